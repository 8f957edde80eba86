"""Cheap purifiers: each gives an image for an image and says what it is."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lgap_utils import baselines
from lgap_utils.attacks import full
from lgap_utils.baselines import with_purifier
from lgap_utils.defense import LGAP
from lgap_utils.identity import identity
from lgap_utils.noise import Keys

BASELINES = {
    "nothing": lambda p: baselines.undefended(),
    "resized": lambda p: baselines.resized(16),
    "blur": lambda p: baselines.blur(2),
    "jpeg": lambda p: baselines.jpeg(50),
    "vae_round_trip": baselines.vae_round_trip,
    "without_caption": baselines.without_caption,
}


@pytest.mark.parametrize("vae_sample", [True, False], ids=["sample", "mode"])
@pytest.mark.parametrize("name", BASELINES)
def test_a_cheap_purifier_gives_an_image_for_an_image_and_says_whether_it_draws(
    defense, purifier, images, name, vae_sample
):
    x, keys = torch.cat([images.x[:2, :, 4:28], torch.ones(1, 3, 24, 32)]), Keys(range(3))
    with torch.no_grad(), purifier.using(num_inference_steps=50, strength=0.04, vae_sample=vae_sample):
        cheap = BASELINES[name](purifier)
        out = with_purifier(defense, cheap).purify(x, keys=keys)
        assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
        assert torch.equal(out, x) == (name == "nothing") and len(set(cheap.settings()) & {"purifier"}) == 1
        others = cheap(x, ["a ring"] * 3, Keys(range(3), seed=1))
        assert torch.equal(others, out) == (not cheap.random) and cheap.random == (
            {"vae_round_trip": vae_sample, "without_caption": True}.get(name, False)
        )
        alone = torch.cat([cheap(x[i : i + 1], [""], keys[i : i + 1]) for i in range(3)])
        assert torch.allclose(alone, out, rtol=0, atol=1e-5)


def test_two_cheap_purifiers_never_share_a_configuration(purifier):
    settings = [make(purifier).settings() for make in BASELINES.values()] + [
        purifier.settings(),
        baselines.blur(1).settings(),
    ]
    assert all(settings.count(one) == 1 for one in settings)


def test_jpeg_is_that_of_pil(images):
    file = io.BytesIO()
    Image.fromarray(images.pixels[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    between = (images.pixels[:2] - 0.4).clamp(
        0
    ) / 255  # pixels that are not on the grid go to the nearest that is
    for x in (images.x[:2], between):
        assert torch.equal(baselines.jpeg(40)(x, None, None)[0], expected)


def test_blur_is_a_gaussian_and_the_resize_takes_the_size_it_is_given():
    x = torch.zeros(1, 3, 15, 15)
    x[..., 7, 7] = 1
    weight = torch.exp(-(torch.arange(-3, 4) ** 2) / 2)
    expected = torch.outer(weight, weight) / weight.sum() ** 2
    assert torch.allclose(baselines.blur(1)(x, None, None)[0, 0, 4:11, 4:11], expected, atol=1e-6)
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 3, 8, 8) / 64
    assert torch.allclose(baselines.resized(1)(x, None, None), x.mean(), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["black", "white"])
@pytest.mark.parametrize("name", ["blur", "resized"])
def test_a_saturated_image_keeps_its_gradient(name, value):
    x, grey = (torch.full((1, 3, 32, 32), v, requires_grad=True) for v in (value, 0.5))
    slope, plain = (
        torch.autograd.grad(BASELINES[name](None)(image, None, None).sum(), image)[0] for image in (x, grey)
    )
    assert torch.allclose(slope, plain, rtol=0, atol=1e-5) and plain.min() > 0


def test_without_a_caption_it_is_the_same_diffusion_with_an_empty_one_and_no_guidance(purifier, images):
    x, keys = images.x[:2], Keys(range(2))
    with torch.no_grad(), purifier.using(num_inference_steps=50, strength=0.04, guidance_scale=5.0):
        old = purifier.settings()
        found = baselines.without_caption(purifier)(x, ["a large red star", "a ring"], keys)
        assert purifier.settings() == old
        with purifier.using(guidance_scale=1.0):
            assert torch.equal(found, purifier(x, ["", ""], keys))
        assert not torch.allclose(found, purifier(x, ["a large red star", "a ring"], keys), atol=1e-3)
        with pytest.raises(TypeError):
            baselines.without_caption(purifier)(x, None, None, "one argument too many")
        assert purifier.settings() == old


def test_beside_stand_all_of_them_with_the_defence_first(defense, images):
    defenses = baselines.with_baselines(defense, 32)
    settings = [identity(other.purifier)["is"] for other in defenses.values()]
    assert (
        next(iter(defenses.values())) is defense
        and all(settings.count(one) == 1 for one in settings)
        and len(settings) == len(BASELINES) + 1
    )
    assert all(other.classifier is defense.classifier for other in defenses.values())


def test_another_purifier_stands_before_the_same_classifier_and_captions_nothing(defense, images):
    other = with_purifier(defense, baselines.undefended())
    assert other.caption(images.x[:3]) == [""] * 3 and other.classes == defense.classes
    with torch.no_grad():
        assert torch.equal(other(images.x[:3]), defense.classify(images.x[:3]))


def test_a_captioner_that_was_told_says_it_of_each_image_under_every_view(defense, purifier, images):
    told = baselines.Told({7: "a red ring", 9: "a blue disc"}, "true class")
    mine, keys = LGAP(told, purifier, defense.classifier), Keys([9, 7])
    x = images.x[:2]
    assert mine.caption(x, keys) == ["a blue disc", "a red ring"]
    with torch.no_grad():
        expected = mine.purify(x, ["a blue disc", "a red ring"], keys.at([0, 0], 2))
        assert torch.equal(mine.purify(x, keys=keys.at([0, 0], 2)), expected)
        assert torch.equal(full(mine)(x, keys.at([0, 0], 2)), mine.classify(expected))
    assert full(mine).captioned(x, [9, 7]).captions == {9: "a blue disc", 7: "a red ring"}
    assert identity(told) != identity(baselines.Told({7: "a red ring"}, "true class"))
    with pytest.raises(ValueError, match="true class: no caption for image 8"):
        mine.caption(x, Keys([7, 8]))
