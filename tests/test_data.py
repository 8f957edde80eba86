"""Images are what their index says, the parts of a data set share none, and a wrong file is refused by name."""

import hashlib
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from checkpoints.captions import PALETTE, pixel_caption
from checkpoints.new_models import new_text_tokenizer
from lgap_utils import data, imagenet, toy
from lgap_utils.data import CIFAR10_CLASSES, CIFAR100_CLASSES, load_images, validate
from lgap_utils.imagenet import imagenet_classes, imagenet_ids
from lgap_utils.profiles import PROFILES, data_root
from lgap_utils.words import SYNONYMS, names_class

# ---------------------------------------------------------------- the toy scenes


@pytest.fixture(scope="module")
def scenes():
    """Six hundred drawings of each split."""
    return {split: [toy.draw(split, i) for i in range(600)] for split in toy.SPLITS}


def test_the_drawings_never_change(images):
    """Stored numbers belong to these pixels."""
    assert hashlib.sha256(images.pixels.numpy().tobytes()).hexdigest() == (
        "c4fda50c567633770d54932fae7c8eb14b0e4b2aacc2b09b73dc93b1a138d27d"
    )
    assert images.labels.tolist() == [2, 8, 8, 3, 5, 8, 8, 1] and images.captions[0].startswith("a ")


def test_a_drawing_depends_on_its_split_and_index_alone(images):
    state = np.random.get_state()[1].copy()
    part = load_images("toy", "test", 3, start=5)
    assert torch.equal(part.pixels, images.pixels[5:]) and part.captions == images.captions[5:]
    assert part.indices.tolist() == [5, 6, 7] and torch.equal(part.labels, images.labels[5:])
    assert np.array_equal(np.random.get_state()[1], state)


def test_no_drawing_is_in_two_splits(scenes):
    digests = [image.tobytes() for drawings in scenes.values() for image, _, _ in drawings]
    assert len(set(digests)) == len(digests) == 1800


def test_a_caption_names_its_class_and_no_other(scenes):
    for _, label, caption in scenes["train"]:
        assert [name for name in toy.CLASSES if names_class(caption, name)] == [toy.CLASSES[label]]


def test_captions_fit_the_captioner(scenes, defense):
    """In BLIP's `max_length`, prompt included, with its tokens for beginning and end."""
    p, tokenizer = PROFILES["toy"], defense.captioner.processor.tokenizer
    lengths = [len(ids) for ids in tokenizer([f"{p.prompt} {c}" for _, _, c in scenes["train"]]).input_ids]
    assert (
        10 < max(lengths) <= p.max_length
        and len(defense.purifier.tokenizer(scenes["train"][0][2]).input_ids) < 32
    )


def test_the_drawings_are_varied_and_in_range(scenes):
    pixels = np.stack([image for image, _, _ in scenes["train"]])
    counts = np.bincount([label for _, label, _ in scenes["train"]], minlength=10)
    assert pixels.shape == (600, 32, 32, 3) and pixels.dtype == np.uint8
    assert counts.min() >= 35 and len({caption for _, _, caption in scenes["train"]}) > 550  # of 60 and 600
    assert np.isin(pixels, (0, 255)).mean() < 0.05 and 20 < pixels.std()


def test_the_ten_shapes_differ_and_stay_in_the_unit_disc():
    v, u = np.mgrid[-1.5:1.5:61j, -1.5:1.5:61j]
    masks = [toy.SHAPES[name](u, v) > 0 for name in toy.CLASSES]
    assert all(0.1 < mask.sum() / (np.hypot(u, v) < 1).sum() < 0.9 for mask in masks)
    assert all(np.hypot(u, v)[mask].max() < 1.2 for mask in masks)
    assert all((a ^ b).sum() > 0.15 * (a | b).sum() for i, a in enumerate(masks) for b in masks[:i])


def test_images_can_be_sliced(images):
    for part in (slice(2, 5), torch.tensor([2, 3, 4]), images.indices.ge(2) & images.indices.le(4)):
        some = images[part]
        assert some.indices.tolist() == [2, 3, 4] and some.captions == images.captions[2:5] and len(some) == 3
        assert torch.equal(some.x, images.x[2:5]) and some.x.dtype == torch.float32 and some.x.max() <= 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ("mnist", "test", 1),
            r"no data set 'mnist'; choose from \['cifar10', 'cifar100', 'imagenet', 'toy'\]",
        ),
        (("toy", "dev", 1), r"no split 'dev'; choose from \['test', 'train', 'validation'\]"),
        (("toy", "test"), "how many"),
        (("toy", "test", 0), "n >= 1"),
        (("toy", "test", 1, -1), "start >= 0"),
        (("cifar10", "test", None, -1), "start >= 0"),
        (("imagenet", "train"), "imagenet has no split 'train' here, only 'test'"),
    ],
)
def test_rows_that_cannot_be_are_refused(hub, arguments, says):
    with pytest.raises(ValueError, match=says):
        load_images(*arguments)


# ---------------------------------------------------------------- CIFAR-10 and CIFAR-100

FILES = {"cifar10": "plain_text/{}-00000-of-00001.parquet", "cifar100": "cifar100/{}-00000-of-00001.parquet"}
both = pytest.mark.parametrize("dataset", FILES)


def nothing(tmp_path):
    """A folder of data that has none."""
    (tmp_path / "none").mkdir()
    return str(tmp_path / "none")


def encoded(pixels, kind="png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Both data sets in the hub's layout, 100 training and 10 test images each. Returns the files of a split and the training pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    files = lambda dataset, split: tmp_path / dataset / FILES[dataset].format(split)
    for split, n in (("train", 100), ("test", 10)):
        cells = [{"bytes": encoded(image), "path": None} for image in pixels[:n]]
        files("cifar10", split).parent.mkdir(parents=True, exist_ok=True)
        files("cifar100", split).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"img": cells, "label": np.arange(n) % 10}).to_parquet(files("cifar10", split))
        pd.DataFrame({"img": cells, "fine_label": 99 - np.arange(n), "coarse_label": 0}).to_parquet(
            files("cifar100", split)
        )
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    return files, pixels


@both
def test_a_cifar_is_read_row_by_row(hub, dataset):
    files, pixels = hub
    test = load_images(dataset, "test")
    assert (
        np.array_equal(test.pixels.permute(0, 2, 3, 1), pixels[:10])
        and test.pixels.is_contiguous()
        and test.captions is None
    )
    assert test.indices.tolist() == list(range(10))
    labels = {"cifar10": list(range(10)), "cifar100": list(range(99, 89, -1))}[dataset]
    assert test.labels.tolist() == labels and test.labels.dtype == torch.long
    assert test.classes[labels[3]] == {"cifar10": "cat", "cifar100": "willow_tree"}[dataset]
    assert hashlib.sha256(files(dataset, "test").read_bytes()).hexdigest() in test.source
    part = load_images(dataset, "test", 4, start=3)
    assert part.indices.tolist() == [3, 4, 5, 6] and torch.equal(part.pixels, test.pixels[3:7])


@both
def test_validation_is_kept_out_of_training(hub, dataset):
    train, validation = load_images(dataset, "train"), load_images(dataset, "validation")
    assert len(train) == 98 and validation.indices.tolist() == [7, 57]
    assert sorted(train.indices.tolist() + [7, 57]) == list(range(100))
    for part in (train, validation):
        assert np.array_equal(part.pixels.permute(0, 2, 3, 1), hub[1][part.indices])
        assert torch.equal(part.labels, part.indices % 10 if dataset == "cifar10" else 99 - part.indices)
    assert load_images(dataset, "train", 2, start=6).indices.tolist() == [6, 8]


@both
def test_rows_beyond_the_end_are_refused(hub, dataset):
    assert len(load_images(dataset, "test", 2, start=8)) == 2
    for n, start in ((11, 0), (3, 8), (1, 10), (None, 10)):
        with pytest.raises(
            ValueError, match=f"{dataset} test: asked for rows {start} to .*ends before that: it has 10"
        ):
            load_images(dataset, "test", n, start)


@both
def test_a_missing_file_is_named(hub, tmp_path, monkeypatch, dataset):
    hub[0](dataset, "test").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=f"test-00000-of-00001.parquet is missing; expected the layout of .*uoft-cs/{dataset}",
    ):
        load_images(dataset, "test", 1)
    monkeypatch.setenv("LGAP_DATA", nothing(tmp_path))
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        FileNotFoundError, match=f"nor could be fetched from the hub .*set LGAP_DATA .*{dataset}/"
    ):
        load_images(dataset, "test", 1)


@both
def test_the_hub_is_asked_for_one_file_at_a_fixed_revision(hub, tmp_path, monkeypatch, dataset):
    calls = []
    fetch = lambda *args, **kw: calls.append((args, kw)) or str(tmp_path / dataset / args[1])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setenv("LGAP_DATA", nothing(tmp_path))
    monkeypatch.setenv("LGAP_CACHE", "elsewhere")
    with pytest.raises(ValueError, match="is damaged: sha256"):  # it is not the file that the hub has
        load_images(dataset, "test")
    lock(
        monkeypatch,
        tmp_path,
        dataset,
        hashlib.sha256((tmp_path / dataset / FILES[dataset].format("test")).read_bytes()).hexdigest(),
    )
    calls.clear()
    assert len(load_images(dataset, "test")) == 10
    assert calls == [
        (
            (f"uoft-cs/{dataset}", FILES[dataset].format("test")),
            {"repo_type": "dataset", "revision": data.CIFARS[dataset].revision, "cache_dir": "elsewhere"},
        )
    ]


def rewrite(**columns):
    """Writes another file in place of `file`; the column of labels is called what the data set calls it."""
    return lambda file: (
        pd.DataFrame(columns)
        .rename(columns={"label": "fine_label"} if file.parent.name == "cifar100" else {})
        .to_parquet(file)
    )


SOME = np.zeros((32, 32, 3), np.uint8)
WRONG = {
    "other columns": rewrite(image=[{"bytes": encoded(SOME)}], label=[0]),
    "no label": rewrite(img=[{"bytes": encoded(SOME)}]),
    "28 x 28": rewrite(img=[{"bytes": encoded(SOME[:28, :28])}], label=[0]),
    "mixed sizes": rewrite(img=[{"bytes": encoded(SOME)}, {"bytes": encoded(SOME[:28, :28])}], label=[0, 1]),
    "label 100": rewrite(img=[{"bytes": encoded(SOME)}], label=[100]),
    "label -1": rewrite(img=[{"bytes": encoded(SOME)}], label=[-1]),
    "label as text": rewrite(img=[{"bytes": encoded(SOME)}], label=["cat"]),
    "label 0.5": rewrite(img=[{"bytes": encoded(SOME)}], label=[0.5]),
    "a label is missing": rewrite(img=[{"bytes": encoded(SOME)}] * 2, label=[0, None]),
    "no picture": rewrite(img=[{"bytes": b"<html>Not found</html>"}], label=[0]),
    "half a picture": rewrite(img=[{"bytes": encoded(SOME)[:60]}], label=[0]),
    "a picture is missing": rewrite(img=[{"bytes": encoded(SOME)}, None], label=[0, 1]),
    "pictures without their struct": rewrite(img=[encoded(SOME)], label=[0]),
    "HTML": lambda file: file.write_text("<html>Not found</html>"),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
}


def lock(monkeypatch, tmp_path, dataset, digest):
    """A lock file that knows another digest for the test split."""
    cifar = data.CIFARS[dataset]
    known = {
        f"{cifar.repository}@{cifar.revision}": {
            FILES[dataset].format("test"): {"sha256": digest, "size": None}
        }
    }
    (tmp_path / "lock.json").write_text(json.dumps(known))
    monkeypatch.setenv("LGAP_LOCK", str(tmp_path / "lock.json"))


@both
@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_file_of_another_kind_is_refused_by_name(hub, spoil, dataset):
    file = hub[0](dataset, "test")
    spoil(file)
    with pytest.raises(ValueError, match=str(file)):
        load_images(dataset, "test")
    checks = {what: (ok, detail) for what, ok, detail in validate(dataset)}
    assert str(file) in checks[f"{dataset} test: images"][1] and not checks[f"{dataset} test: images"][0]


def test_label_10_is_refused_where_there_are_ten(hub):
    rewrite(img=[{"bytes": encoded(SOME)}], label=[10])(hub[0]("cifar10", "test"))
    with pytest.raises(ValueError, match="expected whole numbers from 0 to 9 in the column label"):
        load_images("cifar10", "test")


def test_the_hundred_names_are_in_the_official_order():
    assert len(CIFAR100_CLASSES) == 100 and list(CIFAR100_CLASSES) == sorted(
        set(CIFAR100_CLASSES)
    )  # it is alphabetical
    assert [CIFAR100_CLASSES[i] for i in (0, 11, 19, 23, 49, 99)] == [
        "apple",
        "boy",
        "cattle",
        "cloud",
        "mountain",
        "worm",
    ]


@both
def test_what_is_validated(hub, monkeypatch, tmp_path, dataset):
    """That a folder is another than the hub's is no fault; another size, other labels and missing files are."""
    checks = {what.removeprefix(dataset): (ok, detail) for what, ok, detail in validate(dataset)}
    assert checks[" test: images"] == (False, "10, expected 10000") and checks[" train: images"] == (
        False,
        "98, expected 49000",
    )
    assert not checks[" test: first labels"][0]
    assert all(
        checks[f" {split}: files"][0] and "other files than the hub's" in checks[f" {split}: files"][1]
        for split in toy.SPLITS
    )
    digest = hashlib.sha256(hub[0](dataset, "test").read_bytes()).hexdigest()
    first = tuple(load_images(dataset, "test", 4).labels.tolist())
    monkeypatch.setitem(data.COUNTS, dataset, {"test": 10})
    monkeypatch.setitem(data.FIRST_LABELS, dataset, first)
    lock(monkeypatch, tmp_path, dataset, digest)
    assert [(ok, "other" in detail) for _, ok, detail in validate(dataset)] == [(True, False)] * 3
    hub[0](dataset, "test").unlink()
    ((what, ok, detail),) = validate(dataset)
    assert not ok and "is missing" in detail


def test_an_unknown_data_set_is_not_validated():
    assert all(ok for _, ok, _ in validate("toy"))
    with pytest.raises(
        ValueError, match=r"no data set 'mnist'; choose from \['cifar10', 'cifar100', 'imagenet', 'toy'\]"
    ):
        validate("mnist")


def real(folder):
    return pytest.mark.skipif(not (data_root() / folder).is_dir(), reason=f"{folder} is not in LGAP_DATA")


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
    """The names are in the order of the labels: the five trees share a coarse label, and no other class has it."""
    test = load_images("cifar100", "test")
    assert [test.classes[i] for i in test.labels[:4]] == ["mountain", "forest", "seal", "mushroom"]
    assert not set(load_images("cifar100", "validation").indices.tolist()) & set(
        load_images("cifar100", "train").indices.tolist()
    )
    table = pd.read_parquet(data_root() / "cifar100" / FILES["cifar100"].format("test"))
    coarse = table.groupby("fine_label")["coarse_label"].unique().map(tuple)
    trees = {CIFAR100_CLASSES[i] for i in coarse.index[coarse == coarse[CIFAR100_CLASSES.index("oak_tree")]]}
    assert coarse.map(len).max() == 1 and trees == {
        name for name in CIFAR100_CLASSES if name.endswith("_tree")
    }


# ---------------------------------------------------------------- ImageNet

KINDS = ("n02123045", "n01440764", "n04146614")  # tabby, tench, school bus: labels 281, 0 and 779


@pytest.fixture
def imagenet_folder(tmp_path, monkeypatch):
    """Six images in class folders, and a list of three of them as the paper's subset. Returns the folder of classes and the list."""
    folder, rng = tmp_path / "imagenet" / "val", np.random.default_rng(0)
    names = [f"{kind}/ILSVRC2012_val_{i:08}.JPEG" for i, kind in enumerate(KINDS * 2)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(
            encoded(rng.integers(0, 256, (40 + 10 * i, 60, 3), dtype=np.uint8), "jpeg")
        )
    monkeypatch.setattr(imagenet, "IMAGENET_IDS", tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("\n".join(names[:3]) + "\n")
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    return folder, names


def test_imagenet_is_the_list_in_its_order_where_all_of_it_is_there(imagenet_folder):
    images = load_images("imagenet", "test")
    assert (
        images.pixels.shape == (3, 3, 224, 224)
        and images.pixels.dtype == torch.uint8
        and images.indices.tolist() == [0, 1, 2]
    )
    assert (
        images.labels.tolist() == [281, 0, 779]
        and images.captions is None
        and "the 3 images of paper/ids.txt" in images.source
    )
    assert (
        images.classes[0].split(", ")[0] == "tench"
        and images.classes[779] == "school bus"
        and len(images.classes) == 1000
    )
    part = load_images("imagenet", "test", 1, start=2)
    assert (
        part.indices.tolist() == [2]
        and torch.equal(part.pixels, images.pixels[2:])
        and part.labels.tolist() == [779]
    )
    assert part.source != images.source  # its checksum is of what was read
    for n, start in ((4, 0), (None, 3)):
        with pytest.raises(ValueError, match="imagenet test: asked for .*ends before that: it has 3"):
            load_images("imagenet", "test", n, start)


def test_another_folder_is_taken_as_it_is_and_says_so(imagenet_folder, monkeypatch):
    folder, names = imagenet_folder
    (folder / names[0]).unlink()
    with pytest.raises(
        ValueError, match=f"1 of the 3 images of paper/ids.txt are missing, e.g. {names[0]}; copy them"
    ):
        load_images("imagenet", "test")
    for name in names[1:3]:
        (folder / name).unlink()
    (folder / ".DS_Store").touch()
    (folder / KINDS[0] / ".hidden.JPEG").touch()
    images = load_images("imagenet", "test")
    assert (
        images.labels.tolist() == [0, 281, 779]
        and "all 3 images in imagenet/val by path, for none of " in images.source
    )
    checks = {what: (ok, detail) for what, ok, detail in validate("imagenet")}
    assert (
        checks["imagenet test: images"] == (False, "3, expected 2048")
        and not checks["imagenet test: first labels"][0]
    )
    assert checks["imagenet test: files"] == (True, images.source)
    monkeypatch.setattr(imagenet, "IMAGENET_MOST", 2)
    with pytest.raises(ValueError, match=r"holds 3 images, too many at once; say how many, n=\.\.\."):
        load_images("imagenet", "test")
    assert len(load_images("imagenet", "test", 3)) == 3


def test_half_of_imagenets_list_is_not_at_hand(imagenet_folder):
    folder, names = imagenet_folder
    assert data.at_hand("imagenet")
    (folder / names[0]).unlink()
    assert not data.at_hand("imagenet")
    for name in names[1:3]:
        (folder / name).unlink()
    assert data.at_hand("imagenet")


def test_pixels_are_those_that_robustbench_evaluates_on(imagenet_folder):
    from lgap_utils.zoo import import_robustbench

    import_robustbench()
    from robustbench.data import PREPROCESSINGS

    images = load_images("imagenet", "test")
    for x, name in zip(images.x, imagenet_folder[1]):
        assert torch.equal(x, PREPROCESSINGS["Res256Crop224"](Image.open(imagenet_folder[0] / name)))
    for x, name in zip(
        load_images("imagenet", "test", crop=288).x, imagenet_folder[1]
    ):  # what Wong et al.'s classifier is shown
        assert x.shape == (3, 288, 288) and torch.equal(
            x, PREPROCESSINGS["Crop288"](Image.open(imagenet_folder[0] / name).convert("RGB"))
        )
    with pytest.raises(ValueError, match="crop=288: only imagenet is cropped, not 'toy'"):
        load_images("toy", "test", 1, crop=288)


def test_grey_and_cmyk_photographs_become_colour(imagenet_folder):
    folder, names = imagenet_folder
    for name, mode in zip(names, ("L", "CMYK")):
        Image.open(folder / name).convert(mode).save(folder / name, "jpeg")
    assert load_images("imagenet", "test").pixels.shape == (3, 3, 224, 224)


def empty(folder):
    for file in (folder / KINDS[1]).iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda folder: next((folder / KINDS[0]).glob("*0.JPEG")).write_text("<html>"),
            "00000000.JPEG: an image cannot be decoded",
        ),
        (
            lambda folder: next((folder / KINDS[0]).glob("*0.JPEG")).write_bytes(encoded(SOME, "jpeg")[:-40]),
            "00000000.JPEG: an image cannot",
        ),
        (empty, f"{KINDS[1]} holds no image"),
        (
            lambda folder: (folder / "cats").mkdir(),
            "cats is named like none of the 1000 classes; expected a WordNet id, e.g. n01440764",
        ),
        (lambda folder: (folder / "n00000001").mkdir(), "n00000001 is named like none"),
        (
            lambda folder: [(folder / kind).rename(folder.parent / kind) for kind in KINDS],
            "val holds no class folder",
        ),
    ],
    ids=["no image", "half an image", "empty class", "a name", "no such id", "no classes"],
)
def test_a_wrong_folder_is_refused_by_name(imagenet_folder, spoil, says):
    spoil(imagenet_folder[0])
    with pytest.raises(ValueError, match=says):
        load_images("imagenet", "test")
    assert [ok for _, ok, _ in validate("imagenet")] == [False]


def test_imagenet_that_is_nowhere_is_said_so(imagenet_folder, tmp_path, monkeypatch):
    imagenet_folder[0].rename(tmp_path / "imagenet" / "validation")
    with pytest.raises(
        FileNotFoundError,
        match="00000-of-00014.parquet is missing; expected .*ILSVRC/imagenet-1k, or imagenet/val/<wnid>",
    ):
        load_images("imagenet", "test")
    monkeypatch.setenv("LGAP_DATA", nothing(tmp_path))
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        FileNotFoundError,
        match="nor could be fetched .*set LGAP_DATA to .*imagenet/val/<wnid>.*gated: accept its terms",
    ):
        load_images("imagenet", "test")


@pytest.fixture
def shards(imagenet_folder, tmp_path, monkeypatch):
    """The same images as the hub has them, in two shards and another order, the class in each file name."""
    folder, names = imagenet_folder
    labels = imagenet_classes()[0]
    rows = [
        {
            "image": {"bytes": (folder / name).read_bytes(), "path": f"{name[10:-5]}_{name[:9]}.JPEG"},
            "label": labels[name[:9]],
        }
        for name in names
    ]
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "imagenet" / "data").mkdir()
    monkeypatch.setattr(
        imagenet, "IMAGENET_SHARDS", tuple(f"data/validation-0000{k}-of-00002.parquet" for k in range(2))
    )
    write = lambda k, rows: pd.DataFrame(rows).to_parquet(tmp_path / "imagenet" / imagenet.IMAGENET_SHARDS[k])
    write(0, rows[:1:-1])
    write(1, rows[:2])
    return rows, write


def test_the_hubs_shards_hold_the_same_images(shards, tmp_path, monkeypatch):
    parquet = load_images("imagenet", "test")
    (tmp_path / "imagenet" / "data").rename(tmp_path / "data")
    calls = []
    fetch = lambda *args, **kw: calls.append((*args, kw["revision"])) or str(tmp_path / args[1])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setenv("LGAP_DATA", nothing(tmp_path))
    hub = load_images("imagenet", "test")
    assert calls == [
        ("ILSVRC/imagenet-1k", name, imagenet.IMAGENET_REVISION) for name in imagenet.IMAGENET_SHARDS
    ]
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    (tmp_path / "elsewhere").rename(tmp_path / "imagenet" / "val")
    folder = load_images("imagenet", "test")
    for images in (parquet, hub):
        assert torch.equal(images.pixels, folder.pixels) and torch.equal(images.labels, folder.labels)
        assert images.source == folder.source and images.official


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda rows: rows[:1], "00000001.JPEG is in none of 2 shards"),
        (
            lambda rows: [rows[0], rows[1] | {"label": 5}],
            "n01440764/ILSVRC2012_val_00000001.JPEG has the label 5, expected 0",
        ),
        (
            lambda rows: [{"image": row["image"] | {"path": None}, "label": 0} for row in rows],
            "00000000.JPEG is in none",
        ),
        (
            lambda rows: [{"picture": row["image"], "label": 0} for row in rows],
            "00001-of-00002.parquet: not a parquet file of image",
        ),
        (
            lambda rows: [rows[0], rows[1] | {"image": rows[1]["image"] | {"bytes": b"no"}}],
            "00000001.JPEG: an image cannot be decoded",
        ),
    ],
    ids=["missing", "label", "no names", "columns", "no image"],
)
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


def test_the_2048_are_the_first_that_robustbench_lists():
    ids, labels = imagenet_ids(), imagenet_classes()[0]
    assert ids == imagenet._packaged("robustbench", "helper_files/imagenet_test_image_ids.txt").split()[:2048]
    assert len(set(ids)) == 2048 and len({name.split("/")[0] for name in ids}) == 869
    assert tuple(labels[name.split("/")[0]] for name in ids[:4]) == data.FIRST_LABELS["imagenet"]


def test_the_labels_are_the_sorted_ids_and_each_has_a_name(monkeypatch):
    labels, classes = imagenet_classes()
    assert sorted(labels) == sorted(labels, key=labels.get) and list(labels.values()) == list(
        range(1000)
    ) == list(range(len(classes)))
    from torchvision.models import ResNet50_Weights

    first = [name.split(",")[0] for name in classes]
    theirs = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    assert sum(a == b for a, b in zip(first, theirs)) > 980  # theirs tell the two cranes apart
    packaged = imagenet._packaged
    monkeypatch.setattr(
        imagenet,
        "_packaged",
        lambda package, name: packaged("no_such_package" if package == "timm" else package, name),
    )
    assert imagenet_classes.__wrapped__()[1] == tuple(labels)
    with pytest.raises(
        FileNotFoundError, match="map.json of the package no_such_package is not installed; pip install"
    ):
        packaged("no_such_package", "map.json")


@real("imagenet")
def test_the_real_imagenet():
    images = load_images("imagenet", "test", 4)
    assert images.pixels.shape == (4, 3, 224, 224) and images.pixels.float().std() > 20
    folders = (
        sorted(p.name for p in (data_root() / "imagenet" / "val").iterdir())
        if (data_root() / "imagenet" / "val").is_dir()
        else []
    )
    if images.source.startswith("all"):
        assert images.labels.tolist() == [imagenet_classes()[0][name] for name in folders[:4]]
    else:
        assert tuple(images.labels.tolist()) == data.FIRST_LABELS["imagenet"]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "caption, named",
    [
        ("a cat on a mat", "cat"),
        ("A Cat!", "cat"),
        ("the cat's bed", "cat"),
        ("a kitten", "cat"),
        ("a small car", "automobile"),
        ("an aircraft", "airplane"),
        ("a boat at sea", "ship"),
        ("dog-like", "dog"),
        ("a caterpillar", None),
        ("a scat singer", None),
        ("shipping", None),
        ("a carpet", None),
        ("a dogma", None),
        ("", None),
    ],
)
def test_a_caption_names_a_class_by_whole_words(caption, named):
    assert [name for name in CIFAR10_CLASSES if names_class(caption, name)] == ([named] if named else [])


SHARK, KIT = "great white shark, white shark, man-eater", "carpenter's kit, tool kit"


@pytest.mark.parametrize(
    "caption, class_name, named",
    [
        ("an aquarium fish", "aquarium_fish", True),
        ("Aquarium-fish.", "aquarium_fish", True),
        ("a goldfish", "aquarium_fish", True),
        ("a fish in an aquarium", "aquarium_fish", False),
        ("an aquarium with fish", "aquarium_fish", False),
        ("fish", "aquarium_fish", False),
        ("a red bell pepper", "sweet_pepper", True),
        ("a bell and pepper", "sweet_pepper", False),
        ("trees and maple", "maple_tree", False),
        ("a white shark", SHARK, True),
        ("the great white shark", SHARK, True),
        ("a man eater", SHARK, True),
        ("a white boat and a shark", SHARK, False),
        ("a shark", SHARK, False),
        ("a white sharkskin", SHARK, False),
        ("a carpenter's kit", KIT, True),
        ("a tool kit", KIT, True),
        ("a kit", KIT, False),
        ("a cat", "", False),
        ("a cat", "3", False),
        ("a cat", ", ,", False),
        ("", "cat", False),
        ("a Cat", "CAT", True),
    ],
)
def test_a_name_of_several_words_is_named_in_a_row(caption, class_name, named):
    assert names_class(caption, class_name) is named


@pytest.mark.parametrize("classes", [CIFAR10_CLASSES, CIFAR100_CLASSES])
def test_no_synonym_belongs_to_two_classes(classes):
    words = [word for name in classes for word in {name, *SYNONYMS.get(name, ())}]
    assert len(words) == len(set(words))
    for name in classes:
        for word in (name, *SYNONYMS.get(name, ())):
            assert [c for c in classes if names_class(f"a {word}.", c)] == [name]


def test_every_synonym_is_of_a_class_there_is():
    assert set(SYNONYMS) <= {*CIFAR10_CLASSES, *CIFAR100_CLASSES}


def test_a_caption_from_pixels_names_the_class_and_fits(make):
    """With every class, colour, brightness and wording, in the tokens of a vocabulary learned from such captions."""
    p, grounds = (
        PROFILES["small"],
        [torch.tensor(rgb).byte().view(3, 1, 1).expand(3, 32, 32) for rgb in PALETTE.values()],
    )
    captions = [
        (name, pixel_caption(ground, name, i))
        for name in CIFAR10_CLASSES
        for ground in grounds
        for i in range(4)
    ]
    for name, caption in captions:
        assert [c for c in CIFAR10_CLASSES if names_class(caption, c)] == [name]
    texts = [f"{p.prompt} {caption}" for _, caption in captions]
    tokenizer = make.new_captioner(
        [c for _, c in captions], p, "cpu", width=16, layers=1, text_layers=1
    ).processor.tokenizer
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= p.max_length
    assert len(new_text_tokenizer([c for _, c in captions], p.prompt, 32)(captions[0][1]).input_ids) < 32


def test_a_caption_from_pixels_says_what_is_there():
    pixels = torch.tensor(PALETTE["white"]).byte().view(3, 1, 1).repeat(1, 32, 32)
    pixels[:, 8:24, 8:24] = torch.tensor(PALETTE["red"]).byte().view(3, 1, 1)
    wordings = [pixel_caption(pixels, "truck", i) for i in range(4)]
    assert wordings[0] == "a red truck on a white background" and len(set(wordings)) == 4
    assert wordings == [pixel_caption(pixels, "truck", i) for i in range(4, 8)] and all(
        "red" in w for w in wordings
    )
    assert "bright" in wordings[1] and "dark" in pixel_caption(pixels // 4, "truck", 1)
