"""What a download must be before anything opens it, and the lock file that says so; BLIP's and RobustBench's files as published."""
import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from stand_ins import in_cache

from lgap_utils import files, models
from lgap_utils.files import CheckpointError, check, locked, sha256, snapshot
from lgap_utils.profiles import REVISIONS

ENTRY = "robustbench:cifar10/Linf/Standard"
REPOSITORY, REVISION = "Salesforce/blip-image-captioning-base", REVISIONS["Salesforce/blip-image-captioning-base"]


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """A lock file and a cache of the test's own, and no network."""
    (tmp_path / "lock.json").write_text("{}")
    monkeypatch.setenv("LGAP_LOCK", str(tmp_path / "lock.json"))
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something tried to reach the network"))


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---------------------------------------------------------------- the lock file

def test_the_committed_lock_file_names_what_the_paper_profile_reads():
    lock = json.loads((files.ROOT / "checkpoints" / "hub.lock.json").read_text())
    for repository in ("stable-diffusion-v1-5/stable-diffusion-v1-5", REPOSITORY):
        known = lock[f"{repository}@{REVISIONS[repository]}"]
        big = {name: entry for name, entry in known.items() if (entry["size"] or 0) > 10 ** 7}
        assert big and all(len(entry["sha256"]) == 64 for entry in big.values())
    (diffusion,) = [known for source, known in lock.items() if source.startswith("stable-diffusion")]
    assert {name.split("/")[0] for name in diffusion} == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    from lgap_utils import data
    for repository, names in [(data.IMAGENET, data.IMAGENET_SHARDS), *((c.repository, [c.file.format(s) for s in ("train", "test")])
                                                                       for c in data.CIFARS.values())]:
        assert {name for source, known in lock.items() if source.startswith(repository + "@") for name in known} <= set(names)
    # torchvision writes the first digits of the digest into the file's name
    assert lock["robustbench"]["imagenet/Linf/Standard_R50.pt"]["sha256"].startswith("0676ba61")


def test_an_unknown_digest_is_recorded_once_and_checked_ever_after(tmp_path, capsys):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"first")
    assert check(file, "here@1", "weights.bin", "fetch it again") == sha256(file)
    assert "first use of weights.bin" in capsys.readouterr().out
    assert locked("here@1")["weights.bin"] == {"sha256": sha256(file), "size": 5}
    check(file, "here@1", "weights.bin", "fetch it again")
    assert not capsys.readouterr().out
    file.write_bytes(b"other")
    with pytest.raises(CheckpointError, match=f"{file} is damaged: sha256 .*, expected .*, 5 bytes of 5; delete it, then fetch it again"):
        check(file, "here@1", "weights.bin", "fetch it again")
    assert locked("here@2") == {}


@pytest.mark.parametrize("content, words", [(None, "is missing"), (b"", "is empty"), (b"\n <!DOCTYPE html><p>quota", "is a web page")])
def test_what_is_no_file_is_refused_before_its_digest_is_recorded(tmp_path, content, words):
    file = tmp_path / "weights.bin"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        check(file, "here@1", "weights.bin", "fetch it again")
    assert (tmp_path / "lock.json").read_text() == "{}"


def test_a_file_that_the_hub_named_by_its_digest_must_have_it(tmp_path):
    """The hub's cache keeps a large file under its sha256: half of one is told even where the lock file knows nothing."""
    blob = tmp_path / ("0" * 64)
    blob.write_bytes(b"half of")
    (tmp_path / "weights.bin").symlink_to(blob)
    with pytest.raises(CheckpointError, match="is damaged: sha256 .*, expected 0000000000000000"):
        check(tmp_path / "weights.bin", "here@1", "weights.bin", "fetch it again")


def test_a_lock_file_that_cannot_be_read_or_written_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "lock.json").write_text("{")
    with pytest.raises(CheckpointError, match="lock.json is not JSON; restore it"):
        check(tmp_path / "weights.bin", "here@1", "weights.bin", "fetch it again")
    monkeypatch.setenv("LGAP_LOCK", str(tmp_path / "none" / "lock.json"))
    with pytest.raises(CheckpointError, match="none/lock.json is not there; restore it .*, or copy it to where LGAP_LOCK says"):
        check(tmp_path / "weights.bin", "here@1", "weights.bin", "fetch it again")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "lock.json").write_text("{}")
    monkeypatch.setattr(files, "write_whole", lambda *_: (_ for _ in ()).throw(OSError("a full disk")))
    check(tmp_path / "weights.bin", "here@1", "weights.bin", "fetch it again")
    assert "could not be recorded (a full disk)" in capsys.readouterr().out


# ---------------------------------------------------------------- the hub's cache

@pytest.fixture
def blip(defense, tmp_path):
    """The captioner as BLIP base is published: a pickle, and the processor's files of an older version."""
    folder = tmp_path / "published"
    defense.captioner.model.save_pretrained(folder)
    defense.captioner.processor.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights = defense.captioner.model.state_dict() | {"text_decoder.bert.embeddings.position_ids": torch.arange(64)[None]}
    torch.save(weights, folder / "pytorch_model.bin")
    known = {p.name: {"sha256": None, "size": None} for p in folder.iterdir()}          # as the committed lock file names them
    (tmp_path / "lock.json").write_text(json.dumps({f"{REPOSITORY}@{REVISION}": known}))
    return folder


def test_blip_comes_from_the_hubs_cache_and_is_converted_once(blip, defense, images, tmp_path):
    in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    captioner = models.load_captioner(REPOSITORY, device="cpu")
    assert captioner(images.x) == defense.captioner(images.x)
    assert set(locked(f"{REPOSITORY}@{REVISION}")) == {p.name for p in blip.iterdir()}
    (converted,) = (tmp_path / "cache" / "converted").iterdir()
    assert converted.name == sha256(blip / "pytorch_model.bin")[:16] and not list(converted.glob("*.bin"))
    before = (converted / "model.safetensors").stat()
    models.load_captioner(REPOSITORY, device="cpu")
    assert (converted / "model.safetensors").stat() == before
    with open(converted / "model.safetensors", "r+b") as f:
        f.seek(-1, 2)
        last = f.read(1)
        f.seek(-1, 2)
        f.write(bytes([last[0] ^ 1]))
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        models.load_captioner(REPOSITORY, device="cpu")


def test_a_folder_in_place_of_the_id_may_hold_the_pickle_too(blip, defense, images):
    assert models.load_captioner(str(blip), device="cpu")(images.x) == defense.captioner(images.x)


FAULTS = {"missing": Path.unlink, "empty": lambda f: f.write_bytes(b""), "HTML": lambda f: f.write_text("<!doctype html>"),
          "half": lambda f: f.write_bytes(f.read_bytes()[:f.stat().st_size // 2]),
          "a pickle": lambda f: f.write_bytes(pickle.dumps(Bomb(f.parents[1] / "exploded"))),
          "one flipped bit": lambda f: f.write_bytes(f.read_bytes()[:-1] + bytes([f.read_bytes()[-1] ^ 1]))}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_in_the_hubs_cache_is_refused_by_name(blip, tmp_path, fault):
    spoilt = in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    models.load_captioner(REPOSITORY, device="cpu")                         # the first use records the digests
    shutil.rmtree(tmp_path / "cache" / "converted")
    file = (spoilt / "pytorch_model.bin").resolve() if fault != "missing" else spoilt / "pytorch_model.bin"
    FAULTS[fault](file)
    with pytest.raises(CheckpointError, match="pytorch_model.bin") as refused:
        models.load_captioner(REPOSITORY, device="cpu")
    assert "\n" not in str(refused.value) and not list(tmp_path.rglob("exploded"))


def test_what_no_cache_holds_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"captioner from 'Salesforce/.*' \(HF_HUB_OFFLINE is set\): LocalEntryNotFoundError"):
        models.load_captioner(REPOSITORY)
    with pytest.raises(CheckpointError, match="'someone/else' is a hub id without a revision"):
        models.load_captioner("someone/else")


def test_half_precision_weights_are_read_by_their_variant(profile, defense, images, tmp_path):
    """Stable Diffusion's fp16 files, as the paper profile reads them; latents stay single, so the picture is nearly the same."""
    repository = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    folder = tmp_path / "published"
    shutil.copytree(profile.diffusion, folder)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    in_cache(tmp_path / "cache", repository, REVISIONS[repository], folder)
    settings = dict(size=32, strength=0.5, num_inference_steps=50, device="cpu", variant="fp16")
    whole, half = (models.load_diffusion(repository, dtype=dtype, **settings) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.bfloat16 and half.settings()["dtype"] == "bfloat16"
    with torch.no_grad(), whole.using(strength=0.1), half.using(strength=0.1):
        one, other = (p(images.x[:2], ["a large red star"] * 2) for p in (whole, half))
    assert other.dtype == torch.float32 and 0 < (one - other).abs().mean() < 0.05
    with pytest.raises(CheckpointError, match="diffusion model"):
        models.load_diffusion(repository, **settings | {"variant": ""})
    assert all("AttnProcessor2_0" in type(p).__name__ for p in whole.unet.attn_processors.values())     # torch's fused attention


def test_rows_know_the_digests_of_the_models_they_came_from(blip, tmp_path):
    """A download that changed, or another commit, is another configuration, whose rows are not mixed in."""
    in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    models.load_captioner(REPOSITORY, device="cpu")
    found = models.digests(REPOSITORY)
    assert found["from"] == f"{REPOSITORY}@{REVISION}" and found["pytorch_model.bin"] == sha256(blip / "pytorch_model.bin")
    assert models.digests(REPOSITORY, "1" * 40) == {"from": f"{REPOSITORY}@{'1' * 40}"}


# ---------------------------------------------------------------- RobustBench

@pytest.fixture
def standard(tmp_path):
    """Standard.pt in RobustBench's layout, as trained under DataParallel: a WRN-28-10 of the right shape with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.new_wide_resnet(28, 10, 10).eval()
    file = models.robustbench_file("cifar10", "Linf", "Standard")
    assert file == tmp_path / "cache" / "robustbench" / "cifar10" / "Linf" / "Standard.pt"
    file.parent.mkdir(parents=True)
    torch.save({"epoch": 200, "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, file)
    return file


def test_robustbenchs_file_is_loaded_as_robustbench_loads_it(standard, images, tmp_path):
    ours = models.load_classifier(ENTRY, device="cpu")
    load = models.import_robustbench()[0].utils.load_model
    theirs = load("Standard", model_dir=str(standard.parents[2]), dataset="cifar10", threat_model="Linf")
    with torch.no_grad():
        assert torch.allclose(ours(images.x[:2]), theirs(images.x[:2]), atol=1e-4)
    assert type(ours) is type(theirs) and sum(p.numel() for p in ours.parameters()) == 36_479_194
    assert locked("robustbench")["cifar10/Linf/Standard.pt"]["sha256"] == sha256(standard)

    # fine-tuned and saved, it is loaded with the same architecture and nothing is fetched
    standard.unlink()
    ours.fc.bias.data += torch.arange(10.0)
    models.save_classifier_like(ours, ENTRY, tmp_path / "tuned")
    tuned = models.load_classifier(str(tmp_path / "tuned"), device="cpu")
    with torch.no_grad():
        assert torch.equal(tuned(images.x[:1]), ours(images.x[:1]))


@pytest.mark.parametrize("fault", [*FAULTS, "another architecture"])
def test_a_spoilt_robustbench_file_is_refused_by_name(standard, tmp_path, fault):
    files._record("robustbench", "cifar10/Linf/Standard.pt", {"sha256": sha256(standard), "size": standard.stat().st_size})
    if fault == "another architecture":
        torch.save({"state_dict": models.new_wide_resnet(10, 1, 10).state_dict()}, standard)
        (tmp_path / "lock.json").write_text("{}")
    else:
        FAULTS[fault](standard)
    with pytest.raises(CheckpointError) as refused:
        models.load_classifier(ENTRY, device="cpu")
    said = str(refused.value)
    assert "Standard" in said and "\n" not in said and not list(tmp_path.rglob("exploded"))
    if fault not in ("another architecture", "one flipped bit"):
        assert "drive.google.com/uc?id=1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC" in said          # where to get it


def test_a_pickle_that_no_digest_is_known_of_runs_nothing(standard, tmp_path):
    standard.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(CheckpointError, match="classifier from 'robustbench:cifar10/Linf/Standard'"):
        models.load_classifier(ENTRY, device="cpu")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["Standard_R50", "Salman2020Do_R50", "Wong2020Fast"])
def test_imagenets_classifiers_normalise_inside(tmp_path, monkeypatch, name):
    """As RobustBench: its files hold a bare ResNet-50 (Wong et al.'s under DataParallel), normalisation is its own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    from torchvision.models import resnet50
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = resnet50().eval()
    file = models.robustbench_file("imagenet", "Linf", name)
    file.parent.mkdir(parents=True)
    prefix = "module." if name == "Wong2020Fast" else ""
    weights = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save(weights if name == "Standard_R50" else {"state_dict": weights}, file)
    ours = models.load_classifier(f"robustbench:imagenet/Linf/{name}", device="cpu")
    x = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(ours(x), net((x - mean) / std), atol=1e-4)
    if name == "Salman2020Do_R50":
        load = models.import_robustbench()[0].utils.load_model
        theirs = load(name, model_dir=str(file.parents[2]), dataset="imagenet", threat_model="Linf")
        with torch.no_grad():
            assert torch.allclose(ours(x), theirs(x), atol=1e-4)


def test_an_unknown_entry_is_refused_with_the_choices():
    with pytest.raises(CheckpointError, match="RobustBench has no 'Standart' for 'cifar10' and 'Linf'; choose from"):
        models.load_classifier("robustbench:cifar10/Linf/Standart")


def test_a_download_takes_its_place_only_when_it_has_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "offline", lambda: False)
    monkeypatch.setattr("gdown.download", lambda url, output, quiet: Path(output).write_text("<html>quota exceeded</html>"))
    with pytest.raises(CheckpointError, match="is a web page and no model"):
        models.load_classifier(ENTRY, device="cpu")
    assert not list((tmp_path / "cache").rglob("*.p*t"))


def test_a_snapshot_asks_for_a_pickle_only_where_the_lock_file_names_it(tmp_path, monkeypatch):
    (tmp_path / "lock.json").write_text(json.dumps({"a/b@1": {"model.bin": {"sha256": None, "size": 1}, "other.fp16": {"sha256": None}}}))
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.update(kw) or str(tmp_path / "repository"))
    (tmp_path / "repository").mkdir()
    with pytest.raises(CheckpointError, match="model.bin of a/b@1 is missing"):
        snapshot("a/b", "1", ["*.json"])
    (tmp_path / "repository" / "model.bin").write_bytes(b"x")
    assert snapshot("a/b", "1", ["*.json"]) == tmp_path / "repository"
    assert asked == {"revision": "1", "allow_patterns": ["*.json", "model.bin"], "cache_dir": str(tmp_path / "cache")}
