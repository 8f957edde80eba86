"""Models come whole or not at all, BLIP sees the pixels its processor would make, and a profile refuses nonsense."""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lgap_utils import experiment, files, identity, models, zoo
from lgap_utils.files import CheckpointError
from lgap_utils.profiles import PROFILES, get_profile

FILES = {
    "captioner": "captioner/model.safetensors",
    "unet": "diffusion/unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "diffusion/text_encoder/model.safetensors",
    "vae": "diffusion/vae/diffusion_pytorch_model.safetensors",
    "classifier": "classifier/model.safetensors",
}
DEEPER = {
    "captioner": {"text_config": {"num_hidden_layers": 2}},
    "unet": {"layers_per_block": 2},
    "vae": {"layers_per_block": 2},
    "text_encoder": {"num_hidden_layers": 3},
    "classifier": {"depth": 16},
}


@pytest.fixture
def copy(profile, tmp_path):
    """A copy of the three models that a test may spoil."""
    folder = tmp_path / "copy"
    shutil.copytree(Path(profile.classifier).parent, folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(
        socket.socket, "connect", lambda *_: pytest.fail("something tried to reach the network")
    )


def load(part, folder):
    if part == "captioner":
        return models.load_captioner(str(folder / "captioner"), device="cpu")
    if part == "classifier":
        return models.load_classifier(str(folder / "classifier"), device="cpu")
    return models.load_diffusion(str(folder / "diffusion"), device="cpu", size=32, strength=0.5)


# ---------------------------------------------------------------- damaged files


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def bomb_beside(file):
    """No safetensors, but a pickle under the name that the libraries try next."""
    bomb(file)
    file.rename(file.with_suffix(".bin"))
    shutil.copy(file.with_suffix(".bin"), file.with_name("pytorch_model.bin"))


def bomb(file):
    file.write_bytes(pickle.dumps(Bomb(file.parents[2] / "exploded")))


def other_weights(file):
    folder = next(p for p in file.parents if p.name == "copy")
    shutil.copy(folder / FILES["vae" if "vae" not in str(file) else "unet"], file)


def deeper(file):
    """The configuration of a model that has a layer more than the file."""
    config = json.loads((file.parent / "config.json").read_text())
    for key, value in DEEPER[next(part for part, name in FILES.items() if file.match(name))].items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (file.parent / "config.json").write_text(json.dumps(config))


FAULTS = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "half": half,
    "a pickle": bomb,
    "a pickle beside": bomb_beside,
    "HTML": lambda file: file.write_text("<html>Not found</html>"),
    "other weights": other_weights,
    "a deeper model": deeper,
}


@pytest.mark.parametrize("spoil", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("part", FILES)
def test_a_spoilt_model_is_refused_by_name(copy, part, spoil, no_network):
    """A user's own folder, which has no checksums."""
    (copy / "SHA256SUMS").unlink()
    spoil(copy / FILES[part])
    folder = copy / FILES[part].split("/")[0]
    with pytest.raises(CheckpointError) as refused:
        load(part, copy)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)
    assert not list(copy.parent.rglob("exploded"))


def test_the_bomb_is_live(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("part", FILES)
def test_one_flipped_bit_is_noticed(copy, part):
    """The library alone would load it without a word."""
    file = copy / FILES[part]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"{file} is damaged: sha256 {hashlib.sha256(content).hexdigest()[:16]}"
    ):
        load(part, copy)


def test_a_file_that_the_checksums_name_must_be_there(copy):
    (copy / "captioner" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        load("captioner", copy)
    load("classifier", copy)  # which is another folder's business


def test_checksums_are_those_of_hashlib_and_cover_every_file(copy):
    found = files.verify(copy)
    whole = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    assert set(found) == whole and set(FILES.values()) < whole
    assert all(
        hashlib.sha256((copy / name).read_bytes()).hexdigest() == digest for name, digest in found.items()
    )
    assert files.verify(copy / "classifier").keys() == {
        "classifier/config.json",
        "classifier/model.safetensors",
    }
    (copy / "SHA256SUMS").unlink()
    assert files.verify(copy) == {}


@pytest.mark.parametrize("text", ["", "\n", "0123456789abcdef"], ids=["empty", "a blank line", "cut short"])
def test_a_list_of_checksums_that_lists_nothing_is_refused(copy, text):
    (copy / "captioner" / "SHA256SUMS").write_text(text)
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        load("captioner", copy)


def test_a_model_that_is_nowhere_is_named(tmp_path, no_network, monkeypatch):
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path))
    for name in (str(tmp_path / "none"), "checkpoints/none/captioner", "./none"):
        with pytest.raises(CheckpointError, match=f"{name}: no such folder"):
            models.load_captioner(name)
    with pytest.raises(CheckpointError, match="'someone/blip' is a hub id without a revision"):
        models.load_captioner("someone/blip")
    with pytest.raises(
        CheckpointError, match="someone/blip@0+ could not be fetched .*: HF_HUB_OFFLINE is set"
    ):
        models.load_captioner("someone/blip", "0" * 40)
    with pytest.raises(CheckpointError, match="someone/sd@0+ could not be fetched .*: HF_HUB_OFFLINE is set"):
        models.load_diffusion("someone/sd", "0" * 40, size=32, strength=0.5)
    with pytest.raises(CheckpointError, match="'someone/wrn': no such folder, and no robustbench:"):
        models.load_classifier("someone/wrn")
    for name in ("robustbench:cifar10/Linf/NoSuchModel", "robustbench:Standard"):
        with pytest.raises(CheckpointError, match=f"classifier from '{name}'"):
            models.load_classifier(name)


# ---------------------------------------------------------------- what is loaded is what was saved


def test_loading_gives_the_saved_weights(profile, defense):
    from safetensors.torch import load_file

    parts = {
        "captioner": defense.captioner.model,
        "unet": defense.purifier.unet,
        "vae": defense.purifier.vae,
        "text_encoder": defense.purifier.text_encoder,
        "classifier": defense.classifier,
    }
    for name, part in parts.items():
        saved, state = load_file(Path(profile.classifier).parent / FILES[name]), part.state_dict()
        assert saved and all(torch.equal(state[key], saved[key].to(state[key].dtype)) for key in saved)
        assert not part.training and all(
            p.dtype == torch.float32 and not p.requires_grad for p in part.parameters()
        )


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


def test_the_scheduler_is_ddim_whatever_the_folder_says(copy):
    """Stable Diffusion ships another scheduler's configuration."""
    file = copy / "diffusion/scheduler/scheduler_config.json"
    file.write_text(
        json.dumps(
            {
                "_class_name": "PNDMScheduler",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "skip_prk_steps": True,
                "beta_schedule": "scaled_linear",
                "clip_sample": True,
                "set_alpha_to_one": True,
                "steps_offset": 0,
            }
        )
    )
    files.write_checksums(copy)
    scheduler = load("unet", copy).scheduler
    assert (
        type(scheduler).__name__ == "DDIMScheduler"
        and scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    )
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


def test_the_architecture_is_robustbenchs_wide_resnet(defense, images):
    with torch.device("meta"):
        net = zoo.new_wide_resnet(28, 10, 10)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 36.5
    assert type(defense.classifier) is zoo.import_robustbench()[1]
    assert defense.classify(images.x).shape == (8, 10)


def test_a_tuned_classifier_is_saved_with_its_architecture(profile, defense, tmp_path, images):
    net = models.load_classifier(profile.classifier, device="cpu")
    net.fc.bias.data += torch.arange(10.0)
    models.save_classifier_like(net, profile.classifier, tmp_path / "tuned")
    loaded = models.load_defense(profile, classifier=tmp_path / "tuned", device="cpu").classifier
    assert torch.equal(loaded(images.x), net(images.x)) and not torch.equal(
        loaded(images.x), defense.classify(images.x)
    )
    assert files.verify(tmp_path / "tuned").keys() == {"config.json", "model.safetensors"}


# ---------------------------------------------------------------- the captioner


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


# ---------------------------------------------------------------- tokenizers


def test_the_text_tokenizer_knows_every_word_and_survives_saving(make, captions, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = make.new_text_tokenizer(captions, "a picture of", 32)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for caption in (*captions[:50], "a caterpillar, 7 Ångström!"):
        ids = tokenizer(caption).input_ids
        assert loaded(caption).input_ids == ids and loaded.model_max_length == 32
        assert ids[0] == loaded.bos_token_id and ids[-1] == loaded.eos_token_id
        assert loaded.unk_token_id not in ids[1:-1]
        assert loaded.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.lower().replace(
            " ", ""
        )
    assert all(len(tokenizer(caption).input_ids) == len(caption.split()) + 2 for caption in captions)


def test_the_captioners_tokenizer_knows_every_word_and_survives_saving(defense, captions, tmp_path):
    from transformers import BlipProcessor

    tokenizer = defense.captioner.processor.tokenizer
    defense.captioner.processor.save_pretrained(tmp_path)
    loaded = BlipProcessor.from_pretrained(tmp_path).tokenizer
    for caption in (*captions[:50], "a caterpillar 7"):
        ids = loaded(caption).input_ids
        assert ids == tokenizer(caption).input_ids and loaded.unk_token_id not in ids
        assert loaded.decode(ids, skip_special_tokens=True) == caption
    assert all(len(tokenizer(caption).input_ids) == len(caption.split()) + 2 for caption in captions)
    assert loaded.decode(defense.captioner.model.config.text_config.bos_token_id) == "[DEC]"
    assert loaded.convert_tokens_to_ids("[DEC]") in loaded.all_special_ids


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize(
    "field, value",
    [
        ("eps_255", -1),
        ("eps_255", float("nan")),
        ("eps_255", "8/255"),
        ("eps_255", 256),
        ("eps_255", True),
        ("eps_255", float("inf")),
        ("step_size_255", -2),
        ("strength", 1.5),
        ("strength", "half"),
        ("guidance_scale", -1),
        ("finetune_lr", float("nan")),
        ("n_steps", 0),
        ("n_steps", 2.0),
        ("n_steps", "40"),
        ("n_images", 0),
        ("n_images", True),
        ("batch_size", 0),
        ("seed", -1),
        ("num_inference_steps", 0),
        ("size", 7),
        ("max_length", 1),
        ("num_beams", 0),
        ("time_grid", "ddpm"),
        ("dtype", "half"),
        ("variant", "fp32"),
        ("vae_input", "raw"),
        ("eot_average", "mean"),
        ("antialias", 1),
        ("captioner_revision", "main"),
        ("n_eot", 0),
        ("autoattack_block", 0),
        ("needs_gpu", "no"),
        ("dataset", "mnist"),
        ("vae_sample", "no"),
        ("prompt", 7),
    ],
)
def test_a_profile_refuses_a_bad_value_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        get_profile("toy", **{field: value})


def test_unknown_names_are_refused_with_the_choices(profile):
    with pytest.raises(
        ValueError, match=r"no profile 'tiny'; choose from \['authors', 'paper', 'small', 'toy'\]"
    ):
        get_profile("tiny")
    with pytest.raises(ValueError, match="no field epsilon; choose from .*'eps_255'"):
        get_profile("toy", epsilon=8)
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


def test_overrides_replace_and_none_keeps():
    profile = get_profile("paper", n_images=7, seed=None)
    assert profile.n_images == 7 and profile.seed == PROFILES["paper"].seed
    assert np.isclose(profile.eps, 8 / 255) and np.isclose(profile.step_size, 2 / 255)


def test_the_authors_preset_is_the_paper_with_departures_that_can_be_taken_back_one_by_one():
    paper, authors = (dataclasses.asdict(PROFILES[name]) for name in ("paper", "authors"))
    departures = {field for field in paper if paper[field] != authors[field]} - {"name", "about", "tables"}
    assert departures == {
        "vae_input",
        "antialias",
        "dtype",
        "eps_255",
        "step_size_255",
        "masked_bpda",
        "eot_average",
        "n_eot",
        "finetune_lr",
        "finetune_epochs",
        "finetune_batch",
        "seed",
    }
    assert (
        get_profile("authors").eps == 8 / 256
        and get_profile("authors", 3).eps == 8 / 255
        and get_profile("authors", 2).n_images == 8160
    )
    one_back = dataclasses.asdict(get_profile("authors", antialias=True))
    assert {field for field in authors if authors[field] != one_back[field]} == {"antialias"}


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
        ("meta", "torch finds no meta device here"),
        ("gpu", "no such kind; expected cpu, cuda, cuda:0 or another that torch has"),
    ):
        monkeypatch.setenv("LGAP_DEVICE", name)
        with pytest.raises(ValueError, match=f"device '{name}': {words}"):
            models.device_of()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert models.device_of("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="device 'cuda:1': torch finds 1 of this kind here"):
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
    with pytest.raises(ValueError, match=f"device '{kind}:3': torch finds 1 of this kind here"):
        models.device_of(f"{kind}:3")
    with pytest.raises(ValueError, match="device '0': no such kind"):
        models.device_of(0)  # and not what LGAP_DEVICE says


def test_a_device_without_double_precision_and_bfloat16_purifies():
    """tests/pretended.py: an operation that mixes it with the CPU, or makes such a tensor there, is refused."""
    env = {**os.environ, "LGAP_DEVICE": "pretended", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("pretended.py")],
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


@pytest.mark.parametrize("table", ["2", 5, 0, -1, True, 2.0, [2]])
def test_a_table_that_the_paper_has_not_is_refused(table):
    with pytest.raises(ValueError, match=r"no table .*; choose from \[1, 2, 3, 4\]"):
        get_profile("paper", table)


def test_every_table_of_the_paper_is_there():
    found = [get_profile("paper", table).dataset for table in (None, 1, 2, 3, 4)]
    assert found == ["cifar10", "cifar10", "cifar100", "cifar10", "imagenet"]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"size": 33}, "size=33: expected a multiple of 8"),
        ({"size": 36}, "size=36: expected a multiple of 8"),
        (
            {"max_length": 4},
            "max_length=4: expected at least 6, so that after the 3 words of the prompt 'a picture of'",
        ),
        ({"max_length": 5}, "max_length=5: expected at least 6"),
        ({"prompt": "a " * 30}, "max_length=20: expected at least 33"),
        ({"min_length": 21}, "min_length=21: expected at most max_length=20"),
        (
            {"guidance_scale": 0},
            "guidance_scale=0: expected at least 1.*at 0 the caption is ignored and two passes are paid",
        ),
        ({"guidance_scale": 0.9}, "guidance_scale=0.9: .*between 0 and 1 it counts less"),
        ({"guidance_scale": 101}, "expected 1 to 100"),
        ({"guidance_scale": True}, "guidance_scale=True: expected a number"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(settings, says):
    with pytest.raises(ValueError, match=says):
        get_profile("toy", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 40},
        {"max_length": 6},
        {"max_length": 3, "prompt": "", "min_length": 3},
        {"guidance_scale": 1},
        {"guidance_scale": 100.0},
        {"min_length": 20},
    ],
)
def test_settings_at_their_bounds_are_taken(settings):
    profile = get_profile("toy", **settings)
    assert {name: getattr(profile, name) for name in settings} == settings


@pytest.mark.parametrize(
    "loader, part, file",
    [
        (models.load_captioner, "captioner", "tokenizer.json"),
        (models.load_diffusion, "diffusion", "tokenizer/tokenizer.json"),
    ],
)
def test_a_folder_without_its_words_is_refused(profile, tmp_path, loader, part, file):
    """transformers makes a tokenizer of special tokens alone, and every caption would be the same to it."""
    folder = shutil.copytree(getattr(profile, part), tmp_path / part)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        loader(str(folder), device="cpu")


@pytest.mark.parametrize(
    "other, compared",
    [
        ({}, True),
        ({"n_images": 7, "seed": 1, "eps_255": 8}, True),
        ({"eps_255": 2}, False),
        ({"diffusion": "/models/sd"}, False),
        ({"n_steps": 3, "same_models": True}, True),
    ],
)
def test_a_number_under_other_settings_is_not_held_against_the_papers(other, compared):
    assert get_profile("paper", 1, **other).same_models == compared


def test_a_fine_tuned_classifier_is_refused_where_it_was_tuned_otherwise(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    own = dataclasses.replace(
        profile, n_finetune=4, n_validation=2, finetune_epochs=1, strength=0.1, num_inference_steps=10
    )
    with pytest.raises(
        CheckpointError, match="no classifier was fine-tuned for this profile yet; run notebook 03 first"
    ):
        experiment.load_finetuned(own)
    tuned = models.load_defense(own, device="cpu")
    experiment.finetune(own, tuned)
    again = models.load_defense(own, device="cpu")
    experiment.finetune(own, again)  # done already: the same weights, nothing is trained
    monkeypatch.setattr(experiment, "finetune", lambda *_: pytest.fail("it is there"))
    assert identity.state_digest(experiment.load_or_finetune(own).classifier) == identity.state_digest(
        tuned.classifier
    )
    loaded = experiment.load_finetuned(own)
    assert all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(*(d.classifier.state_dict().values() for d in (tuned, again, loaded)))
    )
    for other in (
        {"finetune_epochs": 2},
        {"finetune_augment": True},
        {"finetune_schedule": "steps"},
        {"strength": 0.2},
        {"n_finetune": 5},
    ):
        with pytest.raises(
            ValueError, match=f"was fine-tuned with other settings .*{next(iter(other))}: there .*, here"
        ):
            experiment.load_finetuned(dataclasses.replace(own, **other))
    from safetensors.torch import load_file, save_file

    file = shutil.copytree(profile.captioner, tmp_path / "other weights") / "model.safetensors"
    state = load_file(file)
    state[next(iter(state))] += 1
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was fine-tuned with other settings .*weights"):
        experiment.load_finetuned(dataclasses.replace(own, captioner=str(file.parent)))


def test_a_classifier_of_the_users_own_is_not_taken_for_the_profiles_fine_tuned_one(
    profile, tmp_path, monkeypatch
):
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    own = dataclasses.replace(
        profile, n_finetune=4, n_validation=2, finetune_epochs=1, strength=0.1, num_inference_steps=10
    )
    other = models.load_defense(own, classifier=zoo.new_wide_resnet(16, 1, 10), device="cpu")
    with pytest.raises(
        ValueError,
        match="classifier: this WideResNet has not the architecture of '.*', as which it would be saved",
    ):
        experiment.finetune(own, other)
    with pytest.raises(ValueError, match="classifier: this function has not the architecture of"):
        experiment.finetune(
            own, models.load_defense(own, classifier=lambda x: x.flatten(1)[:, :10], device="cpu")
        )
    assert not own.finetuned.exists()
    same = models.load_defense(own, device="cpu")
    same.classifier.fc.bias.data += 1
    experiment.finetune(own, same)
    with pytest.raises(ValueError, match="was fine-tuned with other settings .*began as: there '.*', here"):
        experiment.load_or_finetune(own)
    kept = (own.finetuned / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds rows of another configuration"):
        experiment.finetune(own, models.load_defense(own, device="cpu"))
    assert (own.finetuned / "model.safetensors").read_bytes() == kept


def test_two_that_fine_tune_at_once_end_with_the_same_classifier(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    own = dataclasses.replace(
        profile, n_finetune=4, n_validation=2, finetune_epochs=1, strength=0.1, num_inference_steps=10
    )
    both = [models.load_defense(own, device="cpu") for _ in range(2)]
    threads = [threading.Thread(target=experiment.finetune, args=(own, defense)) for defense in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = identity.state_digest(experiment.load_finetuned(own).classifier)
    assert [identity.state_digest(defense.classifier) for defense in both] == [expected] * 2
