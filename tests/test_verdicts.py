"""Each check of the audit passes, warns, or says that it was not run or had too few images."""

import pytest
from made_rows import ATTACK, MATRIX, STRONGER, rows_of

from lgap_utils import verdicts
from lgap_utils.protocols import NATURAL, Attack, get_attack

INSIDE, ZERO, FALLS = "inside the ball and [0, 1]", "eps 0 changes nothing", "accuracy falls with eps"
DOUBLING = "doubling the steps changes little"
PGD = get_attack("PGD-10")
GOOD = rows_of([[0]] * 10)


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


def test_a_stronger_rung_that_leaves_more_is_warned_of_with_the_interval():
    runs = {"blind": (ATTACK, rows_of([[0, 1]] * 10)), "bpda": (STRONGER, rows_of([[0, 0]] * 10))}
    audit = verdicts.audit(runs, stronger=[("blind", "bpda"), ("bpda", "blind"), ("bpda", "absent")])
    row = audit.loc["bpda is no weaker than blind"]
    assert row["verdict"] == "warn" and row["detail"].startswith("100.0 % and 50.0 % stand, +50.0 points (")
    assert audit.loc["blind is no weaker than bpda", "verdict"] == "pass"
    assert audit.loc["absent is no weaker than bpda", "verdict"] == "not run"


def test_one_draw_of_ten_that_falls_does_not_make_ten_per_cent_look_like_ninety():
    """Whatever falls to the weaker falls to the stronger in some draw; in the mean 10 % and 90 % stand."""
    weak, strong = rows_of([[0] + [1] * 9] * 20), rows_of([[1] + [0] * 9] * 20)
    runs = {"weak": (ATTACK, weak), "strong": (STRONGER, strong)}
    assert verdicts_of(runs, stronger=[("weak", "strong")])["strong is no weaker than weak"] == "warn"


@pytest.mark.parametrize("n", [1, verdicts.FEW_IMAGES - 1, verdicts.FEW_IMAGES])
@pytest.mark.parametrize("bad", [False, True])
def test_a_check_of_few_images_neither_passes_nor_warns(n, bad):
    first, second = rows_of([[int(bad)]] * n), rows_of([[int(not bad)]] * n)
    runs = {"a": (with_eps(4), first), "b": (PGD, second)}
    checks = verdicts_of(runs, stronger=[("a", "b")], eps_sweep=("a", "b"))
    few = "too few images" if n < verdicts.FEW_IMAGES else ""
    assert checks["b is no weaker than a"] == checks[FALLS] == (few or ("warn" if bad else "pass"))


@pytest.mark.parametrize(
    "n, lost, verdict",
    [(64, 0, "pass"), (9, 0, "too few images"), (16, 0, "too few images"), (64, 20, "warn")],
)
def test_steps_that_still_help_are_warned_of_and_what_cannot_be_told_is_not_passed(n, lost, verdict):
    once, twice = rows_of([[0]] * n), rows_of([[1]] * lost + [[0]] * (n - lost))
    runs = {"once": (PGD, once), "twice": (get_attack("PGD-10", n_steps=20), twice)}
    row = verdicts.audit(runs, doubled=("once", "twice")).loc[DOUBLING]
    assert row["verdict"] == verdict and "with 10 and 20 steps" in row["detail"]
    assert ("can be more than 10 points" in row["detail"]) == (verdict == "too few images")


@pytest.mark.parametrize("still, verdict", [(0, "pass"), (1, "warn")])
def test_every_image_must_be_moved_unless_eps_is_zero(still, verdict):
    rows = rows_of([[0, 0]] * 4)
    rows.loc[rows["index"] < still, "linf"] = 0.0
    runs = {"AA": (ATTACK, rows), "none": (NATURAL, rows.assign(linf=0.0))}
    row = verdicts.audit(runs).loc["every attacked image is moved"]
    assert row["verdict"] == verdict and ("AA: 1 of 4" == row["detail"]) == bool(still)


@pytest.mark.parametrize("random", [False, True])
def test_whether_autoattack_suits_is_asked_of_the_defence(random):
    rows = rows_of([[0]] * 3, random=random)
    checks = verdicts_of({"AA": (get_attack("AutoAttack"), rows)})
    assert checks["AA: AutoAttack's own flags"] == "pass"  # of the bare classifier, which draws nothing
    assert checks.get("AA: AutoAttack suits the defence") == ("warn" if random else None)


def test_runs_without_a_common_image_are_not_compared():
    runs = {"a": (ATTACK, GOOD), "b": (ATTACK, GOOD.assign(index=GOOD["index"] + 10))}
    audit = verdicts.audit(runs, stronger=[("a", "b")], eps_sweep=("a", "b"), doubled=("a", "b"))
    assert list(audit["verdict"]).count("too few images") == 3
    assert not audit["detail"].str.contains("nan").any()


@pytest.mark.parametrize(
    "standing, verdict",
    [
        ((50, 50, 50), "warn"),
        ((50, 60, 0), "warn"),
        ((50, 20, 2), "warn"),  # 4 %
        ((50, 20, 20), "warn"),
        ((50, 20, 1), "pass"),
        ((50, 0, 0), "pass"),  # there is nothing left to fall
        ((50, 1, 2), "warn"),
        ((0, 0, 50), "warn"),
    ],
)
def test_accuracy_falls_strictly_and_to_nothing(standing, verdict):
    runs = {str(k): (with_eps(4 * k), rows_of([[0]] * n + [[1]] * (50 - n))) for k, n in enumerate(standing)}
    assert verdicts_of(runs, eps_sweep=tuple(runs))[FALLS] == verdict
    assert verdicts_of(runs, eps_sweep=("0", "absent"))[FALLS] == "not run"
    assert verdicts_of(runs, eps_sweep=("0",))[FALLS] == "not run"


def test_of_an_attack_of_ones_own_the_audit_claims_nothing():
    class Mine(Attack):
        pass

    checks = verdicts_of({"mine": (Mine("mine"), rows_of([[0]]))})
    assert checks["mine: the attack's own flags"] == "not run"
    assert not checks.index.str.contains("gradient").any()


def test_rungs_of_different_size_are_compared_on_the_images_that_both_have():
    few, many = rows_of([[1]] * 10), rows_of([[0]] * 10 + [[1]] * 8)
    runs = {"eps 0": (with_eps(0), many), "eps 8": (PGD, few)}
    audit = verdicts.audit(runs, eps_sweep=("eps 0", "eps 8"), stronger=[("eps 0", "eps 8")])
    assert audit.loc[FALLS, "verdict"] == "pass" and "10 images" in audit.loc[FALLS, "detail"]
    assert audit.loc["eps 8 is no weaker than eps 0", "detail"].endswith(", 10 images")


def test_autoattacks_flags_are_shown():
    rows = rows_of([[0], [0]], flags="it seems to be a randomized defense!")
    audit = verdicts.audit({"AA": (get_attack("AutoAttack"), rows)})
    row = audit.loc["AA: AutoAttack's own flags"]
    assert row["verdict"] == "warn" and "2 images: it seems to be a rand" in row["detail"]
