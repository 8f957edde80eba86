"""Published rows are those that this checkout would make: it accepts them, in the folder of a run."""

import json
import shutil
from pathlib import Path

import pytest

from lgap_utils import baselines, models
from lgap_utils.defense import METHOD
from lgap_utils.evaluate import describe_defense, folder_name
from lgap_utils.profiles import get_profile
from lgap_utils.protocols import Attack
from lgap_utils.rows import Rows, differences

PUBLISHED = Path(__file__).resolve().parents[1] / "outputs" / "published" / "small"
# but those of a captioner that is told the classes, which takes the data set to make
FOLDERS = sorted(file.parent for file in (PUBLISHED / "rows").glob("*/*/config.json"))
FOLDERS = [folder for folder in FOLDERS if not folder.parent.name.endswith("_told")]
# {folder of an evaluation: (the paper's table whose settings it has, whether its classifier is fine-tuned)}
EVALUATIONS = {
    "table1_and_3": (1, True),
    "table1_and_3_known": (1, True),  # two draws, which the attacker knows
    "table1_as_it_came": (1, False),
    "table2": (2, True),
    "table4": (4, False),
}


@pytest.fixture(scope="module")
def described_here():
    """{folder of an evaluation with published rows: what its defences are, as this checkout loads them}."""
    found = {}
    for folder in {folder.parent.name for folder in FOLDERS}:
        table, tuned = EVALUATIONS[folder]
        profile = get_profile("small", table)
        classifier = PUBLISHED / f"classifier_{profile.dataset}" if tuned else None
        defense = models.load_defense(profile, device="cpu", classifier=classifier)
        defenses = baselines.with_baselines(defense, 32)
        found[folder] = {name: describe_defense(defense) for name, defense in defenses.items()}
    return found


def test_there_are_published_rows():
    """Of Table 4 at least, whose classifier is as it came; those of a fine-tuned one go with it."""
    if not FOLDERS:
        pytest.skip("no rows of this form are published yet")
    names = {folder.name for folder in FOLDERS if folder.parent.name == "table4"}
    assert names >= {"natural", "pgd-10", "autoattack", "bpda-40", "pgd-10-eps-0"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_the_checkout_accepts_published_rows(folder, described_here, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    profile = get_profile("small", EVALUATIONS[folder.parent.name][0])
    here, attack = json.loads(json.dumps(described_here[folder.parent.name])), config["attack"]
    assert folder_name(attack["name"]) == folder.name and Attack(**attack).settings() == attack
    assert config["method"] == METHOD and config["dataset"] == profile.dataset
    assert config["seed"] == profile.seed + (folder.parent.name == "table2")  # notebook 05 takes the next one
    target = config["target"]["name"]
    assert not differences(config["target"], {"name": target} | here[target])
    folder = shutil.copytree(folder, tmp_path / folder.name)  # a shard that is not whole would be set aside
    attacked = Rows(folder, config).read()
    assert len(attacked) and attacked["inside"].all()
    for file in folder.glob("*/config.json"):
        own = json.loads(file.read_text())
        name = own["defence"]["name"]
        assert folder_name(name) == file.parent.name
        assert not differences(own["defence"], {"name": name} | here[name])
        assert not differences({**own, "defence": None, "n_draws": None}, {**config, "defence": None})
        scored = Rows(file.parent, own, ("index", "draw")).read()
        assert set(scored["draw"]) == set(range(own["n_draws"]))
        assert own["n_draws"] in (1, 2, profile.n_draws) and set(scored["index"]) <= set(attacked["index"])
