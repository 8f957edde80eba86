"""Each check of the audit passes, warns, or says that it was not run or had too few images."""

import itertools

import pytest
from made_rows import ATTACK, MATRIX, STRONGER, rows_of

from lgap_utils import verdicts
from lgap_utils.protocols import Attack, get_attack


def verdicts_of(runs, **how):
    return verdicts.audit(runs, **how)["verdict"]


def test_an_evaluation_that_holds_passes_and_what_was_not_made_is_said():
    found = verdicts_of(
        {"blind": (ATTACK, rows_of([[0, 0], [0, 1]] * 5)), "bpda": (STRONGER, rows_of([[0, 0], [1, 1]] * 5))},
        stronger=[("blind", "bpda")],
    )
    assert found["inside the ball and [0, 1]"] == found["bpda is no weaker than blind"] == "pass"
    assert found["blind: gradient neither zero nor NaN"] == "pass"
    assert (
        found[["eps 0 changes nothing", "accuracy falls with eps", "doubling the steps changes little"]]
        == "not run"
    ).all()


@pytest.mark.parametrize(
    "check, broken, how",
    [
        ("inside the ball and [0, 1]", {"inside": False}, {}),
        ("blind: gradient neither zero nor NaN", {"bad_gradients": 3}, {}),
        ("eps 0 changes nothing", {"clean": 5}, {"eps_zero": "blind"}),
    ],
)
def test_each_check_of_the_audit_can_fail(check, broken, how):
    runs = {"blind": (ATTACK, rows_of(MATRIX, **broken))}
    assert verdicts_of(runs, **how)[check] == "warn"


def test_a_weaker_rung_that_breaks_more_is_found_image_by_image():
    runs = {
        "blind": (ATTACK, rows_of([[0], [1]] * 5)),
        "bpda": (STRONGER, rows_of([[1], [0]] * 5)),
    }  # as many stand, not the same
    audit = verdicts.audit(runs, stronger=[("blind", "bpda"), ("bpda", "absent")])
    row = audit.loc["bpda is no weaker than blind"]
    assert row["verdict"] == "warn" and "image 1" in row["detail"]
    assert audit.loc["absent is no weaker than bpda", "verdict"] == "not run"


def test_a_weaker_attack_under_which_no_image_stands_in_every_draw_is_found_by_the_mean():
    half, none = rows_of([[0, 1]] * 10), rows_of([[1, 1]] * 10)
    found = verdicts.audit(
        {"all": (ATTACK, none), "half": (STRONGER, half)}, stronger=[("all", "half"), ("half", "all")]
    )
    row = found.loc["half is no weaker than all"]
    assert row["verdict"] == "warn" and "mean of draws 0.0 % and 50.0 %" in row["detail"]
    assert found.loc["all is no weaker than half", "verdict"] == "pass"


@pytest.mark.parametrize(
    "n, verdict",
    [(1, "too few images"), (verdicts.FEW_IMAGES - 1, "too few images"), (verdicts.FEW_IMAGES, "pass")],
)
def test_a_check_of_few_images_neither_passes_nor_warns(n, verdict):
    for bad in (False, True):
        first, second = rows_of([[int(bad)]] * n), rows_of([[int(not bad)]] * n)
        runs = {
            "a": (get_attack("PGD-10", eps_255=4), first),
            "b": (get_attack("PGD-10"), second),
            "c": (get_attack("PGD-10", n_steps=20), second),
        }
        found = verdicts_of(runs, stronger=[("a", "b")], eps_sweep=("a", "b"), doubled=("b", "c"))
        expected = "warn" if bad and verdict == "pass" else verdict
        assert found["b is no weaker than a"] == found["accuracy falls with eps"] == expected
        assert found["doubling the steps changes little"] == verdict
    nothing = {
        "a": (ATTACK, rows_of([[0]] * 10)),
        "b": (ATTACK, rows_of([[0]] * 10).assign(index=lambda r: r["index"] + 10)),
    }
    found = verdicts.audit(nothing, stronger=[("a", "b")], eps_sweep=("a", "b"), doubled=("a", "b"))
    assert (
        list(found["verdict"]).count("too few images") == 3 and not found["detail"].str.contains("nan").any()
    )


def test_a_flat_line_does_not_fall_with_eps():
    for guess in (0, 1):
        runs = {str(eps): (get_attack("PGD-10", eps_255=eps), rows_of([[guess]] * 10)) for eps in (0, 4, 8)}
        row = verdicts.audit(runs, eps_sweep=("0", "4", "8")).loc["accuracy falls with eps"]
        assert row["verdict"] == "warn" and "did not fall" in row["detail"]
    runs["8"] = runs["8"][0], rows_of([[0]] * 9 + [[1]])
    runs |= {name: (attack, rows_of([[0]] * 10)) for name, (attack, _) in runs.items() if name != "8"}
    assert (
        verdicts_of(runs, eps_sweep=("0", "4", "8"))["accuracy falls with eps"] == "pass"
    )  # flat, then lower
    assert verdicts_of(runs, eps_sweep=("0", "absent"))["accuracy falls with eps"] == "not run"


def test_a_distance_that_is_not_known_is_not_inside():
    assert (
        verdicts_of({"blind": (ATTACK, rows_of(MATRIX, linf=float("nan")))})["inside the ball and [0, 1]"]
        == "warn"
    )


def test_of_an_attack_of_ones_own_the_audit_claims_nothing():
    class Mine(Attack):
        pass

    found = verdicts_of({"mine": (Mine("mine"), rows_of([[0]]))})
    assert found["mine: the attack's own flags"] == "not run" and not any(
        "gradient" in check for check in found.index
    )


def test_accuracy_that_rises_with_eps_and_steps_that_still_help_are_warned_of():
    good, bad = rows_of([[0]] * 10), rows_of([[1]] * 10)
    for first, second in itertools.permutations((good, bad)):
        runs = {"a": (get_attack("PGD-10", eps_255=4), first), "b": (get_attack("PGD-10"), second)}
        assert verdicts_of(runs, eps_sweep=("a", "b"))["accuracy falls with eps"] == (
            "pass" if first is good else "warn"
        )
        assert (
            verdicts_of(runs, doubled=("a", "b"))["doubling the steps changes little"] == "warn"
        )  # a change in either direction
    runs = {"a": (get_attack("PGD-10"), good), "b": (get_attack("PGD-10", n_steps=20), good)}
    assert verdicts_of(runs, doubled=("a", "b"))["doubling the steps changes little"] == "pass"


def test_rungs_of_different_size_are_compared_on_the_images_that_both_have():
    few, many = rows_of([[0]] * 9 + [[1]]), rows_of([[0]] * 10 + [[1]] * 8)
    runs = {"eps 0": (get_attack("PGD-10", eps_255=0), many), "eps 8": (get_attack("PGD-10"), few)}
    audit = verdicts.audit(runs, eps_sweep=("eps 0", "eps 8"), stronger=[("eps 0", "eps 8")])
    assert (
        audit.loc["accuracy falls with eps", "verdict"] == "pass"
        and "10 images" in audit.loc["accuracy falls with eps", "detail"]
    )
    assert audit.loc["eps 8 is no weaker than eps 0", "detail"].startswith("of 10 images")


def test_autoattacks_flags_are_shown():
    rows = rows_of([[0], [0]], flags="it seems to be a randomized defense!")
    audit = verdicts.audit({"AA": (get_attack("AutoAttack"), rows)})
    row = audit.loc["AA: AutoAttack's own flags"]
    assert row["verdict"] == "warn" and "2 images: it seems to be a rand" in row["detail"]
