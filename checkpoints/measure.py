"""What a profile's models are worth, before any fine-tuning."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from checkpoints.captions import captions_of
from lgap_utils import attacks, protocols
from lgap_utils.data import load_images
from lgap_utils.defense import LGAP
from lgap_utils.experiment import load_rival_defense
from lgap_utils.images import Images
from lgap_utils.models import load_defense
from lgap_utils.noise import Keys
from lgap_utils.profiles import Profile
from lgap_utils.tables import proportion
from lgap_utils.words import names_class

# What a flag says of each image.
COUNTED = (
    "classifier right, undefended",
    "classifier right, VAE round trip only",
    "classifier right, LGAP",
    "classifier right, LGAP told the true class",
    "caption names the class",
)
RIVAL = "classifier right, rival"


def measured(profile: Profile, device: Any, split: str = "test") -> str:
    """What the models are worth on the first images of a split, clean and attacked, as Markdown."""
    defense, images = (
        load_defense(profile, device=device),
        load_images(profile.dataset, split, profile.n_images),
    )
    flags, psnr = _flags(profile, defense, images, images.x, device)
    rows = {(name, "clean"): proportion(each) for name, each in flags.items()}
    flags, _ = _flags(profile, defense, images, _attacked(profile, defense, images, device), device)
    rows |= {(name, "attacked"): proportion(each) for name, each in flags.items()}
    table = pd.DataFrame(rows).T.rename_axis(["measured", "images"]).reset_index()
    sizes = f"eps {profile.eps_255:g}/255, step {profile.step_size_255:g}/255"
    attack = f"preprocessor-blind PGD-{profile.n_steps}, {sizes}, random start"
    return (
        f"{images.source}; {split} images, the first {len(images)}; attacked: {attack}; "
        f"intervals: 95 %, Wilson.\n\n{table.to_markdown(index=False)}\n\n"
        f"PSNR of the VAE's round trip on clean images: {psnr.mean():.1f} dB "
        f"(standard deviation {psnr.std():.1f} over {len(psnr)} images).\n"
    )


def _attacked(profile: Profile, defense: LGAP, images: Images, device: Any) -> Tensor:
    """The images under preprocessor-blind PGD."""
    model, keys = attacks.blind(defense), Keys(images.indices, profile.seed, "attack")
    sizes = {"eps": profile.eps, "step_size": profile.step_size, "n_steps": profile.n_steps}
    attack = lambda x, y, keys: attacks.pgd(model, x.to(device), y, keys=keys, **sizes)
    return protocols.in_batches(attack, images.x, images.labels, keys).cpu()


@torch.no_grad()
def _flags(
    profile: Profile, defense: LGAP, images: Images, x: Tensor, device: Any
) -> tuple[dict[str, list[bool]], Tensor]:
    """({what is counted: a flag for each image}, PSNR of the VAE's round trip [n] in dB) of pixels x."""
    flags: dict[str, list[bool]] = {name: [] for name in COUNTED}
    rival = load_rival_defense(dataclasses.replace(profile, n_rival_tuning=0)) if profile.rival else None
    psnr, true_captions = [], captions_of(images)
    for rows in torch.arange(len(x)).split(profile.batch_size):
        batch, y, keys = x[rows].to(device), images.labels[rows], Keys(images.indices[rows], profile.seed)
        trip = defense.purifier.round_trip(batch, keys)
        captions = defense.caption(batch)
        true = [true_captions[i] for i in rows.tolist()]
        purified = [defense.purify(batch, texts, keys) for texts in (captions, true)]
        for name, seen in zip(COUNTED, (batch, trip, *purified)):
            flags[name] += (defense.classify(seen).argmax(1).cpu() == y).tolist()
        for caption, label in zip(captions, y.tolist()):
            flags[COUNTED[-1]].append(names_class(caption, images.classes[label]))
        if rival:
            flags.setdefault(RIVAL, []).extend((rival(batch, keys=keys).argmax(1).cpu() == y).tolist())
        psnr.append(-10 * torch.log10((trip - batch).square().mean((1, 2, 3))))
    return flags, torch.cat(psnr)
