"""Images at the door: what a batch of them must be, and how one is read from wherever it comes."""

from __future__ import annotations

import contextlib
import numbers
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .checks import check_images, kind_of


@dataclass(frozen=True)
class Images:
    """Images of one split: `pixels` uint8 [n, 3, h, w]; `labels` and `indices` (rows in the split) long [n].

    Raises TypeError for another type; ValueError for another shape or length, for a label that is no class,
    and for an index that is negative or there twice. The first bad one is named.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    classes: tuple[str, ...]
    captions: tuple[str, ...] | None = None  # true ones, where the data set has them
    source: str = ""  # what was read, with its checksum
    official: bool = False  # test images that the paper measures on, as far as can be told

    def __post_init__(self):
        _check_tensor("pixels", self.pixels, torch.uint8)
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3:
            raise ValueError(f"pixels: expected the shape [n, 3, h, w], got {list(self.pixels.shape)}")
        if not isinstance(self.classes, tuple | list) or not self.classes:
            raise TypeError(f"classes: expected a tuple of names, got {self.classes!r}")
        for name, values in (("labels", self.labels), ("indices", self.indices)):
            _check_tensor(name, values, torch.long)
            if values.shape != (len(self),):
                shape = list(values.shape)
                raise ValueError(f"{name}: expected one for each of {len(self)} images, got {shape}")
        for row, label in enumerate(self.labels.tolist()):
            if not 0 <= label < len(self.classes):
                raise ValueError(f"labels[{row}] is {label}; expected a class, 0 to {len(self.classes) - 1}")
        first = {}
        for row, index in enumerate(self.indices.tolist()):
            if index < 0:
                raise ValueError(f"indices[{row}] is {index}; expected a row of the split, from 0")
            if index in first:
                raise ValueError(f"indices[{row}] is {index}, as indices[{first[index]}]; expected each once")
            first[index] = row
        if self.captions is not None:
            _check_captions(self.captions, len(self))

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def x(self) -> Tensor:
        """float32 [n, 3, h, w] in [0, 1]."""
        return self.pixels.float() / 255

    def __getitem__(self, part: Any) -> Images:
        """Some of the images: a slice, a list or tensor of positions, each once, or a mask."""
        if isinstance(part, numbers.Integral):
            raise TypeError(f"images[{part}]: expected a slice, list or mask; one image is images[[{part}]]")
        captions = None if self.captions is None else tuple(np.array(self.captions, dtype=object)[part])
        pixels, labels, indices = self.pixels[part], self.labels[part], self.indices[part]
        return replace(self, pixels=pixels, labels=labels, indices=indices, captions=captions)


def _check_tensor(name: str, values: Any, dtype: torch.dtype) -> None:
    if not isinstance(values, Tensor) or values.dtype != dtype:
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {kind_of(values)}")


def _check_captions(captions: Any, n: int) -> None:
    if not isinstance(captions, tuple | list):
        raise TypeError(f"captions: expected a tuple of sentences, got {kind_of(captions)}")
    if len(captions) != n:
        raise ValueError(f"captions: expected {n}, one an image, got {len(captions)}")
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"captions[{row}]: expected a sentence, got {kind_of(caption)}")


def resize(x: Tensor, size: Sequence[int], antialias: bool = True) -> Tensor:
    """Images [n, 3, h, w] in [0, 1], bilinear to size (h, w); the same if they have it."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return mend_rounding(F.interpolate(x, size=tuple(size), mode="bilinear", antialias=antialias))


def mend_rounding(x: Tensor) -> Tensor:
    """x back in [0, 1], with the gradient of x: a clamp's own would be 0 at black and at white."""
    return x + (x.clamp(0, 1) - x).detach()


# what BLIP's pixels are normalised by
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
AUTHORS_BATCH = 32  # images in a batch of the authors' CIFAR scripts; an image's index is its place


def vae_pixels(x: Tensor, indices: Sequence[int | str], vae_input: str) -> Tensor:
    """What a VAE is shown of images in [0, 1]; see `vae_input` in profiles.py for the authors' slip."""
    if vae_input == "unit":
        return 2 * x - 1
    mean, std = torch.tensor(CLIP_MEAN).to(x), torch.tensor(CLIP_STD).to(x)
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    if vae_input == "clip":
        return x
    shown = []
    for image, index in zip(x, indices):  # the authors undo it for the first three images of a batch
        place = index % AUTHORS_BATCH if isinstance(index, int) else AUTHORS_BATCH - 1
        shown.append(image * std[place] + mean[place] if place < 3 else image)
    return torch.stack(shown)


# ---------------------------------------------------------------- one image from anywhere


def read_image(source: Any) -> Tensor:
    """One image from anywhere -> float [3, h, w] in [0, 1].

    source: a path, an open binary file, a PIL image of any mode, an array [h, w] or [h, w, 1 or 3 or 4],
    a tensor [h, w] or [1 or 3 or 4, h, w], or a batch of one of these. uint8 is divided by 255,
    uint16 (and PIL's 16-bit grey) by 65535; bools are black and white; floats are in [0, 1] already; other
    whole numbers are refused. A photograph is turned upright as its EXIF says. The fourth channel is opacity,
    over white. Of several frames the first is read. A float tensor keeps its dtype and device. Raises
    FileNotFoundError, TypeError or ValueError, in one sentence.
    """
    channels_first = isinstance(source, Tensor)  # as torch has them; arrays have them last
    if isinstance(source, (str, os.PathLike, Image.Image)) or hasattr(source, "read"):
        source = _decoded(source)
    if not isinstance(source, (Tensor, np.ndarray)):
        raise TypeError(f"image: expected a path, file, PIL image, array or tensor, got {kind_of(source)}")
    x = source if isinstance(source, Tensor) else _as_tensor(source)
    x = x[0] if x.ndim == 4 and len(x) == 1 else x
    shape = list(x.shape)
    expected, elsewhere, hint = "[height, width, 3]", 0, "channels-first, use .transpose(1, 2, 0)"
    if channels_first:
        expected, elsewhere, hint = "[3, height, width]", 2, "channels-last, use .permute(2, 0, 1)"
    if x.ndim == 2:
        x = x[None]
    elif x.ndim == 3 and not channels_first:
        x = x.permute(2, 0, 1)
    if x.ndim != 3 or len(x) not in (1, 3, 4):
        hint = f"; it looks {hint}" if x.ndim == 3 and shape[elsewhere] in (1, 3, 4) else ""
        raise ValueError(f"image: expected {expected}, got shape {shape}{hint}")
    return _on_white(x)


def _decoded(source: Any) -> np.ndarray:
    """The pixels of a file or a PIL image: upright, and RGBA where something is transparent."""
    name = source if isinstance(source, (str, os.PathLike)) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(source)
            with opened as image:
                tile = getattr(image, "tile", None)
                stored = tile[0].args if tile else None
                image.load()
                return _pixels(ImageOps.exif_transpose(image), stored)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image file that PIL can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"it has more than {Image.MAX_IMAGE_PIXELS} pixels, which PIL takes for an attack"
        raise ValueError(f"{name}: {limit}; scale it down") from None
    except Exception as error:  # PIL raises whatever its decoders do
        text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
        raise ValueError(f"{name}: it cannot be read whole as an image ({text.splitlines()[0]})") from None


def _pixels(image: Image.Image, stored: Any) -> np.ndarray:
    """An array of a decoded PIL image. stored: how its file keeps a pixel, as PIL names it."""
    hidden = image.info.get("transparency")  # of a PNG: the colour that is not shown
    if image.mode.startswith("I") or image.mode == "F":
        array = np.array(image)
        if hidden is not None:
            array[array == hidden] = 65535
        return array
    if hidden is not None and stored == "RGB;16B":
        raise ValueError("it has 16 bits a channel and a transparent colour; save it with an alpha channel")
    if stored in ("L;2", "L;4") and isinstance(hidden, int):  # PIL spreads the pixels to 8 bits, but not this
        image.info["transparency"] = hidden * {"L;2": 85, "L;4": 17}[stored]
    if image.has_transparency_data:
        return np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor of its own; floats in single precision."""
    kind = array.dtype.kind
    if kind not in "buif":
        raise TypeError(f"image: expected an array of numbers, got {array.dtype}")
    return torch.from_numpy(array.astype(np.float32 if kind == "f" else array.dtype.newbyteorder("=")))


RANGES = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}


def _on_white(x: Tensor) -> Tensor:
    """Pixels [1, 3 or 4, h, w] of any type -> float [3, h, w] in [0, 1]."""
    if x.dtype in RANGES:
        x = x.float() / RANGES[x.dtype]
    elif not x.is_floating_point():
        expected = "expected [0, 1] as floats, or uint8, uint16 or bool"
        raise ValueError(f"image: the range of {x.dtype} is not known; {expected}")
    if len(x) == 1:
        x = x.repeat(3, 1, 1)
    check_images(x[-3:][None])  # of four channels: before opacity can hide anything
    if len(x) == 4:
        colours, opacity = x[:3], x[3:]
        x = colours * opacity + (1 - opacity)
        check_images(x[None])
    return x
