"""Images in [0, 1], labels and stable indices; every data set returns the same thing.

`toy` is drawn by toy.py. CIFAR-10 and CIFAR-100 are read from a folder in the hub's parquet layout or in
torchvision's, else from the hub; ImageNet from class folders or one flat folder, else from the hub's shards.
"""
from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import numbers
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from . import toy
from .files import CheckpointError, check, hub_file, locked, reason, sha256
from .profiles import ROOT, data_root

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = tuple("""
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
    cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
    hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split())
# Words that name a class in a caption beside its own name.
SYNONYMS = {"airplane": ("plane", "aircraft", "jet", "airliner"), "automobile": ("car", "sedan", "vehicle"),
            "bird": ("birds",), "cat": ("kitten",), "deer": ("doe", "stag"), "dog": ("puppy",), "frog": ("toad",),
            "horse": ("pony",), "ship": ("boat",), "truck": ("lorry",),
            "aquarium_fish": ("goldfish",), "baby": ("infant",), "bicycle": ("bike",), "cattle": ("cow", "cows", "bull"),
            "chimpanzee": ("chimp",), "cockroach": ("roach",), "couch": ("sofa",), "forest": ("woods",), "lawn_mower": ("lawnmower",),
            "motorcycle": ("motorbike",), "pickup_truck": ("pickup",), "possum": ("opossum",), "road": ("street", "highway"),
            "sea": ("ocean",), "streetcar": ("tram", "trolley"), "sweet_pepper": ("bell pepper", "bell peppers"),
            "telephone": ("phone",), "television": ("tv",)}


@dataclass(frozen=True)
class Cifar:
    """One of the two CIFARs, on the hub and as torchvision keeps it."""
    repository: str
    revision: str
    file: str               # with {} for train or test
    label: str
    classes: tuple
    folder: str             # where torchvision unpacks it


CIFARS = {
    "cifar10": Cifar("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "plain_text/{}-00000-of-00001.parquet", "label",
                     CIFAR10_CLASSES, "cifar-10-batches-py"),
    "cifar100": Cifar("uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", "cifar100/{}-00000-of-00001.parquet", "fine_label",
                      CIFAR100_CLASSES, "cifar-100-python"),
}
IMAGENET, IMAGENET_REVISION = "ILSVRC/imagenet-1k", "49e2ee26f3810fb5a7536bbf732a7b07389a47b5"
IMAGENET_SHARDS = tuple(f"data/validation-{k:05}-of-00014.parquet" for k in range(14))
# paper silent: its 2048 images are not named; these are the first 2048 of the 5000 that RobustBench evaluates on, in its order.
IMAGENET_IDS = ROOT / "paper" / "imagenet_2048.txt"
IMAGENET_ALL = 50_000       # images of the validation split
IMAGENET_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")     # whatever the rest of a file's name
IMAGENET_MOST = 10_000      # images of 224 x 224 to hold without being asked for so many: 1.5 GB

# What `validate` expects: the size of each part, and the labels of test rows 0 to 3.
COUNTS = {name: {"train": 49_000, "validation": 1000, "test": 10_000} for name in CIFARS} | {"imagenet": {"test": 2048}}
FIRST_LABELS = {"cifar10": (3, 8, 8, 0), "cifar100": (49, 33, 72, 51), "imagenet": (979, 441, 980, 737)}


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
    captions: tuple | None = None      # true ones, where the data set has them
    source: str = ""                   # what was read, with its checksum
    official: bool = False             # test images that the paper measures on, as far as can be told

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
        return replace(self, pixels=self.pixels[part], labels=self.labels[part], indices=self.indices[part],
                       captions=captions)


def _tensor(name, values, dtype):
    if not isinstance(values, torch.Tensor) or values.dtype != dtype:
        got = f"{values.dtype}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {got}")


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
    readers |= {"toy": _toy, "imagenet": functools.partial(_imagenet, crop=crop)}
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


def data_folder():
    """The folder of data sets. Raises FileNotFoundError where LGAP_DATA names one that is not there."""
    folder = data_root()
    if os.environ.get("LGAP_DATA") and not folder.is_dir():
        raise FileNotFoundError(f"LGAP_DATA={os.environ['LGAP_DATA']}: there is no folder {folder}; correct it, "
                                "or unset it to read data sets from data/ in the checkout or from the hub")
    return folder


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
    return toy.CLASSES if dataset == "toy" else imagenet_classes()[1] if dataset == "imagenet" else CIFARS[dataset].classes


def _toy(split, n, start):
    if n is None:
        raise ValueError("the toy data set has no end; say how many images, n=...")
    pixels, labels, captions = zip(*(toy.draw(split, i) for i in range(start, start + n)))
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels),
                  torch.arange(start, start + n), toy.CLASSES, captions, "drawn by lgap_utils/toy.py")


# ---------------------------------------------------------------- CIFAR-10 and CIFAR-100

def _cifar(dataset, split, n, start):
    part = "test" if split == "test" else "train"
    folder = None if _parquet_file(dataset, part) else torchvision_folder(dataset)
    labels, decode, file, source = _torchvision(dataset, part, folder) if folder else _parquet(dataset, part)
    rows, classes = np.arange(len(labels)), CIFARS[dataset].classes
    if split != "test":
        rows = rows[(rows % 50 == 7) == (split == "validation")]
    rows = _part(rows, f"{dataset} {split}", n, start)
    known = COUNTS[dataset]["test"], FIRST_LABELS[dataset]
    official = split == "test" and (len(labels), tuple(labels[:4])) == known
    labels = labels[rows]
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"{file}: expected whole numbers from 0 to {len(classes) - 1} in the column "
                         f"{CIFARS[dataset].label}")
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
    (file,) = _hub_files(dataset, cifar.repository, cifar.revision, [name],
                         f"{dataset}/{name} or torchvision's {cifar.folder}/")
    try:
        table = pd.read_parquet(file, columns=["img", cifar.label])
    except Exception as error:
        raise ValueError(f"{file}: not a parquet file with the columns img and {cifar.label} ({type(error).__name__})") from error

    def decode(rows):
        cells = zip(rows, table["img"].iloc[rows])
        return _decode([(f"{file}, row {i}", lambda cell=cell: cell["bytes"]) for i, cell in cells], 32)[0]

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


# ---------------------------------------------------------------- ImageNet

@functools.cache
def imagenet_classes():
    """({WordNet id: label} of the 1000 classes, their names in the order of labels), from the packages that ship them.

    A name is what WordNet has, alternatives separated by commas; two classes share the name "crane". Where the names are not
    installed, the ids stand for them. Raises FileNotFoundError where the labels are not.
    """
    labels = json.loads(_packaged("robustbench", "helper_files/imagenet_class_to_id_map.json"))
    try:
        names = dict(line.split("\t") for line in _packaged("timm", "data/_info/imagenet_synset_to_lemma.txt").splitlines())
    except FileNotFoundError:
        names = {}
    return labels, tuple(names.get(wnid, wnid) for wnid in sorted(labels, key=labels.get))


def _packaged(package, name):
    """Text of a file in an installed package, found without importing it: robustbench needs `autoattack` to import."""
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations if spec else ():
        if (file := Path(folder, name)).is_file():
            return file.read_text()
    raise FileNotFoundError(f"{name} of the package {package} is not installed; pip install -r requirements.txt brings it in")


def imagenet_ids():
    """The 2048 images of Table 4, each as "wnid/file name"."""
    return [line for line in IMAGENET_IDS.read_text().split("\n") if line and not line.startswith("#")]


def _imagenet(split, n, start, crop=None):
    if split != "test":
        raise ValueError(f"imagenet has no split {split!r} here, only 'test': the paper trains nothing on it")
    (labels, classes), folder = imagenet_classes(), data_folder() / "imagenet" / "val"
    if folder.is_dir():
        files, source, official = _imagenet_files(folder)
        if n is None and len(files) > IMAGENET_MOST:
            raise ValueError(f"{folder} holds {len(files)} images, too many at once; say how many, n=...")
        files = _part(files, "imagenet test", n, start)
        images, kinds = [(file, file.read_bytes) for file, _ in files], [kind for _, kind in files]
    else:
        names, source, official = imagenet_ids(), _the_list(), True
        names = _part(names, "imagenet test", n, start)
        images, kinds = _imagenet_shards(names, labels), [name.split("/")[0] for name in names]
    from torchvision import transforms
    # RobustBench's Res256Crop224, which is bilinear, or its Crop288
    prepare = transforms.CenterCrop(crop) if crop else transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    pixels, digest = _decode(images, crop or 224, prepare)
    indices = torch.arange(start, start + len(images))
    return Images(pixels, torch.tensor([labels[kind] for kind in kinds]), indices, classes, None,
                  f"{source}; rows {start} to {indices[-1]} sha256 {digest}", official)


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
        raise ValueError(f"{folder}: {len(missing)} of {_the_list()} are missing, e.g. {missing[0]}; "
                         "copy them, or leave none of the list there, and all images by path are taken")
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
        raise ValueError(f"{folder} holds no class folder and no image; expected one folder per WordNet id, "
                         "e.g. n01440764/ILSVRC2012_val_00000293.JPEG, or ILSVRC2012_val_*.JPEG")
    found = []
    for kind in kinds:
        if kind.name not in labels:
            raise ValueError(f"{kind} is named like none of the 1000 classes; expected a WordNet id, "
                             "e.g. n01440764")
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
            raise ValueError(f"{file}: nothing says of which class it is; put it into a folder named by its "
                             f"WordNet id, or put torchvision's meta.bin into {root}")
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
    except Exception:       # torch's own words advise to switch its protection off
        codes, means = [], {}
    if len(codes) != IMAGENET_ALL or any(len(kinds) > 1 for kinds in means.values()):
        raise ValueError(f"{file} does not hold the {IMAGENET_ALL} validation images' classes in order; "
                         "get it again, or take it away and sort the images into class folders")
    return {number: next(iter(means.get(code, {code}))) for number, code in enumerate(codes, 1)}


def _imagenet_shards(names, labels):
    """[(name, read)] of the named images in the hub's parquet shards, whose rows know their file names and labels."""
    import pyarrow.parquet as pq
    shards = _hub_files("imagenet", IMAGENET, IMAGENET_REVISION, IMAGENET_SHARDS,
                        "imagenet/val/<wnid>/*.JPEG or imagenet/val/ILSVRC2012_val_*.JPEG; the hub's copy is "
                        "gated: accept its terms there and log in")
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
            raise ValueError(f"{shard}: not a parquet file of image {{bytes, path}} and label ({type(error).__name__})") from error
    for name in names:
        if name not in found:
            raise ValueError(f"{folder}: {name} is in none of {len(shards)} shards; expected all of {IMAGENET}'s validation split")
        if found[name][1] != labels[name.split("/")[0]]:
            raise ValueError(f"{folder}: {name} has the label {found[name][1]}, expected {labels[name.split('/')[0]]}")
    return [(f"{folder}, {name}", lambda data=found[name][0]: data) for name in names]


# ---------------------------------------------------------------- files

def _part(rows, what, n, start):
    """rows[start : start + n], all of them."""
    if len(rows) < start + (n or 1):
        raise ValueError(f"{what}: asked for rows {start} to {start + (n or 1) - 1}, the split ends before that: it has {len(rows)}")
    return rows[start:None if n is None else start + n]


def _decode(images, size, prepare=lambda image: image):
    """uint8 [n, 3, size, size], and the sha256 of all that was read, of [(name, read)] where read() gives an encoded image."""
    from PIL import Image
    pixels, digest = torch.empty(len(images), 3, size, size, dtype=torch.uint8), hashlib.sha256()
    for row, (name, read) in zip(pixels, images):
        try:
            data = read()
            with Image.open(io.BytesIO(data)) as image:
                mode, image = image.mode, prepare(image.convert("RGB"))
        except Exception as error:      # a decoder raises many kinds; all mean the same to the user
            raise ValueError(f"{name}: an image cannot be decoded ({type(error).__name__}); fetch the file again") from error
        if mode in ("I", "F") or mode.startswith("I;16"):       # PIL would cut them off at 255
            raise ValueError(f"{name}: expected 8 bits a channel, got PIL's mode {mode}; save it with 8 bits")
        if image.size != (size, size):
            raise ValueError(f"{name}: expected an image of {size} x {size} pixels, got {image.width} x {image.height}")
        row.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        digest.update(data)
    return pixels, digest.hexdigest()


def _hub_files(folder, repository, revision, names, instead=None):
    """The named files below LGAP_DATA/folder where that folder is, else from the hub at a fixed revision."""
    root = data_folder() / folder
    if root.is_dir():
        if missing := [name for name in names if not (root / name).is_file()]:
            raise FileNotFoundError(f"{root / missing[0]} is missing; expected the layout of the hub data set {repository}"
                                    + (f", or {instead}" if instead else ""))
        return [root / name for name in names]
    from huggingface_hub import constants
    try:
        paths = [hub_file(repository, name, revision, "dataset") for name in names]
    except Exception as error:  # the hub's client raises many kinds
        cause, remedy = reason(error)
        raise FileNotFoundError(f"{repository} is neither in {root} nor could be fetched from the hub at {constants.ENDPOINT}/datasets/"
                                f"{repository}: {cause}; {remedy}, or set LGAP_DATA to a folder that holds "
                                f"{instead or f'{folder}/{names[0]}'}") from None
    try:
        for path, name in zip(paths, names):
            check(path, f"{repository}@{revision}", name, "fetch it again")
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    return paths


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
            known = locked(f"{cifar.repository}@{cifar.revision}").get(file, {}).get("sha256") or "not known"
        checks.append((f"{what}: files", True, images.source + ("" if known in images.source else ", other files than the hub's")))
    return checks


# ---------------------------------------------------------------- words

def _words(text):
    return " ".join("".join(c if c.isalpha() else " " for c in text.lower()).split())


def names_class(caption, class_name):
    """Whether the caption holds, as whole words in a row, the class's name, one of its alternatives or one of its synonyms.

    Alternatives are separated by commas, words by spaces, hyphens or underscores: "aquarium_fish", "great white shark, white shark".
    """
    caption, names = f" {_words(caption)} ", map(_words, (*class_name.split(","), *SYNONYMS.get(class_name, ())))
    return any(f" {name} " in caption for name in names if name)


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
