"""Each check of the audit passes, warns, or says that it was not run or had too few images."""

import itertools

import pytest
from made_rows import ATTACK, MATRIX, STRONGER, rows_of

from lgap_utils import verdicts
from lgap_utils.protocols import Attack, get_attack

INSIDE, ZERO, FALLS = "inside the ball and [0, 1]", "eps 0 changes nothing", "accuracy falls with eps"
DOUBLING = "doubling the steps changes little"
PGD = get_attack("PGD-10")
GOOD, BAD = rows_of([[0]] * 10), rows_of([[1]] * 10)


def verdicts_of(runs, **how):
    return verdicts.audit(runs, **how)["verdict"]


def with_eps(eps_255):
    return get_attack("PGD-10", eps_255=eps_255)


def test_an_evaluation_that_holds_passes_and_what_was_not_made_is_said():
    blind, bpda = rows_of([[0, 0], [0, 1]] * 5), rows_of([[0, 0], [1, 1]] * 5)
    checks = verdicts_of({"blind": (ATTACK, blind), "bpda": (STRONGER, bpda)}, stronger=[("blind", "bpda")])
    assert checks[INSIDE] == checks["bpda is no weaker than blind"] == "pass"
    assert checks["blind: gradient neither zero nor NaN"] == "pass"
    assert (checks[[ZERO, FALLS, DOUBLING]] == "not run").all()


@pytest.mark.parametrize(
    "check, broken, how",
    [
        (INSIDE, {"inside": False}, {}),
        (INSIDE, {"linf": float("nan")}, {}),
        ("blind: gradient neither zero nor NaN", {"bad_gradients": 3}, {}),
        (ZERO, {"clean": 5}, {"eps_zero": "blind"}),
    ],
)
def test_each_check_of_the_audit_can_fail(check, broken, how):
    runs = {"blind": (ATTACK, rows_of(MATRIX, **broken))}
    assert verdicts_of(runs, **how)[check] == "warn"


def test_a_weaker_rung_that_breaks_more_is_found_image_by_image():
    # as many stand under both, and not the same
    runs = {"blind": (ATTACK, rows_of([[0], [1]] * 5)), "bpda": (STRONGER, rows_of([[1], [0]] * 5))}
    audit = verdicts.audit(runs, stronger=[("blind", "bpda"), ("bpda", "absent")])
    row = audit.loc["bpda is no weaker than blind"]
    assert row["verdict"] == "warn" and "image 1" in row["detail"]
    assert audit.loc["absent is no weaker than bpda", "verdict"] == "not run"


def test_a_weaker_attack_under_which_no_image_stands_in_every_draw_is_found_by_the_mean():
    runs = {"all": (ATTACK, rows_of([[1, 1]] * 10)), "half": (STRONGER, rows_of([[0, 1]] * 10))}
    audit = verdicts.audit(runs, stronger=[("all", "half"), ("half", "all")])
    row = audit.loc["half is no weaker than all"]
    assert row["verdict"] == "warn" and "mean of draws 0.0 % and 50.0 %" in row["detail"]
    assert audit.loc["all is no weaker than half", "verdict"] == "pass"


@pytest.mark.parametrize("n", [1, verdicts.FEW_IMAGES - 1, verdicts.FEW_IMAGES])
@pytest.mark.parametrize("bad", [False, True])
def test_a_check_of_few_images_neither_passes_nor_warns(n, bad):
    first, second = rows_of([[int(bad)]] * n), rows_of([[int(not bad)]] * n)
    twice = get_attack("PGD-10", n_steps=20)
    runs = {"a": (with_eps(4), first), "b": (PGD, second), "c": (twice, second)}
    checks = verdicts_of(runs, stronger=[("a", "b")], eps_sweep=("a", "b"), doubled=("b", "c"))
    few = "too few images" if n < verdicts.FEW_IMAGES else ""
    assert checks["b is no weaker than a"] == checks[FALLS] == (few or ("warn" if bad else "pass"))
    assert checks[DOUBLING] == (few or "pass")


def test_runs_without_a_common_image_are_not_compared():
    runs = {"a": (ATTACK, GOOD), "b": (ATTACK, GOOD.assign(index=GOOD["index"] + 10))}
    audit = verdicts.audit(runs, stronger=[("a", "b")], eps_sweep=("a", "b"), doubled=("a", "b"))
    assert list(audit["verdict"]).count("too few images") == 3
    assert not audit["detail"].str.contains("nan").any()


def test_a_flat_line_does_not_fall_with_eps():
    sweep = ("0", "4", "8")
    for rows in (GOOD, BAD):
        row = verdicts.audit({eps: (with_eps(int(eps)), rows) for eps in sweep}, eps_sweep=sweep).loc[FALLS]
        assert row["verdict"] == "warn" and "did not fall" in row["detail"]
    runs = {"0": (with_eps(0), GOOD), "4": (with_eps(4), GOOD), "8": (PGD, rows_of([[0]] * 9 + [[1]]))}
    assert verdicts_of(runs, eps_sweep=sweep)[FALLS] == "pass"  # flat, then lower
    assert verdicts_of(runs, eps_sweep=("0", "absent"))[FALLS] == "not run"
    assert verdicts_of(runs, eps_sweep=("0",))[FALLS] == "not run"


def test_of_an_attack_of_ones_own_the_audit_claims_nothing():
    class Mine(Attack):
        pass

    checks = verdicts_of({"mine": (Mine("mine"), rows_of([[0]]))})
    assert checks["mine: the attack's own flags"] == "not run"
    assert not checks.index.str.contains("gradient").any()


def test_accuracy_that_rises_with_eps_and_steps_that_still_help_are_warned_of():
    for first, second in itertools.permutations((GOOD, BAD)):
        runs = {"a": (with_eps(4), first), "b": (PGD, second)}
        assert verdicts_of(runs, eps_sweep=("a", "b"))[FALLS] == ("pass" if first is GOOD else "warn")
        assert verdicts_of(runs, doubled=("a", "b"))[DOUBLING] == "warn"  # a change in either direction
    runs = {"a": (PGD, GOOD), "b": (get_attack("PGD-10", n_steps=20), GOOD)}
    assert verdicts_of(runs, doubled=("a", "b"))[DOUBLING] == "pass"


def test_rungs_of_different_size_are_compared_on_the_images_that_both_have():
    few, many = rows_of([[0]] * 9 + [[1]]), rows_of([[0]] * 10 + [[1]] * 8)
    runs = {"eps 0": (with_eps(0), many), "eps 8": (PGD, few)}
    audit = verdicts.audit(runs, eps_sweep=("eps 0", "eps 8"), stronger=[("eps 0", "eps 8")])
    assert audit.loc[FALLS, "verdict"] == "pass" and "10 images" in audit.loc[FALLS, "detail"]
    assert audit.loc["eps 8 is no weaker than eps 0", "detail"].startswith("of 10 images")


def test_autoattacks_flags_are_shown():
    rows = rows_of([[0], [0]], flags="it seems to be a randomized defense!")
    audit = verdicts.audit({"AA": (get_attack("AutoAttack"), rows)})
    row = audit.loc["AA: AutoAttack's own flags"]
    assert row["verdict"] == "warn" and "2 images: it seems to be a rand" in row["detail"]
