"""Loading: each foreign model enters through a short adapter. The heavy libraries are imported here, when a model loads.

A model is named by a folder (relative to the checkout), a hub id, or "robustbench:DATASET/THREAT/NAME". Files are checked in files.py
before anything here opens them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from .defense import LGAP, LatentPurifier
from .files import CheckpointError, downloads, locate, sha256, temporary_path, verify, write_checksums
from .hub import record_digests, snapshot
from .identity import config_digest, digest, named, tokenizer_digest
from .profiles import REVISIONS, Profile, get_profile
from .zoo import import_robustbench, load_robustbench, read_tensors, robustbench_entry, robustbench_network


def device_of(device=None, dtype="float32"):
    """The device named, else $LGAP_DEVICE, else the GPU if there is one, else the CPU; of any kind that torch has.

    dtype: what will be computed in. Raises ValueError for a device that is not there or cannot compute in dtype.
    """
    if device is None:
        device = os.environ.get("LGAP_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    name = str(device)
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device {name!r}: no such kind; expected cpu, cuda, cuda:0 or another that torch has "
            "(see LGAP_DEVICE)"
        ) from None
    try:
        kind = torch.get_device_module(found.type)
    except RuntimeError:  # "meta" and the like, which compute nothing
        kind = None
    if kind is None or not kind.is_available():
        what = "GPU" if found.type == "cuda" else f"{found.type} device"
        raise ValueError(f"device {name!r}: torch finds no {what} here; unset LGAP_DEVICE, or set it to cpu")
    if (found.index or 0) >= kind.device_count():
        raise ValueError(
            f"device {name!r}: torch finds {kind.device_count()} of this kind here, counted from 0 "
            "(see LGAP_DEVICE)"
        )
    if dtype != "float32":
        try:
            one = torch.ones(1, 1, 1, 1, device=found, dtype=getattr(torch, dtype))
            torch.nn.functional.conv2d(one, one)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"device {name!r}: it does not compute in {dtype} ({str(error).splitlines()[0][:100]}); "
                "set dtype=float32, or another device"
            ) from None
    return found


# Code that comes with a model is never run, and nobody is asked whether it should be.
LOCAL = {"local_files_only": True, "trust_remote_code": False}
# For `_whole`: weights that do not fit are told by their names.
INFORMED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


@contextlib.contextmanager
def _loading(what, name):
    """Turns whatever a library raises on a bad file into one sentence that names the model.

    Yields `file_digests`, {source: {file: its digest}}, which are recorded once the model has loaded whole, and
    `again`, what to do about bad files.
    """
    read = SimpleNamespace(digests={}, again="")
    try:
        yield read
    except CheckpointError:
        raise
    except Exception as error:
        again = f"; {read.again}" * bool(read.again)
        if "remote_code" in str(error):  # the library's own words advise to let it run
            raise CheckpointError(
                f"cannot load the {what} from {name!r}: its configuration asks for code of its own "
                f"(auto_map), which is never run here{again}"
            ) from None
        said = " ".join(str(error).split())[:300]
        said = f"{type(error).__name__}: {said}"
        raise CheckpointError(f"cannot load the {what} from {name!r}: {said}{again}") from error
    for source, digests in read.digests.items():
        record_digests(source, digests)


def _whole(loaded):
    """The model of `from_pretrained(..., output_loading_info=True)`: a weight that the file lacks would stay random."""
    model, info = loaded
    keys = {
        kind: sorted(map(str, info.get(f"{kind}_keys", ())))
        for kind in ("missing", "mismatched", "unexpected")
    }
    keys["unexpected"] = [
        k for k in keys["unexpected"] if not k.endswith("position_ids")
    ]  # a buffer that older versions saved
    if wrong := [f"{len(found)} {kind}, e.g. {found[0]}" for kind, found in keys.items() if found]:
        raise ValueError(
            f"the weights are not those of a {type(model).__name__} with this configuration: {'; '.join(wrong)}"
        )
    return model


def _with_words(tokenizer):
    """The tokenizer. Without its files transformers makes one that knows only its special tokens: every caption would be the same."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"its {type(tokenizer).__name__} knows no word: tokenizer.json (or vocab.json and merges.txt) is missing; "
            "copy the folder again"
        )
    return tokenizer


def _folder(name, revision, patterns, read):
    """The folder that holds a model's files, all checked: a local one, or a hub repository's at a fixed revision."""
    if folder := locate(name):
        verify(folder)
        read.again = f"copy {folder} again, or make it again"
        return folder
    revision = revision or REVISIONS.get(name)
    if revision is None:
        raise CheckpointError(
            f"{name!r} is a hub id without a revision; give its 40-digit commit, or a local folder"
        )
    folder, read.digests[f"{name}@{revision}"] = snapshot(name, revision, patterns)
    read.again = f"delete {folder.parents[1]}, and it is fetched again"
    return folder


# ---------------------------------------------------------------- captioner


class Captioner(nn.Module):
    """BLIP as a callable: x [n, 3, h, w] in [0, 1] -> n strings, the prompt stripped (paper section 3.1)."""

    def __init__(self, model, processor, *, prompt="a picture of", num_beams=3, max_length=20, min_length=5):
        super().__init__()
        self.model, self.processor, self.prompt = model.eval().requires_grad_(False), processor, prompt
        self.search = {"num_beams": num_beams, "max_length": max_length, "min_length": min_length}

    def settings(self):
        """What defines the captions, by name; network, processor and tokenizer by digests of their configurations."""
        configs = (self.model.config, self.model.generation_config, self.processor.image_processor)
        return {
            "name": "BLIP",
            "prompt": self.prompt,
            **self.search,
            "network and processor": digest([[type(self.model).__name__], *map(config_digest, configs)]),
            "tokenizer": tokenizer_digest(self.processor.tokenizer),
        }

    def pixel_values(self, x):
        """The processor's resize and normalisation; images are in [0, 1] already, so it must not divide by 255 again."""
        processor, first = self.processor.image_processor, next(self.model.parameters())
        pixels = processor(images=list(x.float()), do_rescale=False, do_normalize=False, return_tensors="pt")[
            "pixel_values"
        ]
        mean, std = (
            torch.tensor(v, device=pixels.device).view(1, 3, 1, 1)
            for v in (processor.image_mean, processor.image_std)
        )
        return ((pixels.clamp(0, 1) - mean) / std).to(
            first.device, first.dtype
        )  # bicubic overshoots; 8-bit images cannot

    @torch.no_grad()
    def forward(self, x):
        pixels = self.pixel_values(x)
        words = self.processor.tokenizer([self.prompt] * len(x), return_tensors="pt").to(pixels.device)
        ids = self.model.generate(
            pixel_values=pixels, input_ids=words.input_ids, attention_mask=words.attention_mask, **self.search
        )
        captions = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        start = " ".join(self.prompt.lower().split())
        return [c.strip().removeprefix(start).strip() for c in (" ".join(c.split()) for c in captions)]


CAPTIONER_FILES = ["*.json", "*.txt", "config.json", "model.safetensors"]


def load_captioner(name, revision=None, *, device=None, dtype="float32", **search):
    """BLIP from a folder or the hub; `search` as `Captioner`. Raises CheckpointError."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    device = device_of(device, dtype)
    with _loading("captioner", name) as read:
        folder = _folder(name, revision, CAPTIONER_FILES, read)
        if (pickle := folder / "pytorch_model.bin").is_file() and not (folder / "model.safetensors").exists():
            folder = _converted(pickle, read.again)
        model = _whole(
            BlipForConditionalGeneration.from_pretrained(
                folder, dtype=getattr(torch, dtype), use_safetensors=True, **INFORMED, **LOCAL
            )
        )
        processor = BlipProcessor.from_pretrained(folder, **LOCAL)
        _with_words(processor.tokenizer)
    return Captioner(model, processor, **search).to(device)


def _converted(pickle, again):
    """A folder like that of BLIP's `pickle`, its weights as safetensors: made once, and named by the pickle's digest."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    folder = downloads() / "converted" / sha256(pickle)[:16]
    if not folder.is_dir():
        config, weights = BlipConfig.from_pretrained(pickle.parent, **LOCAL), read_tensors(pickle, again)
        model = _whole(
            BlipForConditionalGeneration.from_pretrained(
                None, config=config, state_dict=weights, **INFORMED, **LOCAL
            )
        )
        part = temporary_path(folder)
        try:
            model.save_pretrained(part)
            for file in [*pickle.parent.glob("*.json"), *pickle.parent.glob("*.txt")]:
                if not (part / file.name).exists():
                    shutil.copyfile(file, part / file.name)
            write_checksums(part)
            os.replace(part, folder)
        except OSError:
            if not folder.is_dir():  # else another process has made it in the meantime
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    verify(folder, f"delete {folder}, and it is made again")
    return folder


# ---------------------------------------------------------------- diffusion


def ddim(config):
    """The DDIM scheduler of CompVis's img2img, with the noise schedule of `config`; SD ships a PNDM configuration."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(
        config,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        thresholding=False,
    )


DIFFUSION_PARTS = {
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def diffusion_files(variant=""):
    """The files of a diffusion model that are read, as patterns; variant: "fp16" for weights that are stored in half precision."""
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    return [
        "tokenizer/*",
        "scheduler/*",
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in DIFFUSION_PARTS),
        *(f"{part}/{stem}{ending}" for part, stem in DIFFUSION_PARTS.items()),
    ]


def load_diffusion(name, revision=None, *, device=None, dtype="float32", variant="", **settings):
    """A latent diffusion model in diffusers' layout, as a `LatentPurifier` with `settings`. Raises CheckpointError."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    device = device_of(device, dtype)
    with _loading("diffusion model", name) as read:
        folder = _folder(name, revision, diffusion_files(variant), read)
        weights = {"use_safetensors": True, "variant": variant or None, **INFORMED}
        plain = {"torch_dtype": getattr(torch, dtype), "low_cpu_mem_usage": False, "local_files_only": True}
        vae = _whole(AutoencoderKL.from_pretrained(folder, subfolder="vae", **plain, **weights))
        unet = _whole(UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **plain, **weights))
        text_encoder = _whole(
            CLIPTextModel.from_pretrained(
                folder, subfolder="text_encoder", dtype=getattr(torch, dtype), **weights, **LOCAL
            )
        )
        tokenizer = _with_words(CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", **LOCAL))
        scheduler = ddim(DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True))
    purifier = LatentPurifier(vae, unet, text_encoder, tokenizer, scheduler, **settings)
    return purifier.to(device, memory_format=torch.channels_last)


class Normalized(nn.Module):
    """Logits for images in [0, 1] of a network that was trained on normalised ones; doing it in here keeps eps in pixels."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net = net
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


def new_classifier(architecture="WideResNet", mean=None, std=None, **sizes):
    """A classifier with random weights, from what its config.json says.

    architecture: "WideResNet" with its sizes (depth, widen_factor, num_classes, dropRate), or "robustbench:DATASET/THREAT/NAME" for
    the network of that entry. mean and std: of the pixels, where the network does not take images in [0, 1] as they are.
    """
    if architecture.startswith("robustbench:"):
        net = robustbench_network(*robustbench_entry(architecture))
    elif architecture == "WideResNet":
        net = import_robustbench()[1](**sizes)
    else:
        raise ValueError(
            f"no architecture {architecture!r}; expected 'WideResNet' or 'robustbench:DATASET/THREAT/NAME'"
        )
    return net if mean is None else Normalized(net, mean, std)


def save_classifier(net, folder, **config):
    """`model.safetensors`, and `config.json` with what `new_classifier` takes."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "WideResNet", **config}, indent=1) + "\n")


def load_classifier(name, *, device=None):
    """A saved classifier's folder, or "robustbench:DATASET/THREAT/NAME": images in [0, 1] -> logits. Raises CheckpointError."""
    with _loading("classifier", name) as read:
        if name.startswith("robustbench:"):
            net, config = load_robustbench(*robustbench_entry(name), read), {"architecture": name}
        else:
            from safetensors.torch import load_file

            folder = locate(name)
            if folder is None:
                raise CheckpointError(f"{name!r}: no such folder, and no robustbench:DATASET/THREAT/NAME")
            verify(folder)
            read.again = f"copy {folder} again, or make it again"
            config = json.loads((folder / "config.json").read_text())
            net = new_classifier(**config)
            net.load_state_dict(load_file(folder / "model.safetensors"))
    net = named(net, "classifier", **config)
    return net.eval().requires_grad_(False).to(device_of(device), memory_format=torch.channels_last)


def save_classifier_like(net, name, folder):
    """Save a fine-tuned `net` to `folder`, with checksums, as the classifier `name` that it started from."""
    config = (
        {"architecture": name}
        if name.startswith("robustbench:")
        else json.loads((locate(name) / "config.json").read_text())
    )
    save_classifier(net, folder, **config)
    write_checksums(folder)


def load_defense(
    profile="toy", *, classifier=None, captioner=None, purifier=None, device=None, input_size=None
):
    """The defence of a profile (a name or a `Profile`), in evaluation mode.

    classifier: a folder in place of the profile's, e.g. the fine-tuned one, or any callable; captioner and purifier: any
    callable. input_size: pixels of the side that the classifier was made for, to which all it sees is resized; None: those of
    the profile's data set, 32, or 224 for ImageNet. Raises CheckpointError, or ValueError for an unknown profile.
    """
    from .data import classes_of

    p = profile if isinstance(profile, Profile) else get_profile(profile)
    if p.needs_gpu and not (device or os.environ.get("LGAP_DEVICE") or torch.cuda.is_available()):
        raise ValueError(
            f"profile {p.name!r} is made for a GPU and torch finds none here; set LGAP_DEVICE=cpu to go on without one"
        )
    if captioner is None:
        captioner = load_captioner(
            p.captioner,
            p.captioner_revision,
            device=device,
            dtype=p.dtype,
            prompt=p.prompt,
            num_beams=p.num_beams,
            max_length=p.max_length,
            min_length=p.min_length,
        )
    if purifier is None:
        purifier = load_diffusion(
            p.diffusion,
            p.diffusion_revision,
            device=device,
            dtype=p.dtype,
            variant=p.variant,
            **{name: getattr(p, name) for name in LatentPurifier.SETTINGS},
        )
    if classifier is None or isinstance(classifier, (str, Path)):
        classifier = load_classifier(str(classifier or p.classifier), device=device)
    if input_size is None:
        input_size = 224 if p.dataset == "imagenet" else 32
    return LGAP(captioner, purifier, classifier, classes_of(p.dataset), input_size)
