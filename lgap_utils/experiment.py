"""experiment."""

from __future__ import annotations

import dataclasses
import json
import shutil
from fnmatch import fnmatch

import torch

from .defense import METHOD
from .evaluate import Evaluation, describe_defense, purified_pixels, purify_rows
from .files import CheckpointError, folder_lock, locate, sha256, verify, write_whole
from .hub import lock_entries
from .identity import identity, state_digest
from .models import CAPTIONER_FILES, diffusion_files, load_classifier, load_defense, save_classifier_like
from .profiles import REVISIONS, ROOT
from .rows import differences

# ---------------------------------------------------------------- the whole defence


def file_digests(name, revision=None, patterns=("*",)):
    """{file: sha256} of those files of a model that fit `patterns`, as far as they are known without opening it."""
    if name.startswith("robustbench:"):
        file = f"{name.removeprefix('robustbench:')}.pt"
        return {file: lock_entries("robustbench").get(file, {}).get("sha256")}
    folder = locate(name)
    if folder is None:
        source = f"{name}@{revision or REVISIONS.get(name)}"
        read = {
            file: known["sha256"]
            for file, known in lock_entries(source).items()
            if any(fnmatch(file, p) for p in (*patterns, "*.bin"))
        }
        return {"from": source} | read
    weights = sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.bin")])
    return verify(folder) or {file.relative_to(folder).as_posix(): sha256(file) for file in weights}


def weight_digests(profile):
    """{model: `file_digests` of its files} of the profile's captioner, diffusion model and classifier."""
    return {
        name: file_digests(name, revision, patterns)
        for name, revision, patterns in (
            (profile.captioner, profile.captioner_revision, CAPTIONER_FILES),
            (profile.diffusion, profile.diffusion_revision, diffusion_files(profile.variant)),
            (profile.classifier, None, ("*",)),
        )
    }


def row_configuration(profile):
    """What rows depend on beside the defence, the attack and the images, which tell what they are themselves."""
    return {"dataset": profile.dataset}


def evaluation(profile, folder, defenses, images):
    """An `evaluate.Evaluation` of {name: LGAP} on `images` with the profile's sizes, its rows below outputs/PROFILE/rows."""
    return Evaluation(
        defenses,
        images,
        profile.outputs / "rows" / folder,
        config=row_configuration(profile),
        n_draws=profile.n_draws,
        seed=profile.seed,
        batch_size=profile.batch_size,
    )


def rivals(profile, defense, images, attack, folder):
    """[(method, rows)] of the profile's robust classifiers that stand without purification, under one attack.

    One that was made for another crop than the defence's classifier sees the same images in its own.
    """
    from .baselines import undefended, with_purifier
    from .data import load_images

    out = []
    n = min(len(images), profile.n_rivals)
    for method, name, crop in profile.rivals:
        seen = load_images(profile.dataset, "test", n, crop=crop) if crop else images[:n]
        rival = with_purifier(
            load_defense(profile, classifier=name, captioner=defense.captioner, purifier=defense.purifier),
            undefended(),
        )
        rival.input_size = crop or rival.input_size
        out.append(
            (method, evaluation(profile, f"{folder}_{method.split()[0]}", {method: rival}, seen).run(attack))
        )
    return out


def purified_rows(profile, defense, images, name, x=None, **extra):
    """Rows of purified images (see evaluate.purify_rows), computed once and kept in outputs/PROFILE/rows/`name`.

    x: what to purify in place of the images; `attack=attack.settings()` must then say how it was made.
    """
    return purify_rows(
        defense,
        images,
        profile.outputs / "rows" / name,
        x=x,
        seed=profile.seed,
        batch_size=profile.batch_size,
        config=row_configuration(profile) | {"images": name, **extra},
        title=name,
    )


def finetune(profile, defense):
    """Fine-tune the defence's classifier in place on purified training images (paper section 4.1) and save it to profile.finetuned.

    Returns (its learning curve as a list of rows, rows of the purified training images). Each stage goes on where it was. The
    classifier may start from other weights than the profile's, but must have its architecture, or it could not be loaded again:
    raises ValueError for another.
    """
    folder = profile.outputs / "rows" / f"03_finetune_{profile.dataset}"
    with folder_lock(folder, wait=True):
        return _finetune(profile, defense, folder)


def _finetune(profile, defense, folder):
    from . import train
    from .data import load_images

    _check_architecture(profile, defense.classifier)
    record, began_as = profile.finetuned / "finetuning.json", state_digest(defense.classifier)
    tuning = load_images(profile.dataset, "train", profile.n_finetune)
    validation = load_images(profile.dataset, "validation", min(profile.n_validation, profile.n_finetune))
    rows = purified_rows(profile, defense, tuning, f"03_train_{profile.dataset}")
    held_out = purified_rows(profile, defense, validation, f"03_validation_{profile.dataset}")
    pixels, pixels_held_out = (purified_pixels(r, tuning.pixels.shape[1:]) for r in (rows, held_out))
    curve = train.finetune(
        defense.classifier,
        pixels,
        tuning.labels,
        folder,
        epochs=profile.finetune_epochs,
        lr=profile.finetune_lr,
        batch_size=profile.finetune_batch,
        schedule=profile.finetune_schedule,
        augment=profile.finetune_augment,
        x_val=pixels_held_out,
        y_val=validation.labels,
        seed=profile.seed,
    )
    record.unlink(missing_ok=True)
    save_classifier_like(defense.classifier, profile.classifier, profile.finetuned)
    told = json.dumps(_finetuning(profile, defense, began_as), indent=1, sort_keys=True)
    write_whole(record, told.encode())  # last: all is there
    return curve, rows


def _check_architecture(profile, classifier):
    """Refuse a classifier that `save_classifier_like` would save as one that it is not."""
    expected = load_classifier(profile.classifier, device="cpu")
    if type(classifier) is not type(expected) or _shape_of(classifier) != _shape_of(expected):
        raise ValueError(
            f"classifier: this {type(classifier).__name__} has not the architecture of {profile.classifier!r}, as which it "
            "would be saved; fine-tune it with train.finetune and keep its weights yourself, or save it with "
            "models.save_classifier and name that folder as the profile's classifier"
        )


def _shape_of(net):
    """The shapes of what is saved of a network, and the values of the buffers that are not, which its configuration gives."""
    saved = net.state_dict()
    fixed = {name: value.tolist() for name, value in net.named_buffers() if name not in saved}
    return {name: list(value.shape) for name, value in saved.items()}, fixed


def _finetuning(profile, defense, began_as):
    """What a fine-tuned classifier depends on. began_as: `state_digest` of the classifier that it was made from."""
    how = {name: value for name, value in dataclasses.asdict(profile).items() if "finetune" in name}
    parts = {part: identity(getattr(defense, part)) for part in ("captioner", "purifier")}
    return json.loads(
        json.dumps(how | parts | {"began as": began_as, "dataset": profile.dataset, "method": METHOD})
    )


def load_finetuned(profile):
    """The defence of a profile with the classifier that `finetune` left; refused if that was done with other settings, or from
    another classifier than the profile's.

    Raises CheckpointError where there is none, ValueError with the difference.
    """
    record = profile.finetuned / "finetuning.json"
    if not record.is_file():
        raise CheckpointError(
            f"{profile.finetuned}: no classifier was fine-tuned for this profile yet; run notebook 03 first"
        )
    defense = load_defense(profile, classifier=profile.finetuned)
    began_as = state_digest(load_classifier(profile.classifier, device="cpu"))
    if changed := differences(json.loads(record.read_text()), _finetuning(profile, defense, began_as)):
        raise ValueError(
            f"{profile.finetuned} was fine-tuned with other settings ({'; '.join(changed)}); "
            "run notebook 03 with these into another LGAP_OUTPUTS, or set them back"
        )
    return defense


def load_or_finetune(profile):
    """`load_finetuned`, after `finetune` where nothing was fine-tuned for this profile yet. What is there is not done again."""
    with folder_lock(profile.outputs / "rows" / f"03_finetune_{profile.dataset}", wait=True):
        if not (profile.finetuned / "finetuning.json").is_file():
            finetune(profile, load_defense(profile))
        return load_finetuned(profile)


def provenance(profile, defense, images):
    """Where numbers come from: configuration, images, versions, device and commit, as plain data for results.json."""
    import importlib.metadata
    import platform
    import subprocess

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    ask = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    git = subprocess.run(ask, capture_output=True, text=True, check=False) if shutil.which("git") else None
    device = next((p.device for p in defense.parameters()), torch.device("cpu"))
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return {
        "profile": profile.name,
        "settings": dataclasses.asdict(profile),
        "weights": weight_digests(profile),
        "defence": describe_defense(defense),
        "method": METHOD,
        "images": images.source,
        "versions": {
            name: version(name)
            for name in ("torch", "diffusers", "transformers", "robustbench", "pyautoattack", "scipy")
        },
        "python": platform.python_version(),
        "device": what,
        "tf32": torch.backends.cudnn.allow_tf32 and device.type == "cuda",
        "commit": git.stdout.strip() if git and git.returncode == 0 else None,
    }
