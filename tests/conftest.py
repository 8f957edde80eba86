"""One small defence with random weights, made as the bundled ones are. No test needs a network or a GPU."""

import atexit
import copy
import os
import re
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["TQDM_DISABLE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
# Digests that a test's small files are recorded with must not get into the lock file of the real ones.
LOCK = Path(tempfile.mkdtemp()) / "hub.lock.json"
shutil.copyfile(ROOT / "checkpoints" / "hub.lock.json", LOCK)
os.environ["LGAP_LOCK"] = str(LOCK)
atexit.register(shutil.rmtree, LOCK.parent)
SIZES = {
    "classifier": {"depth": 10, "widen_factor": 1, "batch_size": 8},
    "vae": {"channels": (8, 16, 16), "latent_channels": 4},
    "diffusion": {"channels": (16, 32), "text_width": 16, "cycles": ()},
}


def pytest_make_parametrize_id(val):
    """Show plain settings as they are written, without the addresses of objects, which differ by process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(val)) if type(val) in (dict, list, tuple) else None


@pytest.fixture
def quick(monkeypatch):
    """AutoAttack's numbers made small; FAB, nine tenths of its time, is left out and sets no flag."""
    from pyautoattack.fab_base import FABAttack

    from lgap_utils import autoattack

    monkeypatch.setattr(FABAttack, "perturb", lambda self, x, y: x.clone())
    monkeypatch.setattr(
        autoattack.autoattack, "__kwdefaults__", autoattack.autoattack.__kwdefaults__ | {"n_queries": 10}
    )
    return {"eps": 0.05, "n_steps": 5}


@pytest.fixture(scope="session")
def make():
    """checkpoints/make.py, which takes seconds to import."""
    from checkpoints import make

    return make


@pytest.fixture(scope="session")
def captions():
    """Enough true captions to hold every word that the toy data set uses."""
    from lgap_utils import toy

    return [toy.draw("train", i)[2] for i in range(300)]


@pytest.fixture(scope="session")
def profile(make, captions, tmp_path_factory):
    """A profile whose three models lie in a temporary folder, in the layout of checkpoints/toy."""
    import torch

    from lgap_utils.data import load_images
    from lgap_utils.profiles import TOY

    out = tmp_path_factory.mktemp("tiny")
    profile = replace(
        TOY,
        name="tiny",
        num_inference_steps=50,
        time_grid="compvis",
        **{part: str(out / part) for part in ("captioner", "diffusion", "classifier")},
    )
    images = load_images("toy", "train", 8)
    for part, sizes in SIZES.items():
        torch.manual_seed(0)
        job = make.Job(profile, images, captions[:8], tmp_path_factory.mktemp(part), out, "cpu")
        make.PARTS[part](job, **{"epochs": 0} | sizes)
    torch.manual_seed(0)
    captioner = make.new_captioner(captions, profile, "cpu", width=16, layers=1, text_layers=1)
    for weight in captioner.model.parameters():
        weight.data *= 8 if weight.ndim > 1 else 1  # without this, every image would get the same words
    captioner.model.half().save_pretrained(out / "captioner")
    captioner.processor.save_pretrained(out / "captioner")
    make.models.write_checksums(out)
    return profile


@pytest.fixture(scope="session")
def defense(profile):
    from lgap_utils.models import load_defense

    return load_defense(profile, device="cpu")


@pytest.fixture(scope="session")
def purifier(defense):
    return defense.purifier


@pytest.fixture(scope="session")
def images():
    """The first eight test images of the toy data set."""
    from lgap_utils.data import load_images

    return load_images("toy", "test", 8)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A whole run of a cheap defence: its folder, which must not be changed, and its table."""
    from cheap_defense import ATTACK, evaluation

    folder = tmp_path_factory.mktemp("unbroken")
    return folder, evaluation(folder, batch_size=2).run(ATTACK)


@pytest.fixture
def copied(unbroken, tmp_path):
    """A copy of the whole run to do harm to."""
    return shutil.copytree(unbroken[0], tmp_path / "copy")


@pytest.fixture(scope="session")
def exact(purifier):
    """The purifier in float64, at 16 x 16 and in a few steps, its colours too pale to reach the clamp."""
    double = copy.deepcopy(purifier).double()
    double.size, double.strength = 16, 0.1
    double.vae.decoder.conv_out.weight.data *= 0.1
    double.vae.decoder.conv_out.bias.data *= 0.1
    return double


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A lock file and a cache of the test's own, and no network."""
    (tmp_path / "lock.json").write_text("{}")
    monkeypatch.setenv("LGAP_LOCK", str(tmp_path / "lock.json"))
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        socket.socket, "connect", lambda *_: pytest.fail("something tried to reach the network")
    )
