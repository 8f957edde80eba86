"""Each part of the bundled models learns what it should."""

import copy
import math

import pytest
import torch
from torch import nn

from checkpoints import pretrain
from checkpoints.new_models import new_captioner, new_vae
from lgap_utils import identity, train
from lgap_utils.data import load_images
from lgap_utils.noise import generator


@pytest.fixture
def net(defense):
    return copy.deepcopy(defense.classifier)


def test_a_classifier_learns_four_scenes_by_heart(net, images, tmp_path):
    some, how = images[:4], {"batch_size": 4, "optimizer": "adam", "weight_decay": 0, "augment": False}
    expected = nn.functional.cross_entropy(copy.deepcopy(net).train()(some.x), some.labels)
    net.requires_grad_(True)
    (first,) = pretrain.train_classifier(copy.deepcopy(net), some, tmp_path / "one step", epochs=1, **how)
    assert math.isclose(first["loss"], expected, rel_tol=1e-4)
    rows = pretrain.train_classifier(net, some, tmp_path / "all", epochs=40, lr=0.01, **how)
    assert train.accuracy(net, some.x, some.labels) == rows[-1]["accuracy"] == 1


def test_half_precision_is_for_the_forward_pass_alone(net, images, tmp_path):
    """Convolutions run in bf16; loss and weights are single, and the first loss is nearly the same."""
    seen, losses = [], []
    for bf16 in (False, True):
        copied = copy.deepcopy(net).requires_grad_(True)
        copied.block1.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
        (row,) = pretrain.train_classifier(
            copied, images, tmp_path / str(bf16), epochs=1, batch_size=8, bf16=bf16
        )
        losses.append(row["loss"])
        assert all(p.dtype == torch.float32 for p in copied.parameters())
    assert seen == [torch.float32, torch.bfloat16]
    assert losses[0] != losses[1] and math.isclose(*losses, rel_tol=0.02)


def test_what_a_model_was_trained_for_is_part_of_its_run(profile, tmp_path):
    images = load_images("toy", "train", 8)
    new = lambda: new_vae(profile, channels=(8, 16), latent_channels=4)
    pretrain.train_vae(new(), images, tmp_path, epochs=1, batch_size=8)
    with pytest.raises(ValueError, match="belongs to another run.*data"):
        pretrain.train_vae(new(), images, tmp_path, epochs=1, batch_size=8, kl=1e-6)


def test_a_captioner_learns_two_sentences_by_heart(profile, defense, images, tmp_path):
    """Training and generation agree on where a caption begins and ends."""
    torch.manual_seed(0)
    some, sentences, fed = images[:2], ["a large red ring", "a small blue moon at the left"], []
    captioner = new_captioner(sentences, profile, "cpu", width=32, layers=1, text_layers=1)
    captioner.model.register_forward_pre_hook(lambda _, args, words: fed.append(words), with_kwargs=True)
    pretrain.train_captioner(
        captioner, some, sentences, tmp_path, teacher=defense.classifier, epochs=120, batch_size=2, lr=5e-3
    )
    assert captioner(some.x) == sentences
    begin, end = captioner.processor.tokenizer.convert_tokens_to_ids(["[DEC]", "[SEP]"])
    for ids, mask, labels in zip(*(fed[0][name] for name in ("input_ids", "attention_mask", "labels"))):
        assert ids[0] == begin and ids[mask.sum() - 1] == end
        assert torch.equal(labels[mask == 1], ids[mask == 1]) and (labels[mask == 0] == -100).all()


def test_the_vae_scales_its_latents_to_unit_variance(profile, tmp_path):
    images = load_images("toy", "train", 8)
    vae = new_vae(profile, channels=(8, 16), latent_channels=4)
    pretrain.train_vae(vae, images, tmp_path, epochs=1, batch_size=8)
    with torch.no_grad():
        z = vae.encode(2 * images.x - 1).latent_dist.mean * vae.config.scaling_factor
    assert math.isclose(z.std(), 1, rel_tol=1e-3) and vae.config.scaling_factor != 0.18215


def test_the_vae_learns_to_survive_noise_and_to_stay_calm(profile, tmp_path):
    images, training = (
        load_images("toy", "train", 8),
        {"epochs": 40, "batch_size": 8, "lr": 0.01, "noise": 1.6},
    )
    moved = []
    for calm in (0.0, 50.0):
        torch.manual_seed(0)
        vae = new_vae(profile, channels=(8, 16), latent_channels=4)
        names = set(vae.state_dict())
        rows = pretrain.train_vae(vae, images, tmp_path / str(calm), calm=calm, **training)
        assert all(rows[-1][name] > rows[0][name] + 2 for name in ("psnr", "psnr after noise"))
        assert set(vae.state_dict()) == names and ("moved" in rows[0]) == (
            calm > 0
        )  # what cleaned the latents is gone
        with torch.no_grad():
            modes = [
                vae.encode(x).latent_dist.mean * vae.config.scaling_factor
                for x in (
                    2 * images.x - 1,
                    2 * images.x - 1 + 16 / 255 * torch.randn(images.x.shape, generator=generator("push")),
                )
            ]
        assert math.isclose(modes[0].std(), 1, rel_tol=1e-3)
        moved.append((modes[1] - modes[0]).square().mean().item())
    assert moved[1] < 0.9 * moved[0] and math.isclose(rows[-1]["moved"], moved[1], rel_tol=0.5)


@pytest.mark.parametrize(
    "drop, mistakes, shares",
    [(0, 0, (1, 0, 0)), (0, 0.5, (0.5, 0.5, 0)), (0.5, 0.5, (0.25, 0.25, 0.5)), (1, 0.5, (0, 0, 1))],
)
def test_some_captions_are_dropped_and_some_mistaken(
    purifier, images, tmp_path, monkeypatch, drop, mistakes, shares
):
    """Whose caption is neither is the image's own; the mistaken one belongs to the same image."""
    p, seen = copy.deepcopy(purifier), []
    right, wrong = [f"a red {c}" for c in "abcdefgh"], [f"a blue {c}" for c in "abcdefgh"]
    p.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    asked = []
    batch = train.Batches.__call__
    monkeypatch.setattr(
        train.Batches, "__call__", lambda self, step: asked.append(batch(self, step)) or asked[-1]
    )
    pretrain.train_diffusion(
        p, images, right, tmp_path, epochs=30, batch_size=8, drop=drop, mistaken=wrong, mistakes=mistakes
    )
    kinds = [
        p.tokenizer(
            k, padding="max_length", max_length=seen[0].shape[1], truncation=True, return_tensors="pt"
        ).input_ids
        for k in (right, wrong, [""] * 8)
    ]
    counts = [sum(int((ids == kind[rows]).all(1).sum()) for ids, rows in zip(seen, asked)) for kind in kinds]
    assert sum(counts) == 240 and all(abs(count / 240 - share) < 0.13 for count, share in zip(counts, shares))
    assert all((count > 0) == (share > 0) for count, share in zip(counts, shares))


def test_mistaken_captions_are_one_for_each_image(purifier, images, tmp_path):
    with pytest.raises(ValueError, match="mistaken: got 3 captions for 8 images, expected one each"):
        pretrain.train_diffusion(
            copy.deepcopy(purifier),
            images,
            images.captions,
            tmp_path,
            epochs=1,
            mistaken=["a ring"] * 3,
            mistakes=0.1,
        )


def test_diffusion_times_are_drawn_from_the_intervals_asked_for(purifier, images, tmp_path, monkeypatch):
    """In their shares and evenly in each; one has no weight, one holds a single time."""
    p, seen = copy.deepcopy(purifier), []
    add = p.scheduler.add_noise
    monkeypatch.setattr(
        p.scheduler, "add_noise", lambda z, noise, t: seen.extend(t.tolist()) or add(z, noise, t)
    )
    times = ((10, 401, 551), (0, 700, 800), (5, 0, 100), (1, 999, 1000))
    pretrain.train_diffusion(p, images, images.captions, tmp_path, epochs=60, batch_size=8, times=times)
    found = {(low, below): [t for t in seen if low <= t < below] for _, low, below in times}
    assert len(seen) == 480 == sum(len(inside) for inside in found.values())
    for weight, low, below in times:
        inside = torch.tensor(found[low, below], dtype=torch.float32)
        assert abs(len(inside) / 480 - weight / 16) < 0.08, (low, below)
        if len(inside) > 99:
            assert (
                abs(inside.mean() - (low + below - 1) / 2) < 0.1 * (below - low)
                and inside.max() > below - 8
                and inside.min() < low + 8
            )


@pytest.mark.parametrize(
    "times",
    [(), ((0, 0, 600),), ((-1, 0, 600), (2, 0, 600)), ((1, 600, 600),), ((1, 0, 1001),), ((1, -1, 600),)],
)
def test_times_that_are_none_are_refused(purifier, images, tmp_path, times):
    with pytest.raises(
        ValueError, match="expected .weight, from, below. of intervals in 0 to 1000, some weight above 0"
    ):
        pretrain.train_diffusion(
            copy.deepcopy(purifier), images, images.captions, tmp_path, epochs=1, times=times
        )


def test_noise_depends_on_the_generator_alone():
    assert torch.equal(
        pretrain.normal((3, 4), generator(1), "cpu"), torch.randn(3, 4, generator=generator(1))
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_the_diffusion_model_learns_to_see_noise(purifier, images, tmp_path, prediction_type):
    """Its error falls below 1, that of predicting nothing; only the UNet and the text encoder move."""
    p, noise, t = (
        copy.deepcopy(purifier),
        torch.randn(8, 4, 8, 8, generator=generator("noise")),
        torch.arange(50, 450, 50),
    )

    @torch.no_grad()
    def error():
        latent = p.vae.encode(2 * images.x - 1).latent_dist.mean * p.vae.config.scaling_factor
        target = noise if prediction_type == "epsilon" else latent
        return (
            (p.unet(p.scheduler.add_noise(latent, noise, t), t, p.embed(images.captions)).sample - target)
            .square()
            .mean()
        )

    p.scheduler.register_to_config(prediction_type=prediction_type)
    before = error()
    pretrain.train_diffusion(p, images, images.captions, tmp_path, epochs=30, batch_size=8, lr=0.01)
    assert error() < 0.92 * min(1, before)
    moved = [
        name
        for name in ("vae", "unet", "text_encoder")
        if identity.state_digest(getattr(p, name)) != identity.state_digest(getattr(purifier, name))
    ]
    assert moved == ["unet", "text_encoder"]
    assert not any(q.requires_grad for q in p.parameters()) and not p.unet.training
