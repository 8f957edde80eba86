"""What a download must be before anything opens it, and the lock file that says so; BLIP's and RobustBench's files as published."""

import io
import json
import pickle
import shutil
import socket
import traceback
import urllib.error
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file
from stand_ins import in_cache

from lgap_utils import experiment, files, hub, models, profiles, zoo
from lgap_utils.files import CheckpointError, sha256
from lgap_utils.hub import explain, lock_entries, record_digests, snapshot, verify_file
from lgap_utils.profiles import REVISIONS

ENTRY = "robustbench:cifar10/Linf/Standard"
REPOSITORY, REVISION = (
    "Salesforce/blip-image-captioning-base",
    REVISIONS["Salesforce/blip-image-captioning-base"],
)


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """A lock file and a cache of the test's own, and no network."""
    (tmp_path / "lock.json").write_text("{}")
    monkeypatch.setenv("LGAP_LOCK", str(tmp_path / "lock.json"))
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        socket.socket, "connect", lambda *_: pytest.fail("something tried to reach the network")
    )


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---------------------------------------------------------------- the lock file


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
    from lgap_utils import data, imagenet

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
    """The hub's cache keeps a large file under its sha256: half of one is told even where the lock file knows nothing."""
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
        CheckpointError,
        match="none/lock.json is not there; restore it .*, or copy it to where LGAP_LOCK says",
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


# ---------------------------------------------------------------- the hub's cache


@pytest.fixture
def blip(defense, tmp_path):
    """The captioner as BLIP base is published: a pickle, and the processor's files of an older version."""
    folder = tmp_path / "published"
    defense.captioner.model.save_pretrained(folder)
    defense.captioner.processor.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights = defense.captioner.model.state_dict() | {
        "text_decoder.bert.embeddings.position_ids": torch.arange(64)[None]
    }
    torch.save(weights, folder / "pytorch_model.bin")
    known = {
        p.name: {"sha256": None, "size": None} for p in folder.iterdir()
    }  # as the committed lock file names them
    (tmp_path / "lock.json").write_text(json.dumps({f"{REPOSITORY}@{REVISION}": known}))
    return folder


def test_blip_comes_from_the_hubs_cache_and_is_converted_once(blip, defense, images, tmp_path):
    in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    captioner = models.load_captioner(REPOSITORY, device="cpu")
    assert captioner(images.x) == defense.captioner(images.x)
    assert set(lock_entries(f"{REPOSITORY}@{REVISION}")) == {p.name for p in blip.iterdir()}
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
    with pytest.raises(
        CheckpointError, match=f"model.safetensors is damaged: .*; delete {converted}, and it is made again"
    ):
        models.load_captioner(REPOSITORY, device="cpu")
    shutil.rmtree(converted)
    models.load_captioner(REPOSITORY, device="cpu")


def test_two_that_convert_at_once_both_end_well(blip, defense, images, tmp_path, monkeypatch):
    """Another process puts its folder in place between the first one's last file and its own turn."""
    in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    summed = files.write_checksums

    def other_is_first(part):
        summed(part)
        shutil.copytree(part, part.parent / sha256(blip / "pytorch_model.bin")[:16])

    monkeypatch.setattr(models, "write_checksums", other_is_first)
    assert models.load_captioner(REPOSITORY, device="cpu")(images.x) == defense.captioner(images.x)
    assert [folder.suffix for folder in (tmp_path / "cache" / "converted").iterdir()] == [
        ""
    ]  # and nothing is left behind


def test_no_two_writers_have_the_same_name_for_what_is_not_whole_yet(tmp_path):
    assert len({files.temporary_path(tmp_path / "weights.bin") for _ in range(100)}) == 100


def test_a_conversion_that_fails_leaves_nothing(blip, tmp_path, monkeypatch):
    in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    monkeypatch.setattr(
        models, "write_checksums", lambda part: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(CheckpointError, match="No space left on device"):
        models.load_captioner(REPOSITORY, device="cpu")
    assert not list((tmp_path / "cache" / "converted").iterdir())
    assert all(
        entry["sha256"] is None for entry in lock_entries(f"{REPOSITORY}@{REVISION}").values()
    )  # it has not loaded whole


def test_a_folder_in_place_of_the_id_may_hold_the_pickle_too(blip, defense, images):
    assert models.load_captioner(str(blip), device="cpu")(images.x) == defense.captioner(images.x)


FAULTS = {
    "missing": Path.unlink,
    "empty": lambda f: f.write_bytes(b""),
    "HTML": lambda f: f.write_text("<!doctype html>"),
    "half": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "a pickle": lambda f: f.write_bytes(pickle.dumps(Bomb(f.parents[1] / "exploded"))),
    "one flipped bit": lambda f: f.write_bytes(f.read_bytes()[:-1] + bytes([f.read_bytes()[-1] ^ 1])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_in_the_hubs_cache_is_refused_by_name(blip, tmp_path, fault):
    spoilt = in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    models.load_captioner(REPOSITORY, device="cpu")  # the first use records the digests
    shutil.rmtree(tmp_path / "cache" / "converted")
    file = (spoilt / "pytorch_model.bin").resolve() if fault != "missing" else spoilt / "pytorch_model.bin"
    FAULTS[fault](file)
    expected = lock_entries(f"{REPOSITORY}@{REVISION}")["pytorch_model.bin"]["sha256"]
    with pytest.raises(
        CheckpointError, match=f"pytorch_model.bin .*expected sha256 {expected[:16]}.*; .*fetch it again"
    ) as refused:
        models.load_captioner(REPOSITORY, device="cpu")
    assert "\n" not in str(refused.value) and not list(tmp_path.rglob("exploded"))
    assert fault == "missing" or f"delete {file}, then" in str(refused.value)


def test_what_no_cache_holds_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(
        CheckpointError,
        match="Salesforce/.* could not be fetched .*: HF_HUB_OFFLINE is set, and the cache lacks it",
    ):
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
    whole, half = (
        models.load_diffusion(repository, dtype=dtype, **settings) for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == torch.bfloat16 and half.settings()["dtype"] == "bfloat16"
    with torch.no_grad(), whole.using(strength=0.1), half.using(strength=0.1):
        one, other = (p(images.x[:2], ["a large red star"] * 2) for p in (whole, half))
    assert other.dtype == torch.float32 and 0 < (one - other).abs().mean() < 0.05
    with pytest.raises(CheckpointError, match="diffusion model"):
        models.load_diffusion(repository, **settings | {"variant": ""})
    assert all(
        "AttnProcessor2_0" in type(p).__name__ for p in whole.unet.attn_processors.values()
    )  # torch's fused attention


def test_rows_know_the_digests_of_the_models_they_came_from(blip, tmp_path):
    """A download that changed, or another commit, is another configuration, whose rows are not mixed in."""
    in_cache(tmp_path / "cache", REPOSITORY, REVISION, blip)
    models.load_captioner(REPOSITORY, device="cpu")
    found = experiment.file_digests(REPOSITORY)
    assert found["from"] == f"{REPOSITORY}@{REVISION}" and found["pytorch_model.bin"] == sha256(
        blip / "pytorch_model.bin"
    )
    assert experiment.file_digests(REPOSITORY, "1" * 40) == {"from": f"{REPOSITORY}@{'1' * 40}"}


# ---------------------------------------------------------------- RobustBench


@pytest.fixture
def standard(tmp_path):
    """Standard.pt in RobustBench's layout, as trained under DataParallel: a WRN-28-10 of the right shape with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = zoo.new_wide_resnet(28, 10, 10).eval()
    file = zoo.robustbench_file("cifar10", "Linf", "Standard")
    assert file == tmp_path / "cache" / "robustbench" / "cifar10" / "Linf" / "Standard.pt"
    file.parent.mkdir(parents=True)
    torch.save({"epoch": 200, "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, file)
    return file


def test_robustbenchs_file_is_loaded_as_robustbench_loads_it(standard, images, tmp_path):
    ours = models.load_classifier(ENTRY, device="cpu")
    load = zoo.import_robustbench()[0].utils.load_model
    theirs = load("Standard", model_dir=str(standard.parents[2]), dataset="cifar10", threat_model="Linf")
    with torch.no_grad():
        assert torch.allclose(ours(images.x[:2]), theirs(images.x[:2]), atol=1e-4)
    assert type(ours) is type(theirs) and sum(p.numel() for p in ours.parameters()) == 36_479_194
    assert lock_entries("robustbench")["cifar10/Linf/Standard.pt"]["sha256"] == sha256(standard)

    # fine-tuned and saved, it is loaded with the same architecture and nothing is fetched
    standard.unlink()
    ours.fc.bias.data += torch.arange(10.0)
    models.save_classifier_like(ours, ENTRY, tmp_path / "tuned")
    tuned = models.load_classifier(str(tmp_path / "tuned"), device="cpu")
    with torch.no_grad():
        assert torch.equal(tuned(images.x[:1]), ours(images.x[:1]))


@pytest.mark.parametrize("fault", [*FAULTS, "another architecture"])
def test_a_spoilt_robustbench_file_is_refused_by_name(standard, tmp_path, fault):
    expected = sha256(standard)
    record_digests(
        "robustbench", {"cifar10/Linf/Standard.pt": {"sha256": expected, "size": standard.stat().st_size}}
    )
    if fault == "another architecture":
        torch.save({"state_dict": zoo.new_wide_resnet(10, 1, 10).state_dict()}, standard)
        (tmp_path / "lock.json").write_text("{}")
    else:
        FAULTS[fault](standard)
    with pytest.raises(CheckpointError) as refused:
        models.load_classifier(ENTRY, device="cpu")
    said = str(refused.value)
    assert "Standard" in said and "\n" not in said and not list(tmp_path.rglob("exploded"))
    assert "drive.google.com/uc?id=1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC" in said  # where to get it
    assert (fault == "missing" or f"delete {standard}, then" in said) and (
        fault == "another architecture" or expected[:16] in said
    )
    assert fault != "another architecture" or json.loads((tmp_path / "lock.json").read_text()) == {}


PICKLES = {
    "code": lambda bomb: pickle.dumps(bomb),
    "code beside tensors": lambda bomb: saved({"conv": torch.zeros(3), "x": bomb}),
    "half": lambda _: saved({"conv": torch.zeros(3000)})[:5000],
    "noise": lambda _: bytes(range(1, 200)),
    "half, as torch once saved": lambda _: saved(
        {"conv": torch.zeros(3000)}, _use_new_zipfile_serialization=False
    )[:5000],
}


def saved(state, **how):
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_no_digest_is_known_of_runs_nothing(standard, tmp_path, what):
    """torch's own words for it, which advise to switch the protection off, are neither passed on nor chained to the error."""
    standard.write_bytes(PICKLES[what](Bomb(tmp_path / "exploded")))
    with pytest.raises(
        CheckpointError,
        match=f"{standard} is refused: it is damaged, or holds more than tensors, .*; delete {standard}, "
        "then fetch it again, or put it there by hand",
    ):
        models.load_classifier(ENTRY, device="cpu")
    assert not (tmp_path / "exploded").exists() and json.loads((tmp_path / "lock.json").read_text()) == {}
    try:
        models.load_classifier(ENTRY, device="cpu")
    except CheckpointError:
        shown = traceback.format_exc()
    assert "weights_only" not in shown.replace("weights_only=True", "") and "trust" not in shown


@pytest.mark.parametrize("what", ["code", "code beside tensors", "half"])
def test_a_captioner_that_is_a_bad_pickle_runs_nothing(blip, tmp_path, what):
    (blip / "pytorch_model.bin").write_bytes(PICKLES[what](Bomb(tmp_path / "exploded")))
    with pytest.raises(
        CheckpointError, match=f"{blip / 'pytorch_model.bin'} is refused: .*; copy {blip} again"
    ):
        models.load_captioner(str(blip), device="cpu")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "cache" / "converted").exists()


@pytest.mark.parametrize("name", ["Standard_R50", "Salman2020Do_R50", "Wong2020Fast"])
def test_imagenets_classifiers_normalise_inside(tmp_path, monkeypatch, name):
    """As RobustBench: its files hold a bare ResNet-50 (Wong et al.'s under DataParallel), normalisation is its own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    from torchvision.models import resnet50

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = resnet50().eval()
    file = zoo.robustbench_file("imagenet", "Linf", name)
    file.parent.mkdir(parents=True)
    prefix = "module." if name == "Wong2020Fast" else ""
    weights = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save(weights if name == "Standard_R50" else {"state_dict": weights}, file)
    ours = models.load_classifier(f"robustbench:imagenet/Linf/{name}", device="cpu")
    x = torch.rand(1, 3, 64, 64)
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
    )
    with torch.no_grad():
        assert torch.allclose(ours(x), net((x - mean) / std), atol=1e-4)
    if name == "Salman2020Do_R50":
        load = zoo.import_robustbench()[0].utils.load_model
        theirs = load(name, model_dir=str(file.parents[2]), dataset="imagenet", threat_model="Linf")
        with torch.no_grad():
            assert torch.allclose(ours(x), theirs(x), atol=1e-4)


def test_an_unknown_entry_is_refused_with_the_choices():
    with pytest.raises(
        CheckpointError, match="RobustBench has no 'Standart' for 'cifar10' and 'Linf'; choose from"
    ):
        models.load_classifier("robustbench:cifar10/Linf/Standart")


def test_a_download_takes_its_place_only_when_it_has_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "offline", lambda: False)
    monkeypatch.setattr(zoo, "check_reachable", lambda url: None)
    monkeypatch.setattr(
        "gdown.download", lambda url, output, quiet: Path(output).write_text("<html>quota exceeded</html>")
    )
    with pytest.raises(
        CheckpointError, match="is a web page and not the file: .*drive.google.com.*as .*Standard.pt"
    ) as refused:
        models.load_classifier(ENTRY, device="cpu")
    assert not list((tmp_path / "cache").rglob("*.p*t")) and "delete" not in str(refused.value)


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
    """Put an auto_map, and what makes the library's own class unknown, into a JSON file; into its image processor, too."""

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
    """Either the library's own class takes the folder, or one sentence says why not, without advice to let its code run."""
    try:
        load()
    except CheckpointError as refused:
        said = str(refused)
        assert "\n" not in said and str(folder) in said and "trust" not in said and "again" in said
        assert "trust_" + "remote_code" not in "".join(traceback.format_exception(refused)).replace(
            "trust_" + 'remote_code": False', ""
        )


PARTS = {
    "captioner": ("model.safetensors", "pytorch_model"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
    "text_encoder": ("model.safetensors", "pytorch_model"),
}


# a captioner's single pickle is the one that is converted here, by a loader of our own
@pytest.mark.parametrize(
    "part, layout",
    [
        ("captioner", "in parts"),
        *((part, how) for part in ("vae", "unet", "text_encoder") for how in ("whole", "in parts")),
    ],
)
def test_weights_that_are_pickles_alone_are_refused_unopened(profile, tmp_path, monkeypatch, part, layout):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    name = "captioner" if part == "captioner" else "diffusion"
    folder = tmp_path / "model"
    shutil.copytree(getattr(profile, name), folder)
    place, (weights, stem) = folder if part == "captioner" else folder / part, PARTS[part]
    keys = list(load_file(place / weights))
    (place / weights).unlink()
    pickled = stem + (".bin" if layout == "whole" else "-00001-of-00001.bin")
    (place / pickled).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    if layout == "in parts":
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, pickled)}
        (place / f"{stem}.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"cannot load the .* from '{folder}'") as refused:
        (
            models.load_captioner(str(folder), device="cpu")
            if part == "captioner"
            else models.load_diffusion(str(folder), device="cpu", size=32, strength=0.5)
        )
    assert (
        "\n" not in str(refused.value)
        and f"copy {folder} again" in str(refused.value)
        and not (tmp_path / "exploded").exists()
    )


@pytest.mark.parametrize("part", ["captioner", "diffusion", "classifier"])
@pytest.mark.parametrize("fault", [*FAULTS, "another architecture"])
def test_a_spoilt_folder_is_refused_by_name(profile, tmp_path, part, fault):
    """The bundled models' layout: the digest in SHA256SUMS, and how to get the file again."""
    folder = tmp_path / part
    shutil.copytree(getattr(profile, part), folder)
    files.write_checksums(folder)
    file = (
        folder / "unet" / "diffusion_pytorch_model.safetensors"
        if part == "diffusion"
        else folder / "model.safetensors"
    )
    expected = sha256(file)
    if fault == "another architecture":
        save_file({"other": torch.zeros(3)}, file)
        (folder / "SHA256SUMS").unlink()
    else:
        FAULTS[fault](file)
    load = {
        "captioner": models.load_captioner,
        "classifier": models.load_classifier,
        "diffusion": lambda *a, **k: models.load_diffusion(*a, **k, size=32, strength=0.5),
    }[part]
    with pytest.raises(CheckpointError) as refused:
        load(str(folder), device="cpu")
    said = str(refused.value)
    assert (
        "\n" not in said and str(folder) in said and "again" in said and not list(tmp_path.rglob("exploded"))
    )
    assert fault == "another architecture" or (str(file) in said and expected[:16] in said)


@pytest.mark.parametrize("part", ["captioner", "unet", "vae", "text_encoder"])
def test_weights_of_another_size_are_told_by_name(profile, tmp_path, part):
    name = "captioner" if part == "captioner" else "diffusion"
    folder = tmp_path / "model"
    shutil.copytree(getattr(profile, name), folder)
    file = next((folder / part if part != "captioner" else folder).glob("*.safetensors"))
    weights = load_file(file)
    first = next(key for key, value in weights.items() if value.ndim > 1)
    save_file(weights | {first: torch.cat([weights[first]] * 2)}, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=f"the weights are not those of a .* with this configuration: 1 mismatched, .*{first}",
    ):
        (
            models.load_captioner(str(folder), device="cpu")
            if part == "captioner"
            else models.load_diffusion(str(folder), device="cpu", size=32, strength=0.5)
        )


# ---------------------------------------------------------------- the reason of a failure


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
