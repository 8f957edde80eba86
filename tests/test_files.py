"""Checksums of model folders, where a model's folder is looked for, and temporary names."""

import hashlib

import pytest

from lgap_utils import files
from lgap_utils.files import CheckpointError


@pytest.fixture
def folder(tmp_path):
    """A model folder of two parts, and its checksums."""
    for name in ("one/config.json", "one/model.safetensors", "two/words.txt", "two/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files.write_checksums(tmp_path)
    return tmp_path


def test_checksums_are_those_of_hashlib_and_cover_every_model_file(folder):
    checked = files.verify(folder)
    assert set(checked) == {"one/config.json", "one/model.safetensors", "two/words.txt"}
    for name, digest in checked.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert files.verify(folder / "one").keys() == {"one/config.json", "one/model.safetensors"}
    (folder / "SHA256SUMS").unlink()
    assert files.verify(folder) == {}


def test_a_file_that_differs_or_lacks_is_refused_with_its_digest_and_the_remedy(folder):
    file = folder / "one" / "config.json"
    expected = files.sha256(file)[:16]
    file.write_text("other")
    with pytest.raises(
        CheckpointError, match=f"{file} is damaged: sha256 .*, expected {expected}...; copy it"
    ):
        files.verify(folder, "copy it again")
    assert set(files.verify(folder, digest=False)) > {"one/config.json"}
    file.unlink()
    for digest in (True, False):
        with pytest.raises(CheckpointError, match=f"{file} is missing, expected sha256 {expected}"):
            files.verify(folder, digest=digest)
    files.verify(folder / "two")  # another part of the same list


@pytest.mark.parametrize("text", ["", "\n", "0123456789abcdef"], ids=["empty", "a blank line", "cut short"])
def test_a_list_of_checksums_that_lists_nothing_is_refused(folder, text):
    (folder / "one" / "SHA256SUMS").write_text(text)
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        files.verify(folder / "one")


def test_no_two_writers_have_the_same_temporary_name(tmp_path):
    assert len({files.temporary_path(tmp_path / "weights.bin") for _ in range(100)}) == 100


def test_a_folder_is_looked_for_here_in_the_checkout_and_in_the_cache(tmp_path, monkeypatch):
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "cache" / "kept").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    assert files.locate("model") == tmp_path / "here" / "model"
    assert files.locate("kept") == tmp_path / "cache" / "kept"
    assert files.locate("checkpoints/toy") == files.ROOT / "checkpoints" / "toy"
    assert files.locate("someone/model") is None  # a hub id
    for name in (str(tmp_path / "none"), "checkpoints/none/captioner", "./none"):
        with pytest.raises(CheckpointError, match=f"{name}: no such folder"):
            files.locate(name)
