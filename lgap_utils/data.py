"""Images in [0, 1], labels and stable indices; every data set returns the same thing.

`toy` is drawn by toy.py. CIFAR-10 and CIFAR-100 are read from a folder in the hub's parquet layout or in
torchvision's, else from the hub; ImageNet from class folders or one flat folder, else from the hub's shards.
"""

from __future__ import annotations

import functools
import numbers
import os
import shlex
from dataclasses import dataclass

import numpy as np
import torch

from . import toy
from .data_files import data_folder, decode_images, hub_files, take_rows
from .files import sha256
from .hub import lock_entries
from .imagenet import IMAGENET_SHARDS, imagenet_classes, load_imagenet
from .images import Images

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
    cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
    hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()
)


@dataclass(frozen=True)
class Cifar:
    """One of the two CIFARs, on the hub and as torchvision keeps it."""

    repository: str
    revision: str
    file: str  # with {} for train or test
    label: str
    classes: tuple
    folder: str  # where torchvision unpacks it


CIFARS = {
    "cifar10": Cifar(
        "uoft-cs/cifar10",
        "0b2714987fa478483af9968de7c934580d0bb9a2",
        "plain_text/{}-00000-of-00001.parquet",
        "label",
        CIFAR10_CLASSES,
        "cifar-10-batches-py",
    ),
    "cifar100": Cifar(
        "uoft-cs/cifar100",
        "aadb3af77e9048adbea6b47c21a81e47dd092ae5",
        "cifar100/{}-00000-of-00001.parquet",
        "fine_label",
        CIFAR100_CLASSES,
        "cifar-100-python",
    ),
}

# What `validate` expects: the size of each part, and the labels of test rows 0 to 3.
COUNTS = {name: {"train": 49_000, "validation": 1000, "test": 10_000} for name in CIFARS} | {
    "imagenet": {"test": 2048}
}
FIRST_LABELS = {"cifar10": (3, 8, 8, 0), "cifar100": (49, 33, 72, 51), "imagenet": (979, 441, 980, 737)}


def load_images(dataset, split, n=None, start=0, crop=None):
    """Rows start .. start + n - 1 of a split ("train", "validation" or "test") of "toy", "cifar10", "cifar100" or "imagenet".

    n None means all of a finite data set. A CIFAR's validation part is every 50th row of the train split, and
    is left out of "train"; a row is the same image in the hub's files and in torchvision's. ImageNet has only
    "test": rows of the list paper/imagenet_2048.txt, known by their numbers; or, where LGAP_DATA/imagenet/val
    holds none of these, of all images below it, sorted by relative path. `source` says what was read,
    `official` whether the paper measures on it. ImageNet's pixels are resized to a short side of 256 and
    cropped to 224 x 224, as RobustBench does; with `crop`, the middle of so many pixels of the image as it
    is, as RobustBench's Crop288 (black where the image is smaller); its class names are comma-separated
    alternatives ("great white shark, white shark").

    Raises TypeError where n, start or crop is no whole number; ValueError for unknown names, rows that do not
    exist, files of another kind and half of that list; FileNotFoundError for missing data and a missing
    LGAP_DATA.
    """
    readers = {name: functools.partial(_cifar, name) for name in CIFARS}
    readers |= {"toy": _toy, "imagenet": functools.partial(load_imagenet, crop=crop)}
    if dataset not in readers:
        raise ValueError(f"no data set {dataset!r}; choose from {sorted(readers)}")
    if split not in toy.SPLITS:
        raise ValueError(f"no split {split!r}; choose from {sorted(toy.SPLITS)}")
    if crop is not None and dataset != "imagenet":
        raise ValueError(f"crop={crop!r}: only imagenet is cropped, not {dataset!r}")
    for name, value, least in (("n", n, 1), ("start", start, 0), ("crop", crop, 1)):
        if value is None and name != "start":
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}={value!r}: expected a whole number, {name} >= {least}")
        if value < least:
            raise ValueError(f"{name}={value}: expected {name} >= {least}")
    return readers[dataset](split, n, start)


def at_hand(dataset):
    """Whether `load_images` reads test images of a data set from below LGAP_DATA, the first of them whole."""
    try:
        if dataset == "imagenet" and not (data_folder() / dataset / "val").is_dir():
            return all(_is_parquet(data_folder() / dataset / shard) for shard in IMAGENET_SHARDS)
        if dataset in CIFARS and not (_parquet_file(dataset, "test") or torchvision_folder(dataset)):
            return False
        return len(load_images(dataset, "test", 1)) == 1
    except (FileNotFoundError, ValueError):
        return False


def _is_parquet(file):
    """Whether a file begins and ends as a whole parquet file does."""
    if not file.is_file() or file.stat().st_size < 12:
        return False
    with open(file, "rb") as f:
        begin = f.read(4)
        f.seek(-4, os.SEEK_END)
        return begin == f.read() == b"PAR1"


def classes_of(dataset):
    """The names of a data set's classes, in the order of its labels."""
    return (
        toy.CLASSES
        if dataset == "toy"
        else imagenet_classes()[1]
        if dataset == "imagenet"
        else CIFARS[dataset].classes
    )


def _toy(split, n, start):
    if n is None:
        raise ValueError("the toy data set has no end; say how many images, n=...")
    pixels, labels, captions = zip(*(toy.draw(split, i) for i in range(start, start + n)))
    return Images(
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(labels),
        torch.arange(start, start + n),
        toy.CLASSES,
        captions,
        "drawn by lgap_utils/toy.py",
    )


# ---------------------------------------------------------------- CIFAR-10 and CIFAR-100


def _cifar(dataset, split, n, start):
    part = "test" if split == "test" else "train"
    folder = None if _parquet_file(dataset, part) else torchvision_folder(dataset)
    labels, decode, file, source = _torchvision(dataset, part, folder) if folder else _parquet(dataset, part)
    rows, classes = np.arange(len(labels)), CIFARS[dataset].classes
    if split != "test":
        rows = rows[(rows % 50 == 7) == (split == "validation")]
    rows = take_rows(rows, f"{dataset} {split}", n, start)
    known = COUNTS[dataset]["test"], FIRST_LABELS[dataset]
    official = split == "test" and (len(labels), tuple(labels[:4])) == known
    labels = labels[rows]
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"{file}: expected whole numbers from 0 to {len(classes) - 1} in the column "
            f"{CIFARS[dataset].label}"
        )
    labels, indices = (torch.from_numpy(values.astype(np.int64)) for values in (labels, rows))
    return Images(decode(rows), labels, indices, classes, None, source, official)


def _parquet_file(dataset, part):
    """The file below LGAP_DATA in the hub's layout, or None."""
    file = data_folder() / dataset / CIFARS[dataset].file.format(part)
    return file if file.is_file() else None


def _parquet(dataset, part):
    """(labels of all rows, rows -> pixels, the file, what was read) in the hub's layout."""
    import pandas as pd

    cifar = CIFARS[dataset]
    name = cifar.file.format(part)
    (file,) = hub_files(
        dataset,
        cifar.repository,
        cifar.revision,
        [name],
        f"{dataset}/{name} or torchvision's {cifar.folder}/",
    )
    try:
        table = pd.read_parquet(file, columns=["img", cifar.label])
    except Exception as error:
        raise ValueError(
            f"{file}: not a parquet file with the columns img and {cifar.label} ({type(error).__name__})"
        ) from error

    def decode(rows):
        cells = zip(rows, table["img"].iloc[rows])
        return decode_images(
            [(f"{file}, row {i}", lambda cell=cell: cell["bytes"]) for i, cell in cells], 32
        )[0]

    return table[cifar.label].to_numpy(), decode, file, f"{file.name} sha256 {sha256(file)}"


def torchvision_folder(dataset):
    """The folder below LGAP_DATA in which torchvision, or RobustBench with it, has unpacked a CIFAR, or None.

    Raises FileNotFoundError where only the archive is there.
    """
    places = (data_folder() / dataset, data_folder())
    for place in places:
        if (folder := place / CIFARS[dataset].folder).is_dir():
            return folder
    for place in places:
        if (archive := place / _kind(dataset).filename).is_file():
            command = shlex.join(["tar", "-xzf", str(archive), "-C", str(place)])
            raise FileNotFoundError(f"{archive} is not unpacked; unpack it with {command}")
    return None


def _kind(dataset):
    """torchvision's class of a CIFAR, whose rows are in the official order: data_batch_1 to data_batch_5.

    A parquet file that was made by going through the archive may begin with another batch of CIFAR-10's train split. Its
    rows are then other images, which a folder of rows refuses to mix, as a row is tied to its pixels.
    """
    from torchvision import datasets

    return getattr(datasets, dataset.upper())


def _torchvision(dataset, part, folder):
    """As `_parquet`, from torchvision's pickles, which it opens once their MD5s are those that it knows."""
    kind = _kind(dataset)
    try:
        read = kind(folder.parent, train=part == "train")
    except RuntimeError:
        raise ValueError(_refused(kind, folder)) from None
    pixels = torch.from_numpy(read.data).permute(0, 3, 1, 2)
    names = dict(kind.train_list if part == "train" else kind.test_list)
    source = f"torchvision's {folder.name}, " + ", ".join(f"{name} md5 {md5}" for name, md5 in names.items())
    return np.array(read.targets), lambda rows: pixels[rows].contiguous(), folder, source


def _refused(kind, folder):
    """Which of torchvision's files is not the one that it knows."""
    from torchvision.datasets.utils import check_integrity

    for name, md5 in (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])):
        if not check_integrity(folder / name, md5):
            what = "has another MD5 than torchvision's" if (folder / name).is_file() else "is missing"
            return f"{folder / name} {what}, so nothing there is opened; unpack {kind.filename} again"
    return f"{folder} changed while it was read; read it again"


def validate(dataset):
    """[(what, ok, detail)]: whether each image of a data set can be read, and whether they are the ones that the paper measures on.

    What is wrong with the data is a line that is not ok; only an unknown name raises, ValueError. A folder of a user's own is taken
    as it is: that its checksum is not the hub's is said, and ok. Everything is read, which takes a minute or so.
    """
    if dataset == "toy":
        return [("toy", True, "drawn by the code: nothing to check")]
    if dataset not in COUNTS:
        raise ValueError(f"no data set {dataset!r}; choose from {sorted([*COUNTS, 'toy'])}")
    checks = []
    for split, count in COUNTS[dataset].items():
        what = f"{dataset} {split}"
        try:
            images = load_images(dataset, split)
        except (FileNotFoundError, ValueError) as error:
            checks.append((f"{what}: images", False, str(error)))
            continue
        checks.append((f"{what}: images", len(images) == count, f"{len(images)}, expected {count}"))
        if split == "test":
            first, expected = tuple(images.labels[:4].tolist()), FIRST_LABELS[dataset]
            checks.append((f"{what}: first labels", first == expected, f"{first}, expected {expected}"))
        known = images.source
        if dataset in CIFARS and ".parquet sha256" in images.source:
            cifar = CIFARS[dataset]
            file = cifar.file.format("test" if split == "test" else "train")
            known = (
                lock_entries(f"{cifar.repository}@{cifar.revision}").get(file, {}).get("sha256")
                or "not known"
            )
        checks.append(
            (
                f"{what}: files",
                True,
                images.source + ("" if known in images.source else ", other files than the hub's"),
            )
        )
    return checks
