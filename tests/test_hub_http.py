"""The hub over HTTP on the loopback: what loads, and what each fault of server, network or disk says."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import Hub
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from lgap_utils import data, hub, imagenet, models, zoo
from lgap_utils.files import CheckpointError, sha256
from lgap_utils.hub import lock_entries
from lgap_utils.profiles import PAPER, REVISIONS, ROOT
from tools import doctor

BLIP, SD = PAPER.captioner, PAPER.diffusion
SOURCE = f"{BLIP}@{REVISIONS[BLIP]}"


@pytest.fixture(scope="module")
def published(profile, tmp_path_factory):
    """A folder with the tiny models as the real ones are published, and with a CIFAR-10 of four images."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    out = tmp_path_factory.mktemp("published")
    captioner = models.load_captioner(profile.captioner, device="cpu")
    captioner.model.save_pretrained(out / "blip")
    captioner.processor.save_pretrained(out / "blip")
    (out / "blip" / "model.safetensors").unlink()
    torch.save(captioner.model.state_dict(), out / "blip" / "pytorch_model.bin")
    shutil.copytree(profile.diffusion, out / "sd")
    for file in (out / "sd").rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    image = io.BytesIO()
    Image.new("RGB", (32, 32), (10, 20, 30)).save(image, "PNG")
    table = pyarrow.table({"img": [{"bytes": image.getvalue(), "path": None}] * 4, "label": [3, 8, 8, 0]})
    file = out / "cifar" / data.CIFARS["cifar10"].file.format("test")
    file.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(table, file)
    return out


@pytest.fixture
def served(published, tmp_path, monkeypatch, request):
    """A hub with the names of the real repositories, an empty cache, and a lock file without digests."""
    served = Hub()
    cifar = data.CIFARS["cifar10"]
    served.add(BLIP, REVISIONS[BLIP], published / "blip")
    served.add(SD, REVISIONS[SD], published / "sd")
    served.add(cifar.repository, cifar.revision, published / "cifar", "dataset")
    lock = {
        f"{name.removeprefix('datasets/')}@{revision}": {
            file: {"sha256": None, "size": len(content)}
            for file, content in stored.items()
            if file not in ("README.md",)
        }
        for name, (revision, stored) in served.repositories.items()
    }
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    for name, value in {
        "LGAP_LOCK": "lock.json",
        "LGAP_CACHE": "cache",
        "LGAP_DATA": "data",
        "HF_HOME": "home",
    }.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    patience(monkeypatch, 1 if "silent" in request.node.name or "no_answer" in request.node.name else 30)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address(monkeypatch, served.url)
    yield served
    _http.close_session()
    served.close()


def address(monkeypatch, url):
    """What HF_ENDPOINT sets, which is read only once."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    _http.close_session()


def patience(monkeypatch, seconds=30):
    """The client tries again at once, and waits so many seconds for an answer."""
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "DEFAULT_REQUEST_TIMEOUT"):
        monkeypatch.setattr(constants, name, seconds)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", seconds)


def captioner():
    return models.load_captioner(BLIP, device="cpu")


def diffusion():
    return models.load_diffusion(SD, device="cpu", variant="fp16", size=32, strength=0.5)


def test_the_papers_models_and_data_come_over_http(served, defense, images, tmp_path, capsys):
    assert captioner()(images.x) == defense.captioner(images.x)
    said = capsys.readouterr().out
    assert f"first use of {SOURCE}, recorded in lock.json: config.json sha256" in said
    assert {entry["sha256"] is None for entry in lock_entries(SOURCE).values()} == {False}
    purifier = diffusion()
    assert purifier.vae.config.block_out_channels == defense.purifier.vae.config.block_out_channels
    read = data.load_images("cifar10", "test")
    assert read.labels.tolist() == [3, 8, 8, 0] and read.pixels[0, :, 0, 0].tolist() == [10, 20, 30]
    asked = len(served.asked)
    captioner(), diffusion(), data.load_images("cifar10", "test")
    assert len(served.asked) == asked  # all is in the cache: the hub is not asked again


# ---------------------------------------------------------------- what a server says

# fault: (what is said of it, what to do)
SAID = {
    "gated": ("only for those who have accepted its terms", "hf auth login"),
    "gated, not granted": ("only for those who have accepted its terms", "accept them there"),
    "unknown or private": ("no such repository", "check its name"),
    "repository gone": ("no such repository", "check its name"),
    "revision gone": ("this revision is not there", "another commit"),
    "bad token": ("does not know your token", "HF_TOKEN"),
    "forbidden": ("access is forbidden", "hf auth login"),
    "not found": ("it is not there", "look for it"),
    "too many requests": ("too many requests", "wait a while"),
    "broken": ("the server is out of order", "later"),
    "login page": ("what answers is no hub", "browser"),
    "silent": ("no answer came in time", "HF_HUB_ETAG_TIMEOUT"),
}


def one_sentence(refused, *words):
    said = str(refused.value)
    assert (
        "\n" not in said and "Error" not in said.replace("CheckpointError", "") and said.count("; ") <= 2
    ), said
    assert all(word in said for word in words), said
    return said


@pytest.mark.parametrize("fault", SAID)
def test_a_model_that_the_hub_does_not_send_says_why_from_where_and_what_to_do(served, fault):
    served.faults = {f"*{BLIP}*": fault}
    with pytest.raises(CheckpointError) as refused:
        captioner()
    one_sentence(refused, SOURCE, f"{served.url}/{BLIP}", "or name a folder", *SAID[fault])
    served.faults = {}
    captioner()  # nothing is left behind that would stand in its way


@pytest.mark.parametrize("fault", [*SAID, "file gone"])
def test_a_data_set_that_the_hub_does_not_send_says_so_too(served, fault):
    served.faults = {"* /datasets/*": fault}
    with pytest.raises(FileNotFoundError) as refused:
        data.load_images("cifar10", "test")
    words = SAID.get(fault, ("a file is not there", "another commit"))
    one_sentence(
        refused,
        f"{served.url}/datasets/uoft-cs/cifar10",
        "or set LGAP_DATA to a folder that holds cifar10/plain_text",
        *words,
    )
    served.faults = {}
    assert len(data.load_images("cifar10", "test")) == 4


@pytest.mark.parametrize(
    "fault, words", [("login page", "not as long as was announced"), ("cut", "the connection broke off")]
)
@pytest.mark.parametrize("file", ["*/config.json", "/blobs/*"])
def test_a_file_that_comes_by_halves_or_as_another_page_is_not_kept(served, fault, words, file, tmp_path):
    served.faults = {f"GET {file}": fault}
    with pytest.raises(CheckpointError) as refused:
        captioner()
    one_sentence(refused, SOURCE, served.url, words, "try again")
    assert lock_entries(SOURCE)["config.json"]["sha256"] is None and not list(tmp_path.rglob("*.incomplete"))
    served.faults = {}
    captioner()


@pytest.mark.parametrize("file", ["config.json", "pytorch_model.bin"])
def test_a_bit_that_flips_on_the_way_is_seen_before_any_digest_is_known(served, file):
    served.faults = {f"GET */{file}" if file.endswith("json") else "GET /blobs/*": "flipped"}
    with pytest.raises(CheckpointError) as refused:
        captioner()
    said = one_sentence(
        refused, f"{file} is damaged: sha256", "expected what the hub called", "then fetch it again"
    )
    assert lock_entries(SOURCE)[file]["sha256"] is None
    served.faults = {}
    as_it_says(said)
    captioner()


def as_it_says(said):
    """Delete what a message names."""
    (named,) = re.findall(r"delete (\S+),", said)
    assert Path(named).is_file() and not Path(named).is_symlink()
    Path(named).unlink()


def test_a_name_that_answers_nothing_and_a_port_that_nobody_has(served, monkeypatch):
    for url in ("http://hub.invalid", "http://127.0.0.1:9"):
        address(monkeypatch, url)
        with pytest.raises(CheckpointError) as refused:
            captioner()
        one_sentence(refused, url, "it cannot be reached", "ALL_PROXY")
        with pytest.raises(FileNotFoundError) as refused:
            data.load_images("cifar10", "test")
        one_sentence(refused, url, "it cannot be reached", "ALL_PROXY")


def test_offline_nothing_is_asked_and_what_is_cached_loads(served, monkeypatch):
    def set_offline(value):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1" if value else "0")

    set_offline(True)
    for load, kind in (
        (captioner, CheckpointError),
        (lambda: data.load_images("cifar10", "test"), FileNotFoundError),
    ):
        with pytest.raises(kind) as refused:
            load()
        one_sentence(refused, "HF_HUB_OFFLINE is set, and the cache lacks it", "unset it")
    assert not served.asked
    set_offline(False)
    captioner()
    set_offline(True)
    asked = len(served.asked)
    captioner()
    assert len(served.asked) == asked


# ---------------------------------------------------------------- the cache

DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "HTML": lambda file: file.write_text("<!doctype html>"),
    "flipped": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["vocab", "pytorch_model.bin"])
def test_deleting_what_the_message_names_mends_a_damaged_cache(served, tmp_path, file, damage):
    file = "tokenizer.json" if file == "vocab" else file
    captioner()
    (link,) = (tmp_path / "cache").rglob(f"snapshots/*/{file}")
    DAMAGES[damage](link.resolve())
    with pytest.raises(CheckpointError) as refused:
        captioner()
    expected = lock_entries(SOURCE)[file]
    said = one_sentence(
        refused, str(link), f"expected sha256 {expected['sha256'][:16]}", "then fetch it again"
    )
    as_it_says(said)
    captioner()  # fetched again: the link alone would have led to the same bad file
    assert sha256(link) == expected["sha256"]


def test_a_blob_that_is_itself_a_link_is_known_by_the_hubs_name_and_deleted_at_its_end(served, tmp_path):
    """huggingface_hub can share blobs between caches: the last file has a name of another kind."""
    captioner()
    (link,) = (tmp_path / "cache").rglob("snapshots/*/pytorch_model.bin")
    blob, shared = link.resolve(), tmp_path / ("f" * 64)
    blob.rename(shared)
    blob.symlink_to(shared)
    captioner()
    DAMAGES["half"](shared)
    with pytest.raises(CheckpointError, match=f"delete {shared}, then"):
        captioner()


@pytest.mark.parametrize(
    "mount, words", [("size=64k", "the disk is full"), ("ro", "it cannot be written there")]
)
def test_a_full_disk_and_a_read_only_one(served, tmp_path, mount, words):
    if not shutil.which("unshare"):
        pytest.skip("there is no unshare here, with which a file system of its own could be mounted")
    (tmp_path / "cache").mkdir()
    script = (
        "from lgap_utils.files import CheckpointError\nfrom lgap_utils.hub import snapshot\n"
        f"try: snapshot({BLIP!r}, {REVISIONS[BLIP]!r}, ['*'])\n"
        "except CheckpointError as error: print(error)"
    )
    command = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs -o {mount} none "$1" && shift && exec "$@"',
        "sh",
        str(tmp_path / "cache"),
        sys.executable,
        "-c",
        script,
    ]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"HF_ENDPOINT": served.url}, capture_output=True, text=True
    )
    if ran.returncode and not ran.stdout and ("unshare" in ran.stderr or "mount" in ran.stderr):
        pytest.skip("this system lets nobody mount a file system of his own")
    assert (
        words in ran.stdout
        and "LGAP_CACHE" in ran.stdout
        and served.url in ran.stdout
        and ran.stdout.count("\n") == 1
    ), ran


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
    ],
)
def test_what_a_disk_refuses_is_said_of_data_too(served, monkeypatch, number, words):
    def write(*_, **__):
        raise OSError(number, os.strerror(number), "/cache/blobs/1")

    monkeypatch.setattr(file_download, "http_get", write)
    with pytest.raises(FileNotFoundError) as refused:
        data.load_images("cifar10", "test")
    assert (
        words in str(refused.value)
        and "/cache/blobs/1" in str(refused.value)
        and "LGAP_CACHE" in str(refused.value)
    )


def test_a_home_is_expanded_in_the_caches_name(served, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LGAP_CACHE", "~/mine")
    captioner()
    assert f"models--{BLIP.replace('/', '--')}" in {p.name for p in (tmp_path / "mine").iterdir()}
    assert doctor_of("captioner") == ("ok", f"{BLIP} in {tmp_path / 'mine'}")


# ---------------------------------------------------------------- RobustBench's files

ENTRY, NAME = "robustbench:cifar10/Linf/Standard", "cifar10/Linf/Standard.pt"


@pytest.fixture
def standard(served, monkeypatch):
    """A small Standard.pt at an address on the hub's server, in the place of Google Drive's."""
    net = zoo.new_wide_resnet(10, 1, 10)
    file = io.BytesIO()
    torch.save({"state_dict": net.state_dict()}, file)
    served.pages["/Standard.pt"] = file.getvalue()
    monkeypatch.setattr(zoo, "robustbench_network", lambda *_: zoo.new_wide_resnet(10, 1, 10))
    monkeypatch.setattr(zoo, "robustbench_page", lambda *_: page(served))
    set_lock(None, None)
    return zoo.robustbench_file("cifar10", "Linf", "Standard")


def page(served):
    """An address on the same server that is not the hub's."""
    return f"{served.url.replace('127.0.0.1', 'localhost')}/Standard.pt"


def set_lock(digest, size):
    lock = json.loads(hub.lock_file().read_text()) | {"robustbench": {NAME: {"sha256": digest, "size": size}}}
    hub.lock_file().write_text(json.dumps(lock))


def load_standard():
    return models.load_classifier(ENTRY, device="cpu")


PAGES = {
    "not found": "it is not there (HTTP 404)",
    "broken": "the server is out of order (HTTP 500)",
    "forbidden": "HTTP 403",
    "silent": "no answer came in time",
    "login page": "is a web page and not the file",
    "cut": "",
    "flipped": "is damaged",
}


@pytest.mark.parametrize("fault", PAGES)
def test_a_file_of_robustbenchs_that_does_not_come_names_page_file_and_folder(served, standard, fault):
    whole = served.pages["/Standard.pt"]
    if fault == "flipped":
        set_lock(hashlib.sha256(whole).hexdigest(), len(whole))
    served.faults = {"GET /Standard.pt": fault}
    with pytest.raises(CheckpointError) as refused:
        load_standard()
    one_sentence(refused, page(served), str(standard), PAGES[fault])
    assert not list(standard.parent.iterdir())
    served.faults = {}
    load_standard()
    assert [p.name for p in standard.parent.iterdir()] == ["Standard.pt"]
    assert lock_entries("robustbench")[NAME] == {"sha256": sha256(standard), "size": len(whole)}


def test_nobody_at_the_address(served, standard, monkeypatch):
    monkeypatch.setattr(zoo, "robustbench_page", lambda *_: "http://127.0.0.1:9/Standard.pt")
    with pytest.raises(CheckpointError) as refused:
        load_standard()
    one_sentence(refused, "http://127.0.0.1:9/Standard.pt: it cannot be reached", str(standard), "ALL_PROXY")


@pytest.mark.parametrize("size", [None, "known"])
def test_half_a_file_is_never_the_truth(served, standard, size):
    """With nothing known of it, the load tells; with the size alone known, that does."""
    whole = served.pages["/Standard.pt"]
    set_lock(None, size and len(whole))
    standard.parent.mkdir(parents=True)
    standard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError) as refused:
        load_standard()
    said = one_sentence(
        refused, str(standard), f"expected {len(whole):,} bytes" if size else "is refused", page(served)
    )
    assert lock_entries("robustbench")[NAME]["sha256"] is None and "weights_only" not in said
    as_it_says(said)
    load_standard()
    assert lock_entries("robustbench")[NAME]["sha256"] == hashlib.sha256(whole).hexdigest()


# ---------------------------------------------------------------- the doctor


def doctor_of(what, name="toy", **settings):
    """(state, detail) of the doctor's line about one thing."""
    settings = {"captioner": BLIP, "dataset": "toy"} | settings
    (found,) = [
        (check.state, check.detail) for check in doctor.examine(name, **settings) if check.what == what
    ]
    return found


def test_the_doctor_asks_about_each_file_and_fetches_nothing(served, tmp_path):
    state, detail = doctor_of("captioner")
    assert state == "to fetch" and detail.endswith(f", from {served.url}")
    files_of = set(lock_entries(SOURCE))
    assert {request.split("/")[-1] for request in served.asked if BLIP in request} == files_of
    assert {request.split()[0] for request in served.asked if BLIP in request} == {"HEAD"} and not (
        tmp_path / "cache"
    ).exists()
    assert doctor_of("network") == ("ok", f"{served.url} answers")


@pytest.mark.parametrize("fault", [*SAID, "file gone"])
def test_the_doctor_says_why_a_file_would_not_come(served, fault):
    served.faults = {"* */tokenizer.json": fault}
    state, detail = doctor_of("captioner")
    words = {"file gone": "a file is not there"}.get(fault) or SAID[fault][0]
    assert state == "missing" and words in detail and f"hf download {BLIP}" in detail
    state, detail = doctor_of("network")
    assert ("is out of reach: no answer" in detail) == (fault == "silent")


def test_a_host_that_gives_no_answer_is_asked_once(served):
    served.faults = {"*": "silent"}
    checks = doctor.examine("toy", captioner=BLIP, diffusion=SD, variant="fp16", dataset="cifar10")
    assert [check.state for check in checks if check.what in ("captioner", "diffusion", "data")] == [
        "missing"
    ] * 3
    assert len([request for request in served.asked if "resolve" in request]) == 1


def test_a_gated_data_set_is_asked_for_by_its_files(served, published):
    served.add(imagenet.IMAGENET, imagenet.IMAGENET_REVISION, published / "cifar", "dataset")
    served.faults = {f"* /datasets/{imagenet.IMAGENET}/*": "gated"}
    state, detail = doctor_of("data", dataset="imagenet")
    assert state == "missing" and "accepted its terms" in detail and "hf auth login" in detail


def test_doctor_and_loader_go_through_the_same_proxy(served, monkeypatch, images):
    """ALL_PROXY, which the hub's client reads and urllib does not."""
    monkeypatch.setenv("ALL_PROXY", served.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    address(monkeypatch, "http://hub.invalid")
    assert doctor_of("captioner")[0] == "to fetch"
    monkeypatch.setattr(zoo, "robustbench_page", lambda *_: "http://drive.invalid/Standard.pt")
    served.pages["/Standard.pt"] = b"x"
    assert doctor_of("classifier", classifier=ENTRY)[0] == "to fetch"
    assert len(captioner()(images.x)) == len(images)


@pytest.mark.parametrize("damage, state", [("half", "missing"), ("HTML", "missing"), ("gone", "to fetch")])
def test_the_doctor_agrees_with_the_loader_about_the_cache(served, tmp_path, damage, state):
    captioner()
    (link,) = (tmp_path / "cache").rglob("snapshots/*/tokenizer.json")
    link.resolve().unlink() if damage == "gone" else DAMAGES[damage](
        link.resolve()
    )  # a link that points nowhere stays
    assert doctor_of("captioner")[0] == state
    with pytest.raises(CheckpointError) if state == "missing" else open(os.devnull):
        captioner()


# ---------------------------------------------------------------- as a user calls it


def test_the_environment_alone_is_enough(served, tmp_path):
    """HF_ENDPOINT and an empty HF_HOME, in a process of its own: doctor, fetch, doctor."""
    script = f"""
from lgap_utils.hub import snapshot
from lgap_utils.profiles import PAPER
from tools import doctor
def look():
    checks = doctor.examine("toy", captioner=PAPER.captioner, dataset="toy")
    return [check.state for check in checks if check.what == "captioner"]
print(look(), len(snapshot({BLIP!r}, {REVISIONS[BLIP]!r}, ["*"])[1]), look())
"""
    env = os.environ | {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    env.pop("LGAP_CACHE")
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1:] == [f"['to fetch'] {len(lock_entries(SOURCE))} ['ok']"], (
        ran.stdout + ran.stderr
    )
    assert list((tmp_path / "home" / "hub").glob("models--*"))
