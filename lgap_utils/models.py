"""Loading: the captioner, the diffusion model and the classifier of a profile, and the whole defence.

A model is named by a folder, relative to the checkout, by a hub id, or by "robustbench:DATASET/THREAT/NAME".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import classes_of
from .defense import LGAP, LatentPurifier
from .files import CheckpointError, locate, verify, write_checksums
from .identity import config_digest, digest, named, tokenizer_digest
from .loading import LOCAL, check_words, load_whole, loading, model_folder, read_tensors
from .profiles import Profile, get_profile
from .zoo import import_robustbench, load_robustbench, robustbench_entry, robustbench_network


def device_of(device: Any = None, dtype: str = "float32") -> torch.device:
    """The named device, else $LGAP_DEVICE, else the GPU if there is one, else the CPU.

    dtype: what it must compute in. Raises ValueError for a device that is missing or cannot.
    """
    if device is None:
        device = os.environ.get("LGAP_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    name = str(device)
    try:
        chosen = torch.device(name)
        backend = torch.get_device_module(chosen.type)
    except RuntimeError:
        kinds = "cpu, cuda, cuda:0 or another that torch has (see LGAP_DEVICE)"
        raise ValueError(f"device {name!r}: no such kind; expected {kinds}") from None
    n = backend.device_count() if backend.is_available() else 0
    if (chosen.index or 0) >= n:
        hardware = "GPU" if chosen.type == "cuda" else f"{chosen.type} device"
        problem = f"torch finds {n or 'no'} {hardware} here"
        raise ValueError(f"device {name!r}: {problem}; unset LGAP_DEVICE, or set it to cpu")
    if dtype != "float32":
        try:
            one = torch.ones(1, 1, 1, 1, device=chosen, dtype=getattr(torch, dtype))
            torch.nn.functional.conv2d(one, one)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            reason = f"it does not compute in {dtype} ({str(error).splitlines()[0][:100]})"
            raise ValueError(f"device {name!r}: {reason}; set dtype=float32, or another device") from None
    return chosen


# ---------------------------------------------------------------- captioner


class Captioner(nn.Module):
    """BLIP as a callable: x [n, 3, h, w] in [0, 1] -> n strings without the prompt (paper section 3.1)."""

    SETTINGS = ("prompt", "num_beams", "max_length", "min_length")  # fields of a profile

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        prompt: str = "a picture of",
        num_beams: int = 3,
        max_length: int = 20,
        min_length: int = 5,
    ):
        super().__init__()
        self.model, self.processor, self.prompt = model.eval().requires_grad_(False), processor, prompt
        self.search = {"num_beams": num_beams, "max_length": max_length, "min_length": min_length}

    def settings(self) -> dict[str, Any]:
        """What defines the captions; network, processor and tokenizer by digests of their configurations."""
        configs = (self.model.config, self.model.generation_config, self.processor.image_processor)
        network = digest([[type(self.model).__name__], *map(config_digest, configs)])
        tokenizer = tokenizer_digest(self.processor.tokenizer)
        search = {"name": "BLIP", "prompt": self.prompt, **self.search}
        return search | {"network and processor": network, "tokenizer": tokenizer}

    def pixel_values(self, x: Tensor) -> Tensor:
        """The processor's resize and normalisation, without its division by 255: x is in [0, 1] already."""
        processor, weight = self.processor.image_processor, next(self.model.parameters())
        scaled = {"do_rescale": False, "do_normalize": False}
        pixels = processor(images=list(x.float()), return_tensors="pt", **scaled)["pixel_values"]
        mean = torch.tensor(processor.image_mean, device=pixels.device).view(1, 3, 1, 1)
        std = torch.tensor(processor.image_std, device=pixels.device).view(1, 3, 1, 1)
        # bicubic interpolation overshoots, which 8-bit images cannot
        return ((pixels.clamp(0, 1) - mean) / std).to(weight.device, weight.dtype)

    def log_likelihood(self, x: Tensor, texts: list[str]) -> Tensor:
        """Mean log-likelihood of a token of each text, given the image and the prompt: [n], differentiable.

        x: one image for each text, or one for all.
        """
        text_config = self.model.config.text_config
        tokens = self.processor.tokenizer(
            [f"{self.prompt} {t}" for t in texts], padding=True, return_tensors="pt"
        )
        n_prompt = len(self.processor.tokenizer(self.prompt).input_ids) - 1  # without its end token
        pixels = self.pixel_values(x)
        ids, mask = tokens.input_ids.to(pixels.device), tokens.attention_mask.to(pixels.device)
        ids[:, 0] = text_config.bos_token_id
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :n_prompt] = -100
        seen = self.model.vision_model(pixel_values=pixels)[0].expand(len(texts), -1, -1)
        logits = self.model.text_decoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen
        ).logits
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
        return -loss.sum(1) / (labels[:, 1:] != -100).sum(1)

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[str]:
        """One caption for each image."""
        pixels = self.pixel_values(x)
        words = self.processor.tokenizer([self.prompt] * len(x), return_tensors="pt").to(pixels.device)
        prompts = {"input_ids": words.input_ids, "attention_mask": words.attention_mask}
        ids = self.model.generate(pixel_values=pixels, **prompts, **self.search)
        captions = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompt = " ".join(self.prompt.lower().split())
        return [" ".join(caption.split()).removeprefix(prompt).strip() for caption in captions]


CAPTIONER_FILES = ["*.json", "*.txt", "config.json", "model.safetensors"]


def load_captioner(
    name: str, revision: str | None = None, *, device: Any = None, dtype: str = "float32", **search: Any
) -> Captioner:
    """BLIP from a folder or the hub; `search` as `Captioner`. Raises CheckpointError."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    device = device_of(device, dtype)
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": False}
    with loading("captioner", name) as source:
        folder = model_folder(name, revision, CAPTIONER_FILES, source)
        weights = folder
        pickle = folder / "pytorch_model.bin"
        if pickle.is_file() and not (folder / "model.safetensors").exists():  # BLIP is published so
            options |= {"config": BlipConfig.from_pretrained(folder, **LOCAL)}
            options |= {"state_dict": read_tensors(pickle, source.again)}
            weights = None
        model = load_whole(BlipForConditionalGeneration, weights, **options)
        processor = BlipProcessor.from_pretrained(folder, **LOCAL)
        check_words(processor.tokenizer)
    return Captioner(model, processor, **search).to(device)


# ---------------------------------------------------------------- diffusion model


def ddim(config: Any) -> Any:
    """CompVis's DDIM scheduler with the noise schedule of `config`; SD itself ships a PNDM configuration."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    fixed = {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
    return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False, **fixed)


DIFFUSION_WEIGHTS = ("vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model", "text_encoder/model")


def diffusion_files(variant: str = "") -> list[str]:
    """Patterns of the files of a diffusion model; variant: "fp16" for weights in half precision."""
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    patterns = ["tokenizer/*", "scheduler/*", "scheduler/scheduler_config.json"]
    patterns += [f"{weights.split('/')[0]}/config.json" for weights in DIFFUSION_WEIGHTS]
    return patterns + [weights + ending for weights in DIFFUSION_WEIGHTS]


def load_diffusion(
    name: str,
    revision: str | None = None,
    *,
    device: Any = None,
    dtype: str = "float32",
    variant: str = "",
    **settings: Any,
) -> LatentPurifier:
    """A diffusion model in diffusers' layout; `settings` as `LatentPurifier`. Raises CheckpointError."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    device = device_of(device, dtype)
    options = {"torch_dtype": getattr(torch, dtype), "variant": variant or None, "low_cpu_mem_usage": False}
    words = {"dtype": getattr(torch, dtype), "variant": variant or None, "trust_remote_code": False}
    with loading("diffusion model", name) as source:
        folder = model_folder(name, revision, diffusion_files(variant), source)
        vae = load_whole(AutoencoderKL, folder, subfolder="vae", **options)
        unet = load_whole(UNet2DConditionModel, folder, subfolder="unet", **options)
        text_encoder = load_whole(CLIPTextModel, folder, subfolder="text_encoder", **words)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", **LOCAL)
        check_words(tokenizer)
        scheduler = ddim(DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True))
    purifier: Any = LatentPurifier(vae, unet, text_encoder, tokenizer, scheduler, **settings)
    return purifier.to(device, memory_format=torch.channels_last)


# ---------------------------------------------------------------- classifier


class Normalized(nn.Module):
    """A network for normalised images that takes images in [0, 1], so that eps is in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 3, h, w] in [0, 1] -> logits [n, classes]."""
        return self.net((x - self.mean) / self.std)


def new_classifier(
    architecture: str = "WideResNet", mean: Any = None, std: Any = None, **sizes: Any
) -> nn.Module:
    """A classifier with random weights, from the content of its config.json. Raises ValueError.

    architecture: "WideResNet" with its sizes (depth, widen_factor, num_classes, dropRate), or the network of
    "robustbench:DATASET/THREAT/NAME". mean, std: of the pixels, for a network that needs normalised images.
    """
    if architecture.startswith("robustbench:"):
        net = robustbench_network(*robustbench_entry(architecture))
    elif architecture == "WideResNet":
        net = import_robustbench()[1](**sizes)
    else:
        choices = "expected 'WideResNet' or 'robustbench:DATASET/THREAT/NAME'"
        raise ValueError(f"no architecture {architecture!r}; {choices}")
    return net if mean is None else Normalized(net, mean, std)


def save_classifier(net: nn.Module, folder: str | Path, **config: Any) -> None:
    """Write model.safetensors, and config.json with the arguments of `new_classifier`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "WideResNet", **config}, indent=1) + "\n")


def save_classifier_like(net: nn.Module, name: str, folder: str | Path) -> None:
    """Save a fine-tuned `net` with checksums, in the architecture of `name`, which it started from."""
    config, _ = _classifier_config(name)
    save_classifier(net, folder, **config)
    write_checksums(folder)


def _classifier_config(name: str) -> tuple[dict[str, Any], Path | None]:
    """(arguments of `new_classifier`, folder of the weights, or None for RobustBench's) of a classifier."""
    if name.startswith("robustbench:"):
        return {"architecture": name}, None
    folder = locate(name)
    if folder is None:
        raise CheckpointError(f"{name!r}: no such folder, and no robustbench:DATASET/THREAT/NAME")
    verify(folder)
    return json.loads((folder / "config.json").read_text()), folder


def load_classifier(name: str, *, device: Any = None) -> nn.Module:
    """A folder or "robustbench:DATASET/THREAT/NAME" as images in [0, 1] -> logits. Raises CheckpointError."""
    from safetensors.torch import load_file

    net: Any
    with loading("classifier", name) as source:
        if not name.startswith("robustbench:"):
            source.again = f"copy {name} again, or make it again"
        config, folder = _classifier_config(name)
        if folder:
            net = new_classifier(**config)
            net.load_state_dict(load_file(folder / "model.safetensors"))
        else:
            net = load_robustbench(*robustbench_entry(name), source)
    net = named(net, "classifier", **config)
    return net.eval().requires_grad_(False).to(device_of(device), memory_format=torch.channels_last)


# ---------------------------------------------------------------- the defence


def load_defense(
    profile: str | Profile = "toy",
    *,
    classifier: str | Path | Callable | None = None,
    captioner: Callable | None = None,
    purifier: Callable | None = None,
    device: Any = None,
    input_size: int | None = None,
) -> LGAP:
    """The defence of a profile, in evaluation mode.

    classifier: a folder or a callable in place of the profile's; captioner, purifier: a callable.
    input_size: side in pixels of the classifier's images; None: 32, or 224 for ImageNet.
    Raises CheckpointError, or ValueError for an unknown profile.
    """
    p = profile if isinstance(profile, Profile) else get_profile(profile)
    if p.needs_gpu and not (device or os.environ.get("LGAP_DEVICE") or torch.cuda.is_available()):
        remedy = "set LGAP_DEVICE=cpu to go on without one"
        raise ValueError(f"profile {p.name!r} is made for a GPU and torch finds none here; {remedy}")
    where = {"device": device, "dtype": p.dtype}
    if captioner is None:
        search = {name: getattr(p, name) for name in Captioner.SETTINGS}
        captioner = load_captioner(p.captioner, p.captioner_revision, **where, **search)
    if purifier is None:
        settings = {name: getattr(p, name) for name in LatentPurifier.SETTINGS}
        purifier = load_diffusion(p.diffusion, p.diffusion_revision, variant=p.variant, **where, **settings)
    if classifier is None or isinstance(classifier, str | Path):
        classifier = load_classifier(str(classifier or p.classifier), device=device)
    if input_size is None:
        input_size = 224 if p.dataset == "imagenet" else 32
    return LGAP(captioner, purifier, classifier, classes_of(p.dataset), input_size)
