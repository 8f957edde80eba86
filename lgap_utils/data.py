"""Images in [0, 1], labels and stable indices; every data set returns the same thing.

`toy` is drawn by toy.py; CIFAR-10 is read from the hub's parquet layout, in a folder or from the hub.
"""
from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import torch

from . import toy
from .profiles import cache_root, data_root

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Words that name a class in a caption beside its own name.
SYNONYMS = {"airplane": ("plane", "aircraft", "jet", "airliner"), "automobile": ("car", "sedan", "vehicle"),
            "bird": ("birds",), "cat": ("kitten",), "deer": ("doe", "stag"), "dog": ("puppy",), "frog": ("toad",),
            "horse": ("pony",), "ship": ("boat",), "truck": ("lorry",)}
CIFAR10_REVISION = "0b2714987fa478483af9968de7c934580d0bb9a2"


@dataclass(frozen=True)
class Images:
    """Images of one split. `pixels` uint8 [n, 3, h, w]; `labels`, `indices` long [n]; an index is the row in the split."""
    pixels: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    classes: tuple
    captions: tuple | None = None      # true ones, where the data set has them
    source: str = ""                   # what was read, with its checksum

    def __len__(self):
        return len(self.pixels)

    @property
    def x(self):
        """float32 [n, 3, h, w] in [0, 1]."""
        return self.pixels.float() / 255

    def __getitem__(self, part):
        captions = None if self.captions is None else tuple(np.array(self.captions, dtype=object)[part])
        return Images(self.pixels[part], self.labels[part], self.indices[part], self.classes, captions, self.source)


def load_images(dataset, split, n=None, start=0):
    """Rows start .. start + n - 1 of a split ("train", "validation" or "test") of "toy" or "cifar10".

    n None means all of a finite data set. CIFAR-10's validation part is every 50th row of the train split, and is left
    out of "train". Raises ValueError for unknown names and for rows that do not exist, FileNotFoundError for missing data.
    """
    readers = {"toy": _toy, "cifar10": _cifar10}
    if dataset not in readers:
        raise ValueError(f"no data set {dataset!r}; choose from {sorted(readers)}")
    if split not in toy.SPLITS:
        raise ValueError(f"no split {split!r}; choose from {sorted(toy.SPLITS)}")
    if start < 0 or (n is not None and n < 1):
        raise ValueError(f"n={n}, start={start}: expected n >= 1 and start >= 0")
    return readers[dataset](split, n, start)


def _toy(split, n, start):
    if n is None:
        raise ValueError("the toy data set has no end; say how many images, n=...")
    pixels, labels, captions = zip(*(toy.draw(split, i) for i in range(start, start + n)))
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels),
                  torch.arange(start, start + n), toy.CLASSES, captions, "drawn by lgap_utils/toy.py")


def _cifar10(split, n, start):
    import pandas as pd
    from PIL import Image
    file = _hub_file("cifar10", "uoft-cs/cifar10", CIFAR10_REVISION,
                     f"plain_text/{'test' if split == 'test' else 'train'}-00000-of-00001.parquet")
    try:
        table = pd.read_parquet(file, columns=["img", "label"])
    except Exception as error:
        raise ValueError(f"{file}: not a parquet file with the columns img and label ({type(error).__name__})") from error
    rows = np.arange(len(table))
    if split != "test":
        rows = rows[(rows % 50 == 7) == (split == "validation")]
    rows = rows[start:None if n is None else start + n]
    if len(rows) == 0 or (n is not None and len(rows) < n):
        raise ValueError(f"cifar10 {split}: asked for rows {start} to {start + (n or 1) - 1}, the split ends before that")
    decode = lambda cell: np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
    labels = torch.from_numpy(table["label"].to_numpy()[rows].astype(np.int64))
    try:
        pixels = torch.from_numpy(np.stack([decode(cell) for cell in table["img"].iloc[rows]])).permute(0, 3, 1, 2).contiguous()
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: an image cannot be decoded ({error})") from error
    if pixels.shape[1:] != (3, 32, 32) or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{file}: expected 32 x 32 colour images with labels 0 to 9")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Images(pixels, labels, torch.from_numpy(rows.astype(np.int64)), CIFAR10_CLASSES, None, f"{file.name} sha256 {digest}")


def _hub_file(folder, repository, revision, name):
    """`name` below LGAP_DATA/folder where that folder is, else from the hub at a fixed revision."""
    root = data_root() / folder
    if (root / name).is_file():
        return root / name
    if root.is_dir():
        raise FileNotFoundError(f"{root / name} is missing; expected the layout of the hub data set {repository}")
    from pathlib import Path

    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision, cache_dir=cache_root()))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        raise FileNotFoundError(f"{repository} is neither in {root} nor could be fetched from the hub "
                                f"({type(error).__name__}); set LGAP_DATA to a folder that holds {folder}/{name}") from None


def names_class(caption, class_name):
    """Whether the caption holds the class's name or one of its synonyms as a word."""
    words = set("".join(c if c.isalpha() else " " for c in caption.lower()).split())
    return bool(words & {class_name, *SYNONYMS.get(class_name, ())})


PALETTE = {"red": (170, 50, 45), "orange": (205, 125, 55), "yellow": (205, 185, 80), "green": (85, 120, 65),
           "blue": (80, 120, 180), "purple": (120, 80, 140), "brown": (120, 90, 65), "white": (225, 225, 225),
           "gray": (135, 135, 135), "black": (35, 35, 35)}


def pixel_caption(pixels, class_name, index):
    """A caption for an image that has none: its class and what its pixels say. pixels uint8 [3, h, w].

    Colour of the middle, colour of the border, brightness and contrast, in one of four wordings that `index` picks;
    so the text says more than the label, and a text-guided model has more than ten sentences to learn from.
    """
    image = pixels.float()
    h, w = image.shape[1:]
    middle = image[:, h // 4:-(h // 4), w // 4:-(w // 4)].flatten(1)
    edge = torch.cat([image[:, :h // 8].flatten(1), image[:, -(h // 8):].flatten(1),
                      image[:, :, :w // 8].flatten(1), image[:, :, -(w // 8):].flatten(1)], 1)
    names, colours = list(PALETTE), torch.tensor(list(PALETTE.values()), dtype=torch.float)
    name = lambda region: names[int((colours - region.median(1).values).square().sum(1).argmin())]
    light = "dark" if image.mean() < 90 else "bright" if image.mean() > 155 else "plain"
    subject, ground = f"{name(middle)} {class_name}", name(edge)
    return (f"a {subject} on a {ground} background",
            f"a {light} image with a {subject} and {ground} around it",
            f"a {subject} in front of {ground} in {light} light",
            f"a {class_name} that is {name(middle)} on {light} {ground}")[index % 4]
