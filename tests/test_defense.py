"""Purification is diffusers' image-to-image and DDIM's formula, the same in any batch, and differentiable."""

import contextlib
import copy
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.models.autoencoders import vae as diffusers_vae
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from PIL import Image
from sums import pale, uniform
from torch import nn

from lgap_utils import batches, models
from lgap_utils.batches import kept_bytes
from lgap_utils.defense import LGAP, Trace, noise_schedule
from lgap_utils.images import vae_pixels
from lgap_utils.noise import Keys, generator

WORDS = [
    "a small red circle at the left of a plain blue picture",
    "a ring",
    "",
    "a large star in the middle of a dotted red picture",
]


STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


# ---------------------------------------------------------------- against diffusers and the formula


@pytest.mark.parametrize("strength", [0.5, 0.1])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_it_equals_the_pipeline_of_diffusers(
    purifier, images, monkeypatch, strength, guidance_scale, prediction_type
):
    predicts = {**STABLE_DIFFUSION, "prediction_type": prediction_type}
    monkeypatch.setattr(purifier, "scheduler", models.ddim(predicts))
    p, x, keys = purifier, images.x[:2], Keys([4, 9], seed=3)
    draws = iter([keys.normal((4, 8, 8), "posterior"), keys.normal((4, 8, 8), "noise")])
    for module in (diffusers_vae, img2img):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws))
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **predicts)
    pipeline = StableDiffusionImg2ImgPipeline(
        p.vae,
        p.text_encoder,
        p.tokenizer,
        p.unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        WORDS[:2], x, strength, num_inference_steps=50, guidance_scale=guidance_scale, output_type="pt"
    ).images
    with torch.no_grad(), p.using(strength=strength, guidance_scale=guidance_scale, time_grid="diffusers"):
        purified = p(x, WORDS[:2], keys)
    assert next(draws, None) is None
    assert torch.allclose(purified, expected, rtol=0, atol=1e-4)
    assert ((purified > 0) & (purified < 1)).float().mean() > 0.5 and (purified - x).abs().mean() > 0.05


@pytest.mark.parametrize(
    "strength, time_grid, noise, first, n",
    [
        (0.5, "compvis", 501, 481, 25),
        (0.1, "compvis", 101, 81, 5),
        (0.5, "diffusers", 481, 481, 25),
        (0.1, "diffusers", 81, 81, 5),
    ],
)
def test_the_times_are_those_of_the_two_code_bases(purifier, strength, time_grid, noise, first, n):
    t_noise, times = noise_schedule(purifier.scheduler, strength, 50, time_grid)
    assert t_noise == noise and times == list(range(first, 0, -20)) and len(times) == n


def test_the_noise_schedule_is_that_of_stable_diffusion(purifier):
    assert np.allclose(purifier.scheduler.alphas_cumprod, ALPHA_BAR, atol=1e-5)
    assert [round(float(purifier.scheduler.alphas_cumprod[t]), 3) for t in (501, 481, 101, 81)] == [
        0.275,
        0.302,
        0.893,
        0.917,
    ]


@contextlib.contextmanager
def recorded(module):
    """A list of (inputs, output) of every call of `module` inside the `with`."""
    calls = []
    handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output.sample)))
    yield calls
    handle.remove()


@pytest.mark.parametrize(
    "strength, times", [(0.5, [501, *range(481, 0, -20)]), (0.1, [101, 81, 61, 41, 21, 1])]
)
def test_every_step_is_the_ddim_formula(purifier, images, strength, times, monkeypatch):
    monkeypatch.setattr(purifier, "scheduler", models.ddim(STABLE_DIFFUSION))  # which predicts the noise
    p, x, keys, trace = purifier, images.x[:2], Keys(range(2)), Trace()
    with torch.no_grad(), p.using(strength=strength), recorded(p.unet) as calls:
        purified = p(x, WORDS[:2], keys, trace)
    assert trace.times == times and [int(inputs[1]) for inputs, _ in calls] == times[1:]

    with torch.no_grad():
        posterior = p.vae.encode(2 * x - 1).latent_dist
        z = (
            posterior.mean + posterior.std * keys.normal((4, 8, 8), "posterior")
        ) * p.vae.config.scaling_factor
    t = times[0]
    z = ALPHA_BAR[t] ** 0.5 * z + (1 - ALPHA_BAR[t]) ** 0.5 * keys.normal((4, 8, 8), "noise")
    assert torch.allclose(trace.latents[0], z, atol=1e-5)
    for t, before, after, (_, output) in zip(times[1:], trace.latents, trace.latents[1:], calls):
        without, with_caption = output.chunk(2)
        eps = without + 5 * (with_caption - without)
        a, a_next = ALPHA_BAR[t], ALPHA_BAR[max(t - 20, 0)]
        x0 = (before - (1 - a) ** 0.5 * eps) / a**0.5
        assert torch.allclose(after, a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        decoded = p.vae.decode(trace.latents[-1] / p.vae.config.scaling_factor).sample
    assert torch.allclose(purified, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_the_trace_does_not_change_the_result(purifier, images):
    x, keys, trace = images.x[:1], Keys([0]), Trace()
    with torch.no_grad(), purifier.using(strength=0.1):
        assert torch.equal(purifier(x, ["a ring"], keys, trace), purifier(x, ["a ring"], keys))
    assert len(trace.denoised) == 5 and all(
        d.shape == x.shape and 0 <= d.min() and d.max() <= 1 for d in trace.denoised
    )


def test_the_caption_and_the_negative_prompt_guide(purifier, images):
    x, keys = images.x[:1], Keys([0])
    with torch.no_grad(), purifier.using(strength=0.1):
        one, other = purifier(x, ["a large red star"], keys), purifier(x, ["a small blue ring"], keys)
        with purifier.using(negative_prompt="a small blue ring"):
            away = purifier(x, ["a large red star"], keys)
    assert (one - other).abs().max() > 1e-3 and (one - away).abs().max() > 1e-3


def test_without_sampling_the_latent_is_the_mode(purifier, images):
    x = images.x[:2]
    with torch.no_grad(), purifier.using(vae_sample=False):
        z = purifier.encode(x, Keys([0, 1]))
        assert torch.equal(
            z, purifier.vae.encode(2 * x - 1).latent_dist.mode() * purifier.vae.config.scaling_factor
        )


# ---------------------------------------------------------------- the authors' departures


def test_the_vae_can_be_shown_what_blip_is_shown(defense, images):
    x, purifier = images.x[:3], defense.purifier
    assert torch.equal(vae_pixels(x, [0, 1, 2], purifier.vae_input), 2 * x - 1)
    with purifier.using(vae_input="clip"):
        assert torch.allclose(
            vae_pixels(x, [0, 1, 2], purifier.vae_input), defense.captioner.pixel_values(x), atol=1e-6
        )
    with pytest.raises(ValueError, match="vae_input='other': choose from"), purifier.using(vae_input="other"):
        pass


def test_the_authors_slip_runs_over_the_batch_and_not_the_channels(purifier):
    """Images 0 to 36 in batches of 32, each zipped with the three means; an image's index is its place."""
    x = torch.rand(37, 3, 4, 4, generator=generator("slip"))
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    expected = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for batch in expected.split(32):
        for image, m, s in zip(batch, mean, std):
            image.mul_(s).add_(m)
    with purifier.using(vae_input="authors"):
        assert torch.equal(vae_pixels(x, list(range(37)), "authors"), expected)
        assert all(
            torch.equal(vae_pixels(x[i : i + 1], [i], "authors")[0], expected[i])
            for i in (0, 2, 3, 31, 32, 34, 35)
        )  # in any batch
        with torch.no_grad():
            assert not torch.allclose(
                purifier.encode(x[:1, :, :4], Keys([0])), purifier.encode(x[:1, :, :4], Keys([3])), atol=1e-3
            )


def test_half_precision_networks_leave_latents_single(purifier, images):

    half, trace = copy.deepcopy(purifier).to(torch.bfloat16), Trace()
    with torch.no_grad(), half.using(strength=0.1):
        out = half(images.x[:2], ["a large red star"] * 2, Keys([0, 1]), trace)
    assert out.dtype == images.x.dtype == torch.float32 and all(
        z.dtype == torch.float32 for z in trace.latents
    )
    x = images.x[:1].clone().requires_grad_(True)
    with half.using(strength=0.1):
        half(x, ["a large red star"], Keys([0])).square().sum().backward()
    assert x.grad.abs().sum() > 0 and torch.isfinite(x.grad).all()


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("keys", [Keys(range(8), seed=1), None], ids=["index keys", "content keys"])
def test_batch_size_and_order_change_nothing(defense, images, keys):
    """Captions, images and logits of one batch of 8, of 3, 3 and 2, of single images, and backwards."""

    def run(order):
        captions = defense.caption(images.x[order])
        x = defense.purify(images.x[order], captions, keys and keys[order])
        return captions, x, defense.classify(x)

    with torch.no_grad(), defense.purifier.using(num_inference_steps=20):
        captions, purified, logits = run(list(range(8)))
        for size in (1, 3):
            parts = [run(list(range(i, min(i + size, 8)))) for i in range(0, 8, size)]
            assert sum((part[0] for part in parts), []) == captions
            assert torch.allclose(
                torch.cat([part[1] for part in parts]), purified, rtol=0, atol=1e-4
            )  # 25 steps of rounding
            assert torch.allclose(torch.cat([part[2] for part in parts]), logits, rtol=0, atol=1e-3)
        backwards = run(list(range(7, -1, -1)))
    assert backwards[0] == captions[::-1] and torch.allclose(
        backwards[1].flip(0), purified, rtol=0, atol=1e-4
    )


def test_seeds_matter_and_the_global_generators_do_not(defense, images):
    x = images.x[:2]
    with torch.no_grad(), defense.purifier.using(strength=0.1):
        torch.manual_seed(4321)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        first = defense(x)
        assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(
            np.random.get_state()[1], before[1]
        )
        torch.manual_seed(1)
        assert torch.equal(defense(x), first)
        one, other = (defense.purify(x, WORDS[:2], Keys.of_content(x, seed)) for seed in (0, 1))
    assert (one - other).flatten(1).abs().amax(1).min() > 1e-3


# ---------------------------------------------------------------- gradients


@pytest.fixture
def wide():
    """Two images larger than the working size, and a direction to weigh the output with."""
    return 0.2 + 0.6 * uniform(2, 3, 24, 24).double(), uniform(2, 3, 24, 24).double() - 0.5


def gradient(purifier, x, direction, captions=WORDS[:2]):
    x = x.clone().requires_grad_()
    purified = LGAP(None, purifier, nn.Identity()).purify(x, captions, Keys(range(len(x))))
    return torch.autograd.grad((purified * direction).sum(), x)[0]


def test_the_gradient_is_that_of_finite_differences(exact, wide):
    x, direction = wide
    keys, h = Keys([0, 1]), 1e-5
    value = lambda x: (exact(x, WORDS[:2], keys) * direction).sum()
    with torch.no_grad():
        purified = exact(x, WORDS[:2], keys)
    assert 0 < purified.min() and purified.max() < 1  # the clamp is not touched
    slope = gradient(exact, x, direction)
    for seed in range(3):
        step = torch.randn(x.shape, dtype=x.dtype, generator=generator("direction", seed))
        with torch.no_grad():
            measured = (value(x + h * step) - value(x - h * step)) / (2 * h)
        # beside the size of both factors: of a sum that nearly cancels, rounding leaves few digits
        assert torch.isclose(
            (slope * step).sum(), measured, rtol=1e-5, atol=1e-6 * (slope.norm() * step.norm()).item()
        )


def test_checkpointing_leaves_the_gradient_as_it_is(exact, wide, monkeypatch):
    with exact.using(checkpointing=True):
        recomputed = gradient(exact, *wide)
    assert recomputed.flatten(1).abs().amax(1).min() > 0
    with exact.using(checkpointing=False):
        assert torch.equal(gradient(exact, *wide), recomputed)
    asked, room = [], iter([True, True, False, True] + 99 * [False])
    monkeypatch.setattr(batches, "has_room", lambda n, device: asked.append(n) or next(room))
    assert torch.equal(gradient(exact, *wide), recomputed)
    assert len(asked) == len(exact.schedule()[1]) + 2 and len(set(asked)) == 3 and min(asked) > 0


@pytest.mark.parametrize("part", ["encode", "step", "decode"])
def test_what_autograd_keeps_is_known_from_one_image(exact, wide, part):
    x = exact.at_working_size(wide[0]).detach()
    z, text, keys = torch.randn(2, 4, 4, 4, dtype=x.dtype), exact.embed([""] * 4), Keys([0, 1])
    args = {"encode": (x, keys), "step": (z, 481, text), "decode": (z,)}[part]
    function, asked = getattr(exact, part), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "has_room", lambda n, device: asked.append(n))
        exact._kept.fits(function, args, list(exact.parameters()))
    leaf = args[0].requires_grad_()
    assert asked[0] == pytest.approx(
        kept_bytes(lambda: function(leaf, *args[1:]), exact.parameters()), rel=0.05
    )


@pytest.mark.parametrize(
    "later",
    [{"num_inference_steps": 25}, {"guidance_scale": 1.0}, {"vae_input": "clip"}, {"vae_sample": False}],
)
def test_the_gradient_is_that_of_the_settings_it_was_built_with(exact, wide, later):
    """The backward pass recomputes, also where the settings have changed meanwhile."""
    x, direction = wide
    expected, built = gradient(exact, x, direction), x.clone().requires_grad_()
    loss = (exact(built, WORDS[:2], Keys([0, 1])) * direction).sum()
    with exact.using(**later):
        with torch.no_grad():
            exact(x, WORDS[:2], Keys([0, 1]))
        assert torch.equal(torch.autograd.grad(loss, built, retain_graph=True)[0], expected)
    assert torch.equal(torch.autograd.grad(loss, built)[0], expected)


def test_an_image_has_no_gradient_from_its_neighbour(exact, wide):
    x, direction = wide
    direction[1] = 0
    slope = gradient(exact, x, direction)
    assert slope[0].abs().max() > 0 and slope[1].abs().max() == 0


def test_the_weights_are_frozen_and_captioning_carries_no_gradient(defense, images):
    assert not any(p.requires_grad for p in defense.parameters())
    x = images.x[:1].requires_grad_()
    with defense.purifier.using(strength=0.02):
        own = torch.autograd.grad(defense(x).sum(), x)[0]
        given = torch.autograd.grad(defense(x, defense.caption(x)).sum(), x)[0]
    assert torch.equal(own, given) and own.abs().max() > 0


def test_with_checkpointing_memory_does_not_grow_with_the_steps(exact, wide):
    def saved(n_steps, checkpointing):
        """Bytes kept for the backward pass."""
        kept = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
        )
        with exact.using(strength=n_steps / 50, checkpointing=checkpointing), hooks:
            exact(wide[0].clone().requires_grad_(), WORDS[:2], Keys([0, 1]))
        return sum(t.nbytes for t in kept.values())

    latent = 2 * 4 * 4 * 4 * 8  # bytes of z, which each step needs to start again
    assert saved(5, True) - saved(1, True) <= 4 * 2 * latent
    assert saved(5, False) - saved(1, False) > 4 * 100 * latent


# ---------------------------------------------------------------- bad inputs


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_what_ddim_can_step_with_is_taken(purifier, images, prediction_type):
    p, scheduler = purifier, models.ddim({**STABLE_DIFFUSION, "prediction_type": prediction_type})
    own = type(p)(p.vae, p.unet, p.text_encoder, p.tokenizer, scheduler, size=32, strength=0.02)
    with torch.no_grad():
        assert torch.isfinite(own(images.x[:1], ["a ring"], Keys([0]))).all()


def test_a_step_that_truncates_counts_as_both_code_bases_count(purifier):
    assert len(noise_schedule(purifier.scheduler, 0.29, 100)[1]) == 28
    assert noise_schedule(purifier.scheduler, 1.0, 50, "diffusers")[0] == 981


def test_settings_come_back_after_a_failure(purifier):
    old = purifier.settings()
    with pytest.raises(KeyError), purifier.using(strength=0.1, size=16):
        raise KeyError
    assert purifier.settings() == old


def test_a_purifier_that_cannot_be_traced_says_so(images):
    defense = LGAP(lambda x: [""], pale, lambda x: x.flatten(1))
    assert defense.purify_one(images.x[0]).trace is None
    with pytest.raises(
        TypeError,
        match=r"purifier: expected a callable of \(x, captions, keys, trace\), this one takes \(x, capt",
    ):
        defense.purify_one(images.x[0], with_trace=True)


@pytest.mark.parametrize(
    "caption",
    ["", "red " * 300, "a\x00b\n\t\x1b[31m", r"\frac{1}{2} & 50\% $x_0$", "ein Bär 猫"],
    ids=["empty", "300 words", "control characters", "LaTeX", "not English"],
)
def test_strange_captions_are_no_reason_to_stop(purifier, images, caption):
    cut = purifier.truncated
    with torch.no_grad(), purifier.using(strength=0.02), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.isfinite(purifier(images.x[:1], [caption], Keys([0]))).all()
    assert purifier.truncated - cut == (caption.count("red") == 300)


def test_a_cut_caption_is_counted_and_announced(purifier):
    before, fits, long = purifier.truncated, "red " * 30, "red " * 31  # 32 tokens, two of them begin and end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exactly = purifier.embed([fits])
    with pytest.warns(UserWarning, match="2 of 3 captions were cut to the text encoder's 32 tokens"):
        cut = purifier.embed([long, fits, long + "star"])
    assert purifier.truncated - before == 2
    assert torch.allclose(cut[0], exactly[0], atol=1e-5)  # what was cut is the end


# ---------------------------------------------------------------- a user's own parts


def test_any_callables_make_a_defence(images):
    seen = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).train()
    defense = LGAP(lambda x: seen.append(x) or ["thing"] * len(x), pale, net, images.classes)
    x = images.x[:3].requires_grad_()
    assert torch.equal(defense(x), net(x * 0.5))
    assert defense.caption(x) == ["thing"] * 3 and not net.training
    assert all(torch.equal(x, s) and not s.requires_grad for s in seen)


def test_what_the_classifier_sees_is_an_image(defense, images):
    seen = []
    with torch.no_grad(), defense.purifier.using(strength=0.1):
        LGAP(defense.captioner, defense.purifier, lambda x: seen.append(x) or torch.zeros(len(x), 10))(
            images.x[:2]
        )
    assert (
        seen[0].shape == (2, 3, 32, 32) and seen[0].min() >= 0 and seen[0].max() <= 1 and seen[0].max() > 0.5
    )


def test_a_classifier_may_answer_as_those_of_transformers_do(images):
    from transformers.modeling_outputs import ImageClassifierOutput

    logits = uniform(3, 10) * 8 - 4
    defense = LGAP(None, pale, lambda x: ImageClassifierOutput(logits=logits), images.classes)
    assert torch.equal(defense(images.x[:3], ["", "", ""]), logits)


@pytest.mark.parametrize("draws", [1, 2])
def test_a_part_that_works_in_place_spoils_nothing_for_others(images, draws):
    x, keys = images.x[:2].requires_grad_(), Keys([0, 1]).at([0, 0], draws)
    before = x.detach().clone()
    defense = LGAP(
        lambda x: ["a ring"] * len(x.mul_(0)),
        lambda x, captions, keys: x.mul_(0.5).add_(0.25),
        lambda x: x.sub_(0.5).flatten(1)[:, :10],
    )
    y = x * 1  # no leaf: in place would be allowed
    assert defense.caption(y) == ["a ring"] * 2
    purified = defense.purify(y, None, keys)
    shown = purified.detach().clone()
    logits = defense.classify(purified)
    assert torch.equal(y, before) and torch.equal(purified, shown)
    assert torch.equal(purified, (before * 0.5 + 0.25).repeat_interleave(draws, 0))
    slope = torch.autograd.grad(logits.sum(), x)[0]
    assert (
        torch.equal(slope.flatten(1)[:, :10], torch.full((2, 10), 0.5 * draws))
        and not slope.flatten(1)[:, 10:].any()
    )
    with torch.no_grad():
        plain = images.x[:2]
        defense(plain)
        assert torch.equal(plain, before)


# ---------------------------------------------------------------- one image from anywhere


def test_purify_one_is_the_defence_on_a_batch_of_one(defense, images):
    with torch.no_grad(), defense.purifier.using(strength=0.1):
        one = defense.purify_one(images.pixels[0].permute(1, 2, 0).numpy(), seed=4, with_trace=True)
        x = images.x[:1]
        assert torch.equal(one.image, defense.purify(x, [one.caption], Keys.of_content(x, 4))[0])
        assert torch.equal(one.logits, defense.classify(one.image[None])[0])
    assert one.label == one.logits.argmax() and len(one.trace.latents) == 6


def test_an_image_of_any_size_goes_through_the_bundled_defence(tmp_path):
    Image.new("RGB", (90, 70), (200, 40, 40)).save(tmp_path / "cat.png")
    result = models.load_defense("toy").purify_one(tmp_path / "cat.png")
    assert (
        result.image.shape == (3, 70, 90) and result.logits.shape == (10,) and isinstance(result.caption, str)
    )
