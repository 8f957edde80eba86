"""A profile's fine-tuned classifier is taken only where it was made with the same settings."""

import dataclasses
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from lgap_utils import baselines, experiment, identity, models, zoo
from lgap_utils.files import CheckpointError, sha256
from lgap_utils.profiles import REVISIONS


@pytest.fixture
def own(profile, tmp_path, monkeypatch):
    """The small profile with the shortest fine-tuning, and outputs of its own."""
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    sizes = {"n_finetune": 4, "n_validation": 2, "finetune_epochs": 1}
    return dataclasses.replace(profile, strength=0.1, num_inference_steps=10, **sizes)


def load(profile, **parts):
    return models.load_defense(profile, device="cpu", **parts)


def digest(defense):
    return identity.state_digest(defense.classifier)


OTHER_SETTINGS = (
    {"finetune_epochs": 2},
    {"finetune_augment": True},
    {"finetune_schedule": "steps"},
    {"strength": 0.2},
    {"n_finetune": 5},
)


def test_a_fine_tuned_classifier_is_refused_where_it_was_tuned_otherwise(own, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no classifier was fine-tuned .* yet; run notebook 03 first"):
        experiment.load_finetuned(own)
    tuned = load(own)
    experiment.finetune(own, tuned)
    again = load(own)
    experiment.finetune(own, again)  # done already: the same weights, nothing is trained
    monkeypatch.setattr(experiment, "finetune", lambda *_: pytest.fail("it is there"))
    assert digest(experiment.load_or_finetune(own)) == digest(tuned)
    assert digest(experiment.load_finetuned(own)) == digest(again) == digest(tuned)
    for other in OTHER_SETTINGS:
        difference = f"was fine-tuned with other settings .*{next(iter(other))}: there .*, here"
        with pytest.raises(ValueError, match=difference):
            experiment.load_finetuned(dataclasses.replace(own, **other))
    captioner = shutil.copytree(own.captioner, tmp_path / "other weights")
    state = load_file(captioner / "model.safetensors")
    state[next(iter(state))] += 1
    save_file(state, captioner / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was fine-tuned with other settings .*weights"):
        experiment.load_finetuned(dataclasses.replace(own, captioner=str(captioner)))


def test_another_classifier_is_not_taken_for_the_profiles_fine_tuned_one(own):
    problem = "classifier: this WideResNet has not the architecture of '.*', as which it would be saved"
    with pytest.raises(ValueError, match=problem):
        experiment.finetune(own, load(own, classifier=zoo.new_wide_resnet(16, 1, 10)))
    with pytest.raises(ValueError, match="classifier: this function has not the architecture of"):
        experiment.finetune(own, load(own, classifier=lambda x: x.flatten(1)[:, :10]))
    assert not own.finetuned.exists()
    same = load(own)
    same.classifier.fc.bias.data += 1
    experiment.finetune(own, same)
    with pytest.raises(ValueError, match="was fine-tuned with other settings .*began as: there '.*', here"):
        experiment.load_or_finetune(own)
    kept = (own.finetuned / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds rows of another configuration"):
        experiment.finetune(own, load(own))
    assert (own.finetuned / "model.safetensors").read_bytes() == kept


def test_a_rival_has_a_fine_tuned_classifier_of_its_own_where_the_profile_says_so(own, tmp_path):
    from test_diffpure import UNET, DDPMScheduler

    with pytest.raises(ValueError, match="rival: the profile 'tiny' names none"):
        experiment.load_rival_defense(own)
    UNET.save_pretrained(tmp_path / "rival")
    DDPMScheduler().save_pretrained(tmp_path / "rival")
    own = dataclasses.replace(own, rival=str(tmp_path / "rival"), rival_steps=10)
    as_it_came = experiment.load_rival_defense(own)
    assert digest(as_it_came) == digest(load(own)) and as_it_came.purifier.denoiser_calls == 1
    tuned = experiment.load_rival_defense(dataclasses.replace(own, n_rival_tuning=4))
    assert digest(tuned) != digest(as_it_came) and not own.finetuned.exists()
    experiment.finetune(own, load(own))
    again = experiment.load_rival_defense(dataclasses.replace(own, n_rival_tuning=4))
    assert digest(again) == digest(tuned) != digest(experiment.load_finetuned(own))
    parts = {"captioner": baselines.no_caption, "purifier": as_it_came.purifier}
    with pytest.raises(ValueError, match="was fine-tuned with other settings .*captioner"):
        experiment.load_finetuned(own, **parts)


def test_two_that_fine_tune_at_once_end_with_the_same_classifier(own):
    both = [load(own) for _ in range(2)]
    threads = [threading.Thread(target=experiment.finetune, args=(own, defense)) for defense in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = digest(experiment.load_finetuned(own))
    assert [digest(defense) for defense in both] == [expected] * 2


def test_a_models_digests_are_those_of_its_folder_or_of_the_lock_file(profile, own_cache, tmp_path):
    """A download that changed, or another commit, is another configuration."""
    name = "Salesforce/blip-image-captioning-base"
    source = f"{name}@{REVISIONS[name]}"
    files = {"config.json": "1" * 64, "pytorch_model.bin": "2" * 64, "README.md": "3" * 64}
    entries = {file: {"sha256": digest, "size": 1} for file, digest in files.items()}
    robustbench = {"cifar10/Linf/Standard.pt": {"sha256": "4" * 64, "size": 1}}
    (tmp_path / "lock.json").write_text(json.dumps({source: entries, "robustbench": robustbench}))
    found = experiment.file_digests(name, patterns=["*.json"])
    assert found == {"from": source, "config.json": "1" * 64, "pytorch_model.bin": "2" * 64}
    assert experiment.file_digests(name, "1" * 40) == {"from": f"{name}@{'1' * 40}"}
    entry = experiment.file_digests("robustbench:cifar10/Linf/Standard")
    assert entry == {"cifar10/Linf/Standard.pt": "4" * 64}
    folder = experiment.file_digests(profile.classifier)
    assert set(folder) == {"classifier/config.json", "classifier/model.safetensors"}
    bare = shutil.copytree(profile.classifier, tmp_path / "bare")
    assert experiment.file_digests(str(bare)) == {"model.safetensors": sha256(bare / "model.safetensors")}


def test_provenance_is_plain_data_with_versions_and_commit(profile, defense, images):
    source = experiment.provenance(profile, defense, images)
    assert json.loads(json.dumps(source))["settings"]["n_steps"] == profile.n_steps
    assert source["versions"]["torch"] == torch.__version__.split("+")[0] and source["device"] == "CPU"
    assert set(source["weights"]) == {profile.captioner, profile.diffusion, profile.classifier}
    assert source["images"] == images.source and source["commit"] != ""
