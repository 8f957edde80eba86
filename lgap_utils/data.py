"""Data sets by name, each read as `Images`: uint8 pixels, labels, and the rows they have in their split."""

from __future__ import annotations

import numbers
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import imagenet, toy
from .data_files import data_folder, decode_images, hub_files, take_rows
from .files import sha256
from .images import Images


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 or CIFAR-100, on the hub and as torchvision unpacks it."""

    repository: str
    revision: str
    file: str  # parquet, with {} for train or test
    label: str  # its column
    folder: str  # torchvision's
    classes: tuple[str, ...]  # in the order of labels


def _read_cifars() -> dict[str, Cifar]:
    tables = tomllib.loads(Path(__file__).with_name("cifar.toml").read_text(encoding="utf-8"))
    return {
        name: Cifar(**table | {"classes": tuple(table["classes"].split())}) for name, table in tables.items()
    }


CIFARS = _read_cifars()
CIFAR10_CLASSES, CIFAR100_CLASSES = CIFARS["cifar10"].classes, CIFARS["cifar100"].classes
DATA_SETS = ("cifar10", "cifar100", "imagenet", "toy")

# What the paper measures on: the number of images, and the labels of test rows 0 to 3.
COUNTS = {name: {"train": 49_000, "validation": 1000, "test": 10_000} for name in CIFARS}
COUNTS["imagenet"] = {"test": 2048}
FIRST_LABELS = {"cifar10": (3, 8, 8, 0), "cifar100": (49, 33, 72, 51), "imagenet": (979, 441, 980, 737)}


def load_images(
    dataset: str, split: str, n: int | None = None, start: int = 0, crop: int | None = None
) -> Images:
    """Rows start .. start + n - 1 of a split, "train", "validation" or "test"; n None: all.

    "toy" is drawn and has no end. "cifar10" and "cifar100" lie below LGAP_DATA in the hub's parquet layout or
    in torchvision's, else they come from the hub; validation is every 50th row of train, and left out of it.
    "imagenet" has only "test", Table 4's images or others (`imagenet.load_imagenet`), resized to a short side
    of 256 and cropped to 224 x 224; with `crop`, the middle of so many pixels of the image as it is.

    Raises TypeError where n, start or crop is no whole number; ValueError for unknown names, rows that do not
    exist and files of another kind; FileNotFoundError for missing data.
    """
    if dataset not in DATA_SETS:
        raise ValueError(f"no data set {dataset!r}; choose from {sorted(DATA_SETS)}")
    if split not in toy.SPLITS:
        raise ValueError(f"no split {split!r}; choose from {sorted(toy.SPLITS)}")
    if crop is not None and dataset != "imagenet":
        raise ValueError(f"crop={crop!r}: only imagenet is cropped, not {dataset!r}")
    for name, value, least in (("n", n, 1), ("start", start, 0), ("crop", crop, 1)):
        if value is None and name != "start":
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}={value!r}: expected a whole number, {name} >= {least}")
        if int(value) < least:
            raise ValueError(f"{name}={value}: expected {name} >= {least}")
    if dataset == "toy":
        return _draw_toy(split, n, start)
    if dataset == "imagenet":
        return imagenet.load_imagenet(split, n, start, crop)
    return _load_cifar(dataset, split, n, start)


def at_hand(dataset: str) -> bool:
    """Whether `load_images` reads the first test image of a data set without a download."""
    try:
        root = data_folder() / dataset
        if dataset == "imagenet" and not (root / "val").is_dir():
            import pyarrow.parquet as pq

            for shard in imagenet.IMAGENET_SHARDS:
                pq.read_metadata(root / shard)  # raises where the file is missing or cut off
            return True
        if dataset in CIFARS and not (_parquet(dataset, "test").is_file() or torchvision_folder(dataset)):
            return False
        return len(load_images(dataset, "test", 1)) == 1
    except (OSError, ValueError):
        return False


def classes_of(dataset: str) -> tuple[str, ...]:
    """The names of a data set's classes, in the order of its labels."""
    if dataset == "toy":
        return toy.CLASSES
    return imagenet.imagenet_classes()[1] if dataset == "imagenet" else CIFARS[dataset].classes


def _draw_toy(split: str, n: int | None, start: int) -> Images:
    if n is None:
        raise ValueError("the toy data set has no end; say how many images, n=...")
    images, labels, captions = zip(*(toy.draw(split, i) for i in range(start, start + n)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    indices = torch.arange(start, start + n)
    return Images(pixels, torch.tensor(labels), indices, toy.CLASSES, captions, "drawn by lgap_utils/toy.py")


# All of a CIFAR's train or test: labels, function from rows to uint8 pixels, where it lies, what was read.
CifarPart = tuple[np.ndarray, Callable[[np.ndarray], torch.Tensor], Path, str]


def _load_cifar(dataset: str, split: str, n: int | None, start: int) -> Images:
    part = "test" if split == "test" else "train"
    folder = None if _parquet(dataset, part).is_file() else torchvision_folder(dataset)
    if folder:
        all_labels, decode, place, source = _read_torchvision(dataset, part, folder)
    else:
        all_labels, decode, place, source = _read_parquet(dataset, part)
    rows, classes = np.arange(len(all_labels)), CIFARS[dataset].classes
    if split != "test":
        rows = rows[(rows % 50 == 7) == (split == "validation")]
    rows = take_rows(rows, f"{dataset} {split}", n, start)
    labels = all_labels[rows]
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(classes):
        expected = f"whole numbers from 0 to {len(classes) - 1} in the column {CIFARS[dataset].label}"
        raise ValueError(f"{place}: expected {expected}")
    known = COUNTS[dataset]["test"], FIRST_LABELS[dataset]
    official = split == "test" and (len(all_labels), tuple(all_labels[:4])) == known
    targets, indices = torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(rows)
    return Images(decode(rows), targets, indices, classes, None, source, official)


def _parquet(dataset: str, part: str) -> Path:
    """The file below LGAP_DATA in the hub's layout, whether it exists or not."""
    return data_folder() / dataset / CIFARS[dataset].file.format(part)


def _read_parquet(dataset: str, part: str) -> CifarPart:
    import pandas as pd

    cifar = CIFARS[dataset]
    name = cifar.file.format(part)
    layouts = f"{dataset}/{name} or torchvision's {cifar.folder}/"
    (file,) = hub_files(dataset, cifar.repository, cifar.revision, [name], layouts)
    try:
        table = pd.read_parquet(file, columns=["img", cifar.label])
    except Exception as error:  # pandas and pyarrow raise errors of many types
        columns = f"img and {cifar.label}"
        raise ValueError(f"{file}: not a parquet file with the columns {columns}") from error

    def decode(rows: np.ndarray) -> torch.Tensor:
        cells = zip(rows, table["img"].iloc[rows])
        images = [(f"{file}, row {row}", lambda cell=cell: cell["bytes"]) for row, cell in cells]
        return decode_images(images, 32)[0]

    return table[cifar.label].to_numpy(), decode, file, f"{file.name} sha256 {sha256(file)}"


def torchvision_folder(dataset: str) -> Path | None:
    """The folder below LGAP_DATA in which torchvision or RobustBench has unpacked a CIFAR, or None.

    Raises FileNotFoundError where only the archive is there.
    """
    places = (data_folder() / dataset, data_folder())
    for place in places:
        if (place / CIFARS[dataset].folder).is_dir():
            return place / CIFARS[dataset].folder
    for place in places:
        archive = place / _torchvision_class(dataset).filename
        if archive.is_file():
            command = shlex.join(["tar", "-xzf", str(archive), "-C", str(place)])
            raise FileNotFoundError(f"{archive} is not unpacked; unpack it with {command}")
    return None


def _torchvision_class(dataset: str) -> Any:
    """torchvision's CIFAR10 or CIFAR100. It reads data_batch_1 to data_batch_5, which is the official order.

    A parquet file made in the archive's order may begin with another batch of CIFAR-10. Its rows are other
    images, and a folder of results refuses to mix them: it holds each row's pixels' digest.
    """
    from torchvision import datasets

    return getattr(datasets, dataset.upper())


def _read_torchvision(dataset: str, part: str, folder: Path) -> CifarPart:
    """Open torchvision's pickles. It refuses to open any whose MD5 it does not know."""
    from torchvision.datasets.utils import check_integrity

    cifar = _torchvision_class(dataset)
    try:
        read = cifar(folder.parent, train=part == "train")
    except RuntimeError:
        files = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
        damaged = [str(folder / name) for name, md5 in files if not check_integrity(folder / name, md5)]
        raise ValueError(
            f"{', '.join(damaged) or folder}: missing, or its MD5 is not torchvision's, so nothing there is "
            f"opened; unpack {cifar.filename} again"
        ) from None
    pixels = torch.from_numpy(read.data).permute(0, 3, 1, 2)
    files = cifar.train_list if part == "train" else cifar.test_list
    source = f"torchvision's {folder.name}, " + ", ".join(f"{name} md5 {md5}" for name, md5 in files)
    return np.array(read.targets), lambda rows: pixels[rows].contiguous(), folder, source
