"""A handful of rows, pinned: a change of results must raise defense.METHOD, so that older rows are refused.

After a change that is meant:  raise METHOD, then `python tests/test_golden.py` writes tests/golden.json anew.
"""

import json
from pathlib import Path

import pytest
import torch

from lgap_utils import baselines, data, models
from lgap_utils.defense import METHOD
from lgap_utils.noise import Keys
from lgap_utils.protocols import NATURAL, Attack

FILE = Path(__file__).with_name("golden.json")
FEW = {"eps_255": 8, "step_size_255": 2, "n_steps": 2}
ATTACKS = [
    NATURAL,
    Attack("blind", **FEW),
    Attack("blind, restarts", **FEW, n_restarts=2, any_step=True),
    Attack("bpda", view="bpda", **FEW),
    Attack("bpda, 2 draws", view="bpda", n_eot=2, random_start=False, **FEW),
    Attack("bpda, vote", view="bpda", n_eot=2, average="vote", masked=True, **FEW),
    Attack("bpda, logits", view="bpda", n_eot=2, average="logits", **FEW),
    Attack("full", view="full", **FEW),
    Attack("full, clean caption, known noise", view="full", captions="clean", known_noise=True, **FEW),
    Attack("square", optimiser="square", view="full", n_steps=3, n_eot=2),
    Attack("autoattack", optimiser="autoattack", n_steps=3, block=2),
]


@pytest.fixture(scope="module")
def toy():
    return models.load_defense("toy", device="cpu"), data.load_images("toy", "test", 2)


def measured(defense, images, attack):
    """What an attack does to two images and the defence makes of them, in numbers that show other noise."""
    keys, x = Keys(images.indices), images.x
    adv = attack(defense, x, images.labels, Keys(images.indices, 0, "attack"))
    captions = defense.caption(adv)
    with torch.no_grad():
        purified = defense.purify(adv, captions, keys.at([0, 0], 2))
        logits = defense.classify(purified)
    return {
        "captions": captions,
        "labels": logits.argmax(1).tolist(),
        "purified": purified.mean((1, 2, 3)).tolist(),
        "moved, 1/255": (255 * (adv - x)).abs().mean((1, 2, 3)).tolist(),
        "logits": logits.abs().mean(1).tolist(),
    }


def cheap(defense, images):
    """The purifiers that stand beside LGAP, by the mean of what they make."""
    return {
        name: other.purify(images.x, keys=Keys(images.indices)).mean().item()
        for name, other in baselines.with_baselines(defense, 32).items()
    }


def test_the_golden_rows_are_those_of_this_method():
    assert json.loads(FILE.read_text())["METHOD"] == METHOD


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_row_is_what_it_was(toy, quick, attack):
    expected, found = json.loads(FILE.read_text())["rows"][attack.name], measured(*toy, attack)
    assert (found["captions"], found["labels"]) == (expected["captions"], expected["labels"])
    # CPUs round differently, and a sign may flip; other noise moves each of these a hundred times as far
    assert found["purified"] == pytest.approx(expected["purified"], abs=1e-3)
    assert found["moved, 1/255"] == pytest.approx(expected["moved, 1/255"], abs=0.05)
    assert found["logits"] == pytest.approx(expected["logits"], rel=0.05)


def test_a_cheap_purifier_makes_what_it_made(toy):
    with torch.no_grad():
        assert cheap(*toy) == pytest.approx(json.loads(FILE.read_text())["purifiers"], abs=1e-4)


if __name__ == "__main__":
    from pyautoattack.fab_base import FABAttack

    FABAttack.perturb = lambda self, x, y: x.clone()  # as the fixture `quick` has it
    both = models.load_defense("toy", device="cpu"), data.load_images("toy", "test", 2)
    with torch.no_grad():
        purifiers = cheap(*both)
    golden = {
        "METHOD": METHOD,
        "rows": {attack.name: measured(*both, attack) for attack in ATTACKS},
        "purifiers": purifiers,
    }
    rounded = json.loads(json.dumps(golden), parse_float=lambda text: round(float(text), 6))
    FILE.write_text(json.dumps(rounded, indent=1) + "\n")
