"""Images are what their index says, the parts of a data set share none, and a wrong file is refused by name."""
import hashlib
import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lgap_utils import toy
from lgap_utils.data import CIFAR10_CLASSES, PALETTE, SYNONYMS, load_images, names_class, pixel_caption
from lgap_utils.profiles import PROFILES, data_root

# ---------------------------------------------------------------- the toy scenes


@pytest.fixture(scope="module")
def scenes():
    """Six hundred drawings of each split."""
    return {split: [toy.draw(split, i) for i in range(600)] for split in toy.SPLITS}


def test_the_drawings_never_change(images):
    """Stored numbers belong to these pixels."""
    assert hashlib.sha256(images.pixels.numpy().tobytes()).hexdigest() == (
        "c4fda50c567633770d54932fae7c8eb14b0e4b2aacc2b09b73dc93b1a138d27d")
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
    assert 10 < max(lengths) <= p.max_length and len(defense.purifier.tokenizer(scenes["train"][0][2]).input_ids) < 32


def test_the_drawings_are_varied_and_in_range(scenes):
    pixels = np.stack([image for image, _, _ in scenes["train"]])
    counts = np.bincount([label for _, label, _ in scenes["train"]], minlength=10)
    assert pixels.shape == (600, 32, 32, 3) and pixels.dtype == np.uint8
    assert counts.min() >= 35 and len({caption for _, _, caption in scenes["train"]}) > 550       # of 60 and 600
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


@pytest.mark.parametrize("arguments, says", [
    (("mnist", "test", 1), r"no data set 'mnist'; choose from \['cifar10', 'toy'\]"),
    (("toy", "dev", 1), r"no split 'dev'; choose from \['test', 'train', 'validation'\]"),
    (("toy", "test"), "how many"), (("toy", "test", 0), "n >= 1"), (("toy", "test", 1, -1), "start >= 0"),
    (("cifar10", "test", None, -1), "start >= 0"),
], ids=str)
def test_rows_that_cannot_be_are_refused(hub, arguments, says):
    with pytest.raises(ValueError, match=says):
        load_images(*arguments)


# ---------------------------------------------------------------- CIFAR-10

def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set in the hub's layout: 100 training and 10 test images. Returns its folder and the training pixels."""
    folder = tmp_path / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    for split, n in (("train", 100), ("test", 10)):
        cells = [{"bytes": png(image), "path": None} for image in pixels[:n]]
        pd.DataFrame({"img": cells, "label": np.arange(n) % 10}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    return folder, pixels


def test_cifar10_is_read_row_by_row(hub):
    folder, pixels = hub
    test = load_images("cifar10", "test")
    assert np.array_equal(test.pixels.permute(0, 2, 3, 1), pixels[:10]) and test.pixels.is_contiguous()
    assert test.labels.tolist() == test.indices.tolist() == list(range(10)) and test.classes[3] == "cat"
    digest = hashlib.sha256((folder / "test-00000-of-00001.parquet").read_bytes()).hexdigest()
    assert digest in test.source and test.captions is None
    part = load_images("cifar10", "test", 4, start=3)
    assert part.indices.tolist() == [3, 4, 5, 6] and torch.equal(part.pixels, test.pixels[3:7])


def test_validation_is_kept_out_of_training(hub):
    train, validation = load_images("cifar10", "train"), load_images("cifar10", "validation")
    assert len(train) == 98 and validation.indices.tolist() == [7, 57]
    assert sorted(train.indices.tolist() + [7, 57]) == list(range(100))
    for part in (train, validation):
        assert np.array_equal(part.pixels.permute(0, 2, 3, 1), hub[1][part.indices]) and torch.equal(part.labels, part.indices % 10)
    assert load_images("cifar10", "train", 2, start=6).indices.tolist() == [6, 8]


def test_rows_beyond_the_end_are_refused(hub):
    assert len(load_images("cifar10", "test", 2, start=8)) == 2
    for n, start in ((11, 0), (3, 8), (1, 10), (None, 10)):
        with pytest.raises(ValueError, match=f"cifar10 test: asked for rows {start} to .*ends before"):
            load_images("cifar10", "test", n, start)


def test_a_missing_file_is_named(hub, tmp_path, monkeypatch):
    (hub[0] / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="test-00000-of-00001.parquet is missing; expected the layout of .*uoft-cs/cifar10"):
        load_images("cifar10", "test", 1)
    monkeypatch.setenv("LGAP_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="nor could be fetched from the hub .*set LGAP_DATA"):
        load_images("cifar10", "test", 1)


def rewrite(**columns):
    return lambda file: pd.DataFrame(columns).to_parquet(file)


SOME = np.zeros((32, 32, 3), np.uint8)
WRONG = {
    "other columns": rewrite(image=[{"bytes": png(SOME)}], label=[0]),
    "no label": rewrite(img=[{"bytes": png(SOME)}]),
    "28 x 28": rewrite(img=[{"bytes": png(SOME[:28, :28])}], label=[0]),
    "mixed sizes": rewrite(img=[{"bytes": png(SOME)}, {"bytes": png(SOME[:28, :28])}], label=[0, 1]),
    "label 10": rewrite(img=[{"bytes": png(SOME)}], label=[10]),
    "label -1": rewrite(img=[{"bytes": png(SOME)}], label=[-1]),
    "no picture": rewrite(img=[{"bytes": b"<html>Not found</html>"}], label=[0]),
    "HTML": lambda file: file.write_text("<html>Not found</html>"),
    "half": lambda file: file.write_bytes(file.read_bytes()[:file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_file_of_another_kind_is_refused_by_name(hub, spoil):
    file = hub[0] / "test-00000-of-00001.parquet"
    spoil(file)
    with pytest.raises(ValueError, match=str(file)):
        load_images("cifar10", "test")


@pytest.mark.skipif(not (data_root() / "cifar10").is_dir(), reason="CIFAR-10 is not in LGAP_DATA")
def test_the_real_cifar10():
    parts = {split: load_images("cifar10", split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [49_000, 1000, 10_000]
    assert parts["test"].labels[:4].tolist() == [3, 8, 8, 0]                     # cat, ship, ship, airplane
    assert torch.bincount(parts["test"].labels).tolist() == [1000] * 10
    assert not set(parts["train"].indices.tolist()) & set(parts["validation"].indices.tolist())
    table = pd.read_parquet(data_root() / "cifar10/plain_text/test-00000-of-00001.parquet")
    assert all(cell["bytes"].startswith(b"\x89PNG") for cell in table["img"].head(512))


# ---------------------------------------------------------------- words

@pytest.mark.parametrize("caption, named", [
    ("a cat on a mat", "cat"), ("A Cat!", "cat"), ("the cat's bed", "cat"), ("a kitten", "cat"), ("a small car", "automobile"),
    ("an aircraft", "airplane"), ("a boat at sea", "ship"), ("dog-like", "dog"),
    ("a caterpillar", None), ("a scat singer", None), ("shipping", None), ("a carpet", None), ("a dogma", None), ("", None)])
def test_a_caption_names_a_class_by_whole_words(caption, named):
    assert [name for name in CIFAR10_CLASSES if names_class(caption, name)] == ([named] if named else [])


def test_no_synonym_belongs_to_two_classes():
    words = [word for name in CIFAR10_CLASSES for word in {name, *SYNONYMS.get(name, ())}]
    assert len(words) == len(set(words))


def test_a_caption_from_pixels_names_the_class_and_fits(make):
    """With every class, colour, brightness and wording, in the tokens of a vocabulary learned from such captions."""
    p, grounds = PROFILES["small"], [torch.tensor(rgb).byte().view(3, 1, 1).expand(3, 32, 32) for rgb in PALETTE.values()]
    captions = [(name, pixel_caption(ground, name, i)) for name in CIFAR10_CLASSES for ground in grounds for i in range(4)]
    for name, caption in captions:
        assert [c for c in CIFAR10_CLASSES if names_class(caption, c)] == [name]
    texts = [f"{p.prompt} {caption}" for _, caption in captions]
    tokenizer = make.new_captioner([c for _, c in captions], p, "cpu", width=16, layers=1, text_layers=1).processor.tokenizer
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= p.max_length
    assert len(make.new_text_tokenizer([c for _, c in captions], p.prompt, 32)(captions[0][1]).input_ids) < 32


def test_a_caption_from_pixels_says_what_is_there():
    pixels = torch.tensor(PALETTE["white"]).byte().view(3, 1, 1).repeat(1, 32, 32)
    pixels[:, 8:24, 8:24] = torch.tensor(PALETTE["red"]).byte().view(3, 1, 1)
    wordings = [pixel_caption(pixels, "truck", i) for i in range(4)]
    assert wordings[0] == "a red truck on a white background" and len(set(wordings)) == 4
    assert wordings == [pixel_caption(pixels, "truck", i) for i in range(4, 8)] and all("red" in w for w in wordings)
    assert "bright" in wordings[1] and "dark" in pixel_caption(pixels // 4, "truck", 1)
