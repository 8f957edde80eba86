"""`python -m lgap_utils purify`: photos, attacked if asked for, through the defence, in one picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lgap_utils.profiles import PROFILES, ROOT, Profile, get_profile
from tools.request import settings_of

MADE_BY = "lgap purify"  # in the picture's own record: a file with another one is somebody's, and stays


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("photo", nargs="+", type=Path, help="an image file; each is a row of the picture")
    command.add_argument("--profile", default="small", help=f"{', '.join(PROFILES)}; default: small")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of it")
    command.add_argument(
        "--attack", action="store_true", help="attack it with the profile's blind PGD-40 first"
    )
    command.add_argument(
        "--label", help="the class that it shows; without it, what the classifier says of it"
    )
    command.add_argument("--out", type=Path, help="the picture; default: PHOTO-purified.png, in this folder")
    command.add_argument("--seed", type=int, default=0, help="another seed is another noise")


def target(photos: list[Path], out: Path | None) -> Path:
    """Where the picture goes. Raises ValueError for a file that is not an earlier picture, and no PNG."""
    from PIL import Image

    out = out or Path(f"{photos[0].stem}-purified.png")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: expected a file that ends in .png")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if out.exists():
        try:
            with Image.open(out) as old:
                ours = old.info.get("Software") == MADE_BY
        except (OSError, SyntaxError):
            ours = False
        if not ours:
            raise ValueError(f"{out} is there and not a picture of this command; choose another with --out")
    return out


def as_seen(photo: Path, side: int):
    """The middle square of a photo at the size of the model: float [1, 3, side, side] in [0, 1]."""
    from lgap_utils.images import read_image, resize

    x = read_image(photo)[None]
    h, w = x.shape[-2:]
    square = min(h, w)
    top, left = (h - square) // 2, (w - square) // 2
    return resize(x[..., top : top + square, left : left + square], (side, side))


def classifier_of(p: Profile, chosen: bool) -> tuple[Path | None, str]:
    """(a fine-tuned classifier or None for the profile's own, what to call it); chosen: by --set."""
    if not chosen:
        for folder in (p.finetuned, ROOT / "outputs" / "published" / p.name / f"classifier_{p.dataset}"):
            if (folder / "config.json").is_file():
                return folder, "classifier fine-tuned"
    return None, "classifier as it came"


def stages(defense, x, attack, wanted: int | None, seed: int) -> tuple[list, str]:
    """(the stages of one image, the line that is printed of it)."""
    import torch

    from lgap_utils.noise import Keys
    from lgap_utils.picture import Stage

    photo = defense.purify_one(x, seed)
    label = int(photo.before_logits.argmax()) if wanted is None else wanted
    right = lambda logits: int(logits.argmax()) == label
    before = photo.before_logits
    out = [Stage("photo", x[0], photo.named(before), photo.caption, right(before))]
    line = f"photo: {photo.named(before)}; purified: {photo.named()}"
    out.append(Stage("purified", photo.image, photo.named(), "", right(photo.logits)))
    if attack:
        adv = attack(defense, x, torch.tensor([label]), Keys.of_content(x, seed))
        hit = defense.purify_one(adv, seed)
        title = f"attacked, {attack.eps_255:g}/255"
        out.append(Stage(title, adv[0], hit.named(hit.before_logits), hit.caption, right(hit.before_logits)))
        out.append(Stage("attacked, purified", hit.image, hit.named(), "", right(hit.logits)))
        line += f"; attacked: {hit.named(hit.before_logits)}; attacked and purified: {hit.named()}"
    return out, line


def note(p: Profile, classes: tuple[str, ...], side: int, tuned: str, truth: str | None) -> str:
    names = ", ".join(classes) if len(classes) <= 10 else f"{len(classes)} classes"
    mark = f"it shows {truth}" if truth else "the label is that of the photo before attack and purification"
    return (
        f"Profile {p.name}, {tuned}. The models see the middle square in {side} x {side} pixels and know "
        f"{names} alone. Anything else gets such a name; a percentage is a softmax, not how often it is "
        f"right. Tick: {mark}."
    )


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    try:
        settings = settings_of(args.profile, args.set)
        p = get_profile(args.profile, **settings)
        out = target(args.photo, args.out)
    except ValueError as error:
        parser.error(str(error))
    from transformers.utils import logging

    from lgap_utils import checks, models, protocols
    from lgap_utils.data import classes_of
    from lgap_utils.files import CheckpointError, write_whole
    from lgap_utils.picture import draw, png

    logging.disable_progress_bar()
    try:
        classes = classes_of(p.dataset)
        if args.label is not None:
            checks.check_choice("--label", args.label, classes)
        for photo in args.photo:  # before the models are loaded, which may take minutes
            as_seen(photo, 1)
        folder, tuned = classifier_of(p, "classifier" in settings)
        defense = models.load_defense(p, classifier=folder)
        attack = args.attack and protocols.get_attack(
            "blind PGD-40", eps_255=p.eps_255, step_size_255=p.step_size_255
        )
        wanted = None if args.label is None else classes.index(args.label)
        rows = []
        for photo in args.photo:
            x = as_seen(photo, defense.input_size).to(models.device_of())
            row, line = stages(defense, x, attack, wanted, args.seed)
            rows.append(row)
            print(f"{photo.name}: {line}")
        text = note(p, classes, defense.input_size, tuned, args.label)
        write_whole(out, png(draw(rows, text), Software=MADE_BY))
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        sys.exit(f"purify: {error}")
    print(f"picture: {out}")
