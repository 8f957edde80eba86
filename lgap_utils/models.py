"""Loading: each foreign model enters through a short adapter. The heavy libraries are imported here, when a model loads.

A model is named by a folder (relative to the checkout) or a hub id; both go through the same `from_pretrained`.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from .defense import LGAP, LatentPurifier
from .evaluate import Evaluation, state_digest
from .profiles import ROOT, Profile, cache_root, get_profile


class CheckpointError(RuntimeError):
    """A model that is missing, damaged or not what it should be; the message says which, and what to do."""


def device_and_dtype(device=None):
    """The GPU if there is one, else the CPU; always float32 unless the caller changes it."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


# ---------------------------------------------------------------- files and checksums

def locate(name):
    """The folder that `name` stands for, or None where it is a hub id."""
    for folder in (Path(name).expanduser(), ROOT / name):
        if folder.is_dir():
            return folder.resolve()
    if Path(name).is_absolute() or name.startswith(("checkpoints/", ".", "~")):
        raise CheckpointError(f"{name}: no such folder; the bundled models are made by `python checkpoints/make.py PROFILE`")
    return None


def sha256(path):
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder):
    """`SHA256SUMS` of every file below `folder` that a model is loaded from, in the format `sha256sum -c` reads."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".txt"))
    (Path(folder) / "SHA256SUMS").write_text("".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))


def verify(folder):
    """Check `folder` against the SHA256SUMS in it or in the folder above; {file: digest} of what was checked.

    safetensors with a flipped byte load without complaint, so this is the only thing that notices. A user's own folder
    without a SHA256SUMS is taken as it is: the result is empty.
    """
    folder = Path(folder)
    sums = next((p for p in (folder / "SHA256SUMS", folder.parent / "SHA256SUMS") if p.is_file()), None)
    if sums is None:
        return {}
    found = {}
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not (len(expected) == 64 and name):
            raise CheckpointError(f"{sums} is damaged: {line[:80]!r} is no checksum; restore it from the repository")
        path = sums.parent / name
        if folder not in path.parents:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; restore it with `git checkout -- {path.name}` or make it again")
        if (digest := sha256(path)) != expected:
            raise CheckpointError(f"{path} is damaged: sha256 {digest[:16]}..., expected {expected[:16]}...; "
                                  "restore it from the repository")
        found[name] = digest
    if not found and sums.parent == folder:
        raise CheckpointError(f"{sums} lists no file; restore it from the repository")
    return found


@contextlib.contextmanager
def _loading(what, name):
    """Turns whatever a library raises on a bad file into one sentence that names the model."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise CheckpointError(f"cannot load the {what} from {name!r}{offline}: {type(error).__name__}: {first}") from error


def _whole(loaded):
    """The model of `from_pretrained(..., output_loading_info=True)`: a weight that the file lacks would stay random."""
    model, info = loaded
    keys = {kind: sorted(map(str, info.get(f"{kind}_keys", ()))) for kind in ("missing", "mismatched", "unexpected")}
    keys["unexpected"] = [k for k in keys["unexpected"] if not k.endswith("position_ids")]   # a buffer that older versions saved
    if wrong := [f"{len(found)} {kind}, e.g. {found[0]}" for kind, found in keys.items() if found]:
        raise ValueError(f"the weights are not those of a {type(model).__name__} with this configuration: {'; '.join(wrong)}")
    return model


def _source(name, revision):
    """Keyword arguments that make `from_pretrained` read a folder, or a hub repository at a fixed revision."""
    if folder := locate(name):
        verify(folder)
        return str(folder), {"local_files_only": True}
    if revision is None:
        raise CheckpointError(f"{name!r} is a hub id without a revision; give its 40-digit commit, or a local folder")
    return name, {"revision": revision, "cache_dir": cache_root()}


# ---------------------------------------------------------------- captioner

class Captioner(nn.Module):
    """BLIP as a callable: x [n, 3, h, w] in [0, 1] -> n strings, the prompt stripped (paper section 3.1)."""

    def __init__(self, model, processor, *, prompt="a picture of", num_beams=3, max_length=20, min_length=5):
        super().__init__()
        self.model, self.processor, self.prompt = model.eval().requires_grad_(False), processor, prompt
        self.search = {"num_beams": num_beams, "max_length": max_length, "min_length": min_length}

    def settings(self):
        """The numbers that define the captions, by name."""
        return {"prompt": self.prompt, **self.search}

    def pixel_values(self, x):
        """The processor's resize and normalisation; images are in [0, 1] already, so it must not divide by 255 again."""
        processor, first = self.processor.image_processor, next(self.model.parameters())
        pixels = processor(images=list(x.float()), do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
        return ((pixels.clamp(0, 1) - mean) / std).to(first.device, first.dtype)    # bicubic overshoots; 8-bit images cannot

    @torch.no_grad()
    def forward(self, x):
        pixels = self.pixel_values(x)
        words = self.processor.tokenizer([self.prompt] * len(x), return_tensors="pt").to(pixels.device)
        ids = self.model.generate(pixel_values=pixels, input_ids=words.input_ids, attention_mask=words.attention_mask, **self.search)
        captions = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        start = " ".join(self.prompt.lower().split())
        return [c.strip().removeprefix(start).strip() for c in (" ".join(c.split()) for c in captions)]


def load_captioner(name, revision=None, *, device=None, **search):
    """BLIP from a folder or the hub; `search` as `Captioner`. Raises CheckpointError."""
    from transformers import BlipForConditionalGeneration, BlipProcessor
    where, how = _source(name, revision)
    with _loading("captioner", name):
        model = _whole(BlipForConditionalGeneration.from_pretrained(where, dtype=torch.float32, output_loading_info=True, **how))
        processor = BlipProcessor.from_pretrained(where, **how)
    return Captioner(model, processor, **search).to(device_and_dtype(device))


# ---------------------------------------------------------------- diffusion

def ddim(config):
    """The DDIM scheduler of CompVis's img2img, with the noise schedule of `config`; SD ships a PNDM configuration."""
    from diffusers import DDIMScheduler
    return DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                                     timestep_spacing="leading", thresholding=False)


def load_diffusion(name, revision=None, *, device=None, **settings):
    """A latent diffusion model in diffusers' layout, as a `LatentPurifier` with `settings`. Raises CheckpointError."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    where, how = _source(name, revision)
    with _loading("diffusion model", name):
        weights = {"use_safetensors": True, "output_loading_info": True, **how}
        plain = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
        vae = _whole(AutoencoderKL.from_pretrained(where, subfolder="vae", **plain, **weights))
        unet = _whole(UNet2DConditionModel.from_pretrained(where, subfolder="unet", **plain, **weights))
        text_encoder = _whole(CLIPTextModel.from_pretrained(where, subfolder="text_encoder", dtype=torch.float32, **weights))
        tokenizer = CLIPTokenizer.from_pretrained(where, subfolder="tokenizer", **how)
        scheduler = ddim(DDIMScheduler.load_config(where, subfolder="scheduler", **how))
    purifier = LatentPurifier(vae, unet, text_encoder, tokenizer, scheduler, **settings)
    return purifier.to(device_and_dtype(device), memory_format=torch.channels_last)


# ---------------------------------------------------------------- classifier

def import_robustbench():
    """robustbench 1.1.1 imports `autoattack` but depends on `pyautoattack`, the same code under its new name."""
    import warnings

    import pyautoattack
    import pyautoattack.state
    sys.modules.setdefault("autoattack", pyautoattack)
    sys.modules.setdefault("autoattack.state", pyautoattack.state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                # pkg_resources and timm announce their own deprecations
        import robustbench.utils
        from robustbench.model_zoo.architectures.wide_resnet import WideResNet
    return robustbench, WideResNet


def new_wide_resnet(depth, widen_factor, num_classes):
    """RobustBench's WideResNet with random weights; it takes images in [0, 1] as they are."""
    return import_robustbench()[1](depth=depth, widen_factor=widen_factor, num_classes=num_classes)


def save_classifier(net, folder, **architecture):
    """`model.safetensors` and `config.json` (depth, widen_factor, num_classes)."""
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "WideResNet", **architecture}, indent=1) + "\n")


def load_classifier(name, *, device=None):
    """A saved WideResNet folder, or "robustbench:DATASET/THREAT/NAME": images in [0, 1] -> logits. Raises CheckpointError."""
    if name.startswith("robustbench:"):
        with _loading("classifier", name):
            dataset, threat, model = name.removeprefix("robustbench:").split("/")
            directory = Path(cache_root() or ROOT / "data") / "robustbench"
            net = import_robustbench()[0].utils.load_model(model, model_dir=str(directory), dataset=dataset, threat_model=threat)
    else:
        from safetensors.torch import load_file
        folder = locate(name)
        if folder is None:
            raise CheckpointError(f"{name!r}: no such folder, and no robustbench:DATASET/THREAT/NAME")
        verify(folder)
        with _loading("classifier", name):
            config = json.loads((folder / "config.json").read_text())
            if (kind := config.pop("architecture")) != "WideResNet":
                raise ValueError(f"config.json names the architecture {kind!r}, expected 'WideResNet'")
            net = new_wide_resnet(**config)
            net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.eval().requires_grad_(False).to(device_and_dtype(device), memory_format=torch.channels_last)


def save_classifier_like(net, name, folder):
    """Save a fine-tuned `net` to `folder`, with checksums, as the classifier `name` that it started from."""
    start = locate(name)
    if start is None:
        raise CheckpointError(f"{name!r}: only a classifier from a folder can be saved with its architecture")
    architecture = json.loads((start / "config.json").read_text())
    architecture.pop("architecture")
    save_classifier(net, folder, **architecture)
    write_checksums(folder)


# ---------------------------------------------------------------- the whole defence

def configuration(profile, defense):
    """What rows depend on: settings of captioner and purifier, seed, data set and checksums of all weights."""
    weights = {}
    for name, revision in ((profile.captioner, profile.captioner_revision), (profile.diffusion, profile.diffusion_revision),
                           (profile.classifier, None)):
        folder = locate(name) if not name.startswith("robustbench:") else None
        if folder is None:
            weights[name] = revision
        else:
            weights[name] = verify(folder) or {f.relative_to(folder).as_posix(): sha256(f) for f in sorted(folder.rglob("*.safetensors"))}
    # a user's own callable has no settings; its name has to stand for them
    named = lambda part: getattr(part, "__qualname__", type(part).__name__)
    settings = lambda part: part.settings() if hasattr(part, "settings") else named(part)
    classifier = state_digest(defense.classifier) if isinstance(defense.classifier, nn.Module) else named(defense.classifier)
    return {"dataset": profile.dataset, "seed": profile.seed, "weights": weights, "classifier": classifier,
            "captioner": settings(defense.captioner), "purifier": settings(defense.purifier)}


def evaluation(profile, folder, defenses, images):
    """An `evaluate.Evaluation` of {name: LGAP} on `images` with the profile's sizes, its rows below outputs/PROFILE/rows."""
    return Evaluation(defenses, images, profile.outputs / "rows" / folder, config=configuration(profile, next(iter(defenses.values()))),
                      n_draws=profile.n_draws, seed=profile.seed, batch_size=profile.batch_size)


def rivals(profile, defense, images, attack, folder):
    """[(method, rows)] of the profile's robust classifiers that stand without purification, under one attack."""
    from .baselines import instead, nothing
    out = []
    for method, name in profile.rivals:
        rival = instead(load_defense(profile, classifier=name, captioner=defense.captioner, purifier=defense.purifier), nothing())
        out.append((method, evaluation(profile, f"{folder}_{method.split()[0]}", {method: rival}, images).run(attack)))
    return out


def provenance(profile, defense):
    """Where numbers come from: configuration, versions, device and commit, as plain data for results.json."""
    import importlib.metadata
    import platform
    import subprocess
    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False) if shutil.which("git") else None
    device = next((p.device for p in defense.parameters()), torch.device("cpu"))
    return {"profile": profile.name, "settings": dataclasses.asdict(profile), **configuration(profile, defense),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "robustbench", "pyautoattack", "scipy")},
            "python": platform.python_version(), "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "commit": git.stdout.strip() if git and git.returncode == 0 else None}


def load_defense(profile="toy", *, classifier=None, captioner=None, purifier=None, device=None):
    """The defence of a profile (a name or a `Profile`), in evaluation mode.

    classifier: a folder in place of the profile's, e.g. the fine-tuned one, or any callable; captioner and purifier: any
    callable. Raises CheckpointError, or ValueError for an unknown profile.
    """
    from .data import classes_of
    p = profile if isinstance(profile, Profile) else get_profile(profile)
    if captioner is None:
        captioner = load_captioner(p.captioner, p.captioner_revision, device=device, prompt=p.prompt,
                                   num_beams=p.num_beams, max_length=p.max_length, min_length=p.min_length)
    if purifier is None:
        purifier = load_diffusion(p.diffusion, p.diffusion_revision, device=device, size=p.size, strength=p.strength,
                                  num_inference_steps=p.num_inference_steps, guidance_scale=p.guidance_scale,
                                  time_grid=p.time_grid, vae_sample=p.vae_sample, negative_prompt=p.negative_prompt)
    if classifier is None or isinstance(classifier, (str, Path)):
        classifier = load_classifier(str(classifier or p.classifier), device=device)
    return LGAP(captioner, purifier, classifier, classes_of(p.dataset), 224 if p.dataset == "imagenet" else 32)
