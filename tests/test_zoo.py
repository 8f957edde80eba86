"""RobustBench's files, as published: they load as RobustBench loads them, or are refused by name."""

import json
import traceback
from pathlib import Path

import pytest
import torch
from spoilt import FAULTS, PICKLES, Bomb

from lgap_utils import models, zoo
from lgap_utils.files import CheckpointError, sha256
from lgap_utils.hub import lock_entries, record_digests

pytestmark = pytest.mark.usefixtures("own_cache")
ENTRY = "robustbench:cifar10/Linf/Standard"


@pytest.fixture
def standard(tmp_path):
    """Standard.pt in RobustBench's layout, as trained under DataParallel: a WRN-28-10 with random weights."""
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


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_no_digest_is_known_of_runs_nothing(standard, tmp_path, what):
    """torch's own words, which advise to switch the protection off, are neither passed on nor chained."""
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


@pytest.mark.parametrize("name", ["Standard_R50", "Salman2020Do_R50", "Wong2020Fast"])
def test_imagenets_classifiers_normalise_inside(tmp_path, monkeypatch, name):
    """As RobustBench: its files hold a bare ResNet-50 (Wong et al.'s under DataParallel)."""
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


def test_the_architecture_is_robustbenchs_wide_resnet(defense, images):
    with torch.device("meta"):
        net = zoo.new_wide_resnet(28, 10, 10)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 36.5
    assert type(defense.classifier) is zoo.import_robustbench()[1]
    assert defense.classify(images.x).shape == (8, 10)
