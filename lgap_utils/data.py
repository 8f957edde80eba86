"""Images in [0, 1], labels and stable indices; every data set returns the same thing.

`toy` is drawn by toy.py; CIFAR-10 and CIFAR-100 are read from the hub's parquet layout, in a folder or from the hub; ImageNet from
class folders, else from the hub's gated parquet shards.
"""
from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import toy
from .files import CheckpointError, check, hub_file, locked, reason
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
    """One of the two CIFARs on the hub."""
    repository: str
    revision: str
    file: str               # with {} for train or test
    label: str
    classes: tuple


CIFARS = {
    "cifar10": Cifar("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "plain_text/{}-00000-of-00001.parquet", "label",
                     CIFAR10_CLASSES),
    "cifar100": Cifar("uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", "cifar100/{}-00000-of-00001.parquet", "fine_label",
                      CIFAR100_CLASSES),
}
IMAGENET, IMAGENET_REVISION = "ILSVRC/imagenet-1k", "49e2ee26f3810fb5a7536bbf732a7b07389a47b5"
IMAGENET_SHARDS = tuple(f"data/validation-{k:05}-of-00014.parquet" for k in range(14))
# paper silent: its 2048 images are not named; these are the first 2048 of the 5000 that RobustBench evaluates on, in its order.
IMAGENET_IDS = ROOT / "paper" / "imagenet_2048.txt"
IMAGENET_MOST = 10_000      # images of 224 x 224 to hold without being asked for so many: 1.5 GB

# What `validate` expects: the size of each part, and the labels of test rows 0 to 3.
COUNTS = {name: {"train": 49_000, "validation": 1000, "test": 10_000} for name in CIFARS} | {"imagenet": {"test": 2048}}
FIRST_LABELS = {"cifar10": (3, 8, 8, 0), "cifar100": (49, 33, 72, 51), "imagenet": (979, 441, 980, 737)}


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


def load_images(dataset, split, n=None, start=0, crop=None):
    """Rows start .. start + n - 1 of a split ("train", "validation" or "test") of "toy", "cifar10", "cifar100" or "imagenet".

    n None means all of a finite data set. A CIFAR's validation part is every 50th row of the train split, and is left out of "train".
    ImageNet has only "test": rows of the list paper/imagenet_2048.txt, or, where LGAP_DATA/imagenet/val holds none of these, of all
    images below it, sorted by relative path; `source` says which. Its pixels are resized to a short side of 256 and cropped to
    224 x 224, as RobustBench does; with `crop`, the middle of so many pixels of the image as it is, as RobustBench's Crop288 (black
    where the image is smaller); its class names are comma-separated alternatives ("great white shark, white shark").
    Raises ValueError for unknown names, for rows that do not exist, for files of another kind and for half of that list,
    FileNotFoundError for missing data.
    """
    readers = {name: functools.partial(_cifar, name) for name in CIFARS}
    readers |= {"toy": _toy, "imagenet": functools.partial(_imagenet, crop=crop)}
    if dataset not in readers:
        raise ValueError(f"no data set {dataset!r}; choose from {sorted(readers)}")
    if split not in toy.SPLITS:
        raise ValueError(f"no split {split!r}; choose from {sorted(toy.SPLITS)}")
    if crop is not None and dataset != "imagenet":
        raise ValueError(f"crop={crop!r}: only imagenet is cropped, not {dataset!r}")
    if start < 0 or (n is not None and n < 1):
        raise ValueError(f"n={n}, start={start}: expected n >= 1 and start >= 0")
    return readers[dataset](split, n, start)


def at_hand(dataset):
    """Whether a data set's test images lie below LGAP_DATA, where `load_images` looks, so that nothing would be fetched."""
    root = data_root() / dataset
    if dataset == "imagenet":
        if not (root / "val").is_dir():
            return all((root / shard).is_file() for shard in IMAGENET_SHARDS)
        try:
            return bool(_imagenet_names(root / "val"))
        except (FileNotFoundError, ValueError):
            return False
    return dataset == "toy" or (root / CIFARS[dataset].file.format("test")).is_file()


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
    import pandas as pd
    cifar = CIFARS[dataset]
    (file,) = _hub_files(dataset, cifar.repository, cifar.revision, [cifar.file.format("test" if split == "test" else "train")])
    try:
        table = pd.read_parquet(file, columns=["img", cifar.label])
    except Exception as error:
        raise ValueError(f"{file}: not a parquet file with the columns img and {cifar.label} ({type(error).__name__})") from error
    rows = np.arange(len(table))
    if split != "test":
        rows = rows[(rows % 50 == 7) == (split == "validation")]
    rows = _part(rows, f"{dataset} {split}", n, start)
    labels = table[cifar.label].to_numpy()[rows]
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(cifar.classes):
        raise ValueError(f"{file}: expected whole numbers from 0 to {len(cifar.classes) - 1} in the column {cifar.label}")
    pixels, _ = _decode([(f"{file}, row {i}", lambda cell=cell: cell["bytes"]) for i, cell in zip(rows, table["img"].iloc[rows])], 32)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Images(pixels, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(rows.astype(np.int64)), cifar.classes, None,
                  f"{file.name} sha256 {digest}")


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
    labels, classes = imagenet_classes()
    folder, names = data_root() / "imagenet" / "val", imagenet_ids()
    source = f"the {len(names)} images of paper/{IMAGENET_IDS.name}"
    if folder.is_dir():
        names, source = _imagenet_names(folder)
        if n is None and len(names) > IMAGENET_MOST:
            raise ValueError(f"{folder} holds {len(names)} images, too many at once; say how many, n=...")
        names = _part(names, "imagenet test", n, start)
        images = [(folder / name, (folder / name).read_bytes) for name in names]
    else:
        names = _part(names, "imagenet test", n, start)
        images = _imagenet_shards(names, labels)
    from torchvision import transforms
    # RobustBench's Res256Crop224, which is bilinear, or its Crop288
    prepare = transforms.CenterCrop(crop) if crop else transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    pixels, digest = _decode(images, crop or 224, prepare)
    indices = torch.arange(start, start + len(names))
    return Images(pixels, torch.tensor([labels[name.split("/")[0]] for name in names]), indices, classes, None,
                  f"{source}; rows {start} to {indices[-1]} sha256 {digest}")


def _imagenet_names(folder):
    """("wnid/file name" of the images that a folder is taken for, where that choice comes from): the list, or all if it has none of it."""
    names, there = imagenet_ids(), _imagenet_folder(folder, imagenet_classes()[0])
    missing = sorted(set(names).difference(there))
    if not missing:
        return names, f"the {len(names)} images of paper/{IMAGENET_IDS.name}"
    if len(missing) < len(names):
        raise ValueError(f"{folder}: {len(missing)} of the {len(names)} images of paper/{IMAGENET_IDS.name} are missing, e.g. "
                         f"{missing[0]}; copy them, or leave none of the list there, and all images by path are taken")
    return there, f"all {len(there)} images in imagenet/val by path, for none of paper/{IMAGENET_IDS.name} is there"


def _imagenet_folder(folder, labels):
    """"wnid/file name" of all images, sorted."""
    kinds = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if not kinds:
        raise ValueError(f"{folder} holds no class folder; expected one per WordNet id, e.g. n01440764/ILSVRC2012_val_00000293.JPEG")
    if strange := sorted(p.name for p in kinds if p.name not in labels):
        raise ValueError(f"{folder / strange[0]} is named like none of the 1000 classes; expected a WordNet id, e.g. n01440764")
    files = {p.name: [f.name for f in p.iterdir() if f.suffix.lower() in (".jpeg", ".jpg") and not f.name.startswith(".")] for p in kinds}
    if empty := sorted(kind for kind, found in files.items() if not found):
        raise ValueError(f"{folder / empty[0]} holds no image; expected *.JPEG in it, or no such folder")
    return sorted(f"{kind}/{name}" for kind, found in files.items() for name in found)


def _imagenet_shards(names, labels):
    """[(name, read)] of the named images in the hub's parquet shards, whose rows know their file names and labels."""
    import pyarrow.parquet as pq
    shards = _hub_files("imagenet", IMAGENET, IMAGENET_REVISION, IMAGENET_SHARDS,
                        "imagenet/val/<wnid>/*.JPEG; the hub's copy is gated: accept its terms there and log in")
    folder, number, found = shards[0].parent, re.compile(r"ILSVRC2012_val_\d{8}"), {}
    wanted = {number.search(name)[0]: name for name in names}
    for shard in shards:
        try:
            for batch in pq.ParquetFile(shard).iter_batches(256, columns=["image", "label"]):
                paths, images = (batch.column("image").field(part) for part in ("path", "bytes"))
                for path, data, label in zip(paths.to_pylist(), images, batch.column("label").to_pylist()):
                    if (match := number.search(path or "")) and match[0] in wanted:
                        found[wanted[match[0]]] = data.as_py(), label
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
                image = prepare(image.convert("RGB"))
        except Exception as error:      # a decoder raises many kinds; all mean the same to the user
            raise ValueError(f"{name}: an image cannot be decoded ({type(error).__name__}); fetch the file again") from error
        if image.size != (size, size):
            raise ValueError(f"{name}: expected an image of {size} x {size} pixels, got {image.width} x {image.height}")
        row.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        digest.update(data)
    return pixels, digest.hexdigest()


def _hub_files(folder, repository, revision, names, instead=None):
    """The named files below LGAP_DATA/folder where that folder is, else from the hub at a fixed revision."""
    root = data_root() / folder
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
        if cifar := CIFARS.get(dataset):
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
