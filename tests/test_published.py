"""Published rows are those that this checkout would make: it accepts them, in the folder where a run would look for them."""

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
FOLDERS = sorted(file.parent for file in (PUBLISHED / "rows").glob("*/*/config.json"))
# {folder of an evaluation: (the paper's table whose settings it has, whether its classifier is the fine-tuned one)}
EVALUATIONS = {
    "table1_and_3": (1, True),
    "table1_as_it_came": (1, False),
    "table2": (2, True),
    "table4": (4, False),
}


@pytest.fixture(scope="module")
def described_here():
    """{folder of an evaluation that has published rows: what its defences are, as this checkout loads them}."""
    found = {}
    for folder in {folder.parent.name for folder in FOLDERS}:
        table, tuned = EVALUATIONS[folder]
        profile = get_profile("small", table)
        classifier = PUBLISHED / f"classifier_{profile.dataset}" if tuned else None
        defense = models.load_defense(profile, device="cpu", classifier=classifier)
        found[folder] = {
            name: describe_defense(d) for name, d in baselines.with_baselines(defense, 32).items()
        }
    return found


def test_there_are_published_rows():
    """Of Table 4 at least, whose classifier is as it came; those of a fine-tuned one go with the classifier."""
    names = {folder.name for folder in FOLDERS if folder.parent.name == "table4"}
    assert names == {"natural", "pgd-10", "autoattack", "bpda-40", "pgd-10-eps-0"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_the_checkout_accepts_published_rows(folder, described_here, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    profile = get_profile("small", EVALUATIONS[folder.parent.name][0])
    here = json.loads(json.dumps(described_here[folder.parent.name]))
    assert (
        folder_name(config["attack"]["name"]) == folder.name
        and Attack(**config["attack"]).settings() == config["attack"]
    )
    assert (
        config["attack"]["eps_255"] in (0, profile.eps_255)
        and config["attack"]["step_size_255"] == profile.step_size_255
    )
    folder = shutil.copytree(folder, tmp_path / folder.name)  # a shard that is not whole would be set aside
    assert config["method"] == METHOD and not differences(
        config["defences"], {name: here[name] for name in config["defences"]}
    )
    assert (config["seed"], config["n_draws"], config["dataset"]) == (
        profile.seed,
        profile.n_draws,
        profile.dataset,
    )
    table = Rows(folder, config, ("index", "defence", "draw")).read()
    assert len(table) and table["inside"].all() and set(table["defence"]) == set(config["defences"])
