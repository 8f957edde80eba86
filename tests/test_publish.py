"""Published results: what is copied, what stays with the data, and that git knows nothing else of a run."""

import importlib.util
import json
import shutil
import subprocess

import pytest

from lgap_utils.profiles import ROOT

SPEC = importlib.util.spec_from_file_location("publish", ROOT / "tools" / "publish.py")
publish = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(publish)

# What a run leaves, and what of it is published at `small` and at `toy`.
MADE = {
    "results.json": "both",
    "tables/03_a.csv": "both",
    "tables/03_a.md": "both",
    "tables/03_a.tex": "both",
    "figures/03_accuracy.png": "small",
    "figures/04_table1.png": "small",
    "figures/07_table4.png": "small",
    "figures/02_figure2.png": "toy",
    "figures/01_captions.png": "",
    "figures/03_training_images.png": "",
    "figures/05_cifar100.png": "",
    "figures/07_imagenet.png": "",
    "figures/09_of_another_notebook.png": "",
    "figures/03_accuracy.pdf": "",
    "rows/table2/natural/000000-a.parquet": "small",
    "rows/table2/natural/config.json": "small",
    "rows/table2/natural/.lock": "",
    "rows/table2/natural/000000-b.broken": "",
    "rows/table2/natural/1.parquet.7.part": "",
    "rows/03_train_toy/000000-a.parquet": "",
    "rows/mine/natural/000000-a.parquet": "",
    "classifier_cifar10/model.safetensors": "small",
    "classifier_cifar10/config.json": "small",
    "classifier_cifar10/finetuning.json": "small",
    "classifier_cifar10/SHA256SUMS": "small",
    "classifier_cifar10/.lock": "",
    ".lock": "",
}


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    root.mkdir()
    if subprocess.run(["git", "init", "--quiet"], cwd=root).returncode:
        pytest.skip("no git")
    shutil.copy(ROOT / ".gitignore", root)
    (root / "README.md").write_text(
        "<!-- table: outputs/published/small/tables/03_a.md -->\nold\n<!-- end -->\nx\n"
        "<!-- table: outputs/published/small/tables/none.md -->\nstays\n<!-- end -->\n"
        "<!-- times: small -->x<!-- end -->\n"
    )
    return root


def put(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def files_of(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("profile", ["small", "toy"])
def test_results_are_copied_and_pictures_of_the_data_are_not(profile, checkout, tmp_path):
    source, target = tmp_path / "measured", checkout / "outputs/published" / profile
    for name in MADE:
        put(source, name, json.dumps({"name": name}))
    put(target, "rows/table2/natural/000000-old.parquet", "of an earlier run")
    put(target, "tables/06_other.md", "of a notebook that was not run again")
    notebook = {"metadata": {"papermill": {"duration": 61.5}}, "cells": []}
    put(source, "notebooks/03_finetuning.ipynb", json.dumps(notebook))
    put(source, "notebooks/04_table1.ipynb", json.dumps(notebook | {"metadata": {}}))
    before = files_of(source)
    n = publish.publish(source, checkout, profile)
    wanted = {name for name, where in MADE.items() if where in (profile, "both")}
    old = {"tables/06_other.md"} | ({"rows/table2/natural/000000-old.parquet"} if profile == "toy" else set())
    times = (target / "tables/00_times.csv").read_text().splitlines()
    assert times == ["notebook,seconds", "03_finetuning,61.5"]
    assert (
        files_of(target) == wanted | old | {"tables/00_times.csv"}
        and n == len(wanted)
        and files_of(source) == before
    )
    assert all(json.loads((target / name).read_text())["name"] == name for name in wanted)
    text = (checkout / "README.md").read_text()
    assert ('{"name": "tables/03_a.md"}' in text) == (profile == "small") and "stays" in text
    assert ("<!-- times: small -->62 s<!-- end -->" in text) == (profile == "small")


def test_a_torn_results_file_is_not_published(checkout, tmp_path):
    put(tmp_path / "measured", "results.json", "{")
    put(tmp_path / "measured", "tables/03_a.md", "new")
    with pytest.raises(ValueError):
        publish.publish(tmp_path / "measured", checkout, "small")
    assert not (checkout / "outputs").exists() and "old" in (checkout / "README.md").read_text()


def test_outside_of_a_git_checkout_nothing_is_published(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    put(tmp_path / "measured", "results.json", "{}")
    (tmp_path / "plain").mkdir()
    with pytest.raises(RuntimeError, match="publishing needs a git checkout"):
        publish.publish(tmp_path / "measured", tmp_path / "plain", "small")
    assert not files_of(tmp_path / "plain")


def git(*arguments):
    listing = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


def test_git_knows_nothing_of_outputs_but_what_is_published():
    known = git("ls-files", "outputs")
    assert known and all(name.startswith("outputs/published/") for name in known)
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []
    for name in ("toy/tables/a.md", "small/results.json", "small/figures/04_table1.png"):
        name = f"outputs/{name}"
        assert git("check-ignore", "--no-index", name) == [name]
