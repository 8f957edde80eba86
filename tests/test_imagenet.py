"""ImageNet from class folders, flat, with the names of the hub's archive, or in the hub's shards; faults."""

# ruff: noqa: F401, F811  (fixtures of fake_data_sets)
import pandas as pd
import pytest
import torch
from fake_data_sets import (
    BLANK,
    WNIDS,
    archive_name,
    empty_folder,
    encoded,
    equal,
    imagenet_folder,
    real,
    shards,
)
from PIL import Image

from lgap_utils import data, imagenet
from lgap_utils.data import at_hand, load_images
from lgap_utils.imagenet import image_number, imagenet_classes, imagenet_ids, packaged_text
from lgap_utils.profiles import data_root

# ---------------------------------------------------------------- the list of Table 4


def test_the_list_is_read_in_its_order(imagenet_folder):
    images = load_images("imagenet", "test")
    assert images.pixels.shape == (3, 3, 224, 224) and images.pixels.dtype == torch.uint8
    assert images.indices.tolist() == [0, 1, 2] and images.labels.tolist() == [281, 0, 779]
    assert images.captions is None and images.official
    assert images.source.startswith("the 3 images of paper/ids.txt; rows 0 to 2 sha256 ")
    assert images.classes[0].split(", ")[0] == "tench" and images.classes[779] == "school bus"
    assert len(images.classes) == 1000
    part = load_images("imagenet", "test", 1, start=2)
    assert part.indices.tolist() == [2] and part.labels.tolist() == [779] and part.official
    assert torch.equal(part.pixels, images.pixels[2:])
    assert part.source != images.source  # its checksum is of what was read
    for n, start in ((4, 0), (None, 3)):
        with pytest.raises(ValueError, match="imagenet test: asked for .*ends before that: it has 3"):
            load_images("imagenet", "test", n, start)


def test_the_2048_are_the_first_that_robustbench_lists():
    ids, labels = imagenet_ids(), imagenet_classes()[0]
    assert ids == packaged_text("robustbench", "helper_files/imagenet_test_image_ids.txt").split()[:2048]
    assert len(set(ids)) == len({image_number(name) for name in ids}) == 2048
    assert len({name.split("/")[0] for name in ids}) == 869
    assert tuple(labels[name.split("/")[0]] for name in ids[:4]) == data.FIRST_LABELS["imagenet"]


def test_the_labels_are_the_sorted_ids_and_each_has_a_name(monkeypatch):
    labels, classes = imagenet_classes()
    assert sorted(labels) == sorted(labels, key=labels.get)
    assert list(labels.values()) == list(range(1000)) == list(range(len(classes)))
    from torchvision.models import ResNet50_Weights

    first = [name.split(",")[0] for name in classes]
    theirs = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    assert sum(a == b for a, b in zip(first, theirs)) > 980  # theirs tell the two cranes apart
    without_timm = lambda package, name: packaged_text(package.replace("timm", "no_such_package"), name)
    monkeypatch.setattr(imagenet, "packaged_text", without_timm)
    assert imagenet_classes.__wrapped__()[1] == tuple(labels)
    says = "map.json of the package no_such_package is not installed; pip install"
    with pytest.raises(FileNotFoundError, match=says):
        packaged_text("no_such_package", "map.json")


def test_pixels_are_those_that_robustbench_evaluates_on(imagenet_folder):
    from lgap_utils.zoo import import_robustbench

    import_robustbench()
    from robustbench.data import PREPROCESSINGS

    folder, names = imagenet_folder
    photographs = [Image.open(folder / name).convert("RGB") for name in names[:3]]
    for x, photograph in zip(load_images("imagenet", "test").x, photographs):
        assert torch.equal(x, PREPROCESSINGS["Res256Crop224"](photograph))
    cropped = load_images("imagenet", "test", crop=288).x  # what Wong et al.'s classifier is shown
    assert cropped.shape == (3, 3, 288, 288)
    for x, photograph in zip(cropped, photographs):
        assert torch.equal(x, PREPROCESSINGS["Crop288"](photograph))


def test_grey_and_cmyk_photographs_become_colour(imagenet_folder):
    folder, names = imagenet_folder
    for name, mode in zip(names, ("L", "CMYK")):
        Image.open(folder / name).convert(mode).save(folder / name, "jpeg")
    assert load_images("imagenet", "test").pixels.shape == (3, 3, 224, 224)


@real("imagenet")
def test_the_real_imagenet():
    images = load_images("imagenet", "test", 4)
    assert images.pixels.shape == (4, 3, 224, 224) and images.pixels.float().std() > 20
    if images.official:
        assert tuple(images.labels.tolist()) == data.FIRST_LABELS["imagenet"]
    else:
        wnids = sorted(p.name for p in (data_root() / "imagenet" / "val").iterdir())
        assert images.labels.tolist() == [imagenet_classes()[0][wnid] for wnid in wnids[:4]]


# ---------------------------------------------------------------- layouts of a folder

LAYOUTS = {
    "the archive's names": lambda name: f"{name[:9]}/{archive_name(name)}",
    "flat": lambda name: name[10:],
    "flat, the archive's names": archive_name,
    "jpg": lambda name: name.replace(".JPEG", ".jpg"),
    "a word behind": lambda name: name.replace(".JPEG", "_256px.jpeg"),
}


def rename(folder, names, new):
    for name in names:
        (folder / name).rename(folder / new(name))
    for wnid in WNIDS:
        if not any((folder / wnid).iterdir()):
            (folder / wnid).rmdir()


@pytest.mark.parametrize("new", LAYOUTS.values(), ids=LAYOUTS)
def test_the_list_is_found_by_number_whatever_the_names(imagenet_folder, new):
    folder, names = imagenet_folder
    expected = load_images("imagenet", "test")
    rename(folder, names, new)
    images = load_images("imagenet", "test")
    assert equal(images, expected) and images.source == expected.source
    assert images.official and at_hand("imagenet")
    (folder / new(names[1])).unlink()
    with pytest.raises(ValueError, match=f"1 of the 3 images of paper/ids.txt are missing, e.g. {names[1]}"):
        load_images("imagenet", "test")
    assert not at_hand("imagenet")


def remove_list(folder, names):
    for name in names[:3]:
        (folder / name).unlink()


def test_other_images_are_taken_by_path_and_are_not_official(imagenet_folder):
    folder, names = imagenet_folder
    remove_list(folder, names)
    (folder / ".DS_Store").touch()
    (folder / WNIDS[0] / ".hidden.JPEG").touch()
    images = load_images("imagenet", "test")
    assert images.labels.tolist() == [0, 281, 779] and not images.official and at_hand("imagenet")
    assert images.source.startswith(
        "all 3 images in imagenet/val by path, for none of paper/ids.txt is there;"
    )


def test_other_images_without_class_folders_need_the_archives_names(imagenet_folder):
    folder, names = imagenet_folder
    remove_list(folder, names)
    rename(folder, names[3:], archive_name)
    assert load_images("imagenet", "test").labels.tolist() == [281, 0, 779]
    (folder / archive_name(names[5])).rename(folder / names[5][10:])
    with pytest.raises(ValueError, match=f"{names[5][10:]}: its class is not known; put it into a folder"):
        load_images("imagenet", "test")


def test_of_two_layouts_at_once_it_is_said_which_was_read(imagenet_folder):
    folder, names = imagenet_folder
    expected = load_images("imagenet", "test")
    for name in names:
        (folder / name[10:]).write_bytes(b"not read")
    images = load_images("imagenet", "test")
    assert equal(images, expected)
    assert "images of paper/ids.txt, read from imagenet/val/<wnid>; rows" in images.source
    (folder / names[0]).rename(folder / names[0][10:])  # as torchvision leaves it, stopped half way
    images = load_images("imagenet", "test")
    assert equal(images, expected) and "read from imagenet/val and imagenet/val/<wnid>;" in images.source


def test_a_folder_beside_the_hubs_shards_says_so(shards, tmp_path):
    (tmp_path / "elsewhere").rename(tmp_path / "imagenet" / "val")
    assert "read from imagenet/val/<wnid>; rows" in load_images("imagenet", "test").source


# ---------------------------------------------------------------- folders that are wrong


def copy_of_first(folder, name):
    (folder / LAYOUTS["a word behind"](name)).write_bytes((folder / name).read_bytes())


def empty_class(folder, name):
    for file in (folder / WNIDS[1]).iterdir():
        file.unlink()


def no_classes(folder, name):
    for wnid in WNIDS:
        (folder / wnid).rename(folder.parent / wnid)


WRONG = {
    "no image": (
        lambda folder, name: (folder / name).write_text("<html>"),
        "00000001.JPEG: an image cannot be",
    ),
    "half an image": (
        lambda folder, name: (folder / name).write_bytes(encoded(BLANK, "jpeg")[:-40]),
        "00000001.JPEG: an image cannot be decoded",
    ),
    "empty class": (empty_class, f"{WNIDS[1]} holds no image"),
    "a name": (
        lambda folder, name: (folder / "cats").mkdir(),
        "cats is named like none of the 1000 classes; expected an id, e.g. n01440764",
    ),
    "no such id": (lambda folder, name: (folder / "n00000001").mkdir(), "n00000001 is named like none"),
    "no classes": (no_classes, "val holds no class folder"),
    "another class": (
        lambda folder, name: (folder / name).rename(folder / WNIDS[1] / name[10:]),
        "00000001.JPEG: its class is n01440764, the list has n02123045",
    ),
    "another class in the name": (
        lambda folder, name: (folder / name).rename(folder / f"{WNIDS[1]}/{archive_name(name)}"),
        "is named like one of another class",
    ),
    "twice": (
        copy_of_first,
        "val_00000001_256px.jpeg and .*val_00000001.JPEG have the same number; keep one",
    ),
}


@pytest.mark.parametrize("spoil, says", WRONG.values(), ids=WRONG)
def test_a_wrong_folder_is_refused_by_name(imagenet_folder, spoil, says):
    folder, names = imagenet_folder
    spoil(folder, names[0])
    with pytest.raises(ValueError, match=says):
        load_images("imagenet", "test")
    assert not at_hand("imagenet")


def test_half_of_the_list_is_refused(imagenet_folder):
    folder, names = imagenet_folder
    (folder / names[0]).unlink()
    says = f"1 of the 3 images of paper/ids.txt are missing, e.g. {names[0]}; copy them"
    with pytest.raises(ValueError, match=says):
        load_images("imagenet", "test")
    assert not at_hand("imagenet")


def test_a_damaged_image_anywhere_in_the_list_is_refused_at_once(imagenet_folder):
    """A link to nothing or an empty file is found before a run starts, however few images it reads."""
    folder, names = imagenet_folder
    (folder / names[2]).write_bytes(b"")
    for n in (1, 2):
        with pytest.raises(ValueError, match=f"{names[2]} is empty, or a link to nothing; copy it again"):
            load_images("imagenet", "test", n)
    (folder / names[2]).unlink()
    (folder / names[2]).symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{names[2]} is empty, or a link to nothing; copy it again"):
        load_images("imagenet", "test", 1)


def test_imagenet_that_is_nowhere_is_said_so(imagenet_folder, tmp_path, monkeypatch):
    imagenet_folder[0].rename(tmp_path / "imagenet" / "validation")
    says = (
        "00000-of-00014.parquet is missing; expected .*ILSVRC/imagenet-1k on the hub, or imagenet/val/<wnid>"
    )
    with pytest.raises(FileNotFoundError, match=says):
        load_images("imagenet", "test")
    monkeypatch.setenv("LGAP_DATA", empty_folder(tmp_path))
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    says = "nor could be fetched .*set LGAP_DATA to .*imagenet/val/<wnid>.*gated: accept its terms"
    with pytest.raises(FileNotFoundError, match=says):
        load_images("imagenet", "test")


# ---------------------------------------------------------------- the hub's shards


def test_the_hubs_shards_hold_the_same_images(shards, tmp_path, monkeypatch):
    parquet = load_images("imagenet", "test")
    (tmp_path / "imagenet" / "data").rename(tmp_path / "data")
    calls = []
    fetch = lambda *args, **kw: calls.append((*args, kw["revision"])) or str(tmp_path / args[1])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setenv("LGAP_DATA", empty_folder(tmp_path))
    hub = load_images("imagenet", "test")
    assert calls == [
        (imagenet.IMAGENET, name, imagenet.IMAGENET_REVISION) for name in imagenet.IMAGENET_SHARDS
    ]
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    (tmp_path / "elsewhere").rename(tmp_path / "imagenet" / "val")
    folder = load_images("imagenet", "test")
    for images in (parquet, hub):
        assert equal(images, folder) and images.source == folder.source and images.official


WRONG_ROWS = {
    "missing": (lambda rows: rows[:1], "1 of the 3 images of paper/ids.txt are missing, e.g. n01440764/"),
    "label": (
        lambda rows: [rows[0], rows[1] | {"label": 5}],
        "00000002_n01440764.JPEG: its class is n01496331, the list has n01440764",
    ),
    "no such label": (lambda rows: [rows[0], rows[1] | {"label": 1000}], "not a parquet file of image"),
    "no names": (
        lambda rows: [{"image": row["image"] | {"path": None}, "label": 0} for row in rows],
        "2 of the 3 images of paper/ids.txt are missing",
    ),
    "columns": (
        lambda rows: [{"picture": row["image"], "label": 0} for row in rows],
        "00001-of-00002.parquet: not a parquet file of image",
    ),
    "no image": (
        lambda rows: [rows[0], rows[1] | {"image": rows[1]["image"] | {"bytes": b"no"}}],
        "00000002_n01440764.JPEG: an image cannot be decoded",
    ),
}


@pytest.mark.parametrize("change, says", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_wrong_shards_are_refused_by_name(shards, change, says):
    rows, write = shards
    write(1, change(rows[:2]))
    with pytest.raises(ValueError, match=says):
        load_images("imagenet", "test")


def test_half_a_shard_is_refused_by_name(shards, tmp_path):
    file = tmp_path / "imagenet" / imagenet.IMAGENET_SHARDS[1]
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match="00001-of-00002.parquet: not a parquet file"):
        load_images("imagenet", "test")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002.parquet is missing"):
        load_images("imagenet", "test")


def test_shards_that_are_no_parquet_are_not_at_hand(shards, tmp_path):
    assert at_hand("imagenet")
    file = tmp_path / "imagenet" / imagenet.IMAGENET_SHARDS[1]
    for content in (file.read_bytes()[:-9], b"PAR1", b"", b"<html>Not found</html>"):
        file.write_bytes(content)
        assert not at_hand("imagenet")
    file.unlink()
    assert not at_hand("imagenet")
