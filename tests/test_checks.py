"""What cannot be meant is refused at the door, in one sentence that names it."""

import copy
import itertools
import types
import warnings

import numpy as np
import pytest
import torch
from sums import pale, uniform
from torch import nn

from lgap_utils.checks import check_images
from lgap_utils.defense import LGAP
from lgap_utils.noise import Keys, generator


def with_one(value):
    x = uniform(3, 3, 8, 8)
    x[1, 2, 3, 4] = value
    return x


@pytest.mark.parametrize(
    "x, error, says",
    [
        (np.zeros((1, 3, 8, 8)), TypeError, "torch.Tensor, got ndarray"),
        ((255 * uniform(1, 3, 8, 8)).byte(), TypeError, "uint8"),
        (255 * uniform(1, 3, 8, 8), ValueError, r"span \[.*\], expected \[0, 1\]"),
        (2 * uniform(1, 3, 8, 8) - 1, ValueError, r"span \[-"),
        (with_one(-1e-7), ValueError, r"span \[-1\.0*1?e-07"),
        (with_one(1 + 2e-7), ValueError, r"1\.0000002"),
        (with_one(float("nan")), ValueError, "image 1 of 3 holds NaN"),
        (with_one(float("inf")), ValueError, "image 1 of 3 holds NaN or inf"),
        (uniform(1, 1, 8, 8), ValueError, r"got \[1, 1, 8, 8\]$"),
        (uniform(1, 8, 8, 3), ValueError, "channels-last"),
        (uniform(3, 8, 8), ValueError, r"\[n, 3, height, width\], got \[3, 8, 8\]"),
        (uniform(0, 3, 8, 8), ValueError, "empty"),
    ],
    ids=[
        "array",
        "uint8",
        "0 to 255",
        "-1 to 1",
        "just below 0",
        "just above 1",
        "NaN",
        "inf",
        "grey",
        "channels-last",
        "no batch",
        "empty",
    ],
)
def test_a_bad_image_is_refused_before_anything_runs(x, error, says):
    never = pytest.fail
    with pytest.raises(error, match=f"images: .*{says}"):
        LGAP(never, never, never)(x)


def test_images_that_just_fit_are_taken():
    check_images(torch.tensor([0.0, 1.0, 0.5]).view(1, 3, 1, 1))


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"strength": 0}, "gives 0 denoising steps"),
        ({"strength": 1.5}, "gives 75 denoising steps; expected 1 to 49"),
        ({"strength": 1.0}, "gives 50 denoising steps; expected 1 to 49"),
        ({"strength": 0.1, "num_inference_steps": 4}, "gives 0 denoising steps; expected 1 to 3"),
        ({"strength": -0.1}, "gives -5 denoising steps"),
        ({"time_grid": "ddpm"}, "time_grid='ddpm': choose from"),
        ({"size": 30}, "size=30.*multiple of 4"),
        ({"guidance": 3}, "no setting guidance; choose from"),
        (
            {"guidance_scale": 0},
            "guidance_scale=0: expected at least 1.*at 0 the caption is ignored and two passes are paid",
        ),
        (
            {"guidance_scale": 0.5},
            "guidance_scale=0.5: .*between 0 and 1 it counts less than without guidance",
        ),
        ({"guidance_scale": -2.0}, "guidance_scale=-2.0: .*below 0 images are led away"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: expected a number"),
        ({"guidance_scale": "5"}, "guidance_scale='5': expected a number"),
        ({"strength": float("nan")}, "strength=nan: expected a number"),
        ({"strength": "0.5"}, "strength='0.5': expected a number"),
        ({"num_inference_steps": 50.0}, "num_inference_steps=50.0: expected a whole number"),
        ({"size": "32"}, "size='32': expected a whole number"),
        ({"vae_sample": "False"}, "vae_sample='False': expected True or False"),
        ({"negative_prompt": None}, "negative_prompt=None: expected text"),
        ({"antialias": "no"}, "antialias='no': expected True"),
        ({"checkpointing": 0}, "checkpointing=0: expected True"),
    ],
)
def test_a_bad_setting_is_refused(purifier, images, settings, says):
    old = purifier.settings()
    with pytest.raises(ValueError, match=says), purifier.using(**settings):
        purifier(images.x[:1], ["a ring"])
    assert purifier.settings() == old


@pytest.mark.parametrize("settings", [{"strength": 0}, {"size": 30}, {"time_grid": "ddpm"}])
def test_a_purifier_is_not_built_with_a_bad_setting(purifier, settings):
    p = purifier
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        type(p)(
            p.vae,
            p.unet,
            p.text_encoder,
            p.tokenizer,
            p.scheduler,
            **{"size": 32, "strength": 0.5} | settings,
        )


NETWORKS = {
    "inpainting": (
        "unet",
        {"in_channels": 9},
        r"unet: it has \(9, 4\) channels and the VAE's latents have 4; take a plain",
    ),
    "instructions": ("unet", {"in_channels": 8}, r"unet: it has \(8, 4\) channels"),
    "learned variance": ("unet", {"out_channels": 8}, r"unet: it has \(4, 8\) channels"),
    "other latents": (
        "vae",
        {"latent_channels": 16},
        r"unet: it has \(4, 4\) channels and the VAE's latents have 16",
    ),
    "wider text": (
        "unet",
        {"cross_attention_dim": 768},
        "unet: it reads text of width 768 and the text encoder's is 16",
    ),
    "text of many widths": ("unet", {"cross_attention_dim": (16, 32)}, "unet: it reads text of width 16, 32"),
    "projected text": (
        "unet",
        {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 64},
        "unet: it reads text of width 64",
    ),
    "a class": (
        "unet",
        {"class_embed_type": "timestep"},
        "unet: it takes more than the text of a caption, .*class",
    ),
    "classes": (
        "unet",
        {"num_class_embeds": 1000},
        "unet: it takes more than the text of a caption, .*class",
    ),
    "SDXL": (
        "unet",
        {"addition_embed_type": "text_time"},
        r"unet: it takes more than the text .*'text_time'",
    ),
    "Kandinsky": ("unet", {"encoder_hid_dim_type": "image_proj"}, "unet: it takes more than .*'image_proj'"),
    "shifted latents": ("vae", {"shift_factor": 0.1}, "vae: expected one of RGB images"),
    "grey images": ("vae", {"in_channels": 1}, "vae: expected one of RGB images"),
    "a flow": (
        "scheduler",
        {"prediction_type": "flow_prediction"},
        "prediction_type='flow_prediction': choose from",
    ),
}


@pytest.mark.parametrize("part, changes, says", NETWORKS.values(), ids=NETWORKS)
def test_networks_that_do_not_go_together_are_refused_when_they_load(purifier, part, changes, says):

    parts = {
        name: getattr(purifier, name) for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    }
    parts[part] = copy.deepcopy(parts[part])
    parts[part].register_to_config(**changes)
    with pytest.raises(ValueError, match=says):
        type(purifier)(**parts, size=32, strength=0.5)


def test_a_tokenizer_longer_than_the_text_encoder_is_refused(purifier):

    p, longer = purifier, copy.deepcopy(purifier.tokenizer)
    longer.model_max_length = int(1e30)
    with pytest.raises(
        ValueError,
        match="tokenizer: model_max_length=1000000000000000019884624838656: the text encoder reads 32",
    ):
        type(p)(p.vae, p.unet, p.text_encoder, longer, p.scheduler, size=32, strength=0.5)


@pytest.mark.parametrize(
    "wrong, error",
    [
        (["one"], ValueError),
        ("ab", TypeError),
        ([1, 2], TypeError),
        (["a", None], TypeError),
        (["a", "b", "c"], ValueError),
        ({"a", "b"}, TypeError),
        ({"a": 1, "b": 2}, TypeError),
        (7, TypeError),
        (b"ab", TypeError),
        ([["a"], ["b"]], TypeError),
        (itertools.repeat("a"), ValueError),
        (np.zeros(2), TypeError),
    ],
    ids=[
        "too few",
        "a string",
        "numbers",
        "None",
        "too many",
        "a set",
        "a dict",
        "a number",
        "bytes",
        "lists",
        "endless",
        "an array",
    ],
)
def test_captions_are_one_string_per_image(defense, images, wrong, error):
    with pytest.raises(error, match="captions: "):
        defense.purify(images.x[:2], wrong)
    with pytest.raises(error, match="captions: "):
        LGAP(lambda x: wrong, defense.purifier, defense.classifier).caption(images.x[:2])


@pytest.mark.parametrize(
    "answer",
    [["a", "b"], ("a", "b"), (c for c in "ab"), map(str.lower, "AB"), np.array(["a", "b"])],
    ids=["list", "tuple", "generator", "map", "array"],
)
def test_captions_come_in_whatever_has_an_order(images, answer):
    assert LGAP(lambda x: answer, None, None).caption(images.x[:2]) == ["a", "b"]


def test_a_captioner_that_answers_nothing_is_refused(images):
    with pytest.raises(TypeError, match="captions: expected a list of strings, one per image, got NoneType"):
        LGAP(lambda x: None, pale, None)(images.x[:2])


CALLABLES = {
    "no callable": ("blip-base", TypeError, "expected a callable, got str"),
    "None": (None, TypeError, "expected a callable, got NoneType"),
    "no arguments": (lambda: "", TypeError, r"expected a callable of \(x.*\), this one takes \(\)"),
    "too many": (
        lambda a, b, c, d, e: "",
        TypeError,
        r"expected a callable of \(x.*\), this one takes \(a, b, c, d, e\)",
    ),
}


@pytest.mark.parametrize("role", ["captioner", "purifier", "classifier"])
@pytest.mark.parametrize("part, error, says", CALLABLES.values(), ids=CALLABLES)
def test_a_part_that_cannot_be_called_as_it_will_be_is_refused(images, role, part, error, says):
    parts = {"captioner": lambda x: [""] * len(x), "purifier": pale, "classifier": lambda x: x.flatten(1)} | {
        role: part
    }
    with pytest.raises(error, match=f"{role}: {says}"):
        LGAP(**parts)(images.x[:2])


def test_keys_are_keys(images):
    with pytest.raises(TypeError, match="keys: expected `Keys`, one for each image, got list"):
        LGAP(None, pale, None).purify(images.x[:2], ["", ""], [0, 1])


def test_keys_are_one_per_image(defense, images):
    with pytest.raises(ValueError, match="keys: got 3 for 2 images"):
        defense.purify(images.x[:2], ["", ""], Keys(range(3)))


def test_a_classifier_in_training_mode_is_caught(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    defense = LGAP(lambda x: [""] * len(x), pale, net)
    net.train()
    with pytest.raises(ValueError, match="training mode.*eval"):
        defense(images.x)


@pytest.mark.parametrize("role", ["captioner", "purifier", "classifier"])
@pytest.mark.parametrize(
    "inner, says",
    [
        (nn.Dropout(), r"its `1.0` \(Dropout\) is in training mode"),
        (nn.BatchNorm2d(3), r"its `1.0` \(BatchNorm2d\) is in training mode"),
        (nn.BatchNorm2d(3, track_running_stats=False), r"its `1.0` \(BatchNorm2d\) keeps no running"),
    ],
    ids=["dropout", "batch norm", "no statistics"],
)
def test_a_part_of_a_part_in_training_mode_is_caught_by_name(images, role, inner, says):
    class Part(nn.Sequential):
        def forward(self, x, captions=None, keys=None):
            return {
                "captioner": ["" for _ in x],
                "purifier": super().forward(x),
                "classifier": super().forward(x).flatten(1),
            }[role]

    parts = {"captioner": lambda x: [""] * len(x), "purifier": pale, "classifier": lambda x: x.flatten(1)}
    defense = LGAP(**parts | {role: Part(nn.Identity(), nn.Sequential(inner))})
    if getattr(inner, "track_running_stats", True):
        defense(images.x[:2])  # LGAP switched it to evaluation
        inner.train()
    with pytest.raises(ValueError, match=f"{role}: {says}"):
        defense(images.x[:2])


def test_the_bundled_parts_are_in_evaluation_mode_and_caught_when_they_are_not(defense, images):

    own = copy.deepcopy(defense)
    own.purifier.unet.mid_block.train()
    with pytest.raises(ValueError, match="purifier: its `unet.mid_block` .* is in training mode"):
        own.purify(images.x[:1], [""])


@pytest.mark.parametrize(
    "output, says",
    [
        (None, "NoneType"),
        ((torch.zeros(3, 10), None), "tuple"),
        (np.zeros((3, 10), np.float32), "ndarray"),
        ([1, 2, 3], "list"),
        ({"logits": torch.zeros(3, 10)}, "dict"),
        (types.SimpleNamespace(logits=None), "NoneType"),
        (torch.zeros(3, 10).long(), "torch.int64"),
    ],
    ids=["None", "tuple", "numpy", "list", "dict", "no logits", "whole numbers"],
)
def test_an_answer_of_the_classifier_that_is_no_tensor_is_refused(images, output, says):
    with pytest.raises(
        TypeError, match=rf"classifier: its output is {says}, expected logits \[3, 10\] as a tensor of floats"
    ):
        LGAP(None, pale, lambda x: output, images.classes)(images.x[:3], ["", "", ""])


def test_the_image_whose_logits_are_not_finite_is_named(images):
    logits = torch.zeros(3, 10)
    logits[1, 4] = float("nan")
    defense = LGAP(None, pale, lambda x: logits)
    with pytest.raises(
        ValueError,
        match=r"classifier: its output for image 1 of 3 holds NaN or inf \(key \(7, 41, 'defence', 0, 0\)\)",
    ):
        defense(images.x[:3], ["", "", ""], Keys([40, 41, 42], seed=7))
    with pytest.raises(ValueError, match="image 1 of 3 holds NaN or inf$"):
        defense.classify(images.x[:3])


@pytest.mark.parametrize(
    "output, says",
    [
        (torch.zeros(3, 7), r"\[3, 7\], expected \[3, 10\]"),
        (torch.zeros(3), r"\[3\], expected \[3, 10\]"),
        (torch.zeros(3, 10, 1), r"\[3, 10, 1\], expected \[3, 10\]"),
        (torch.zeros(1, 10), r"\[1, 10\], expected \[3, 10\]"),
        (torch.full((3, 10), float("nan")), "NaN"),
    ],
    ids=["wrong classes", "no classes", "three dimensions", "one row for all", "NaN"],
)
def test_a_wrong_answer_of_the_classifier_is_caught(images, output, says):
    with pytest.raises(ValueError, match=f"classifier: .*{says}"):
        LGAP(None, pale, lambda x: output, images.classes)(images.x[:3], ["", "", ""])


def test_probabilities_in_place_of_logits_are_announced(images):
    logits = uniform(3, 10) * 8 - 4
    with pytest.warns(UserWarning, match="softmax"):
        LGAP(None, pale, lambda x: logits.softmax(1)).classify(images.x[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(LGAP(None, pale, lambda x: logits).classify(images.x[:3]), logits)


def test_a_purified_image_that_is_not_finite_is_named(images):
    def broken(x, captions, keys):
        return x * torch.tensor([1, float("nan"), 1]).view(3, 1, 1, 1)

    with pytest.raises(ValueError, match=r"purified image 1 of 3 holds NaN or inf \(key .*41"):
        LGAP(None, broken, None).purify(images.x[:3], ["", "", ""], Keys([40, 41, 42]))


def darkened(image):
    """The image with a corner well below black: 64 of its 1024 pixels."""
    image = image.clone()
    image[:, :8, :8] = -0.4
    return image


PURIFIERS = {
    "-1 to 1": (
        lambda x, captions, keys: 2 * (x - x.amin()) - 1,
        r"image 1 of 2 is not in \[0, 1\].*looks like an image in \[-1, 1\]",
    ),
    "0 to 255": (
        lambda x, captions, keys: 255 * x,
        r"span \[.*\] \(key .*; it looks like an image in \[0, 255\], divide by 255",
    ),
    "twice": (lambda x, captions, keys: 2 * x, "image 0 of 2 is not in .*clamp or rescale it"),
    "one of two": (
        lambda x, captions, keys: x * torch.tensor([1, -1]).view(2, 1, 1, 1),
        r"image 1 of 2 .* \(key \(0, 41",
    ),
    "-1 to 1, noise": (
        lambda x, captions, keys: 2 * uniform(*x.shape) - 1,
        r"looks like an image in \[-1, 1\]",
    ),
    "twice, noise": (lambda x, captions, keys: 2 * uniform(*x.shape), "clamp or rescale it"),
    "a dark corner": (
        lambda x, captions, keys: x.index_put((torch.tensor(1),), darkened(x[1])),
        r"image 1 of 2 .*in \[-1, 1\]",
    ),
    "normalised": (lambda x, captions, keys: (x - 0.5) / 0.2, "not in"),
    "another shape": (
        lambda x, captions, keys: x[:1],
        r"its output is \[1, 3, 32, 32\], expected \[2, 3, 32, 32\]",
    ),
    "channels last": (lambda x, captions, keys: x.permute(0, 2, 3, 1), r"its output is \[2, 32, 32, 3\]"),
    "None": (lambda x, captions, keys: None, "its output is NoneType, expected .* a tensor of floats"),
    "numpy": (lambda x, captions, keys: x.numpy(), "its output is ndarray, expected .* a tensor of floats"),
    "a tuple": (lambda x, captions, keys: (x, captions), "its output is tuple, expected"),
    "uint8": (lambda x, captions, keys: (255 * x).byte(), "its output is torch.uint8, expected"),
    "bool": (lambda x, captions, keys: x > 0.5, "its output is torch.bool, expected"),
}


@pytest.mark.parametrize("purifier, says", PURIFIERS.values(), ids=PURIFIERS)
def test_an_answer_of_the_purifier_that_is_no_image_is_refused(images, purifier, says):
    with pytest.raises((TypeError, ValueError), match=f"purifier: .*{says}"):
        LGAP(None, purifier, None).purify(images.x[:2], ["", ""], Keys([40, 41]))


@pytest.mark.parametrize("sigma", [0.1, 0.25])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_noise_around_an_image_passes(value, sigma):
    x = torch.full((1, 3, 224, 224), value)
    noisy = x + sigma * torch.randn(x.shape, generator=generator("noise"))
    assert torch.equal(LGAP(None, lambda x, captions, keys: noisy, None).purify(x, [""]), noisy)


@pytest.mark.parametrize(
    "x, says",
    [
        (np.zeros((1, 3, 8, 8), np.float32), "got ndarray"),
        ((255 * uniform(1, 3, 8, 8)).byte(), "got torch.uint8"),
        (255 * uniform(1, 3, 8, 8), "divide by 255"),
        (2 * uniform(1, 3, 8, 8) - 1, r"\[-1, 1\]"),
        (uniform(3, 8, 8), r"\[3, 8, 8\]"),
    ],
)
def test_a_classifier_is_shown_images_alone(x, says):
    """Images of another range would be classified all the same, and wrongly."""
    with pytest.raises((TypeError, ValueError), match=f"images: .*{says}"):
        LGAP(None, None, lambda x: pytest.fail("it was asked")).classify(x)
