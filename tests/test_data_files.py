"""Files of data sets: LGAP_DATA must exist, the hub's files are fixed, images have eight bits a channel."""

# ruff: noqa: F401, F811  (fixtures of fake_data_sets)
import hashlib

import numpy as np
import pandas as pd
import pytest
from fake_data_sets import both, cifars, empty_folder, imagenet_folder, lock_test_file
from PIL import Image

from lgap_utils import data, data_files
from lgap_utils.data import at_hand, load_images
from lgap_utils.data_files import take_rows


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet"])
def test_a_folder_of_data_that_does_not_exist_is_named(tmp_path, monkeypatch, dataset):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "dta", tmp_path / "file"):
        monkeypatch.setenv("LGAP_DATA", str(place))
        says = f"LGAP_DATA={place}: there is no folder {place}; correct it, or unset it"
        with pytest.raises(FileNotFoundError, match=says):
            load_images(dataset, "test", 1)
        assert not at_hand(dataset) and load_images("toy", "test", 1)


def test_without_lgap_data_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("LGAP_DATA", raising=False)
    monkeypatch.setattr(data_files, "data_root", lambda: tmp_path / "data")  # as in a fresh checkout
    with pytest.raises(FileNotFoundError, match="uoft-cs/cifar10 "):
        load_images("cifar10", "test", 1)


@both
def test_a_missing_file_is_named(cifars, tmp_path, monkeypatch, dataset):
    cifars[0][dataset].unlink()
    says = f"test-00000-of-00001.parquet is missing; expected the layout of uoft-cs/{dataset} on the hub"
    with pytest.raises(FileNotFoundError, match=says):
        load_images(dataset, "test", 1)
    monkeypatch.setenv("LGAP_DATA", empty_folder(tmp_path))
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    says = f"nor could be fetched from the hub .*set LGAP_DATA .*{dataset}/"
    with pytest.raises(FileNotFoundError, match=says):
        load_images(dataset, "test", 1)


@both
def test_the_hub_is_asked_for_one_file_at_a_fixed_revision(cifars, tmp_path, monkeypatch, dataset):
    calls, file, cifar = [], cifars[0][dataset], data.CIFARS[dataset]
    fetch = lambda *args, **kw: calls.append((args, kw)) or str(file)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setenv("LGAP_DATA", empty_folder(tmp_path))
    monkeypatch.setenv("LGAP_CACHE", "elsewhere")
    with pytest.raises(ValueError, match="is damaged: sha256"):  # it is not the file that the hub has
        load_images(dataset, "test")
    lock_test_file(monkeypatch, tmp_path, dataset, file)
    calls.clear()
    assert len(load_images(dataset, "test")) == 10
    where = {"repo_type": "dataset", "revision": cifar.revision, "cache_dir": "elsewhere"}
    assert calls == [((f"uoft-cs/{dataset}", cifar.file.format("test")), where)]


def test_rows_are_taken_whole_or_not_at_all():
    rows = np.arange(10)
    assert take_rows(rows, "x", 2, 8).tolist() == [8, 9] and take_rows(rows, "x", None, 7).tolist() == [
        7,
        8,
        9,
    ]
    for n, start in ((11, 0), (3, 8), (1, 10), (None, 10)):
        last = start + (n or 1) - 1
        says = f"x: asked for rows {start} to {last}, the split ends before that: it has 10"
        with pytest.raises(ValueError, match=says):
            take_rows(rows, "x", n, start)


# ---------------------------------------------------------------- encoded images


def write_row(file, data):
    """A test split of one image."""
    pd.DataFrame({"img": [{"bytes": data}], "label": [0]}).to_parquet(file)


@pytest.mark.parametrize("mode, dtype", [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
@pytest.mark.parametrize("dataset", ["cifar10", "imagenet"])
def test_an_image_of_more_than_eight_bits_is_refused(cifars, imagenet_folder, tmp_path, dataset, mode, dtype):
    file, (folder, names) = tmp_path / "wide", imagenet_folder
    Image.fromarray(np.full((32, 32), 300, dtype)).save(file, "TIFF")
    if dataset == "imagenet":
        name = folder / names[0]
        name.write_bytes(file.read_bytes())
    else:
        name = f"{cifars[0][dataset]}, row 0"
        write_row(cifars[0][dataset], file.read_bytes())
    says = f"{name}: expected 8 bits a channel, got PIL's mode {mode}; save it with 8 bits"
    with pytest.raises(ValueError, match=says):
        load_images(dataset, "test")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_are_read_as_robustbench_reads_them(cifars, mode, tmp_path):
    file, noise = tmp_path / "one", np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
    write_row(cifars[0]["cifar10"], file.read_bytes())
    pixels = load_images("cifar10", "test").pixels[0].permute(1, 2, 0)
    assert np.array_equal(pixels, np.array(Image.open(file).convert("RGB")))
