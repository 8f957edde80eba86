"""Images are what their index says, parts of a data set share none, a wrong file is refused by name."""

# ruff: noqa: F401, F811  (fixtures of fake_data_sets)
import hashlib
import itertools
import pickle
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fake_data_sets import BLANK, both, cifars, encoded, equal, real, write_parquet

from checkpoints.captions import PALETTE, pixel_caption
from checkpoints.new_models import new_text_tokenizer
from lgap_utils import data
from lgap_utils.data import CIFAR10_CLASSES, CIFAR100_CLASSES, at_hand, load_images
from lgap_utils.images import Images
from lgap_utils.profiles import SMALL, data_root
from lgap_utils.words import names_class

# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ("mnist", "test", 1),
            r"no data set 'mnist'; choose from \['cifar10', 'cifar100', 'imagenet', 'toy'\]",
        ),
        (("toy", "dev", 1), r"no split 'dev'; choose from \['test', 'train', 'validation'\]"),
        (("toy", "test"), "how many"),
        (("cifar10", "test", None, -1), "start >= 0"),
        (("imagenet", "train"), "imagenet has no split 'train' here, only 'test'"),
        (("toy", "test", 1, 0, 288), "crop=288: only imagenet is cropped, not 'toy'"),
    ],
)
def test_rows_that_cannot_be_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        load_images(*arguments)


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
def test_numbers_of_images_that_cannot_be_are_refused(error, settings, says):
    for dataset in ("imagenet",) if "crop" in settings else ("toy", "imagenet"):
        with pytest.raises(error, match=says):
            load_images(dataset, "test", **settings)


def test_numpys_whole_numbers_will_do():
    assert load_images("toy", "test", np.int64(2), start=np.int32(1)).indices.tolist() == [1, 2]


# ---------------------------------------------------------------- CIFAR-10 and CIFAR-100 in the hub's layout


@both
def test_a_cifar_is_read_row_by_row(cifars, dataset):
    files, pixels = cifars
    test = load_images(dataset, "test")
    assert np.array_equal(test.pixels.permute(0, 2, 3, 1), pixels[:10]) and test.pixels.is_contiguous()
    assert test.indices.tolist() == list(range(10)) and test.captions is None
    labels = {"cifar10": list(range(10)), "cifar100": list(range(99, 89, -1))}[dataset]
    assert test.labels.tolist() == labels and test.labels.dtype == torch.long
    assert test.classes[labels[3]] == {"cifar10": "cat", "cifar100": "willow_tree"}[dataset]
    assert hashlib.sha256(files[dataset].read_bytes()).hexdigest() in test.source
    part = load_images(dataset, "test", 4, start=3)
    assert part.indices.tolist() == [3, 4, 5, 6] and torch.equal(part.pixels, test.pixels[3:7])
    assert at_hand(dataset)
    with pytest.raises(ValueError, match=f"{dataset} test: asked for rows 8 to 10, .*: it has 10"):
        load_images(dataset, "test", 3, start=8)


@both
def test_validation_is_kept_out_of_training(cifars, dataset):
    train, validation = load_images(dataset, "train"), load_images(dataset, "validation")
    assert len(train) == 98 and validation.indices.tolist() == [7, 57]
    assert sorted(train.indices.tolist() + [7, 57]) == list(range(100))
    for part in (train, validation):
        assert np.array_equal(part.pixels.permute(0, 2, 3, 1), cifars[1][part.indices])
        assert torch.equal(part.labels, part.indices % 10 if dataset == "cifar10" else 99 - part.indices)
    assert load_images(dataset, "train", 2, start=6).indices.tolist() == [6, 8]


def rewrite(**columns):
    """Writes another file in place of `file`; the column of labels is called what the data set calls it."""

    def spoil(file):
        names = {"label": "fine_label"} if file.parent.name == "cifar100" else {}
        pd.DataFrame(columns).rename(columns=names).to_parquet(file)

    return spoil


IMAGE = {"bytes": encoded(BLANK)}
SMALL_IMAGE = {"bytes": encoded(BLANK[:28, :28])}
WRONG = {
    "other columns": rewrite(image=[IMAGE], label=[0]),
    "no label": rewrite(img=[IMAGE]),
    "28 x 28": rewrite(img=[SMALL_IMAGE], label=[0]),
    "mixed sizes": rewrite(img=[IMAGE, SMALL_IMAGE], label=[0, 1]),
    "label 100": rewrite(img=[IMAGE], label=[100]),
    "label -1": rewrite(img=[IMAGE], label=[-1]),
    "label as text": rewrite(img=[IMAGE], label=["cat"]),
    "label 0.5": rewrite(img=[IMAGE], label=[0.5]),
    "a label is missing": rewrite(img=[IMAGE] * 2, label=[0, None]),
    "no picture": rewrite(img=[{"bytes": b"<html>Not found</html>"}], label=[0]),
    "half a picture": rewrite(img=[{"bytes": encoded(BLANK)[:60]}], label=[0]),
    "a picture is missing": rewrite(img=[IMAGE, None], label=[0, 1]),
    "pictures without their struct": rewrite(img=[encoded(BLANK)], label=[0]),
    "HTML": lambda file: file.write_text("<html>Not found</html>"),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
}


@both
@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_file_of_another_kind_is_refused_by_name(cifars, spoil, dataset):
    file = cifars[0][dataset]
    spoil(file)
    with pytest.raises(ValueError, match=str(file)):
        load_images(dataset, "test")


@both
@pytest.mark.parametrize("wrong", ["HTML", "empty", "half a picture", "a link to nothing"])
def test_a_damaged_file_is_not_at_hand(cifars, dataset, wrong):
    file = cifars[0][dataset]
    if wrong == "a link to nothing":
        file.unlink()
        file.symlink_to("nowhere")
    else:
        WRONG[wrong](file)
    assert not at_hand(dataset)


def test_label_10_is_refused_where_there_are_ten(cifars):
    rewrite(img=[IMAGE], label=[10])(cifars[0]["cifar10"])
    with pytest.raises(ValueError, match="expected whole numbers from 0 to 9 in the column label"):
        load_images("cifar10", "test")


def test_the_hundred_names_are_in_the_official_order():
    assert len(CIFAR100_CLASSES) == 100 and list(CIFAR100_CLASSES) == sorted(set(CIFAR100_CLASSES))
    names = {0: "apple", 11: "boy", 19: "cattle", 23: "cloud", 49: "mountain", 99: "worm"}
    assert {label: CIFAR100_CLASSES[label] for label in names} == names
    assert data.classes_of("cifar100") == CIFAR100_CLASSES and len(data.classes_of("imagenet")) == 1000
    assert data.classes_of("cifar10") == CIFAR10_CLASSES and data.classes_of("toy")[0] == "circle"


@real("cifar10")
def test_the_real_cifar10():
    parts = {split: load_images("cifar10", split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [49_000, 1000, 10_000]
    assert parts["test"].labels[:4].tolist() == [3, 8, 8, 0]  # cat, ship, ship, airplane
    assert [part.official for part in parts.values()] == [False, False, True]
    assert torch.bincount(parts["test"].labels).tolist() == [1000] * 10
    assert not set(parts["train"].indices.tolist()) & set(parts["validation"].indices.tolist())
    table = pd.read_parquet(data_root() / "cifar10/plain_text/test-00000-of-00001.parquet")
    lossless = [
        cell["bytes"].startswith(b"\x89PNG") or cell["bytes"][8:16] == b"WEBPVP8L"
        for cell in table["img"].head(512)
    ]
    assert all(lossless)  # numbers are measured on these


@real("cifar100")
def test_the_real_cifar100():
    """Names are in the order of labels: the five trees share a coarse label that no other class has."""
    test = load_images("cifar100", "test")
    assert [test.classes[i] for i in test.labels[:4]] == ["mountain", "forest", "seal", "mushroom"]
    assert not set(load_images("cifar100", "validation").indices.tolist()) & set(
        load_images("cifar100", "train").indices.tolist()
    )
    table = pd.read_parquet(data_root() / "cifar100" / data.CIFARS["cifar100"].file.format("test"))
    coarse = table.groupby("fine_label")["coarse_label"].unique().map(tuple)
    trees = {CIFAR100_CLASSES[i] for i in coarse.index[coarse == coarse[CIFAR100_CLASSES.index("oak_tree")]]}
    assert coarse.map(len).max() == 1 and trees == {
        name for name in CIFAR100_CLASSES if name.endswith("_tree")
    }


# ---------------------------------------------------------------- torchvision's CIFAR

KIND = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """Both CIFARs as torchvision unpacks them, 100 and 10 images: {data set: {file: (pixels, labels)}}."""
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
        write_parquet(folder, dataset, split, pixels, labels)


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
    file = tmp_path / kind.base_folder / names[which]
    file.write_bytes(pickle.dumps(Payload()))
    says = (
        f"{file}: missing, or its MD5 is not torchvision's, so nothing there is opened; unpack .*tar.gz again"
    )
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=says):
            load_images(dataset, split)
    file.unlink()
    with pytest.raises(ValueError, match=says):
        load_images(dataset, "test")
    assert not at_hand(dataset) and not Payload.ran
    pickle.loads(pickle.dumps(Payload()))
    assert Payload.ran.pop()  # it would have been noticed


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


# ---------------------------------------------------------------- captions from pixels


def test_a_caption_from_pixels_names_the_class_and_fits(make):
    """Every class, colour and wording, in the tokens of a vocabulary learned from such captions."""
    captions = []
    for rgb in PALETTE.values():
        pixels = torch.tensor(rgb).byte().view(3, 1, 1).expand(3, 32, 32)
        for name, wording in itertools.product(CIFAR10_CLASSES, range(4)):
            captions.append(pixel_caption(pixels, name, wording))
            assert [c for c in CIFAR10_CLASSES if names_class(captions[-1], c)] == [name]
    texts = [f"{SMALL.prompt} {caption}" for caption in captions]
    captioner = make.new_captioner(captions, SMALL, "cpu", width=16, layers=1, text_layers=1)
    assert max(len(ids) for ids in captioner.processor.tokenizer(texts).input_ids) <= SMALL.max_length
    assert len(new_text_tokenizer(captions, SMALL.prompt, 32)(captions[0]).input_ids) < 32


def test_a_caption_from_pixels_says_what_is_there():
    pixels = torch.tensor(PALETTE["white"]).byte().view(3, 1, 1).repeat(1, 32, 32)
    pixels[:, 8:24, 8:24] = torch.tensor(PALETTE["red"]).byte().view(3, 1, 1)
    wordings = [pixel_caption(pixels, "truck", i) for i in range(4)]
    assert wordings[0] == "a red truck on a white background" and len(set(wordings)) == 4
    assert wordings == [pixel_caption(pixels, "truck", i) for i in range(4, 8)] and all(
        "red" in w for w in wordings
    )
    assert "bright" in wordings[1] and "dark" in pixel_caption(pixels // 4, "truck", 1)
