"""The lock file of digests, and the cause and remedy of each failed download."""

import json
import urllib.error

import pytest
import requests

from lgap_utils import data, hub, imagenet, profiles
from lgap_utils.files import CheckpointError, sha256
from lgap_utils.hub import explain, lock_entries, record_digests, snapshot, verify_file
from lgap_utils.profiles import REVISIONS

pytestmark = pytest.mark.usefixtures("own_cache")
REPOSITORY = "Salesforce/blip-image-captioning-base"
REVISION = REVISIONS[REPOSITORY]


def test_the_committed_lock_file_names_what_the_paper_profile_reads():
    lock = json.loads((profiles.ROOT / "checkpoints" / "hub.lock.json").read_text())
    for repository in ("stable-diffusion-v1-5/stable-diffusion-v1-5", REPOSITORY):
        known = lock[f"{repository}@{REVISIONS[repository]}"]
        big = {name: entry for name, entry in known.items() if (entry["size"] or 0) > 10**7}
        assert big and all(len(entry["sha256"]) == 64 for entry in big.values())
    (diffusion,) = [known for source, known in lock.items() if source.startswith("stable-diffusion")]
    assert {name.split("/")[0] for name in diffusion} == {
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
    }

    for repository, names in [
        (imagenet.IMAGENET, imagenet.IMAGENET_SHARDS),
        *((c.repository, [c.file.format(s) for s in ("train", "test")]) for c in data.CIFARS.values()),
    ]:
        assert {
            name for source, known in lock.items() if source.startswith(repository + "@") for name in known
        } <= set(names)
    # torchvision writes the first digits of the digest into the file's name
    assert lock["robustbench"]["imagenet/Linf/Standard_R50.pt"]["sha256"].startswith("0676ba61")


def test_a_digest_is_recorded_after_its_model_has_loaded_and_checked_ever_after(tmp_path, capsys):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"first")
    entry = verify_file(file, "here@1", "weights.bin", "fetch it again")
    assert (
        entry == {"sha256": sha256(file), "size": 5} and lock_entries("here@1") == {}
    )  # looking at a file records nothing
    record_digests("here@1", {"weights.bin": entry})
    assert "first use of here@1, recorded in lock.json: weights.bin sha256" in capsys.readouterr().out
    assert lock_entries("here@1")["weights.bin"] == entry
    record_digests("here@1", {"weights.bin": entry | {"sha256": "0" * 64}})
    assert (
        lock_entries("here@1")["weights.bin"] == entry and not capsys.readouterr().out
    )  # what is known stays
    assert verify_file(file, "here@1", "weights.bin", "fetch it again") == entry
    file.write_bytes(b"other")
    with pytest.raises(
        CheckpointError,
        match=f"{file} is damaged: sha256 .*, 5 bytes, expected 5 bytes, expected sha256 .*; "
        f"delete {file}, then fetch it again",
    ):
        verify_file(file, "here@1", "weights.bin", "fetch it again")
    assert lock_entries("here@2") == {}


@pytest.mark.parametrize("length, digest", [(4, True), (4, False), (6, False)])
def test_a_size_that_is_known_is_compared_while_the_digest_is_not(tmp_path, length, digest):
    (tmp_path / "lock.json").write_text(json.dumps({"here@1": {"weights.bin": {"sha256": None, "size": 5}}}))
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x" * length)
    with pytest.raises(
        CheckpointError,
        match=f"is damaged: (sha256 .*, )?{length} bytes, expected 5 bytes; delete {file}, then fetch",
    ):
        verify_file(file, "here@1", "weights.bin", "fetch it again", digest)


@pytest.mark.parametrize(
    "content, words",
    [(None, "is missing"), (b"", "is empty"), (b"\n <!DOCTYPE html><p>quota", "is a web page")],
)
def test_what_is_no_file_is_refused(tmp_path, content, words):
    file = tmp_path / "weights.bin"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        verify_file(file, "here@1", "weights.bin", "fetch it again")
    assert (tmp_path / "lock.json").read_text() == "{}"


def test_a_file_that_the_hub_named_by_its_digest_must_have_it(tmp_path):
    """The hub's cache names a large file by its sha256: half of one is refused with no digest known."""
    blob = tmp_path / ("0" * 64)
    blob.write_bytes(b"half of")
    (tmp_path / "weights.bin").symlink_to(blob)
    with pytest.raises(
        CheckpointError,
        match=f"is damaged: sha256 .*, expected what the hub called {blob}; delete {blob}, then",
    ):
        verify_file(tmp_path / "weights.bin", "here@1", "weights.bin", "fetch it again")


def test_a_lock_file_that_cannot_be_read_or_written_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "lock.json").write_text("{")
    with pytest.raises(CheckpointError, match="lock.json is not JSON; restore it"):
        verify_file(tmp_path / "weights.bin", "here@1", "weights.bin", "fetch it again")
    monkeypatch.setenv("LGAP_LOCK", str(tmp_path / "none" / "lock.json"))
    with pytest.raises(
        CheckpointError, match="none/lock.json is not there; restore it .*, or name another with LGAP_LOCK"
    ):
        verify_file(tmp_path / "weights.bin", "here@1", "weights.bin", "fetch it again")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "lock.json").write_text("{}")
    monkeypatch.setattr(hub, "write_whole", lambda *_: (_ for _ in ()).throw(OSError("a full disk")))
    record_digests(
        "here@1",
        {"weights.bin": verify_file(tmp_path / "weights.bin", "here@1", "weights.bin", "fetch it again")},
    )
    assert "could not be recorded (a full disk)" in capsys.readouterr().out


def test_a_snapshot_asks_for_a_pickle_only_where_the_lock_file_names_it(tmp_path, monkeypatch):
    (tmp_path / "lock.json").write_text(
        json.dumps({"a/b@1": {"model.bin": {"sha256": None, "size": 1}, "other.fp16": {"sha256": None}}})
    )
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **kw: asked.update(kw) or str(tmp_path / "repository"),
    )
    (tmp_path / "repository").mkdir()
    with pytest.raises(CheckpointError, match="model.bin of a/b@1 is missing"):
        snapshot("a/b", "1", ["*.json"])
    (tmp_path / "repository" / "model.bin").write_bytes(b"x")
    folder, read = snapshot("a/b", "1", ["*.json"])
    assert folder == tmp_path / "repository" and set(read) == {"model.bin"}
    assert asked == {
        "revision": "1",
        "allow_patterns": ["*.json", "model.bin"],
        "cache_dir": str(tmp_path / "cache"),
    }


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(28, "No space left on device", "/x"), "the disk is full"),
        (OSError(27, "File too large"), "the disk is full"),
        (PermissionError(13, "Permission denied", "/x"), "cannot be written there"),
        (NotADirectoryError(20, "x"), "cannot be written there"),
        (TimeoutError("timed out"), "no answer came in time"),
        (ConnectionRefusedError(111, "refused"), "it cannot be reached"),
        (urllib.error.HTTPError("http://a", 404, "Not Found", {}, None), "it is not there (HTTP 404)"),
        (urllib.error.URLError("no host"), "it cannot be reached"),
        (requests.exceptions.ConnectTimeout("x"), "no answer came in time"),
        (requests.exceptions.ProxyError("x"), "the proxy does not let it through"),
        (requests.exceptions.ChunkedEncodingError("x"), "the connection broke off"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_failure_has_its_reason(error, words):
    for each in (error, wrapped(error)):
        if each is error or not isinstance(error, RuntimeError):
            cause, remedy = explain(each)
            assert words in cause and remedy and "\n" not in cause + remedy


def wrapped(error):
    try:
        raise ValueError("something above it") from error
    except ValueError as above:
        return above
