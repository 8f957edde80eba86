"""A profile put to work: its evaluations, its fine-tuned classifier, and where its numbers come from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import train
from .baselines import no_caption, undefended, with_purifier
from .data import load_images
from .defense import LGAP, METHOD
from .diffpure import load_rival
from .evaluate import Evaluation, describe_defense, purified_pixels
from .files import CheckpointError, folder_lock, locate, sha256, verify, write_whole
from .hub import lock_entries
from .identity import identity, state_digest
from .images import Images
from .models import (
    CAPTIONER_FILES,
    device_of,
    diffusion_files,
    load_classifier,
    load_defense,
    save_classifier_like,
)
from .profiles import REVISIONS, ROOT, Profile
from .purified import purify_rows
from .rows import differences


def row_configuration(profile: Profile) -> dict[str, Any]:
    """What rows depend on besides the defence, the attack and the images."""
    return {"dataset": profile.dataset}


def evaluation(profile: Profile, folder: str, defenses: dict[str, LGAP], images: Images) -> Evaluation:
    """Evaluation of {name: defence} in the profile's sizes, with rows in outputs/PROFILE/rows/`folder`."""
    sizes = {"n_draws": profile.n_draws, "seed": profile.seed, "batch_size": profile.batch_size}
    sizes["workers"] = profile.workers
    rows = profile.outputs / "rows" / folder
    return Evaluation(defenses, images, rows, config=row_configuration(profile), **sizes)


def rivals(
    profile: Profile, defense: LGAP, images: Images, attack: Any, folder: str
) -> list[tuple[str, Any]]:
    """[(method, rows)] of the profile's robust classifiers, without purification, under one attack.

    A classifier that was made for another crop sees the same images in its own.
    """
    results = []
    parts = {"captioner": defense.captioner, "purifier": defense.purifier}
    n = min(len(images), profile.n_rivals)
    for method, name, crop in profile.rivals:
        seen = load_images(profile.dataset, "test", n, crop=crop) if crop else images[:n]
        rival = with_purifier(load_defense(profile, classifier=name, **parts), undefended())
        rival.input_size = crop or rival.input_size
        run = evaluation(profile, f"{folder}_{method.split()[0]}", {method: rival}, seen)
        results.append((method, run.run(attack)))
    return results


def purified_rows(
    profile: Profile, defense: LGAP, images: Images, name: str, x: Tensor | None = None, **extra: Any
) -> Any:
    """Rows of purified images (see purified.purify_rows), kept in outputs/PROFILE/rows/`name`.

    x: what to purify in place of the images; then `attack=attack.settings()` must say how it was made.
    """
    config = row_configuration(profile) | {"images": name, **extra}
    how = {"seed": profile.seed, "batch_size": profile.batch_size, "config": config, "title": name}
    how["workers"] = profile.workers
    return purify_rows(defense, images, profile.outputs / "rows" / name, x=x, **how)


def finetune(profile: Profile, defense: LGAP, name: str = "") -> tuple[list[dict], Any]:
    """Fine-tune the defence's classifier in place (paper section 4.1) and save it to profile.finetuned.

    name: of a defence with another purifier, for a place of its own beside that. Returns (its learning curve,
    rows of the purified training images). A killed run resumes. Raises ValueError for a classifier of another
    architecture than the profile's, as it could not be loaded again.
    """
    with folder_lock(_finetuning_folder(profile, name), wait=True):
        return _finetune(profile, defense, name)


def load_finetuned(profile: Profile, name: str = "", **parts: Any) -> LGAP:
    """The profile's defence with the classifier that `finetune` saved.

    name: as there; parts: captioner and purifier in place of the profile's. Raises CheckpointError where
    there is none, and ValueError where its settings or its first weights differ.
    """
    saved = _saved(profile, name)
    record = saved / "finetuning.json"
    if not record.is_file():
        problem = "no classifier was fine-tuned for this profile yet"
        raise CheckpointError(f"{saved}: {problem}; run notebook 03 first")
    defense = load_defense(profile, classifier=saved, **parts)
    began_as = state_digest(load_classifier(profile.classifier, device="cpu"))
    changed = differences(json.loads(record.read_text()), _finetuning(profile, defense, began_as))
    if changed:
        problem = f"{saved} was fine-tuned with other settings ({'; '.join(changed)})"
        raise ValueError(
            f"{problem}; set them back, or set LGAP_OUTPUTS to another folder and run notebook 03"
        )
    return defense


def load_or_finetune(profile: Profile, name: str = "", **parts: Any) -> LGAP:
    """`load_finetuned`, after `finetune` if that was not done yet."""
    with folder_lock(_finetuning_folder(profile, name), wait=True):
        if not (_saved(profile, name) / "finetuning.json").is_file():
            finetune(profile, load_defense(profile, **parts), name)
        return load_finetuned(profile, name, **parts)


def load_rival_defense(profile: Profile) -> LGAP:
    """The profile's rival, which reads no caption, before a classifier fine-tuned on what it purified.

    With n_rival_tuning = 0, the classifier is as it came. Raises ValueError for a profile without a rival.
    """
    p = profile
    if not p.rival:
        raise ValueError(f"rival: the profile {p.name!r} names none; expected a UNet2DModel, see profiles.py")
    settings = {"strength": p.rival_strength, "num_inference_steps": p.rival_steps}
    purifier = load_rival(p.rival, p.rival_revision, device=device_of(), **settings)
    parts = {"captioner": no_caption, "purifier": purifier}
    if not p.n_rival_tuning:
        return load_defense(p, **parts)
    return load_or_finetune(dataclasses.replace(p, n_finetune=p.n_rival_tuning), "rival", **parts)


def _saved(profile: Profile, name: str) -> Path:
    """Where the fine-tuned classifier of a defence lies."""
    return profile.finetuned.with_name("_".join(filter(None, (profile.finetuned.name, name))))


def _finetuning_folder(profile: Profile, name: str) -> Path:
    return profile.outputs / "rows" / "_".join(filter(None, ("03_finetune", profile.dataset, name)))


def _finetune(profile: Profile, defense: LGAP, name: str) -> tuple[list[dict], Any]:
    net, p = defense.classifier, profile
    _check_architecture(p, net)
    began_as = state_digest(net)
    tuning = load_images(p.dataset, "train", p.n_finetune)
    validation = load_images(p.dataset, "validation", min(p.n_validation, p.n_finetune))
    whose = "_".join(filter(None, (p.dataset, name)))
    rows = purified_rows(p, defense, tuning, f"03_train_{whose}")
    rows_val = purified_rows(p, defense, validation, f"03_validation_{whose}")
    x, x_val = (purified_pixels(r, tuning.pixels.shape[1:]) for r in (rows, rows_val))
    how = {"epochs": p.finetune_epochs, "lr": p.finetune_lr, "batch_size": p.finetune_batch, "seed": p.seed}
    how |= {"schedule": p.finetune_schedule, "augment": p.finetune_augment}
    folder, saved = _finetuning_folder(p, name), _saved(p, name)
    curve = train.finetune(net, x, tuning.labels, folder, x_val=x_val, y_val=validation.labels, **how)
    record = saved / "finetuning.json"
    record.unlink(missing_ok=True)
    save_classifier_like(net, p.classifier, saved)
    settings = json.dumps(_finetuning(p, defense, began_as), indent=1, sort_keys=True)
    write_whole(record, settings.encode())  # last, as it says that the classifier is whole
    return curve, rows


def _check_architecture(profile: Profile, classifier: Any) -> None:
    """Refuse a classifier that `save_classifier_like` would save under a wrong architecture."""
    expected = load_classifier(profile.classifier, device="cpu")
    if type(classifier) is not type(expected) or _shapes(classifier) != _shapes(expected):
        problem = f"this {type(classifier).__name__} has not the architecture of {profile.classifier!r}"
        remedy = "use train.finetune, or save it with models.save_classifier as the profile's classifier"
        raise ValueError(f"classifier: {problem}, as which it would be saved; {remedy}")


def _shapes(net: nn.Module) -> tuple[dict, dict]:
    """({name: shape} of what is saved of a network, {name: values} of its other buffers)."""
    saved = net.state_dict()
    fixed = {name: value.tolist() for name, value in net.named_buffers() if name not in saved}
    return {name: list(value.shape) for name, value in saved.items()}, fixed


def _finetuning(profile: Profile, defense: LGAP, began_as: str) -> dict[str, Any]:
    """What a fine-tuned classifier depends on; began_as: digest of the first weights."""
    how = {name: value for name, value in dataclasses.asdict(profile).items() if "finetune" in name}
    how |= {part: identity(getattr(defense, part)) for part in ("captioner", "purifier")}
    how |= {"began as": began_as, "dataset": profile.dataset, "method": METHOD}
    return json.loads(json.dumps(how))


def file_digests(
    name: str, revision: str | None = None, patterns: Sequence[str] = ("*",)
) -> dict[str, str | None]:
    """{file: sha256, or None if not known} of a model's files that fit `patterns`; opens no download."""
    if name.startswith("robustbench:"):
        file = f"{name.removeprefix('robustbench:')}.pt"
        return {file: lock_entries("robustbench").get(file, {}).get("sha256")}
    folder = locate(name)
    if folder is None:
        source = f"{name}@{revision or REVISIONS.get(name)}"
        digests: dict[str, str | None] = {"from": source}
        for file, entry in lock_entries(source).items():
            if any(fnmatch(file, pattern) for pattern in (*patterns, "*.bin")):
                digests[file] = entry["sha256"]
        return digests
    weights = sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.bin")])
    return {**verify(folder)} or {file.relative_to(folder).as_posix(): sha256(file) for file in weights}


def weight_digests(profile: Profile) -> dict[str, dict]:
    """{model: `file_digests`} of the profile's captioner, diffusion model and classifier."""
    p = profile
    return {
        p.captioner: file_digests(p.captioner, p.captioner_revision, CAPTIONER_FILES),
        p.diffusion: file_digests(p.diffusion, p.diffusion_revision, diffusion_files(p.variant)),
        p.classifier: file_digests(p.classifier),
    }


LIBRARIES = ("torch", "diffusers", "transformers", "robustbench", "pyautoattack", "scipy")


def provenance(profile: Profile, defense: LGAP, images: Images) -> dict[str, Any]:
    """Where numbers come from, as plain data: configuration, images, versions, device and commit."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() if git.returncode == 0 else None
    device = next((p.device for p in defense.parameters()), torch.device("cpu"))
    on_gpu = device.type == "cuda"
    return {
        "profile": profile.name,
        "settings": dataclasses.asdict(profile),
        "weights": weight_digests(profile),
        "defence": describe_defense(defense),
        "method": METHOD,
        "images": images.source,
        "versions": {name: installed.get(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type.upper(),
        "tf32": torch.backends.cudnn.allow_tf32 and on_gpu,
        "commit": commit,
    }
