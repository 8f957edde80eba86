"""What `python -m lgap_utils doctor` finds missing, in words that help."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from lgap_utils import data, files, hub, models, zoo
from lgap_utils.data import CIFAR10_CLASSES as CLASSES
from lgap_utils.images import Images
from lgap_utils.profiles import PAPER, REVISIONS, ROOT
from tools import cli as command
from tools import doctor, needs, runner


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, no GPU, no data and empty caches."""
    monkeypatch.setattr(
        socket.socket, "connect", lambda *_: pytest.fail("something tried to reach the network")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    for name in ("data", "cache", "outputs"):
        monkeypatch.setenv(f"LGAP_{name.upper()}", str(tmp_path / name))
    (tmp_path / "data").mkdir()
    monkeypatch.delenv("LGAP_DEVICE", raising=False)
    monkeypatch.delenv("LGAP_LOCK", raising=False)


def found(checks, what):
    """[(state, detail)] of the lines about one kind of thing."""
    return [(check.state, check.detail) for check in checks if check.what == what]


def said(argv, capsys):
    """(exit status, what was printed) of the command."""
    with pytest.raises(SystemExit) as stopped:
        command.main(["doctor", *argv])
    out = capsys.readouterr()
    return int(stopped.value.code), out.out + out.err


@pytest.fixture
def online(monkeypatch):
    """Servers that answer, and would send every file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "check_reachable", lambda url: None)


# ---------------------------------------------------------------- what is there, and what is not


def test_the_bundled_profile_is_all_there(capsys):
    checks = doctor.examine("toy")
    assert doctor.can_run(checks) and {check.state for check in checks} == {"ok"}
    status, text = said(["toy", "--set", "n_images=8"], capsys)
    assert status == 0 and "profile toy can run here" in text and "timed just now" in text


def test_without_cache_and_network_everything_is_named_with_the_way_to_get_it(capsys):
    status, text = said(["paper"], capsys)
    plain = " ".join(text.replace(" \\\n", "\n").split())
    assert status == 1 and "profile paper cannot run here" in text and "HF_HUB_OFFLINE is set" in text
    for repository in (PAPER.captioner, PAPER.diffusion):
        assert f"hf download {repository} --revision {REVISIONS[repository]} --cache-dir" in plain
    assert "text_encoder/model.fp16.safetensors" in plain and "pytorch_model.bin" in plain
    names = [
        PAPER.classifier,
        PAPER.tables[4]["classifier"],
        *(name for table in (3, 4) for _, name, _ in PAPER.tables[table]["rivals"]),
    ]
    for name in names:
        assert name in plain and zoo.robustbench_page(*name.removeprefix("robustbench:").split("/")) in plain
    assert (
        f"{PAPER.tables[2]['classifier']}, size not known" in plain
        and "python checkpoints/make.py paper" in plain
    )
    assert plain.count("--repo-type dataset") == 3 and "accept" in plain and "imagenet/val/<wnid>/" in plain
    assert "computed from FLOPs" in plain


def test_what_a_run_would_fetch_is_no_obstacle(online, monkeypatch):
    monkeypatch.setenv("LGAP_DEVICE", "cpu")
    checks = doctor.examine("paper", classifier="checkpoints/toy/classifier")
    assert doctor.can_run(checks) and len(found(checks, "disk")) == 1
    assert found(checks, "captioner") == [
        ("to fetch", f"{PAPER.captioner}, 990.8 MB, from https://huggingface.co")
    ]
    assert found(checks, "diffusion") == [
        ("to fetch", f"{PAPER.diffusion}, 2.1 GB, from https://huggingface.co")
    ]


def test_a_host_that_does_not_answer_is_told_and_a_gated_one_that_refuses(online, monkeypatch):
    def ask(url):
        if "imagenet" in url:
            raise type("GatedRepoError", (OSError,), {"response": SimpleNamespace(status_code=401)})()
        if "huggingface" not in url:
            raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(hub, "check_reachable", ask)
    checks = doctor.examine("paper")
    ((state, detail),) = found(checks, "network")
    assert (
        state == "note"
        and "drive.google.com is out of reach" in detail
        and "huggingface.co answers" in detail
    )
    assert "accepted its terms" in found(checks, "data")[-1][1]
    assert [state for state, _ in found(checks, "data")] == ["to fetch", "to fetch", "missing"]
    assert {state for state, _ in found(checks, "rival")} == {"missing"}


def test_a_full_disk_is_missing_space(online, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(9, 9, 10**9))
    ((state, detail),) = found(doctor.examine("paper"), "disk")
    assert state == "missing" and "at least 3." in detail and "1.0 GB" in detail  # BLIP's 0.99, SD's 2.1


@pytest.mark.parametrize(
    "device, state, words",
    [
        (None, "missing", "set LGAP_DEVICE=cpu to go on without one"),
        ("cpu", "note", "goes on without the GPU"),
        ("cuda", "missing", "torch finds no GPU"),
        ("tpu9", "missing", "no such kind"),
    ],
)
def test_a_profile_that_needs_a_gpu_says_so(device, state, words, monkeypatch):
    if device:
        monkeypatch.setenv("LGAP_DEVICE", device)
    ((seen, detail),) = found(doctor.examine("paper", dataset="toy"), "device")
    assert seen == state and words in detail


# ---------------------------------------------------------------- caches and folders


def cached(cache, repository, revision, sizes, kind="models"):
    """Files of these sizes, full of nothing, in the layout of the hub's cache."""
    folder = cache / f"{kind}--{repository.replace('/', '--')}"
    for number, (name, size) in enumerate(sizes.items()):
        blob, link = folder / "blobs" / f"{number:040x}", folder / "snapshots" / revision / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(blob, "wb") as file:
            file.truncate(size)
        link.symlink_to(blob)
    return folder


def test_a_model_in_the_hubs_cache_is_there_and_half_of_one_is_not(tmp_path, monkeypatch):
    known = json.loads((ROOT / "checkpoints" / "hub.lock.json").read_text())[
        f"{PAPER.captioner}@{REVISIONS[PAPER.captioner]}"
    ]
    sizes = {name: entry["size"] for name, entry in known.items()}
    folder = cached(tmp_path / "cache", PAPER.captioner, REVISIONS[PAPER.captioner], sizes)
    settings = {"captioner": PAPER.captioner, "dataset": "toy"}
    assert found(doctor.examine("toy", **settings), "captioner") == [
        ("ok", f"{PAPER.captioner} in {tmp_path / 'cache'}")
    ]
    blob = folder / "blobs" / f"{list(sizes).index('vocab.txt'):040x}"
    os.truncate(blob, 7)  # what the loader would refuse is not called ok
    ((state, detail),) = found(doctor.examine("toy", **settings), "captioner")
    assert (
        state == "missing"
        and f"vocab.txt is damaged: 7 bytes, expected 231,508 bytes; delete {blob}, then fetch it again"
        in detail
    )
    blob.unlink()
    ((state, detail),) = found(doctor.examine("toy", **settings), "captioner")
    assert state == "missing" and "lacks vocab.txt (0.2 MB)" in detail and detail.endswith(" vocab.txt")
    ((state, detail),) = found(doctor.examine("toy", deep=True, captioner=PAPER.captioner), "captioner")
    assert state == "missing"


def test_a_list_that_names_a_file_which_is_not_there(tmp_path):
    """SHA256SUMS, and the index of weights in several files: the loader reads both, so the doctor does."""
    for part in ("captioner", "classifier"):
        shutil.copytree(ROOT / "checkpoints" / "toy" / part, tmp_path / part)
    files.write_checksums(tmp_path / "captioner")
    (tmp_path / "captioner" / "tokenizer.json").unlink()
    settings = {part: str(tmp_path / part) for part in ("captioner", "classifier")}
    ((state, detail),) = found(doctor.examine("toy", **settings), "captioner")
    assert (
        state == "missing"
        and f"{tmp_path / 'captioner' / 'tokenizer.json'} is missing, expected sha256" in detail
    )
    with pytest.raises(files.CheckpointError, match="tokenizer.json is missing"):
        models.load_captioner(settings["captioner"], device="cpu")


def test_weights_in_several_files_are_there_if_all_that_the_index_lists_are(profile, tmp_path):
    folder = tmp_path / "captioner"
    shutil.copytree(profile.captioner, folder)
    models.load_captioner(profile.captioner, device="cpu").model.save_pretrained(
        folder, max_shard_size="20KB"
    )
    (folder / "model.safetensors").unlink(missing_ok=True)
    models.load_captioner(str(folder), device="cpu")
    assert found(doctor.examine("toy", captioner=str(folder)), "captioner") == [("ok", str(folder))]
    shard = next(folder.glob("model-*.safetensors"))
    shard.unlink()
    ((state, detail),) = found(doctor.examine("toy", captioner=str(folder)), "captioner")
    assert state == "missing" and f"lacks {shard.name}" in detail
    (folder / "model.safetensors.index.json").write_text("[]")
    ((state, detail),) = found(doctor.examine("toy", captioner=str(folder)), "captioner")
    assert state == "missing" and "index.json is damaged" in detail


def test_a_damaged_file_is_found_when_digests_are_asked_for(tmp_path):
    folder = tmp_path / "toy"
    shutil.copytree(ROOT / "checkpoints" / "toy", folder)
    settings = {part: str(folder / part) for part in ("captioner", "diffusion", "classifier")}
    assert doctor.can_run(doctor.examine("toy", deep=True, **settings))
    file = folder / "diffusion" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert doctor.can_run(doctor.examine("toy", **settings))
    ((state, detail),) = found(doctor.examine("toy", deep=True, **settings), "diffusion")
    assert state == "missing" and str(file) in detail and "is damaged" in detail and "\n" not in detail
    file.unlink()
    ((state, detail),) = found(doctor.examine("toy", **settings), "diffusion")
    assert state == "missing" and "lacks unet/diffusion_pytorch_model.safetensors" in detail


@pytest.mark.parametrize(
    "settings, what, words",
    [
        ({"captioner": "somebody/captioner"}, "captioner", "hub id without a revision"),
        ({"classifier": "robustbench:cifar10/Linf/Nobody"}, "classifier", "RobustBench has no 'Nobody'"),
        ({"diffusion": "./nowhere"}, "diffusion", "no such folder"),
        ({"classifier": "checkpoints/small/nothing"}, "classifier", "python checkpoints/make.py small"),
    ],
)
def test_a_model_that_cannot_be_is_missing_and_said_in_a_sentence(settings, what, words):
    ((state, detail),) = found(doctor.examine("toy", **settings), what)
    assert state == "missing" and words in detail


def test_data_in_a_folder_have_to_be_as_many_as_the_profile_asks_for(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    ((state, detail),) = found(doctor.examine("small"), "data")
    assert state == "missing" and "hf download uoft-cs/cifar10" in detail
    folder = tmp_path / "data" / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    table = pyarrow.table({"img": [{"bytes": file.getvalue(), "path": "a.png"}] * 5, "label": [0] * 5})
    pyarrow.parquet.write_table(table, folder / "test-00000-of-00001.parquet")
    ((state, detail),) = found(doctor.examine("small"), "data")
    assert (
        state == "missing"
        and "lacks plain_text/train" in detail
        and f"--local-dir {tmp_path / 'data' / 'cifar10'}" in detail
    )
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    assert found(doctor.examine("small", n_images=5, n_finetune=5), "data") == [
        ("ok", f"cifar10 in {tmp_path / 'data' / 'cifar10'}")
    ]
    ((state, detail),) = found(doctor.examine("small", n_images=6, n_finetune=5), "data")
    assert state == "missing" and "it has 5" in detail and "asks for 6 images" in detail
    ((state, detail),) = found(doctor.examine("small", n_images=5, n_finetune=5, deep=True), "data")
    assert state == "missing" and "cifar10 test: images: 5, expected 10000" in detail


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    "argv, words",
    [
        (["huge"], "no profile 'huge'; choose from ['authors', 'paper', 'small', 'toy']"),
        (["toy", "--set", "n_image=8"], "the profile has no such field; there are"),
        (["toy", "--set", "tables=8"], "the profile has no such field; there are"),
        (["toy", "--set", "n_images=0"], "n_images=0: expected a whole number of at least 1"),
        (["toy", "--set", "dataset=mnist"], "choose from ['cifar10', 'cifar100', 'imagenet', 'toy']"),
        (["toy", "--set", "eps_255=8/255"], "eps_255='8/255': expected a number, e.g. eps_255=8"),
        (["toy", "--set", "import os; x=1"], "write NAME=VALUE"),
        (["toy", "--set", "seed=1", "--set", "SEED=1"], "given twice"),
    ],
)
def test_a_wrong_request_is_refused_with_the_choices(argv, words, capsys):
    status, text = said(argv, capsys)
    assert status == 2 and words in text


def test_settings_that_leave_a_table_without_a_step_are_refused_before_anything_starts():
    says = "strength=0.1 of num_inference_steps=8 gives 0 denoising steps; expected 1 to 7"
    with pytest.raises(SystemExit, match=says):
        runner.ready("toy", ["07_table4_imagenet"], {"num_inference_steps": 8})
    assert runner.ready("toy", ["06_table3_cifar10_adaptive"], {"num_inference_steps": 8}) == []


def test_the_command_finds_its_tools_from_any_folder(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "cli.py").write_text("raise SystemExit('another one')")
    (tmp_path / "tools" / "__init__.py").touch()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lgap_utils", "doctor", "huge"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "no profile 'huge'" in done.stderr, done.stderr


# ---------------------------------------------------------------- every image, with --deep


def made_up(sizes, labels=(3, 8, 8, 0), source="data"):
    """load_images of a data set that has {split: so many images}."""

    def load_images(dataset, split, *_, **__):
        if split not in sizes:
            raise FileNotFoundError(f"{split} is missing")
        n = sizes[split]
        first = torch.tensor([*labels, *[0] * n])[:n]
        return Images(
            torch.zeros(n, 3, 1, 1, dtype=torch.uint8), first, torch.arange(n), CLASSES, source=source
        )

    return load_images


def validated(dataset):
    return {what.removeprefix(dataset): (ok, detail) for what, ok, detail in needs.validate(dataset)}


def test_what_is_validated(monkeypatch):
    """Files of a user's own are no fault; another number of images, other labels and missing files are."""
    monkeypatch.setitem(data.COUNTS, "cifar10", {"train": 5, "validation": 2, "test": 4})
    source = "test.parquet sha256 0123"
    monkeypatch.setattr(data, "load_images", made_up({"train": 5, "validation": 2, "test": 4}, source=source))
    lines = validated("cifar10")
    assert lines[" test: images"] == (True, "4, expected 4") and all(ok for ok, _ in lines.values())
    assert lines[" test: files"] == (True, f"{source}, other files than the hub's")
    monkeypatch.setattr(
        hub, "lock_entries", lambda source: {data.CIFARS["cifar10"].file.format("test"): {"sha256": "0123"}}
    )
    assert validated("cifar10")[" test: files"] == (True, source)
    monkeypatch.setattr(data, "load_images", made_up({"validation": 2, "test": 5}, labels=(1, 2, 3, 4)))
    lines = validated("cifar10")
    assert lines[" train: images"] == (False, "train is missing") and " train: files" not in lines
    assert lines[" test: images"] == (False, "5, expected 4")
    assert lines[" test: first labels"] == (False, "(1, 2, 3, 4), expected (3, 8, 8, 0)")


def test_an_unknown_data_set_is_not_validated():
    assert all(ok for _, ok, _ in needs.validate("toy"))
    choices = r"choose from \['cifar10', 'cifar100', 'imagenet', 'toy'\]"
    with pytest.raises(ValueError, match=f"no data set 'mnist'; {choices}"):
        needs.validate("mnist")
