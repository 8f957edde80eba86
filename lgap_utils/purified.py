"""Purified images: rows that are kept and resumed, e.g. of the training images of a classifier."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .batches import BatchSize, call_in_batches
from .checks import check_images
from .defense import LGAP, METHOD
from .evaluate import describe_defense
from .images import Images
from .noise import Keys
from .profiles import check_whole
from .progress import tqdm
from .rows import known_images, open_rows
from .workers import spread
from .zoo import before_unpickling


def purify_rows(
    defense: LGAP,
    images: Images,
    folder: str | Path,
    *,
    config: dict[str, Any],
    x: torch.Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    title: str = "purify",
    workers: int = 0,
) -> pd.DataFrame:
    """Caption, purify and classify: a row per image, computed once and kept in `folder`.

    x: what to purify in place of the images, e.g. adversarial ones [n, 3, h, w]; config["attack"] says how
    they were made. title: of the progress bar. Columns: index, image (digest of the pixels), label, caption,
    undefended and prediction (labels before and after purification), linf (of x from the image),
    purified (uint8 [3, h, w] as bytes), seconds (per image).
    Raises ValueError for kept rows of other images, another defence, seed or `config`.
    """
    if x is not None and not config.get("attack"):
        raise ValueError("x: rows do not tell how these were made; say it, as in attack=attack.settings()")
    check_whole("workers", workers, 0)
    x = images.x if x is None else x
    check_images(x)
    if x.shape != images.pixels.shape:
        raise ValueError(f"x: got shape {list(x.shape)} for images of shape {list(images.pixels.shape)}")
    parts, known = describe_defense(defense), known_images(images)
    config = {**config, "defence": parts, "seed": seed, "method": METHOD}
    rows = open_rows(Path(folder), config, {"LGAP": parts})
    device = next((p.device for p in defense.parameters()), torch.device("cpu"))
    purifying = _Purifying(defense, seed, BatchSize(batch_size, device))

    def compute(indices: list[int]) -> None:
        missing = set(indices)
        places = [place for place, index in enumerate(known) if index in missing]

        def tasks() -> Iterator[tuple[Images, torch.Tensor]]:
            most, first = -(-len(places) // max(1, workers)), 0
            while part := places[first : first + min(most, purifying.room.size)]:
                yield images[part], x[part]
                first += len(part)

        with tqdm(total=len(x), initial=len(x) - len(places), desc=title, mininterval=2) as bar:
            how = (workers, bar.set_postfix_str, before_unpickling())
            for made in spread(purifying, device, _Purifying.rows, tasks(), *how):
                rows.write(made)
                bar.update(len(made))

    return rows.complete(list(known), known, 1, compute)


class _Purifying:
    """A defence that purifies batches, where it is moved to."""

    def __init__(self, defense: LGAP, seed: int, room: BatchSize):
        self.defense, self.seed, self.room = defense, seed, room

    def to(self, device: torch.device) -> _Purifying:
        self.defense.to(device)
        self.room = BatchSize(self.room.size, device)
        return self

    def rows(self, images: Images, x: torch.Tensor) -> list[dict[str, Any]]:
        """The rows of images x [n, 3, h, w], made of `images`."""
        device = next((p.device for p in self.defense.parameters()), torch.device("cpu"))
        part = lambda p: _purified(self.defense, images[p], x[p].to(device), self.seed)
        return sum(call_in_batches(part, len(x), self.room), [])


@torch.no_grad()
def _purified(defense: LGAP, images: Images, x: torch.Tensor, seed: int) -> list[dict[str, Any]]:
    """The rows of images x [n, 3, h, w], purified together; images: those that they were made of."""
    began = time.perf_counter()
    keys = Keys(images.indices, seed)
    captions = defense.caption(x, keys)
    purified = defense.purify(x, captions, keys)
    undefended, prediction = (defense.classify(batch).argmax(1).tolist() for batch in (x, purified))
    pixels = (purified.cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    seconds = (time.perf_counter() - began) / len(x)
    linf = (x - images.x.to(x.device)).abs().flatten(1).amax(1).tolist()
    rows = []
    for k, (index, (image, label)) in enumerate(known_images(images).items()):
        row = {"index": index, "image": image, "label": label, "caption": captions[k]}
        row |= {"undefended": undefended[k], "prediction": prediction[k], "linf": linf[k]}
        rows.append(row | {"purified": pixels[k].tobytes(), "seconds": seconds})
    return rows
