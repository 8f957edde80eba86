"""What the notebooks install on Colab: ten packages by name at most, and never what a kernel already runs."""

import pytest

from lgap_utils.profiles import ROOT
from tools import colab

THERE = {"torch": "2.9.0", "numpy": "2.1.0", "setuptools": "75.2.0", "robustbench": "1.1.1", "timm": "1.0.9"}
THERE |= {"pyautoattack": "0.2.0", "torchdiffeq": "0.2.5", "geotorch": "0.4.0", "filelock": "4.0"}
THERE |= {"transformers": "5.23.0", "diffusers": "0.42.1", "tokenizers": "0.23.3", "safetensors": "0.9.0"}
THERE |= {"huggingface-hub": "1.40.0"}


@pytest.fixture
def python(monkeypatch):
    """A Python that has some packages, which the test may change."""
    have = dict(THERE)
    monkeypatch.setattr(colab, "installed", lambda name: have.get(name.replace("_", "-")))
    return have


def names(lines):
    return [line.split("==")[0] for line in lines]


def test_nothing_is_installed_where_all_is_there(python):
    assert colab.wanted() == [] and colab.unfit() == {}


def test_on_a_bare_python_ten_named_packages_are_and_no_driver_test_or_notebook_tool(python):
    python.clear()
    wanted = names(colab.wanted())
    assert wanted == [*colab.TOGETHER, *colab.ALONE] and len(wanted) == 10
    assert not [name for name in wanted if name.startswith(("nvidia", "torch=", "pytest", "jupyter"))]
    assert all("==" in line and ";" not in line for line in colab.wanted())


def test_an_old_part_replaces_those_that_go_with_it_and_an_absent_one_comes_alone(python):
    python["transformers"] = "4.57.0"
    del python["geotorch"]
    assert names(colab.wanted()) == [*colab.TOGETHER, "geotorch"]
    python["transformers"] = "5.0.0"
    assert names(colab.wanted()) == ["geotorch"]


def test_what_is_too_old_and_not_ours_to_replace_is_named(python):
    python |= {"torch": "2.4.1", "setuptools": "82.0"}
    assert colab.unfit() == {
        "torch": "torch 2.4.1, expected >=2.6",
        "setuptools": "setuptools 82.0, expected <81",
    }
    assert colab.wanted() == []


def test_every_name_is_pinned():
    pins = colab.pins((ROOT / "requirements.txt").read_text())
    assert {*colab.TOGETHER, *colab.ALONE} <= set(pins)
