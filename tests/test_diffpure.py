"""The pixel-space rival: diffusers' own loop, autograd, keyed noise, folding, loading."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, EDMEulerScheduler, UNet2DModel

from lgap_utils import baselines, diffpure
from lgap_utils.attacks import full
from lgap_utils.defense import LGAP
from lgap_utils.diffpure import PixelPurifier
from lgap_utils.files import CheckpointError
from lgap_utils.noise import Keys

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
KEYS = Keys([4, 9])


def network(channels=3, **config):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    own = {"sample_size": 8, "in_channels": channels, "out_channels": channels} | config
    return UNet2DModel(**blocks, **sizes, **own)


UNET = network()


def purifier(unet=UNET, **settings):
    return PixelPurifier(unet, DDPMScheduler(), **settings)


def test_from_pure_noise_it_is_diffusers_own_ddim_pipeline(monkeypatch):
    """Of strength 1 nearly nothing of the image is left; the noise is put in the pipeline's place by hand."""
    mine = purifier(strength=1.0, num_inference_steps=5)
    noised = mine.scheduler.add_noise(2 * X - 1, KEYS.normal(X.shape[1:], "noise"), torch.tensor([999, 999]))
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *a, **k: noised)
    pipeline = DDIMPipeline(UNET, DDIMScheduler(timestep_spacing="trailing", clip_sample=False))
    pipeline.scheduler.register_to_config(clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(batch_size=2, num_inference_steps=5, output_type="np", return_dict=False)[0]
    assert torch.allclose(mine(X, [], KEYS).permute(0, 2, 3, 1), torch.from_numpy(out), atol=1e-5)


def test_with_eta_one_a_step_is_the_mean_and_the_variance_of_ddpm():
    mine, ddpm = purifier(strength=0.1, num_inference_steps=1000, eta=1.0), DDPMScheduler(clip_sample=False)
    assert mine.schedule()[0] == 99 and mine.denoiser_calls == 100
    z, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)), 50
    with torch.no_grad():
        mean = ddpm.step(UNET(z, t).sample, t, z, generator=torch.Generator().manual_seed(3)).prev_sample
        drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
        mean = mean - ddpm._get_variance(t) ** 0.5 * drawn
        got = mine.step(z, t, KEYS)
    noise = KEYS.normal(z.shape[1:], f"step {t}")
    assert torch.allclose(got, mean + ddpm._get_variance(t) ** 0.5 * noise, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_gradient_is_that_of_plain_autograd_and_noise_belongs_to_the_image(eta):
    how = {"strength": 0.4, "num_inference_steps": 10, "eta": eta}
    mine, plain = purifier(**how), purifier(checkpointing=False, **how)
    slopes = []
    for each in (mine, plain):
        leaf = X.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(each(leaf, [], KEYS).square().sum(), leaf)
        slopes.append(slope)
    assert torch.equal(*slopes) and slopes[0].abs().min(0).values.max() > 0
    with torch.no_grad():
        both, draws = mine(X, [], KEYS), mine(X, [], KEYS.at([0, 0], 3))
        assert torch.allclose(mine(X[1:], [], KEYS[1:]), both[1:], atol=1e-5)
        assert torch.allclose(draws[::3], both, atol=1e-5) and not torch.allclose(draws[1], draws[0])


def test_a_backward_pass_after_the_settings_changed_is_that_of_the_forward_pass():
    mine, leaf = purifier(strength=0.4, num_inference_steps=10, eta=1.0), X.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(mine(leaf, [], KEYS).square().sum(), leaf)
    loss = mine(leaf, [], KEYS).square().sum()
    with mine.using(num_inference_steps=50, eta=0.0):
        assert mine.denoiser_calls == 20 and mine.settings()["eta"] == 0
        (slope,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(slope, expected) and mine.settings()["num_inference_steps"] == 10


def test_pixels_are_folded_as_the_network_has_channels_for():
    folded = purifier(network(12, sample_size=4), num_inference_steps=10, strength=0.1)
    assert folded.fold == 2 and folded(X, [], KEYS).shape == X.shape
    folded.unet.conv_out.weight.zero_(), folded.unet.conv_out.bias.zero_()  # predicts no noise: it stays
    signal = folded.scheduler.alphas_cumprod[folded.schedule()[0]] ** 0.5
    noise = (1 / signal**2 - 1) ** 0.5 * torch.nn.functional.pixel_shuffle(
        KEYS.normal((12, 4, 4), "noise"), 2
    )
    assert torch.allclose(folded(X, [], KEYS), ((2 * X - 1 + noise) / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_it_is_a_purifier_as_any_other_and_says_what_it_is(defense):
    rival = LGAP(baselines.no_caption, purifier(num_inference_steps=10), defense.classifier)
    x = X.repeat(1, 1, 4, 4)[:, :, :32, :32]
    assert full(rival)(x, KEYS.at([0, 0], 2)).shape == (4, rival(x).shape[1])
    settings = [purifier(**s).settings() for s in ({}, {"eta": 1.0}, {"strength": 0.2})]
    assert len({str(each) for each in settings}) == 3 and settings[0]["strength"] == 0.1


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"eta": 2}, "eta=2: expected 0 .DDIM. to 1"),
        ({"eta": "1"}, "eta='1': expected a number"),
        ({"strength": 0.01}, "gives 0 denoising steps"),
        ({"checkpointing": "no"}, "expected True or False"),
        ({"steps": 5}, "no setting steps; choose from"),
        ({"unet": network(4)}, "4 channels in, 4 out"),
        ({"unet": network(num_class_embeds=2)}, "it wants a class for each image"),
        ({"unet": network(sample_size=None)}, "sample_size=None"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        purifier(**settings)


def test_a_scheduler_without_betas_is_refused_and_one_changed_by_hand_is_known():
    with pytest.raises(ValueError, match="no beta_start"):
        PixelPurifier(UNET, EDMEulerScheduler())
    mine, same = purifier(), purifier()
    assert mine.settings() == same.settings()
    mine.scheduler.alphas_cumprod = mine.scheduler.alphas_cumprod * 0.9
    assert mine.settings() != same.settings()


def test_it_loads_from_the_layout_of_the_hub_and_a_missing_file_is_named(tmp_path):
    UNET.save_pretrained(tmp_path)
    DDPMScheduler(beta_end=0.03).save_pretrained(tmp_path)
    loaded = diffpure.load_rival(str(tmp_path), num_inference_steps=10)
    assert loaded.scheduler.config.beta_end == 0.03
    with torch.no_grad():
        assert torch.allclose(loaded.unet(X, 3).sample, UNET(X, 3).sample, atol=1e-5)
    (tmp_path / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot load the rival"):
        diffpure.load_rival(str(tmp_path))
    with pytest.raises(CheckpointError, match="hub id without a revision"):
        diffpure.load_rival("google/ddpm-cifar10-32")
