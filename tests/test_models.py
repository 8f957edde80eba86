"""Models load as they were saved, BLIP sees its processor's pixels, and devices are checked."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_models import in_cache
from spoilt import FAULTS, PICKLES, Bomb
from torch import nn

from lgap_utils import files, identity, models
from lgap_utils.files import CheckpointError
from lgap_utils.hub import lock_entries
from lgap_utils.profiles import PROFILES, REVISIONS

REPOSITORY = "Salesforce/blip-image-captioning-base"
REVISION = REVISIONS[REPOSITORY]


def test_loading_gives_the_saved_weights(profile, defense):
    parts = {
        "captioner": defense.captioner.model,
        "diffusion/unet": defense.purifier.unet,
        "diffusion/vae": defense.purifier.vae,
        "diffusion/text_encoder": defense.purifier.text_encoder,
        "classifier": defense.classifier,
    }
    for name, part in parts.items():
        (file,) = (Path(profile.classifier).parent / name).glob("*.safetensors")
        saved, state = load_file(file), part.state_dict()
        assert saved and all(torch.equal(state[key], saved[key].to(state[key].dtype)) for key in saved)
        assert not part.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters())


def test_a_profile_reaches_every_part(profile):
    settings = {
        "strength": 0.3,
        "num_inference_steps": 20,
        "guidance_scale": 2.0,
        "time_grid": "diffusers",
        "size": 16,
        "vae_sample": False,
        "negative_prompt": "noise",
        "antialias": False,
        "vae_input": "clip",
    }
    search = {"num_beams": 2, "max_length": 11, "min_length": 6}
    own = dataclasses.replace(profile, prompt="a photo of", **settings, **search)
    defense = models.load_defense(own, device="cpu", classifier=profile.classifier)
    assert defense.purifier.settings().items() >= (settings | {"dtype": "float32"}).items()
    assert defense.captioner.search == search and defense.captioner.prompt == "a photo of"
    assert len(defense.classes) == 10 and not defense.training


def test_the_scheduler_is_ddim_whatever_the_folder_says(profile, tmp_path):
    """Stable Diffusion ships another scheduler's configuration."""
    folder = shutil.copytree(profile.diffusion, tmp_path / "diffusion")
    config = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 0}
    config |= {"skip_prk_steps": True, "beta_schedule": "scaled_linear"}
    config |= {"clip_sample": True, "set_alpha_to_one": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = models.load_diffusion(str(folder), device="cpu", size=32, strength=0.5).scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert not scheduler.config.clip_sample and scheduler.config.steps_offset == 1
    assert math.isclose(scheduler.alphas_cumprod[501], 0.275, abs_tol=5e-4)


def test_a_users_own_parts_need_no_model(images):
    class Net(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)).repeat(1, 4)[:, :10]

    nowhere = dataclasses.replace(
        PROFILES["toy"], captioner="none/none", diffusion="none/none", classifier="none/none"
    )
    defense = models.load_defense(
        nowhere,
        captioner=lambda x: ["a ring"] * len(x),
        classifier=Net().train(),
        purifier=lambda x, captions, keys: x.flip(3),
    )
    assert torch.equal(defense(images.x), Net()(images.x.flip(3))) and not defense.classifier.training
    with pytest.raises(ValueError, match=r"\[8, 7\], expected \[8, 10\]"):
        models.load_defense(
            nowhere,
            captioner=lambda x: [""] * 8,
            purifier=lambda x, captions, keys: x,
            classifier=lambda x: x.flatten(1)[:, :7],
        )(images.x)


def test_a_tuned_classifier_is_saved_with_its_architecture(profile, defense, tmp_path, images):
    net = models.load_classifier(profile.classifier, device="cpu")
    net.fc.bias.data += torch.arange(10.0)
    models.save_classifier_like(net, profile.classifier, tmp_path / "tuned")
    loaded = models.load_defense(profile, classifier=tmp_path / "tuned", device="cpu").classifier
    assert torch.equal(loaded(images.x), net(images.x)) and not torch.equal(
        loaded(images.x), defense.classify(images.x)
    )
    assert files.verify(tmp_path / "tuned").keys() == {"config.json", "model.safetensors"}


def pictures(x):
    return [Image.fromarray(image) for image in (255 * x).round().byte().permute(0, 2, 3, 1).numpy()]


def test_pixels_are_those_of_the_processor(defense, images):
    captioner = defense.captioner
    expected = captioner.processor(images=pictures(images.x), return_tensors="pt")["pixel_values"]
    assert torch.allclose(captioner.pixel_values(images.x), expected, atol=1e-5)
    assert expected.std() > 0.3  # divided by 255 twice, everything is the same black


@pytest.mark.parametrize("side", [24, 64])
def test_pixels_are_those_of_the_processor_after_its_resize(defense, images, side):
    """Up to one level of the processor's 8 bits; also at edges, where bicubic interpolation overshoots."""
    x = images.x[:4].repeat(1, 1, 2, 2)[..., :side, :side]
    x[0] = (torch.arange(side) < side // 2).float()
    expected = defense.captioner.processor(images=pictures(x), return_tensors="pt")["pixel_values"]
    pixels = defense.captioner.pixel_values(x)
    assert pixels.shape == (4, 3, 32, 32) and torch.allclose(pixels, expected, atol=0.02)


def test_captions_are_those_of_blip_without_the_prompt(defense, images):
    captioner, processor = defense.captioner, defense.captioner.processor
    inputs = processor(images=pictures(images.x), text=["a picture of"] * 8, return_tensors="pt")
    ids = captioner.model.generate(**inputs, num_beams=3, max_length=20, min_length=5)
    expected = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    captions = captioner(images.x)
    assert all(caption.startswith("a picture of") for caption in expected)
    assert captions == [caption[len("a picture of") :].strip() for caption in expected]
    assert len(set(captions)) > 4  # they differ from image to image, so the rest says something


def test_captions_do_not_depend_on_the_batch(defense, images):
    whole = defense.captioner(images.x)
    for size in (1, 3):
        assert sum((defense.captioner(part) for part in images.x.split(size)), []) == whole


def test_beams_and_lengths_are_respected(defense, images):
    model, processor = defense.captioner.model, defense.captioner.processor
    captions = {
        name: models.Captioner(model, processor, **search)(images.x)
        for name, search in {
            "beams": {},
            "greedy": {"num_beams": 1},
            "short": {"max_length": 8},
            "long": {"min_length": 20},
        }.items()
    }
    n_words = {name: [len(caption.split()) for caption in found] for name, found in captions.items()}
    assert captions["greedy"] != captions["beams"]
    assert max(n_words["short"]) <= 4 < max(n_words["beams"])  # 8 tokens: begin, "a picture of" and four more
    tokens = processor.tokenizer(captions["long"], add_special_tokens=False).input_ids
    assert min(map(len, tokens)) == 16


def test_another_prompt_is_stripped_too(defense, images):
    other = models.Captioner(defense.captioner.model, defense.captioner.processor, prompt="A small  red")
    assert not any("small red" in caption[:9] for caption in other(images.x[:3]))


def test_a_profile_that_cannot_be_is_refused_when_it_loads(profile):
    with pytest.raises(ValueError, match="no profile 'tiny'"):
        models.load_defense("tiny")
    with pytest.raises(ValueError, match="time_grid"):
        models.load_defense(dataclasses.replace(profile, time_grid="ddpm"), device="cpu")
    with pytest.raises(ValueError, match="mnist"):
        models.load_defense(dataclasses.replace(profile, dataset="mnist"), device="cpu")


@pytest.mark.parametrize(
    "settings", [{"strength": 0}, {"strength": 0.1, "num_inference_steps": 4}, {"size": 30}]
)
def test_a_purification_that_cannot_be_is_refused_when_it_loads(profile, settings):
    with pytest.raises(ValueError, match="size=30|gives 0 denoising steps"):
        models.load_defense(dataclasses.replace(profile, **settings), device="cpu")


def test_without_a_gpu_a_profile_that_needs_one_says_so(profile, monkeypatch):
    needing = dataclasses.replace(profile, needs_gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("LGAP_DEVICE", raising=False)
    with pytest.raises(
        ValueError, match="profile 'tiny' is made for a GPU and torch finds none here; set LGAP_DEVICE=cpu"
    ):
        models.load_defense(needing)
    monkeypatch.setenv("LGAP_DEVICE", "cpu")
    assert models.load_defense(needing).classes
    for name, words in (
        ("cuda", "torch finds no GPU here; unset LGAP_DEVICE, or set it to cpu"),
        ("meta", "no such kind"),
        ("gpu", "no such kind; expected cpu, cuda, cuda:0 or another that torch has"),
    ):
        monkeypatch.setenv("LGAP_DEVICE", name)
        with pytest.raises(ValueError, match=f"device '{name}': {words}"):
            models.device_of()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert models.device_of("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="device 'cuda:1': torch finds 1 GPU here"):
        models.device_of("cuda:1")


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_any_device_of_torch_is_taken_where_it_is_there(monkeypatch, kind):
    with pytest.raises(
        ValueError,
        match=f"device '{kind}': torch finds no {kind} device here; unset LGAP_DEVICE, or set it to cpu",
    ):
        models.device_of(kind)
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(module, "device_count", lambda: 1)
    monkeypatch.setenv("LGAP_DEVICE", kind)
    assert models.device_of() == torch.device(kind)
    with pytest.raises(ValueError, match=f"device '{kind}:3': torch finds 1 {kind} device here"):
        models.device_of(f"{kind}:3")
    with pytest.raises(ValueError, match="device '0': no such kind"):
        models.device_of(0)  # and not what LGAP_DEVICE says


def test_a_device_without_double_precision_and_bfloat16_purifies():
    """tests/pretended_device.py refuses what mixes it with the CPU, and tensors of these kinds."""
    env = {**os.environ, "LGAP_DEVICE": "pretended", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("pretended_device.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=env,
    )
    assert run.returncode == 0, run.stderr
    refused, none, end = run.stdout.strip().splitlines()
    assert refused == (
        "device 'pretended': it does not compute in bfloat16 (the pretended device has no torch.bfloat16); "
        "set dtype=float32, or another device"
    )
    assert none == "the pretended device has no torch.float64" and end == "purified"


def test_the_cpu_computes_in_what_a_profile_may_have():
    for dtype in ("float32", "bfloat16", "float16"):
        assert models.device_of("cpu", dtype) == torch.device("cpu")


def test_a_classifier_sees_images_of_the_size_it_was_made_for(profile, defense, images):
    seen, parts = [], {"captioner": defense.captioner, "purifier": lambda x, captions, keys: x}

    def classifier(classes):
        return lambda x: seen.append(tuple(x.shape[2:])) or x.flatten(1)[:, :classes]

    for input_size in (None, 224, 48):
        models.load_defense(profile, **parts, classifier=classifier(10), input_size=input_size)(
            images.x[:1], [""]
        )
    imagenet = dataclasses.replace(profile, dataset="imagenet")
    models.load_defense(imagenet, **parts, classifier=classifier(1000))(images.x[:1], [""])
    assert seen == [(32, 32), (224, 224), (48, 48), (224, 224)]
    for wrong in (0, "224", 224.0, (224, 224), True):
        with pytest.raises(ValueError, match="input_size="):
            models.load_defense(profile, **parts, classifier=classifier(10), input_size=wrong)


@pytest.fixture
def blip(defense, tmp_path, own_cache):
    """The captioner as BLIP base is published: a pickle, and the processor's files of an older version."""
    folder = tmp_path / "published"
    defense.captioner.model.save_pretrained(folder)
    defense.captioner.processor.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights = defense.captioner.model.state_dict() | {
        "text_decoder.bert.embeddings.position_ids": torch.arange(64)[None]
    }
    torch.save(weights, folder / "pytorch_model.bin")
    known = {
        p.name: {"sha256": None, "size": None} for p in folder.iterdir()
    }  # as the committed lock file names them
    (tmp_path / "lock.json").write_text(json.dumps({f"{REPOSITORY}@{REVISION}": known}))
    return folder


def test_blip_comes_from_the_hubs_cache_as_a_pickle(blip, defense, images, tmp_path):
    in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    captioner = models.load_captioner(REPOSITORY, device="cpu")
    assert captioner(images.x) == defense.captioner(images.x)
    assert identity.identity(captioner) == identity.identity(defense.captioner)
    assert set(lock_entries(f"{REPOSITORY}@{REVISION}")) == {p.name for p in blip.iterdir()}
    assert not list(tmp_path.rglob("*.safetensors"))
    half = models.load_captioner(REPOSITORY, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_folder_in_place_of_the_id_may_hold_the_pickle_too(blip, defense, images):
    assert models.load_captioner(str(blip), device="cpu")(images.x) == defense.captioner(images.x)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_in_the_hubs_cache_is_refused_by_name(blip, tmp_path, fault):
    spoilt = in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    models.load_captioner(REPOSITORY, device="cpu")  # the first use records the digests
    file = (spoilt / "pytorch_model.bin").resolve() if fault != "missing" else spoilt / "pytorch_model.bin"
    FAULTS[fault](file)
    expected = lock_entries(f"{REPOSITORY}@{REVISION}")["pytorch_model.bin"]["sha256"]
    with pytest.raises(
        CheckpointError, match=f"pytorch_model.bin .*expected sha256 {expected[:16]}.*; .*fetch it again"
    ) as refused:
        models.load_captioner(REPOSITORY, device="cpu")
    assert "\n" not in str(refused.value) and not list(tmp_path.rglob("exploded"))
    assert fault == "missing" or f"delete {file}, then" in str(refused.value)


def test_half_precision_weights_are_read_by_their_variant(profile, images, tmp_path, own_cache):
    """Stable Diffusion's fp16 files. Latents stay in single precision, so the picture is nearly the same."""
    repository = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    folder = tmp_path / "published"
    shutil.copytree(profile.diffusion, folder)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    in_cache(tmp_path / "cache", repository, REVISIONS[repository], folder)
    settings = dict(size=32, strength=0.5, num_inference_steps=50, device="cpu", variant="fp16")
    whole, half = (
        models.load_diffusion(repository, dtype=dtype, **settings) for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == torch.bfloat16 and half.settings()["dtype"] == "bfloat16"
    with torch.no_grad(), whole.using(strength=0.1), half.using(strength=0.1):
        one, other = (p(images.x[:2], ["a large red star"] * 2) for p in (whole, half))
    assert other.dtype == torch.float32 and 0 < (one - other).abs().mean() < 0.05
    with pytest.raises(CheckpointError, match="diffusion model"):
        models.load_diffusion(repository, **settings | {"variant": ""})
    assert all(
        "AttnProcessor2_0" in type(p).__name__ for p in whole.unet.attn_processors.values()
    )  # torch's fused attention


@pytest.mark.parametrize("what", ["code", "code beside tensors", "half"])
def test_a_captioner_that_is_a_bad_pickle_runs_nothing(blip, tmp_path, what):
    (blip / "pytorch_model.bin").write_bytes(PICKLES[what](Bomb(tmp_path / "exploded")))
    with pytest.raises(
        CheckpointError, match=f"{blip / 'pytorch_model.bin'} is refused: .*; copy {blip} again"
    ):
        models.load_captioner(str(blip), device="cpu")
    assert not (tmp_path / "exploded").exists()
