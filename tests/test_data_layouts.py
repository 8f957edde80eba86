"""Data as people have them: torchvision's CIFAR, ImageNet flat or named as in the hub's archive, faults."""

# ruff: noqa: F401, F811  (fixtures of test_data)
import dataclasses
import hashlib
import pickle
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from test_data import FILES, KINDS, both, encoded, hub, imagenet_folder, shards

from lgap_utils import data, data_files, imagenet, profiles
from lgap_utils.data import at_hand, load_images, validate
from lgap_utils.imagenet import imagenet_classes, imagenet_ids
from lgap_utils.images import Images
from lgap_utils.profiles import PROFILES
from tools import doctor

KIND = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """Both CIFARs as torchvision unpacks them, of 100 and 10 images: {data set: {file: (pixels, labels)}}."""
    rng, written = np.random.default_rng(0), {}
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    for dataset, kind in KIND.items():
        folder, key = tmp_path / kind.base_folder, "labels" if dataset == "cifar10" else "fine_labels"
        folder.mkdir()
        batches, written[dataset] = {"train_list": [], "test_list": []}, {}
        for part, names in batches.items():
            for name, _ in getattr(kind, part):
                n = 10 if part == "test_list" else 100 // len(kind.train_list)
                pixels = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
                labels = rng.integers(0, 10, n).tolist()
                (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(n, -1), key: labels}))
                written[dataset][name] = pixels, labels
                names.append([name, md5(folder / name)])
            monkeypatch.setattr(kind, part, names)
        meta = folder / kind.meta["filename"]
        meta.write_bytes(pickle.dumps({kind.meta["key"]: list(data.classes_of(dataset))}))
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})
    return written


def as_the_hub(written, dataset, folder):
    """The same images in the hub's layout and the official order."""
    names = {"train": [name for name, _ in KIND[dataset].train_list], "test": [KIND[dataset].test_list[0][0]]}
    for split, batches in names.items():
        pixels = np.concatenate([written[dataset][name][0] for name in batches]).transpose(0, 2, 3, 1)
        labels = [label for name in batches for label in written[dataset][name][1]]
        file = folder / dataset / FILES[dataset].format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        cells = [{"bytes": encoded(image), "path": None} for image in pixels]
        pd.DataFrame({"img": cells, data.CIFARS[dataset].label: labels}).to_parquet(file)


# ---------------------------------------------------------------- torchvision's CIFAR


@both
@pytest.mark.parametrize("below", [False, True])
def test_a_row_is_the_same_image_in_both_layouts(unpacked, tmp_path, dataset, below):
    if below:
        (tmp_path / dataset).mkdir()
        (tmp_path / KIND[dataset].base_folder).rename(tmp_path / dataset / KIND[dataset].base_folder)
    found = {split: load_images(dataset, split) for split in ("train", "validation", "test")}
    assert at_hand(dataset)
    assert torch.equal(load_images(dataset, "train", 3, start=5).pixels, found["train"].pixels[5:8])
    as_the_hub(unpacked, dataset, tmp_path)
    for split, images in found.items():
        theirs = load_images(dataset, split)
        assert equal(images, theirs) and images.classes == theirs.classes and images.pixels.is_contiguous()
        # both layouts at once: which was read is said
        assert KIND[dataset].base_folder in images.source and ".parquet sha256" in theirs.source
    name, digest = KIND[dataset].test_list[0]
    assert f"{name} md5 {digest}" in found["test"].source


def test_the_folders_are_torchvisions():
    for dataset, kind in KIND.items():
        assert data.CIFARS[dataset].folder == kind.base_folder


class Payload:
    """A pickle that does something when it is opened."""

    ran = []

    def __reduce__(self):
        return eval, (f"__import__('sys').modules[{__name__!r}].Payload.ran.append(1)",)


@both
@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_an_unknown_pickle_is_never_opened(unpacked, tmp_path, dataset, which):
    assert __name__ in sys.modules
    kind = KIND[dataset]
    names = {"train": kind.train_list[-1][0], "test": kind.test_list[0][0], "meta": kind.meta["filename"]}
    name = names[which]
    file = tmp_path / kind.base_folder / name
    file.write_bytes(pickle.dumps(Payload()))
    says = f"{file} has another MD5 than torchvision's, so nothing there is opened; unpack .*tar.gz again"
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=says):
            load_images(dataset, split)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file} is missing"):
        load_images(dataset, "test")
    assert not at_hand(dataset) and not Payload.ran
    (check,) = doctor.data_sets([profile(dataset)])
    assert check.state == "missing" and str(file) in check.detail
    pickle.loads(pickle.dumps(Payload()))
    assert Payload.ran.pop()  # it would have been noticed


def profile(dataset, **settings):
    settings = {"n_images": 2, "n_finetune": 2} | settings
    return dataclasses.replace(PROFILES["toy"], dataset=dataset, **settings)


@both
@pytest.mark.parametrize("below", [False, True])
def test_an_archive_that_is_not_unpacked_is_named(tmp_path, monkeypatch, dataset, below):
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    folder = tmp_path / dataset if below else tmp_path
    folder.mkdir(exist_ok=True)
    archive = folder / KIND[dataset].filename
    archive.write_bytes(b"an archive")
    says = f"{archive} is not unpacked; unpack it with tar -xzf {archive} -C {folder}"
    with pytest.raises(FileNotFoundError, match=says):
        load_images(dataset, "test", 1)
    assert not at_hand(dataset)
    (check,) = doctor.data_sets([profile(dataset)])
    assert check.state == "missing" and "is not unpacked" in check.detail


@both
def test_the_doctor_finds_torchvisions_files(unpacked, tmp_path, dataset):
    (item,) = doctor.data_sets([profile(dataset)])
    assert item.place == tmp_path / KIND[dataset].base_folder and not item.absent
    (check,) = doctor.data_sets([profile(dataset, n_images=11)])
    assert check.state == "missing" and "it has 10" in check.detail and "asks for 11 images" in check.detail
    lines = {what: (ok, said) for what, ok, said in validate(dataset)}
    # without "other files than the hub's"
    assert lines[f"{dataset} test: files"] == (True, load_images(dataset, "test").source)


# ---------------------------------------------------------------- which images are the paper's


@both
def test_test_images_are_official_by_their_number_and_first_labels(unpacked, tmp_path, monkeypatch, dataset):
    assert not load_images(dataset, "test").official  # 10 rows
    first = tuple(load_images(dataset, "test", 4).labels.tolist())
    monkeypatch.setitem(data.COUNTS, dataset, {"test": 10})
    assert not load_images(dataset, "test").official  # other labels
    monkeypatch.setitem(data.FIRST_LABELS, dataset, first)
    for _ in range(2):
        images = load_images(dataset, "test", 3, start=2)
        assert images.official and images[1:].official and images[[0]].official
        assert not load_images(dataset, "train").official
        as_the_hub(unpacked, dataset, tmp_path)
    assert not load_images("toy", "test", 1).official and not Images(*some()).official


def test_imagenet_is_official_where_the_list_is_read(imagenet_folder):
    folder, names = imagenet_folder
    assert load_images("imagenet", "test", 2).official and load_images("imagenet", "test")[1:].official
    for name in names[:3]:
        (folder / name).unlink()
    assert not load_images("imagenet", "test").official


# ---------------------------------------------------------------- ImageNet in other layouts


def archive_name(name):
    """ "wnid/ILSVRC2012_val_00000001.JPEG" as the hub's archive has it."""
    kind, file = name.split("/")
    return file.replace(".JPEG", f"_{kind}.JPEG")


def equal(images, expected):
    names = ("pixels", "labels", "indices")
    return all(torch.equal(getattr(images, name), getattr(expected, name)) for name in names)


def rename(folder, names, new):
    for name in names:
        (folder / name).rename(folder / new(name))
    for kind in KINDS:
        if not any((folder / kind).iterdir()):
            (folder / kind).rmdir()


LAYOUTS = {
    "the archive's names": lambda name: f"{name[:9]}/{archive_name(name)}",
    "flat": lambda name: name[10:],
    "flat, the archive's names": archive_name,
    "jpg": lambda name: name.replace(".JPEG", ".jpg"),
    "a word behind": lambda name: name.replace(".JPEG", "_256px.jpeg"),
}


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


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda folder, name: (folder / name).rename(folder / KINDS[1] / name[10:]),
            "the folder or name says n01440764, but the 3 images of paper/ids.txt say n02123045",
        ),
        (
            lambda folder, name: (folder / name).rename(folder / f"{KINDS[1]}/{archive_name(name)}"),
            "is named like one of another class",
        ),
        (
            lambda folder, name: (folder / LAYOUTS["a word behind"](name)).write_bytes(
                (folder / name).read_bytes()
            ),
            "val_00000000_256px.jpeg and .*val_00000000.JPEG have the same number; keep one",
        ),
    ],
    ids=["another class", "another class in the name", "twice"],
)
def test_an_image_in_the_wrong_place_or_there_twice_is_refused(imagenet_folder, change, says):
    folder, names = imagenet_folder
    change(folder, names[0])
    with pytest.raises(ValueError, match=says):
        load_images("imagenet", "test")


@pytest.fixture
def flat(imagenet_folder):
    """Six images in one folder, none of the list, all of RobustBench's 5000: folder, each "class/name"."""
    folder, names = imagenet_folder
    known = imagenet._packaged("robustbench", "helper_files/imagenet_test_image_ids.txt").split()[2048:2054]
    for old, new in zip(names, known):
        (folder / old).rename(folder / new[10:])
    for kind in KINDS:
        (folder / kind).rmdir()
    return folder, sorted(known, key=lambda name: name[10:])


def every_class():
    """WordNet ids of the 50,000 validation images: RobustBench's list's where it has them, else the first."""
    kinds = ["n01440764"] * imagenet.IMAGENET_ALL
    for name in imagenet._packaged("robustbench", "helper_files/imagenet_test_image_ids.txt").split():
        kinds[imagenet._number(name) - 1] = name[:9]
    return kinds


def official_number(kind):
    """The challenge numbers its classes in an order of its own."""
    return (imagenet_classes()[0][kind] * 7 + 3) % 1000 + 1


TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def official_labels(folder, kinds):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRUTH).write_text("".join(f"{official_number(kind)}\n" for kind in kinds))


CLASSES_FROM = {
    "torchvision's meta.bin": lambda root, kinds: torch.save(({}, kinds), root / "meta.bin"),
    "the official labels": official_labels,
    "the devkit": lambda root, kinds: official_labels(root / "ILSVRC2012_devkit_t12" / "data", kinds),
}


@pytest.mark.parametrize("write", CLASSES_FROM.values(), ids=CLASSES_FROM)
def test_a_flat_folder_of_other_images_has_its_classes_from(flat, write):
    folder, names = flat
    says = f"{names[0][10:]}: nothing says of which class it is; .* meta.bin into {folder.parent}"
    with pytest.raises(ValueError, match=says):
        load_images("imagenet", "test")
    write(folder.parent, every_class())
    images = load_images("imagenet", "test")
    assert images.labels.tolist() == [imagenet_classes()[0][name[:9]] for name in names]
    assert not images.official and "all 6 images in imagenet/val by path" in images.source
    (folder / "cat.jpg").write_bytes(encoded(np.zeros((32, 32, 3), np.uint8), "jpeg"))
    with pytest.raises(ValueError, match="cat.jpg: nothing says of which class it is"):
        load_images("imagenet", "test")


def test_a_flat_folder_with_the_archives_names_needs_no_file(flat):
    folder, names = flat
    for name in names:
        (folder / name[10:]).rename(folder / archive_name(name))
    labels = load_images("imagenet", "test").labels.tolist()
    assert labels == [imagenet_classes()[0][name[:9]] for name in names]


@pytest.mark.parametrize(
    "write",
    [
        lambda root: (root / "meta.bin").write_bytes(pickle.dumps(Payload(), 2)),
        lambda root: torch.save(Payload(), root / "meta.bin"),
        lambda root: (root / "meta.bin").write_text("<html>"),
        lambda root: torch.save(({}, every_class()[:100]), root / "meta.bin"),
        lambda root: torch.save(({}, every_class()[::-1]), root / "meta.bin"),
        lambda root: (root / TRUTH).write_text("tench\n" * imagenet.IMAGENET_ALL),
        lambda root: (root / TRUTH).write_text("7\n" * imagenet.IMAGENET_ALL),
        lambda root: (root / TRUTH).write_text(""),
    ],
    ids=["a pickle", "torch's pickle", "HTML", "short", "another order", "words", "one class", "empty"],
)
def test_a_file_of_classes_that_is_something_else_is_refused(flat, write):
    folder, _ = flat
    write(folder.parent)
    says = "(meta.bin|truth.txt) does not hold the 50000 validation images' classes in order; get it again"
    with pytest.raises(ValueError, match=says) as error:
        load_images("imagenet", "test")
    assert error.value.__context__ is None and not Payload.ran  # nor are torch's own words passed on


# ---------------------------------------------------------------- what is not there, and what the doctor says


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet"])
def test_a_folder_of_data_that_does_not_exist_is_named(tmp_path, monkeypatch, dataset):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "dta", tmp_path / "file"):
        monkeypatch.setenv("LGAP_DATA", str(place))
        says = f"LGAP_DATA={place}: there is no folder {place}; correct it, or unset it"
        with pytest.raises(FileNotFoundError, match=says):
            load_images(dataset, "test", 1)
        assert not at_hand(dataset) and load_images("toy", "test", 1)
        (check,) = doctor.data_sets([profile(dataset)])
        assert check.state == "missing" and f"LGAP_DATA={place}: there is no folder" in check.detail


def test_without_lgap_data_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("LGAP_DATA", raising=False)
    monkeypatch.setattr(data_files, "data_root", lambda: tmp_path / "data")  # as in a fresh checkout
    with pytest.raises(FileNotFoundError, match="uoft-cs/cifar10 "):
        load_images("cifar10", "test", 1)


SPOILT = {
    "whole": (lambda file: None, True),
    "empty": (lambda file: file.write_bytes(b""), False),
    "no image or table": (lambda file: file.write_text("<html>Not found</html>"), False),
    "a link to nothing": (lambda file: (file.unlink(), file.symlink_to("nowhere")), False),
}


@pytest.mark.parametrize("spoil, fine", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet"])
def test_the_doctor_and_what_is_at_hand_agree_with_the_loader(hub, imagenet_folder, dataset, spoil, fine):
    file = imagenet_folder[0] / imagenet_folder[1][0] if dataset == "imagenet" else hub[0](dataset, "test")
    spoil(file)
    assert at_hand(dataset) == fine
    (found,) = doctor.data_sets([profile(dataset, n_images=1)])
    if fine:
        assert len(load_images(dataset, "test", 1)) == 1
        assert isinstance(found, doctor.Item) and not found.absent
        return
    with pytest.raises((FileNotFoundError, ValueError), match=str(file)):
        load_images(dataset, "test", 1)
    if isinstance(found, doctor.Item):
        assert FILES[dataset].format("test") in found.absent  # and the doctor says how to get it
    else:
        assert found.state == "missing" and str(file) in found.detail
        assert "the profile asks" not in found.detail


def test_a_damaged_image_that_the_profile_would_not_reach_first_is_named_all_the_same(imagenet_folder):
    """A link to nothing or an empty file anywhere in the list is found before a run starts."""
    folder, names = imagenet_folder
    (folder / names[2]).write_bytes(b"")
    for n in (1, 2):
        with pytest.raises(ValueError, match=f"{names[2]} is empty; copy it again"):
            load_images("imagenet", "test", n)
    (folder / names[2]).unlink()
    (folder / names[2]).symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=f"{names[2]} is a link to nothing, or no file; copy it"):
        load_images("imagenet", "test", 1)


def test_shards_that_are_no_parquet_are_not_at_hand(shards, tmp_path):
    assert at_hand("imagenet")
    file = tmp_path / "imagenet" / imagenet.IMAGENET_SHARDS[1]
    for content in (file.read_bytes()[:-9], b"PAR1", b"", b"<html>Not found</html>"):
        file.write_bytes(content)
        assert not at_hand("imagenet")


# ---------------------------------------------------------------- images of more than eight bits


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("dataset", ["cifar10", "imagenet"])
def test_an_image_of_more_than_eight_bits_is_refused_by_name(hub, imagenet_folder, tmp_path, dataset, mode):
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    wide = Image.fromarray(np.full((32, 32), 300, kind))
    file = tmp_path / "wide"
    wide.save(file, "TIFF")
    if dataset == "imagenet":
        name = imagenet_folder[0] / imagenet_folder[1][0]
        name.write_bytes(file.read_bytes())
    else:
        name = f"{hub[0](dataset, 'test')}, row 0"
        table = pd.DataFrame({"img": [{"bytes": file.read_bytes()}], "label": [0]})
        table.to_parquet(hub[0](dataset, "test"))
    says = f"{name}: expected 8 bits a channel, got PIL's mode {mode}; save it with 8 bits"
    with pytest.raises(ValueError, match=says):
        load_images(dataset, "test")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_stay_as_robustbench_reads_them(hub, mode, tmp_path):
    file, noise = tmp_path / "one", np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
    pd.DataFrame({"img": [{"bytes": file.read_bytes()}], "label": [0]}).to_parquet(hub[0]("cifar10", "test"))
    pixels = load_images("cifar10", "test").pixels[0].permute(1, 2, 0)
    assert np.array_equal(pixels, np.array(Image.open(file).convert("RGB")))


# ---------------------------------------------------------------- a user's own images

BLACK = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)


def some(**changes):
    own = {
        "pixels": BLACK,
        "labels": torch.arange(4),
        "indices": torch.arange(4),
        "classes": tuple("abcdefghij"),
        "captions": None,
    }
    return list((own | changes).values())


@pytest.mark.parametrize(
    "error, changes, says",
    [
        (TypeError, {"pixels": BLACK / 255}, "pixels: expected a tensor of torch.uint8, got torch.float32"),
        (TypeError, {"pixels": BLACK.numpy()}, "pixels: expected a tensor of torch.uint8, got ndarray"),
        (ValueError, {"pixels": BLACK.permute(0, 2, 3, 1)}, r"pixels: .*\[n, 3, h, w\], got \[4, 8, 8, 3\]"),
        (ValueError, {"pixels": BLACK[0]}, r"pixels: .* got \[3, 8, 8\]"),
        (ValueError, {"pixels": BLACK[:, :1]}, r"pixels: .* got \[4, 1, 8, 8\]"),
        (
            ValueError,
            {"labels": torch.tensor([0, 1, 99, 10])},
            r"labels\[2\] is 99; expected a class, 0 to 9",
        ),
        (ValueError, {"labels": torch.tensor([0, 9, 8, 10])}, r"labels\[3\] is 10; expected a class, 0 to 9"),
        (ValueError, {"labels": torch.tensor([0, -1, 2, 3])}, r"labels\[1\] is -1"),
        (ValueError, {"labels": torch.tensor([-100, -1, 2, 3])}, r"labels\[0\] is -100"),
        (
            TypeError,
            {"labels": torch.arange(4).int()},
            "labels: expected a tensor of .*int64, got torch.int32",
        ),
        (TypeError, {"labels": torch.arange(4.0)}, "labels: .* got torch.float32"),
        (TypeError, {"labels": [0, 1, 2, 3]}, "labels: .* got list"),
        (ValueError, {"labels": torch.arange(3)}, r"labels: expected one for each of 4 images, got \[3\]"),
        (
            ValueError,
            {"labels": torch.eye(4).long()},
            r"labels: expected one for each of 4 images, got \[4, 4\]",
        ),
        (ValueError, {"indices": torch.tensor([5, 6, 5, 6])}, r"indices\[2\] is 5, as indices\[0\]"),
        (ValueError, {"indices": torch.tensor([0, 1, -2, 3])}, r"indices\[2\] is -2; expected a row"),
        (TypeError, {"indices": torch.arange(4.0)}, "indices: .* got torch.float32"),
        (ValueError, {"indices": torch.arange(5)}, r"indices: expected one for each of 4 images, got \[5\]"),
        (ValueError, {"captions": ("a cat",)}, "captions: expected 4, one an image, got 1"),
        (TypeError, {"captions": "cats"}, "captions: expected a tuple of sentences, got str"),
        (
            TypeError,
            {"captions": ("a cat", "a dog", None, "")},
            r"captions\[2\]: expected a sentence, got None",
        ),
        (TypeError, {"classes": 10}, "classes: expected a tuple of names, got 10"),
        (TypeError, {"classes": ()}, r"classes: expected a tuple of names, got \(\)"),
    ],
    ids=str,
)
def test_own_images_that_cannot_be_are_refused_at_the_door(error, changes, says):
    with pytest.raises(error, match=says):
        Images(*some(**changes))


def test_own_images_can_be_sliced_and_keep_what_they_are():
    images = Images(*some(captions=tuple("wxyz"), indices=torch.tensor([9, 4, 7, 2])), "mine", True)
    mask = images.indices < 5
    positions = [1, 3]
    for part in (
        slice(1, 4, 2),
        positions,
        torch.tensor(positions),
        np.array(positions),
        [-3, -1],
        mask,
        mask.tolist(),
    ):
        two = images[part]
        assert two.indices.tolist() == [4, 2] and two.captions == ("x", "z")
        assert two.source == "mine" and two.official
    assert len(images[:0]) == len(images[[]]) == 0
    with pytest.raises(TypeError, match=r"images\[2\]: .*one image is images\[\[2\]\]"):
        images[2]
    with pytest.raises(ValueError, match=r"indices\[1\] is 4, as indices\[0\]"):
        images[[1, 1]]


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    "error, settings, says",
    [
        (ValueError, {"n": 0}, "n=0: expected n >= 1"),
        (ValueError, {"n": -3}, "n=-3: expected n >= 1"),
        (TypeError, {"n": 2.5}, "n=2.5: expected a whole number, n >= 1"),
        (TypeError, {"n": 2.0}, "n=2.0: expected a whole number"),
        (TypeError, {"n": True}, "n=True: expected a whole number"),
        (TypeError, {"n": "2"}, "n='2': expected a whole number"),
        (ValueError, {"n": 1, "start": -1}, "start=-1: expected start >= 0"),
        (TypeError, {"n": 1, "start": 1.0}, "start=1.0: expected a whole number"),
        (TypeError, {"n": 1, "start": None}, "start=None: expected a whole number"),
        (TypeError, {"n": 1, "start": False}, "start=False: expected a whole number"),
        (ValueError, {"crop": 0}, "crop=0: expected crop >= 1"),
        (TypeError, {"crop": 28.8}, "crop=28.8: expected a whole number"),
    ],
    ids=str,
)
def test_numbers_of_images_that_cannot_be_are_refused(imagenet_folder, error, settings, says):
    for dataset in ("imagenet",) if "crop" in settings else ("toy", "imagenet"):
        with pytest.raises(error, match=says):
            load_images(dataset, "test", **settings)


def test_numpys_whole_numbers_will_do():
    assert load_images("toy", "test", np.int64(2), start=np.int32(1)).indices.tolist() == [1, 2]


def test_the_list_has_each_number_once():
    assert len({imagenet._number(name) for name in imagenet_ids()}) == 2048
