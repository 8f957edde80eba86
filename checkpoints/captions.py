"""Captions of images that have none, and the words of all captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lgap_utils.images import Images

PALETTE = {
    "red": (170, 50, 45),
    "orange": (205, 125, 55),
    "yellow": (205, 185, 80),
    "green": (85, 120, 65),
    "blue": (80, 120, 180),
    "purple": (120, 80, 140),
    "brown": (120, 90, 65),
    "white": (225, 225, 225),
    "gray": (135, 135, 135),
    "black": (35, 35, 35),
}


def pixel_caption(pixels: Tensor, class_name: str, index: int) -> str:
    """A caption for an image without one: its class and what its pixels say. pixels uint8 [3, h, w].

    It names the colours of the middle and of the border, and the brightness, in one of four wordings. `index`
    picks the wording. So the text says more than the label does.
    """
    image = pixels.float()
    h, w = image.shape[1:]
    middle = image[:, h // 4 : -(h // 4), w // 4 : -(w // 4)].flatten(1)
    top, bottom = image[:, : h // 8].flatten(1), image[:, -(h // 8) :].flatten(1)
    left, right = image[:, :, : w // 8].flatten(1), image[:, :, -(w // 8) :].flatten(1)
    subject, ground = _colour(middle), _colour(torch.cat([top, bottom, left, right], 1))
    brightness = image.mean()
    light = "plain"
    if brightness < 90:
        light = "dark"
    elif brightness > 155:
        light = "bright"
    return (
        f"a {subject} {class_name} on a {ground} background",
        f"a {light} image with a {subject} {class_name} and {ground} around it",
        f"a {subject} {class_name} in front of {ground} in {light} light",
        f"a {class_name} that is {subject} on {light} {ground}",
    )[index % 4]


def _colour(region: Tensor) -> str:
    """The name of the palette's colour that is nearest to the median of pixels [3, n]."""
    colours = torch.tensor(list(PALETTE.values()), dtype=torch.float)
    distances = (colours - region.median(1).values).square().sum(1)
    return list(PALETTE)[int(distances.argmin())]


def captions_of(images: Images) -> list[str]:
    """The captions that the models are trained with: those of the images, else `pixel_caption`."""
    if images.captions:
        return list(images.captions)
    return _pixel_captions(images, images.labels.tolist())


def mistaken_captions(images: Images) -> list[str]:
    """For each image its `pixel_caption` with another class, which varies from image to image."""
    n = len(images.classes)
    labels, indices = images.labels.tolist(), images.indices.tolist()
    return _pixel_captions(images, [(y + 1 + i // 4 % (n - 1)) % n for y, i in zip(labels, indices)])


def _pixel_captions(images: Images, labels: Sequence[int]) -> list[str]:
    rows = zip(images.pixels, labels, images.indices.tolist())
    return [pixel_caption(pixels, images.classes[label], index) for pixels, label, index in rows]


def words_of(captions: Sequence[str], prompt: str) -> list[str]:
    """Every word of the prompt and the captions, the most frequent first."""
    return [word for word, _ in Counter(" ".join([prompt, *captions]).split()).most_common()]
