"""Attacks by name: inside their threat model, every number used, and bad fields refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from sums import DEFENSE, KEYS, Counted, N, X, Y, noisy, words

from lgap_utils import protocols
from lgap_utils.attacks import VIEWS, Record
from lgap_utils.defense import LGAP
from lgap_utils.protocols import ATTACKS, Attack, get_attack

PLAIN = [name for name, attack in ATTACKS.items() if attack.view in VIEWS]  # the others: test_surrogates.py


@pytest.mark.parametrize("name", PLAIN)
def test_each_named_attack_stays_inside_its_threat_model_and_says_what_it_is(quick, name):
    attack = get_attack(name, n_steps=3, n_eot=min(2, ATTACKS[name].n_eot))
    record, done, before = Record(), [], X.clone()
    adv = attack(DEFENSE, X[:2], Y[:2], KEYS[:2], record=record, progress=done.append)
    assert (adv - X[:2]).abs().max() <= attack.eps_255 / 255 + 1e-6 and adv.min() >= 0 and adv.max() <= 1
    assert torch.equal(X, before) and not adv.requires_grad
    assert [len(v) for v in dataclasses.astuple(record)] == [2, 2, 2]
    assert "\n" not in attack.describe() and (
        attack.optimiser == "none" or f"eps {attack.eps_255:g}/255" in attack.describe()
    )


def test_every_number_of_an_attack_reaches_the_optimiser(monkeypatch):
    seen, rest = (
        {},
        {
            "n_steps": 7,
            "n_eot": 3,
            "average": "vote",
            "random_start": False,
            "known_noise": True,
            "any_step": True,
            "n_restarts": 2,
            "norm": "l2",
            "low_pass": 2,
            "target": 3,
        },
    )
    monkeypatch.setattr(protocols, "pgd", lambda model, x, y, **settings: seen.update(settings) or x)
    Attack("all", view="full", eps_255=4, step_size_255=1, **rest)(DEFENSE, X, Y, KEYS, batch_size=5)
    assert seen == rest | {
        "eps": 4 / 255,
        "step_size": 1 / 255,
        "keys": KEYS,
        "batch_size": 5,
        "record": None,
        "progress": None,
        "masked_by": None,
    }


@pytest.mark.parametrize(
    "settings", [{}, {"n_eot": 3}, {"any_step": True}, {"n_restarts": 2, "n_eot": 2}, {"view": "bpda"}]
)
def test_the_cost_of_an_attack_is_known_before_it_runs(settings):
    purifier = Counted(noisy)
    attack = Attack("costly", **{"view": "full", "n_steps": 3} | settings)
    attack(
        LGAP(words, purifier, lambda x: 9.0 * F.one_hot(torch.full((len(x),), 3), 10)),
        X,
        torch.full((N,), 3),
        KEYS,
    )  # unbreakable
    assert sum(len(keys) for _, _, keys in purifier.calls) == N * sum(attack.purifications())
    assert (attack.purifications()[0] == 0) == (attack.view == "full")


def test_an_attack_in_batches_that_works_in_place_leaves_the_images_and_labels_as_they_are():
    x, y = X.clone(), Y.clone()
    out = protocols.in_batches(
        lambda x, y, keys: x.add_(y.mul_(0).float().view(-1, 1, 1, 1) + 0.5), x, y, batch_size=3
    )
    assert torch.equal(out, X + 0.5) and torch.equal(x, X) and torch.equal(y, Y)
    Attack("none", optimiser="none")(DEFENSE, x, y, KEYS).zero_()
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"optimiser": "fgsm"}, "optimiser='fgsm': choose from.*pgd"),
        ({"view": "white"}, "view='white'.*bpda"),
        ({"average": "sum"}, "average='sum'.*vote"),
        ({"captions": "old"}, "captions='old'.*anew"),
        ({"version": "custom"}, "version='custom'.*rand"),
        ({"eps_255": "8/255"}, "eps_255='8/255'"),
        ({"eps_255": -1}, r"eps_255=-1: expected a number in \[0, 255\]"),
        ({"eps_255": 256}, "eps_255=256"),
        ({"eps_255": 8 / 255}, "eps_255=0.031.*8 and not 8/255"),
        ({"step_size_255": 0}, "step_size_255=0: no image would move"),
        ({"eps_255": float("nan")}, "eps_255=nan"),
        ({"n_steps": 2.0}, "n_steps=2.0"),
        ({"n_eot": True}, "n_eot=True"),
        ({"known_noise": "False"}, "known_noise='False': expected True or False"),
        ({"any_step": 1}, "any_step=1"),
        ({"random_start": "no"}, "random_start='no'"),
        ({"masked": "yes"}, "masked='yes'"),
        ({"masked": None}, "masked=None"),
        ({"step_size_255": float("nan")}, "step_size_255=nan"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_eot": "3"}, "n_eot='3'"),
        ({"n_restarts": 0}, "n_restarts=0"),
        ({"optimiser": "square", "known_noise": True}, "known_noise=True: only.*'pgd'.*'square'"),
        ({"optimiser": "autoattack", "n_restarts": 2}, "n_restarts=2: only"),
        ({"optimiser": "square", "average": "vote"}, "average='vote': only"),
        ({"optimiser": "autoattack", "any_step": True}, "any_step=True: only"),
        ({"steps": 3, "eot": 2}, "no field eot, steps; choose from.*n_steps"),
    ],
)
def test_a_wrong_field_of_an_attack_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        get_attack("BPDA-40", **wrong)


def test_an_unknown_attack_is_answered_with_the_choices_and_a_known_one_may_be_renamed():
    with pytest.raises(ValueError, match="no attack 'BPDA'; choose from.*BPDA-40"):
        get_attack("BPDA")
    changed = {"name": "BPDA-40 at 4/255", "eps_255": 4}
    assert get_attack("BPDA-40", **changed) == dataclasses.replace(ATTACKS["BPDA-40"], **changed)
    assert get_attack("blind PGD-40", n_steps=10) == Attack(
        "blind PGD-10", n_steps=10
    )  # a name says no other number of steps
    assert (
        get_attack("BPDA-40", n_steps=10, name="mine").name == "mine"
        and get_attack("Square", n_steps=7).name == "Square"
    )
