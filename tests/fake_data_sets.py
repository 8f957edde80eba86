"""Small data sets in the layouts of the hub and of ImageNet's class folders."""

import hashlib
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lgap_utils import data, imagenet
from lgap_utils.profiles import data_root

BLANK = np.zeros((32, 32, 3), np.uint8)
WNIDS = ("n02123045", "n01440764", "n04146614")  # tabby, tench, school bus: labels 281, 0 and 779
both = pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])


def real(folder):
    """Skip a test where LGAP_DATA does not hold the real data set."""
    return pytest.mark.skipif(not (data_root() / folder).is_dir(), reason=f"{folder} is not in LGAP_DATA")


def encoded(pixels, kind="png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def equal(images, expected):
    """Whether two `Images` have the same pixels, labels and indices."""
    names = ("pixels", "labels", "indices")
    return all(torch.equal(getattr(images, name), getattr(expected, name)) for name in names)


def empty_folder(tmp_path):
    (tmp_path / "none").mkdir()
    return str(tmp_path / "none")


def write_parquet(folder, dataset, split, pixels, labels):
    """A split of a CIFAR in the hub's layout. pixels: uint8 [n, 32, 32, 3]."""
    file = folder / dataset / data.CIFARS[dataset].file.format(split)
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(image), "path": None} for image in pixels]
    pd.DataFrame({"img": cells, data.CIFARS[dataset].label: labels}).to_parquet(file)
    return file


@pytest.fixture
def cifars(tmp_path, monkeypatch):
    """Both CIFARs in the hub's layout, 100 training and 10 test images: (test files, training pixels)."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    files = {}
    for split, n in (("train", 100), ("test", 10)):
        files["cifar10"] = write_parquet(tmp_path, "cifar10", split, pixels[:n], np.arange(n) % 10)
        files["cifar100"] = write_parquet(tmp_path, "cifar100", split, pixels[:n], 99 - np.arange(n))
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    return files, pixels


def lock_test_file(monkeypatch, tmp_path, dataset, file):
    """A lock file that knows `file` as the hub's test split."""
    cifar, digest = data.CIFARS[dataset], hashlib.sha256(file.read_bytes()).hexdigest()
    known = {cifar.file.format("test"): {"sha256": digest, "size": None}}
    (tmp_path / "lock.json").write_text(json.dumps({f"{cifar.repository}@{cifar.revision}": known}))
    monkeypatch.setenv("LGAP_LOCK", str(tmp_path / "lock.json"))


def archive_name(name):
    """ "wnid/ILSVRC2012_val_00000001.JPEG" as the hub's archive has it."""
    wnid, file = name.split("/")
    return file.replace(".JPEG", f"_{wnid}.JPEG")


@pytest.fixture
def imagenet_folder(tmp_path, monkeypatch):
    """Six images in class folders, of which the list has three: (the folder, six "wnid/name")."""
    folder, rng = tmp_path / "imagenet" / "val", np.random.default_rng(0)
    names = [f"{wnid}/ILSVRC2012_val_{i:08}.JPEG" for i, wnid in enumerate(WNIDS * 2, 1)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + 10 * i, 60, 3), dtype=np.uint8)
        (folder / name).write_bytes(encoded(pixels, "jpeg"))
    monkeypatch.setattr(imagenet, "IMAGENET_IDS", tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("\n".join(names[:3]) + "\n")
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    return folder, names


@pytest.fixture
def shards(imagenet_folder, tmp_path, monkeypatch):
    """The same images on the hub: two shards, another order, the class in each name: (rows, write)."""
    folder, names = imagenet_folder
    rows = []
    for name in names:
        image = {"bytes": (folder / name).read_bytes(), "path": archive_name(name)}
        rows.append({"image": image, "label": imagenet.imagenet_classes()[0][name[:9]]})
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "imagenet" / "data").mkdir()
    names = tuple(f"data/validation-0000{k}-of-00002.parquet" for k in range(2))
    monkeypatch.setattr(imagenet, "IMAGENET_SHARDS", names)
    write = lambda k, rows: pd.DataFrame(rows).to_parquet(tmp_path / "imagenet" / names[k])
    write(0, rows[:1:-1])
    write(1, rows[:2])
    return rows, write
