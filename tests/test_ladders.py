"""The ladder as one call: for a defence of one's own, too; who is left out is told."""

import dataclasses

import pytest
import torch
from cheap_defense import Noisy, net, some_images, words

from lgap_utils import baselines, evaluate, ladders
from lgap_utils.defense import LGAP
from lgap_utils.noise import Keys
from lgap_utils.profiles import TOY

SIZES = ("n_images", "n_adaptive", "n_eot_images", "n_surrogate", "n_full", "n_curve", "n_controls")
OWN = ["blind PGD-40", "BPDA-40", "BPDA-40+EOT", "full gradient"]


@pytest.fixture
def climb(tmp_path, monkeypatch):
    """The ladder of a defence whose purifier and captioner are nobody's; AutoAttack needs too long here."""
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    rungs = lambda p, blind: [each for each in ladders.rungs(p, blind) if "AutoAttack" not in each[0].name]
    monkeypatch.setitem(ladders.PARTS, "rungs", rungs)
    profile = dataclasses.replace(TOY, n_draws=2, n_steps_full=2, **dict.fromkeys(SIZES, 3))
    mine = LGAP(words, Noisy(), net, tuple("0123456789"))
    defenses = {"mine": mine, "undefended": baselines.with_purifier(mine, baselines.undefended())}
    return lambda **how: ladders.climb(profile, defenses, some_images(), "mine", **how)


def test_a_purifier_of_ones_own_gets_the_ladder_and_what_it_lacks_is_told(climb, capsys):
    runs = climb()
    printed = capsys.readouterr().out
    assert list(runs) == OWN
    assert printed.count("left out: ") == 4
    assert "left out: on the caption; captioner: expected one with log_likelihood" in printed
    assert "left out: VAE surrogate; purifier: a surrogate is a part of a LatentPurifier" in printed
    for attack, rows in runs.values():
        assert attack.name in printed and set(rows["defence"]) == {"mine", "undefended"}
        assert list(rows["index"].unique()) == [10, 13, 16]
        assert torch.isfinite(evaluate.attacked_images(rows, some_images())).all()
    assert all(rows.equals(runs[name][1]) for name, (_, rows) in climb().items())  # kept


def test_known_noise_is_judged_by_the_draws_that_the_attacker_has(climb):
    ((attack, rows),) = climb(part="known noise").values()
    assert attack.known_noise and attack.n_eot == rows[rows["defence"] == "mine"]["draw"].nunique() == 2


def test_a_captioner_that_is_told_names_each_images_class():
    images = some_images()
    defense = ladders.told_the_class(LGAP(words, Noisy(), net, images.classes), images)
    told = defense.caption(images.x, Keys(images.indices))
    assert told == [f"a {images.classes[label]}" for label in images.labels]


def test_a_part_that_is_none_is_refused(climb):
    with pytest.raises(ValueError, match="part='top': choose from .'rungs', 'curve'"):
        climb(part="top")


@pytest.mark.parametrize("part", ladders.PARTS)
def test_every_attack_of_a_part_has_a_name_of_its_own(part):
    found = ladders.PARTS[part](TOY, TOY)
    assert len({attack.name for attack, _ in found}) == len(found) and all(n > 0 for _, n in found)
