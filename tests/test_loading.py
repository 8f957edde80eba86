"""A model loads whole or not at all: damaged files, other weights, pickles and code are refused by name."""

import json
import pickle
import shutil
import socket
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoilt import FAULTS, Bomb, explode

from lgap_utils import models
from lgap_utils.files import CheckpointError, sha256

FILES = {
    "captioner": "captioner/model.safetensors",
    "unet": "diffusion/unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "diffusion/text_encoder/model.safetensors",
    "vae": "diffusion/vae/diffusion_pytorch_model.safetensors",
    "classifier": "classifier/model.safetensors",
}
# {part: what its configuration says of a model with a layer more}
DEEPER = {
    "captioner": {"text_config": {"num_hidden_layers": 2}},
    "unet": {"layers_per_block": 2},
    "vae": {"layers_per_block": 2},
    "text_encoder": {"num_hidden_layers": 3},
    "classifier": {"depth": 16},
}


@pytest.fixture
def copy(profile, tmp_path, monkeypatch):
    """A copy of the three models that a test may spoil; nothing may reach the network."""
    reached = lambda *_: pytest.fail("something tried to reach the network")
    monkeypatch.setattr(socket.socket, "connect", reached)
    return shutil.copytree(Path(profile.classifier).parent, tmp_path / "copy")


def load(part, copy):
    if part == "captioner":
        return models.load_captioner(str(copy / "captioner"), device="cpu")
    if part == "classifier":
        return models.load_classifier(str(copy / "classifier"), device="cpu")
    return models.load_diffusion(str(copy / "diffusion"), device="cpu", size=32, strength=0.5)


# ---------------------------------------------------------------- damaged files


def pickle_beside(file):
    """No safetensors, but a pickle under the names that the libraries try next."""
    explode(file)
    file.rename(file.with_suffix(".bin"))
    shutil.copy(file.with_suffix(".bin"), file.with_name("pytorch_model.bin"))


def other_weights(file):
    folder = next(parent for parent in file.parents if parent.name == "copy")
    shutil.copy(folder / FILES["vae" if "vae" not in str(file) else "unet"], file)


def deeper(file):
    """The configuration of a model that has a layer more than the file."""
    config = json.loads((file.parent / "config.json").read_text())
    part = next(part for part, name in FILES.items() if file.match(name))
    for key, value in DEEPER[part].items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (file.parent / "config.json").write_text(json.dumps(config))


USERS_FAULTS = FAULTS | {"a pickle beside": pickle_beside, "other weights": other_weights, "deeper": deeper}
del USERS_FAULTS["one flipped bit"]  # which only a checksum tells


@pytest.mark.parametrize("fault", USERS_FAULTS)
@pytest.mark.parametrize("part", FILES)
def test_a_users_spoilt_model_is_refused_by_name(copy, part, fault):
    """A folder without checksums."""
    (copy / "SHA256SUMS").unlink()
    USERS_FAULTS[fault](copy / FILES[part])
    with pytest.raises(CheckpointError) as refused:
        load(part, copy)
    message = str(refused.value)
    assert str(copy / FILES[part].split("/")[0]) in message and "\n" not in message
    assert not list(copy.parent.rglob("exploded"))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", FILES)
def test_a_spoilt_model_with_checksums_is_refused_with_its_digest(copy, part, fault):
    """The layout of the bundled models; the message says how to get the file again."""
    file = copy / FILES[part]
    expected = sha256(file)
    FAULTS[fault](file)
    with pytest.raises(CheckpointError, match=f"^{file} is .*expected .*{expected[:16]}.*again$") as refused:
        load(part, copy)
    assert "\n" not in str(refused.value) and not list(copy.parent.rglob("exploded"))
    if part != "classifier":
        load("classifier", copy)  # which is another folder's business


def test_the_bomb_is_live(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("part", ["captioner", "unet", "vae", "text_encoder"])
def test_weights_of_another_size_are_told_by_name(copy, part):
    (copy / "SHA256SUMS").unlink()
    file = copy / FILES[part]
    weights = load_file(file)
    first = next(key for key, value in weights.items() if value.ndim > 1)
    save_file(weights | {first: torch.cat([weights[first]] * 2)}, file, metadata={"format": "pt"})
    message = f"the weights are not those of a .* with this configuration: 1 mismatched, .*{first}"
    with pytest.raises(CheckpointError, match=message):
        load(part, copy)


@pytest.mark.parametrize(
    "part, file", [("captioner", "captioner/tokenizer.json"), ("unet", "diffusion/tokenizer/tokenizer.json")]
)
def test_a_folder_without_its_words_is_refused(copy, part, file):
    """transformers makes a tokenizer of special tokens alone, and every caption would be the same to it."""
    (copy / "SHA256SUMS").unlink()
    (copy / file).unlink()
    with pytest.raises(CheckpointError, match="knows no word: tokenizer.json"):
        load(part, copy)


def test_a_model_that_is_nowhere_is_named(own_cache):
    for name in ("checkpoints/none/captioner", "./none"):
        with pytest.raises(CheckpointError, match=f"{name}: no such folder"):
            models.load_captioner(name)
    with pytest.raises(CheckpointError, match="'someone/blip' is a hub id without a revision"):
        models.load_captioner("someone/blip")
    reason = "could not be fetched .*: HF_HUB_OFFLINE is set"
    with pytest.raises(CheckpointError, match=f"someone/blip@0+ {reason}"):
        models.load_captioner("someone/blip", "0" * 40)
    with pytest.raises(CheckpointError, match=f"someone/sd@0+ {reason}"):
        models.load_diffusion("someone/sd", "0" * 40, size=32, strength=0.5)
    with pytest.raises(CheckpointError, match="'someone/wrn': no such folder, and no robustbench:"):
        models.load_classifier("someone/wrn")
    for name in ("robustbench:cifar10/Linf/NoSuchModel", "robustbench:Standard"):
        with pytest.raises(CheckpointError, match=f"classifier from '{name}'"):
            models.load_classifier(name)


# ---------------------------------------------------------------- what a library is never let do

CODE = """from pathlib import Path
Path({!r}).touch()

class Own:
    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()
"""


NAMED = {
    "AutoProcessor": "own.Own",
    "AutoConfig": "own.Own",
    "AutoModel": "own.Own",
    "AutoImageProcessor": "own.Own",
}


def asks_for_code(file, **changes):
    """Ask in a JSON file for code of the model's own (auto_map), and name a class that the library lacks."""

    def ask(config, named):
        return config | changes | {"auto_map": named}

    config = json.loads(file.read_text()) if file.is_file() else {}
    named = NAMED | {"AutoTokenizer": ["own.Own", "own.Own"]}
    if "image_processor" in config:
        config["image_processor"] = ask(config["image_processor"], named)
    file.write_text(json.dumps(ask(config, named)))


CODED = {
    "processor_config.json": {"image_processor_type": "OwnImageProcessor", "processor_class": "OwnProcessor"},
    "preprocessor_config.json": {"image_processor_type": "OwnImageProcessor"},
    "config.json": {},
    "tokenizer_config.json": {"tokenizer_class": "OwnTokenizer"},
    "generation_config.json": {},
}


@pytest.mark.parametrize("file", CODED)
@pytest.mark.parametrize("model_type", ["blip", "own"])
def test_a_captioners_own_code_is_never_run_and_nobody_is_asked(
    profile, images, tmp_path, monkeypatch, file, model_type
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run code"))
    folder = tmp_path / "model"
    shutil.copytree(profile.captioner, folder)
    (folder / "own.py").write_text(CODE.format(str(tmp_path / "ran")))
    if file == "preprocessor_config.json":
        (folder / file).write_text(
            json.dumps(json.loads((folder / "processor_config.json").read_text()).pop("image_processor"))
        )
        (folder / "processor_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    asks_for_code(folder / file, **CODED[file])
    loads_or_says(lambda: models.load_captioner(str(folder), device="cpu"), folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer/tokenizer_config.json",
        "text_encoder/config.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_diffusion_models_own_code_is_never_run_either(profile, tmp_path, monkeypatch, file):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run code"))
    folder = tmp_path / "model"
    shutil.copytree(profile.diffusion, folder)
    (folder / file).with_name("own.py").write_text(CODE.format(str(tmp_path / "ran")))
    asks_for_code(folder / file, _class_name="Own", tokenizer_class="OwnTokenizer", model_type="own")
    loads_or_says(lambda: models.load_diffusion(str(folder), device="cpu", size=32, strength=0.5), folder)
    assert not (tmp_path / "ran").exists()


def loads_or_says(load, folder):
    """The library's own class takes the folder, or one sentence says why not and advises no switch."""
    try:
        load()
    except CheckpointError as refused:
        message = str(refused)
        assert "\n" not in message and str(folder) in message
        assert "trust" not in message and "again" in message
        shown = "".join(traceback.format_exception(refused))
        switch = "trust_" + "remote_code"
        assert switch not in shown.replace(switch + '": False', "")


# a captioner's single pickle is read, by a loader of our own
@pytest.mark.parametrize(
    "part, layout",
    [
        ("captioner", "in parts"),
        *((part, how) for part in ("vae", "unet", "text_encoder") for how in ("whole", "in parts")),
    ],
)
def test_weights_that_are_pickles_alone_are_refused_unopened(copy, tmp_path, monkeypatch, part, layout):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    (copy / "SHA256SUMS").unlink()
    folder, file = copy / FILES[part].split("/")[0], copy / FILES[part]
    place, stem = file.parent, "pytorch_model" if file.stem == "model" else file.stem
    keys = list(load_file(file))
    file.unlink()
    pickled = stem + (".bin" if layout == "whole" else "-00001-of-00001.bin")
    (place / pickled).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    if layout == "in parts":
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, pickled)}
        (place / f"{stem}.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"cannot load the .* from '{folder}'") as refused:
        load(part, copy)
    assert "\n" not in str(refused.value) and f"copy {folder} again" in str(refused.value)
    assert not (tmp_path / "exploded").exists()
