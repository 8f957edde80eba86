"""ImageNet's validation images: the 2048 of Table 4 or others, in a folder or in the hub's parquet shards."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .data_files import data_folder, decode_images, hub_files, take_rows
from .images import Images
from .profiles import ROOT

IMAGENET, IMAGENET_REVISION = "ILSVRC/imagenet-1k", "49e2ee26f3810fb5a7536bbf732a7b07389a47b5"
IMAGENET_SHARDS = tuple(f"data/validation-{k:05}-of-00014.parquet" for k in range(14))
LAYOUTS = "imagenet/val/<wnid>/*.JPEG or imagenet/val/ILSVRC2012_val_*.JPEG"
# paper silent: its 2048 images are not named; these are the first 2048 of RobustBench's 5000, in its order
IMAGENET_IDS = ROOT / "paper" / "imagenet_2048.txt"


class Photograph(NamedTuple):
    """An image that can be read. wnid: the WordNet id of its class; "" where no folder or name says it."""

    place: Path
    read: Callable[[], bytes]
    wnid: str


@functools.cache
def imagenet_classes() -> tuple[dict[str, int], tuple[str, ...]]:
    """({WordNet id: label} of the 1000 classes, their names in the order of labels).

    A name is WordNet's: alternatives separated by commas. Two classes have the name "crane". timm ships the
    names; without it the ids stand for them. Raises FileNotFoundError without robustbench.
    """
    labels = json.loads(packaged_text("robustbench", "helper_files/imagenet_class_to_id_map.json"))
    try:
        lines = packaged_text("timm", "data/_info/imagenet_synset_to_lemma.txt").splitlines()
    except FileNotFoundError:
        lines = []
    names = dict(line.split("\t") for line in lines)
    return labels, tuple(str(names.get(wnid, wnid)) for wnid in sorted(labels, key=labels.get))


def packaged_text(package: str, name: str) -> str:
    """Text of a file in an installed package, without importing it. Raises FileNotFoundError."""
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin).parent / name if spec and spec.origin else None
    if file is None or not file.is_file():
        raise FileNotFoundError(
            f"{name} of the package {package} is not installed; pip install -r requirements.txt brings it in"
        )
    return file.read_text()


def imagenet_ids() -> list[str]:
    """The 2048 images of Table 4, each as "wnid/file name"."""
    return [line for line in IMAGENET_IDS.read_text().split("\n") if line and not line.startswith("#")]


def image_number(name: str) -> int:
    """The number of a validation image, from 1, in its file name; 0 for another file."""
    match = re.search(r"ILSVRC2012_val_(\d{8})(?!\d)", name)
    return int(match[1]) if match else 0


def load_imagenet(split: str, n: int | None, start: int, crop: int | None = None) -> Images:
    """Rows start .. start + n - 1 of "test"; arguments and errors are those of `load_images`.

    LGAP_DATA/imagenet/val is read where it exists, else the hub's shards. Where it holds none of Table 4's
    images, all its images are read, sorted by path, and are not `official`.
    """
    from torchvision import transforms

    if split != "test":
        raise ValueError(f"imagenet has no split {split!r} here, only 'test': the paper trains nothing on it")
    folder = data_folder() / "imagenet" / "val"
    if folder.is_dir():
        photographs, source, official = _read_folder(folder)
        photographs = take_rows(photographs, "imagenet test", n, start)
    else:
        names = take_rows(imagenet_ids(), "imagenet test", n, start)
        photographs, source, official = _read_shards(names), _the_list(), True
    if crop:  # RobustBench's Crop288
        prepare = transforms.CenterCrop(crop)
    else:  # RobustBench's Res256Crop224, which is bilinear
        prepare = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    pixels, digest = decode_images([(p.place, p.read) for p in photographs], crop or 224, prepare)
    labels, classes = imagenet_classes()
    indices = torch.arange(start, start + len(photographs))
    source += f"; rows {start} to {indices[-1]} sha256 {digest}"
    targets = torch.tensor([labels[p.wnid] for p in photographs])
    return Images(pixels, targets, indices, classes, None, source, official)


def _the_list() -> str:
    return f"the {len(imagenet_ids())} images of paper/{IMAGENET_IDS.name}"


def _by_number(photographs: Sequence[Photograph]) -> dict[int, Photograph]:
    """{image number: photograph} of Table 4's images among `photographs`."""
    numbers, numbered = {image_number(name) for name in imagenet_ids()}, {}
    for photograph in photographs:
        number = image_number(photograph.place.name)
        if number not in numbers:
            continue
        if number in numbered:
            other = numbered[number].place
            raise ValueError(f"{photograph.place} and {other} have the same number; keep one of them")
        numbered[number] = photograph
    return numbered


def _in_order(numbered: dict[int, Photograph], names: Sequence[str], where: Path) -> list[Photograph]:
    """The photographs of `names`. Raises ValueError where one is missing or has another class."""
    missing = sorted(name for name in names if image_number(name) not in numbered)
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} of {_the_list()} are missing, e.g. {missing[0]}; copy them, or remove "
            "the rest of the list to read other images"
        )
    photographs = []
    for name in names:
        photograph = numbered[image_number(name)]
        wnid = name.split("/")[0]
        if photograph.wnid not in ("", wnid):
            raise ValueError(f"{photograph.place}: its class is {photograph.wnid}, the list has {wnid}")
        photographs.append(photograph._replace(wnid=wnid))
    return photographs


def _read_folder(folder: Path) -> tuple[list[Photograph], str, bool]:
    """(photographs, their source, whether they are Table 4's) in a folder or its class folders."""
    flat, in_classes = _jpegs(folder, ""), []
    for class_folder in sorted(folder.iterdir()):
        if class_folder.is_dir() and not class_folder.name.startswith("."):
            in_classes += _jpegs(class_folder, class_folder.name)
    if not flat and not in_classes:
        raise ValueError(f"{folder} holds no class folder and no image; expected {LAYOUTS}")
    numbered = _by_number(flat) | _by_number(in_classes)
    if numbered:
        chosen, source = _in_order(numbered, imagenet_ids(), folder), _the_list()
    else:
        chosen = in_classes or flat
        why = f"for none of paper/{IMAGENET_IDS.name} is there"
        source = f"all {len(chosen)} images in imagenet/val by path, {why}"
    if (flat and in_classes) or (folder.parent / IMAGENET_SHARDS[0]).is_file():
        places = {"imagenet/val" if p.place.parent == folder else "imagenet/val/<wnid>" for p in chosen}
        source += f", read from {' and '.join(sorted(places))}"
    _check_files(chosen)
    return chosen, source, bool(numbered)


def _check_files(photographs: Sequence[Photograph]) -> None:
    """Refuse a file that cannot be read, or whose class is not known, before the first is decoded."""
    for file, _, wnid in photographs:
        if not file.is_file() or file.stat().st_size == 0:
            raise ValueError(f"{file} is empty, or a link to nothing; copy it again")
        if wnid not in imagenet_classes()[0]:
            raise ValueError(f"{file}: its class is not known; put it into a folder named by its WordNet id")


def _jpegs(folder: Path, wnid: str) -> list[Photograph]:
    """The images in a class folder, or those beside the class folders ("")."""
    if wnid and wnid not in imagenet_classes()[0]:
        raise ValueError(f"{folder} is named like none of the 1000 classes; expected an id, e.g. n01440764")
    photographs = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in (".jpeg", ".jpg") or file.name.startswith("."):
            continue
        match = re.fullmatch(r"ILSVRC2012_val_\d{8}_(n\d{8})", file.stem)
        named = match[1] if match else wnid
        if wnid not in ("", named):
            raise ValueError(f"{file} is named like one of another class; move it to where it belongs")
        photographs.append(Photograph(file, file.read_bytes, named))
    if wnid and not photographs:
        raise ValueError(f"{folder} holds no image; expected *.JPEG in it, or no such folder")
    return photographs


def _read_shards(names: Sequence[str]) -> list[Photograph]:
    """The named images of the hub's parquet shards, whose rows hold file names and labels."""
    access = f"{LAYOUTS}; the hub's copy is gated: accept its terms there and log in"
    shards = hub_files("imagenet", IMAGENET, IMAGENET_REVISION, IMAGENET_SHARDS, access)
    numbers, photographs = {image_number(name) for name in names}, []
    for shard in shards:
        try:
            photographs += _read_shard(shard, numbers)
        except Exception as error:  # pyarrow raises errors of many types
            raise ValueError(
                f"{shard}: not a parquet file of image {{bytes, path}} and label ({type(error).__name__})"
            ) from error
    return _in_order(_by_number(photographs), names, shards[0].parent)


def _read_shard(shard: Path, numbers: set[int]) -> list[Photograph]:
    import pyarrow.parquet as pq

    photographs, wnids = [], sorted(imagenet_classes()[0])
    for batch in pq.ParquetFile(shard).iter_batches(256, columns=["image", "label"]):
        paths, images = (batch.column("image").field(part) for part in ("path", "bytes"))
        for path, data, label in zip(paths.to_pylist(), images, batch.column("label").to_pylist()):
            if image_number(path or "") in numbers:
                read = functools.partial(bytes, data.as_py())  # a copy, so that the batch is not kept
                photographs.append(Photograph(shard.parent / path, read, wnids[label]))
    return photographs
