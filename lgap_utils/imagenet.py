"""imagenet."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path

import torch

from .data_files import data_folder, decode_images, hub_files, take_rows
from .images import Images
from .profiles import ROOT

IMAGENET, IMAGENET_REVISION = "ILSVRC/imagenet-1k", "49e2ee26f3810fb5a7536bbf732a7b07389a47b5"
IMAGENET_SHARDS = tuple(f"data/validation-{k:05}-of-00014.parquet" for k in range(14))
# paper silent: its 2048 images are not named; these are the first 2048 of the 5000 that RobustBench evaluates on, in its order.
IMAGENET_IDS = ROOT / "paper" / "imagenet_2048.txt"
IMAGENET_ALL = 50_000  # images of the validation split
IMAGENET_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")  # whatever the rest of a file's name
IMAGENET_MOST = 10_000  # images of 224 x 224 to hold without being asked for so many: 1.5 GB


# ---------------------------------------------------------------- ImageNet


@functools.cache
def imagenet_classes():
    """({WordNet id: label} of the 1000 classes, their names in the order of labels), from the packages that ship them.

    A name is what WordNet has, alternatives separated by commas; two classes share the name "crane". Where the names are not
    installed, the ids stand for them. Raises FileNotFoundError where the labels are not.
    """
    labels = json.loads(_packaged("robustbench", "helper_files/imagenet_class_to_id_map.json"))
    try:
        names = dict(
            line.split("\t")
            for line in _packaged("timm", "data/_info/imagenet_synset_to_lemma.txt").splitlines()
        )
    except FileNotFoundError:
        names = {}
    return labels, tuple(names.get(wnid, wnid) for wnid in sorted(labels, key=labels.get))


def _packaged(package, name):
    """Text of a file in an installed package, found without importing it: robustbench needs `autoattack` to import."""
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations if spec else ():
        if (file := Path(folder, name)).is_file():
            return file.read_text()
    raise FileNotFoundError(
        f"{name} of the package {package} is not installed; pip install -r requirements.txt brings it in"
    )


def imagenet_ids():
    """The 2048 images of Table 4, each as "wnid/file name"."""
    return [line for line in IMAGENET_IDS.read_text().split("\n") if line and not line.startswith("#")]


def load_imagenet(split, n, start, crop=None):
    if split != "test":
        raise ValueError(f"imagenet has no split {split!r} here, only 'test': the paper trains nothing on it")
    (labels, classes), folder = imagenet_classes(), data_folder() / "imagenet" / "val"
    if folder.is_dir():
        files, source, official = _imagenet_files(folder)
        if n is None and len(files) > IMAGENET_MOST:
            raise ValueError(f"{folder} holds {len(files)} images, too many at once; say how many, n=...")
        files = take_rows(files, "imagenet test", n, start)
        images, kinds = [(file, file.read_bytes) for file, _ in files], [kind for _, kind in files]
    else:
        names, source, official = imagenet_ids(), _the_list(), True
        names = take_rows(names, "imagenet test", n, start)
        images, kinds = _imagenet_shards(names, labels), [name.split("/")[0] for name in names]
    from torchvision import transforms

    # RobustBench's Res256Crop224, which is bilinear, or its Crop288
    prepare = (
        transforms.CenterCrop(crop)
        if crop
        else transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    )
    pixels, digest = decode_images(images, crop or 224, prepare)
    indices = torch.arange(start, start + len(images))
    return Images(
        pixels,
        torch.tensor([labels[kind] for kind in kinds]),
        indices,
        classes,
        None,
        f"{source}; rows {start} to {indices[-1]} sha256 {digest}",
        official,
    )


def _the_list():
    return f"the {len(imagenet_ids())} images of paper/{IMAGENET_IDS.name}"


def _imagenet_files(folder):
    """([(image, its WordNet id)] that a folder is taken for, why, in words, whether they are the list's).

    Those are known by their numbers, whatever their names; if none of them is there, all are taken by path.
    """
    (flat, sorted_by_class), wanted = _imagenet_folder(folder), imagenet_ids()
    listed = set(map(_number, wanted))
    there = _numbered(flat, listed) | _numbered(sorted_by_class, listed)
    missing = sorted(name for name in wanted if _number(name) not in there)
    if missing and len(missing) < len(wanted):
        raise ValueError(
            f"{folder}: {len(missing)} of {_the_list()} are missing, e.g. {missing[0]}; "
            "copy them, or leave none of the list there, and all images by path are taken"
        )
    if missing:
        chosen = sorted_by_class or _with_classes(flat, folder.parent)
        why = f"for none of paper/{IMAGENET_IDS.name} is there"
        source = f"all {len(chosen)} images in imagenet/val by path, {why}"
    else:
        chosen, source = [], _the_list()
        for name in wanted:
            (file, kind), expected = there[_number(name)], name.split("/")[0]
            if kind not in (None, expected):
                raise ValueError(f"{file}: the folder or name says {kind}, but {_the_list()} say {expected}")
            chosen.append((file, expected))
    if (flat and sorted_by_class) or (folder.parent / IMAGENET_SHARDS[0]).is_file():
        places = {"imagenet/val" if file.parent == folder else "imagenet/val/<wnid>" for file, _ in chosen}
        source += f", read from {' and '.join(sorted(places))}"
    for file, _ in chosen:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is a link to nothing, or no file; copy it again")
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty; copy it again")
    return chosen, source, not missing


def _number(name):
    """Which validation image a file name means, from 1; None for any other."""
    match = IMAGENET_NUMBER.search(name)
    return match and int(match[1])


def _numbered(files, wanted):
    """{number: (file, WordNet id)} of those files that have a wanted number."""
    found = {}
    for file, kind in files:
        if (number := _number(file.name)) not in wanted:
            continue
        if number in found:
            raise ValueError(f"{file} and {found[number][0]} have the same number; keep one of them")
        found[number] = file, kind
    return found


def _imagenet_folder(folder):
    """Two lists of (image, its WordNet id or None), by path: in `folder` itself, and in class folders."""
    labels = imagenet_classes()[0]
    kinds = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    flat = [(file, _named_class(file)) for file in _photographs(folder)]
    if not kinds and not flat:
        raise ValueError(
            f"{folder} holds no class folder and no image; expected one folder per WordNet id, "
            "e.g. n01440764/ILSVRC2012_val_00000293.JPEG, or ILSVRC2012_val_*.JPEG"
        )
    found = []
    for kind in kinds:
        if kind.name not in labels:
            raise ValueError(
                f"{kind} is named like none of the 1000 classes; expected a WordNet id, e.g. n01440764"
            )
        if not (files := _photographs(kind)):
            raise ValueError(f"{kind} holds no image; expected *.JPEG in it, or no such folder")
        if wrong := [file for file in files if _named_class(file) not in (None, kind.name)]:
            raise ValueError(f"{wrong[0]} is named like one of another class; move it to where it belongs")
        found += [(file, kind.name) for file in files]
    return flat, found


def _photographs(folder):
    files = (f for f in folder.iterdir() if f.suffix.lower() in (".jpeg", ".jpg"))
    return sorted(f for f in files if not f.name.startswith("."))


def _named_class(file):
    """The WordNet id in a name of the hub's archive, ILSVRC2012_val_00000001_<wnid>.JPEG; None in another."""
    match = re.fullmatch(IMAGENET_NUMBER.pattern + r"_(n\d{8})", file.stem)
    return match and match[2]


def _with_classes(files, root):
    """The same (image, WordNet id), each None filled in from meta.bin or the official labels in `root`."""
    kinds = {} if all(kind for _, kind in files) else _validation_classes(root)
    found = []
    for file, kind in files:
        kind = kind or kinds.get(_number(file.name))
        if kind not in imagenet_classes()[0]:
            raise ValueError(
                f"{file}: nothing says of which class it is; put it into a folder named by its "
                f"WordNet id, or put torchvision's meta.bin into {root}"
            )
        found.append((file, kind))
    return found


def _validation_classes(root):
    """{number of a validation image: its WordNet id} by torchvision's meta.bin or the official labels, or {}.

    The official labels are the challenge's own numbers, and RobustBench's list of 5000 images tells what they
    mean. Raises ValueError for a file that is something else.
    """
    truth = "ILSVRC2012_validation_ground_truth.txt"
    places = (root / "meta.bin", root / truth, root / "ILSVRC2012_devkit_t12" / "data" / truth)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return {}
    known = _packaged("robustbench", "helper_files/imagenet_test_image_ids.txt").split()
    try:
        if file.suffix == ".bin":
            codes = torch.load(file, weights_only=True)[1]
        else:
            codes = [int(line) for line in file.read_text().split()]
        means = {}
        for name in known:
            means.setdefault(codes[_number(name) - 1], set()).add(name.split("/")[0])
    except Exception:  # torch's own words advise to switch its protection off
        codes, means = [], {}
    if len(codes) != IMAGENET_ALL or any(len(kinds) > 1 for kinds in means.values()):
        raise ValueError(
            f"{file} does not hold the {IMAGENET_ALL} validation images' classes in order; "
            "get it again, or take it away and sort the images into class folders"
        )
    return {number: next(iter(means.get(code, {code}))) for number, code in enumerate(codes, 1)}


def _imagenet_shards(names, labels):
    """[(name, read)] of the named images in the hub's parquet shards, whose rows know their file names and labels."""
    import pyarrow.parquet as pq

    shards = hub_files(
        "imagenet",
        IMAGENET,
        IMAGENET_REVISION,
        IMAGENET_SHARDS,
        "imagenet/val/<wnid>/*.JPEG or imagenet/val/ILSVRC2012_val_*.JPEG; the hub's copy is "
        "gated: accept its terms there and log in",
    )
    folder, found = shards[0].parent, {}
    wanted = {_number(name): name for name in names}
    for shard in shards:
        try:
            for batch in pq.ParquetFile(shard).iter_batches(256, columns=["image", "label"]):
                paths, images = (batch.column("image").field(part) for part in ("path", "bytes"))
                for path, data, label in zip(paths.to_pylist(), images, batch.column("label").to_pylist()):
                    if (number := _number(path or "")) in wanted:
                        found[wanted[number]] = data.as_py(), label
        except Exception as error:
            raise ValueError(
                f"{shard}: not a parquet file of image {{bytes, path}} and label ({type(error).__name__})"
            ) from error
    for name in names:
        if name not in found:
            raise ValueError(
                f"{folder}: {name} is in none of {len(shards)} shards; expected all of {IMAGENET}'s validation split"
            )
        if found[name][1] != labels[name.split("/")[0]]:
            raise ValueError(
                f"{folder}: {name} has the label {found[name][1]}, expected {labels[name.split('/')[0]]}"
            )
    return [(f"{folder}, {name}", lambda data=found[name][0]: data) for name in names]
