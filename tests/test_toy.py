"""The toy scenes never change, depend on split and index alone, and their captions are true."""

import hashlib

import numpy as np
import pytest
import torch

from lgap_utils import toy
from lgap_utils.data import load_images
from lgap_utils.profiles import TOY
from lgap_utils.words import names_class


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


def test_every_shape_place_and_texture_is_drawn_as_it_was(scenes):
    digest = hashlib.sha256()
    for drawings in scenes.values():
        for image, label, caption in drawings:
            digest.update(image.tobytes() + bytes([label]) + caption.encode())
    assert digest.hexdigest() == ("90847541c2b7855fc6444b56fac8bfac799d4fe42805dfa6a2a856fa55cf0d11")


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
    tokenizer = defense.captioner.processor.tokenizer
    captions = [caption for _, _, caption in scenes["train"]]
    lengths = [len(ids) for ids in tokenizer([f"{TOY.prompt} {caption}" for caption in captions]).input_ids]
    assert 10 < max(lengths) <= TOY.max_length
    assert len(defense.purifier.tokenizer(captions[0]).input_ids) < 32


def test_the_drawings_are_varied_and_in_range(scenes):
    pixels = np.stack([image for image, _, _ in scenes["train"]])
    counts = np.bincount([label for _, label, _ in scenes["train"]], minlength=10)
    assert pixels.shape == (600, 32, 32, 3) and pixels.dtype == np.uint8
    assert counts.min() >= 35 and len({caption for _, _, caption in scenes["train"]}) > 550  # of 60 and 600
    assert np.isin(pixels, (0, 255)).mean() < 0.05 and 20 < pixels.std()


def test_the_ten_shapes_differ_and_stay_in_the_unit_disc():
    v, u = np.mgrid[-1.5:1.5:61j, -1.5:1.5:61j]
    radius = np.hypot(u, v)
    masks = [toy.SHAPES[name](u, v) > 0 for name in toy.CLASSES]
    for i, mask in enumerate(masks):
        assert 0.1 < mask.sum() / (radius < 1).sum() < 0.9 and radius[mask].max() < 1.2
        assert all((mask ^ other).sum() > 0.15 * (mask | other).sum() for other in masks[:i])
