"""Images at the door: what a batch of them must be, and how one is read from wherever it comes."""

from __future__ import annotations

import contextlib
import numbers
import os
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch

from .checks import check_images


@dataclass(frozen=True)
class Images:
    """Images of one split: `pixels` uint8 [n, 3, h, w]; `labels` and `indices` (rows in the split) long [n].

    A user's own are checked here: TypeError for another type; ValueError for another shape or length, for a
    label that is no class, and for an index that is negative or there twice. The first bad one is named.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    classes: tuple
    captions: tuple | None = None  # true ones, where the data set has them
    source: str = ""  # what was read, with its checksum
    official: bool = False  # test images that the paper measures on, as far as can be told

    def __post_init__(self):
        _tensor("pixels", self.pixels, torch.uint8)
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3:
            raise ValueError(f"pixels: expected the shape [n, 3, h, w], got {list(self.pixels.shape)}")
        if not isinstance(self.classes, tuple | list) or not self.classes:
            raise TypeError(f"classes: expected a tuple of names, got {self.classes!r}")
        labels, indices = self._whole_numbers("labels"), self._whole_numbers("indices")
        for row, label in enumerate(labels):
            if not 0 <= label < len(self.classes):
                raise ValueError(f"labels[{row}] is {label}; expected a class, 0 to {len(self.classes) - 1}")
        first = {}
        for row, index in enumerate(indices):
            if index < 0:
                raise ValueError(f"indices[{row}] is {index}; expected a row of the split, from 0")
            if first.setdefault(index, row) != row:
                raise ValueError(f"indices[{row}] is {index}, as indices[{first[index]}]; expected each once")
        self._check_captions()

    def _whole_numbers(self, name):
        values = getattr(self, name)
        _tensor(name, values, torch.long)
        if values.shape != (len(self),):
            raise ValueError(f"{name}: expected one for each of {len(self)} images, got {list(values.shape)}")
        return values.tolist()

    def _check_captions(self):
        if self.captions is None:
            return
        if not isinstance(self.captions, tuple | list):
            raise TypeError(f"captions: expected a tuple of sentences, got {type(self.captions).__name__}")
        if len(self.captions) != len(self):
            raise ValueError(f"captions: expected {len(self)}, one an image, got {len(self.captions)}")
        for row, caption in enumerate(self.captions):
            if not isinstance(caption, str):
                raise TypeError(f"captions[{row}]: expected a sentence, got {type(caption).__name__}")

    def __len__(self):
        return len(self.pixels)

    @property
    def x(self):
        """float32 [n, 3, h, w] in [0, 1]."""
        return self.pixels.float() / 255

    def __getitem__(self, part):
        """Some of the images: a slice, a list or tensor of positions, each once, or a mask."""
        if isinstance(part, numbers.Integral):
            raise TypeError(f"images[{part}]: expected a slice, list or mask; one image is images[[{part}]]")
        captions = None if self.captions is None else tuple(np.array(self.captions, dtype=object)[part])
        return replace(
            self,
            pixels=self.pixels[part],
            labels=self.labels[part],
            indices=self.indices[part],
            captions=captions,
        )


def _tensor(name, values, dtype):
    if not isinstance(values, torch.Tensor) or values.dtype != dtype:
        got = f"{values.dtype}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {got}")


def read_image(source):
    """One image from anywhere -> float [3, h, w] in [0, 1].

    source: a path, an open binary file, a PIL image of any mode, an array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4],
    or a tensor [h, w], [1, h, w], [3, h, w] or [4, h, w]; a batch of one counts as one. uint8 is divided by 255, uint16
    (and PIL's 16-bit grey) by 65535; bools are black and white; floats are in [0, 1] already; other whole numbers have
    no known range and are refused. A photograph is turned upright as its EXIF says. The fourth channel is opacity, and
    whatever is transparent lies on white. Of several frames the first is read. A float tensor keeps its dtype and device.

    Raises FileNotFoundError, TypeError or ValueError, in one sentence.
    """
    import numpy as np
    from PIL import Image

    channels_first = isinstance(source, torch.Tensor)  # as torch has them; arrays have them last
    if isinstance(source, (str, os.PathLike, Image.Image)) or hasattr(source, "read"):
        source = _decoded(source)
    if not isinstance(source, (torch.Tensor, np.ndarray)):
        raise TypeError(
            f"image: expected one path, open file, PIL image, array or tensor, got {type(source).__name__}"
        )
    x = source if channels_first else _as_tensor(source)
    x = x[0] if x.ndim == 4 and len(x) == 1 else x
    shape = list(x.shape)
    if x.ndim == 2:
        x = x[None]
    elif x.ndim == 3 and not channels_first:
        x = x.permute(2, 0, 1)
    if x.ndim != 3 or len(x) not in (1, 3, 4):
        expected = "[3, height, width]" if channels_first else "[height, width, 3]"
        other = (
            "channels-last, use .permute(2, 0, 1)"
            if channels_first
            else "channels-first, use .transpose(1, 2, 0)"
        )
        hint = f"; it looks {other}" if x.ndim == 3 and shape[2 if channels_first else 0] in (1, 3, 4) else ""
        raise ValueError(f"image: expected {expected}, got shape {shape}{hint}")
    return _on_white(x)


def _decoded(source):
    """The pixels of a file or a PIL image as an array: upright, and RGBA where something is transparent."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = source if isinstance(source, (str, os.PathLike)) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(source)
            with opened as image:
                stored = (
                    image.tile[0].args if getattr(image, "tile", None) else None
                )  # how the file keeps a pixel
                image.load()
                return _pixels(ImageOps.exif_transpose(image), stored)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image file that PIL can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"{name}: it has more than {Image.MAX_IMAGE_PIXELS} pixels, which PIL takes for an attack; "
            "scale it down"
        ) from None
    except Exception as error:  # PIL raises whatever its decoders do
        said = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{name}: it cannot be read whole as an image ({said[0]})") from None


def _pixels(image, stored):
    """An array of a decoded PIL image. stored: how its file keeps a pixel, as PIL names it, if that is known."""
    import numpy as np

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


def _as_tensor(array):
    """An array as a tensor of its own; floats in single precision."""
    import numpy as np

    kind = array.dtype.kind
    if kind not in "buif":
        raise TypeError(f"image: expected an array of numbers, got {array.dtype}")
    return torch.from_numpy(array.astype(np.float32 if kind == "f" else array.dtype.newbyteorder("=")))


RANGES = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}


def _on_white(x):
    """Pixels [1, 3 or 4, h, w] of any type -> float [3, h, w] in [0, 1]."""
    if x.dtype in RANGES:
        x = x.float() / RANGES[x.dtype]
    elif not x.is_floating_point():
        raise ValueError(
            f"image: the range of {x.dtype} is not known; expected [0, 1] as floats, or uint8, uint16 or bool"
        )
    if len(x) == 1:
        x = x.repeat(3, 1, 1)
    check_images(x[-3:][None])  # of four channels: before opacity can hide anything
    if len(x) == 4:
        colours, opacity = x[:3], x[3:]
        x = colours * opacity + (1 - opacity)
        check_images(x[None])
    return x
