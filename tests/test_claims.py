"""Verdicts by rule: planted results make each of them flip, and what was not measured is open."""

import json

import pandas as pd
import pytest

from tools.claims import (
    FAILS,
    HOLDS,
    OPEN,
    Measured,
    Published,
    finding,
    gains,
    keeps,
    measured,
    paper,
    verdicts,
)

CLAIMS = 10


def entry(attack, robust, low, high, dataset="cifar10", paper_dataset="cifar10", natural=84.0, **more):
    row = {"name": "LGAP", "attack": attack, "clean_acc": natural, "natural_interval": "80.0 to 88.0"}
    row |= {"natural_n": 512, "robust_acc": robust, "robust_interval": f"{low} to {high}", "robust_n": 512}
    return row | {"dataset": dataset, "paper_dataset": paper_dataset} | more


def results(robust=70.0, low=66.0, high=74.0, worst=(4.0, 2.0, 7.0), cifar100="cifar100"):
    number = (robust, low, high)
    external = {"external": worst[0], "external_interval": f"{worst[1]} to {worst[2]}", "external_n": 64}
    return {
        "table 1": {"rows": [entry("PGD", *number)]},
        "table 2": {"rows": [entry("PGD", *number, cifar100, "cifar100")]},
        "table 3": {"rows": [entry("BPDA", *number, **external), entry("BPDA 40+EOT", *number)]},
        "table 4": {"rows": [entry("BPDA-40", *number, "cifar10", "imagenet")]},
    }


def planted(folder, whole=None, caption="0.4 (0.1 to 1.6)", gap=("+8.0", "+5.0 to +11.0")):
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results() if whole is None else whole))
    save = lambda name, rows: pd.DataFrame(rows).to_csv(folder / "tables" / f"{name}.csv", index=False)
    names = {"captions": "names the true class, clean", "%": 84.0, "95 % interval": "80.0 to 88.0", "n": 512}
    save("01_captions", [names, names | {"captions": "names the true class, attacked"}])
    rungs = {"blind PGD-40": "70.0 (66.0 to 74.0)", "on the caption": caption}
    rows = [{"LGAP under": name, "caption alone, %": cell, "n": 512} for name, cell in rungs.items()]
    save("06_ladder", rows)
    save("06_common", [{"LGAP under": "blind PGD-40", "natural, %": "90.0 (80.0 to 96.0)", "n": 64}])
    pairs = [(i, s) for i in ("clean", "adversarial") for s in ("LGAP without a caption", "caption alone")]
    rows = [{"images": i, "first": "LGAP", "second": s, "points": gap[0], "95 % interval": gap[1], "n": 512}
            for i, s in pairs]  # fmt: skip
    save("04_paired", rows)
    return Published(folder)


def verdict(of, number):
    return [verdict for _, _, verdict in verdicts(of)][number]


def test_everything_is_open_where_nothing_was_measured(tmp_path):
    of = Published(tmp_path)
    assert [v for *_, v in verdicts(of)] == [OPEN] * CLAIMS
    assert {evidence for _, evidence, _ in verdicts(of)} >= {"not measured"}
    assert finding(of).startswith(
        "Of 7 of the paper's claims 0 hold, 0 do not, 7 are open; of 3 that go further 0 hold"
    )


@pytest.mark.parametrize("number", [0, 1, 5, 6])
def test_robustness_holds_fails_or_stays_open(tmp_path, number):
    assert verdict(planted(tmp_path), number) == HOLDS
    assert verdict(planted(tmp_path, results(20.0, 17.0, 24.0)), number) == FAILS
    assert verdict(planted(tmp_path, results(28.0, 24.0, 32.0)), number) == OPEN


def test_a_number_of_another_data_set_decides_nothing(tmp_path):
    of = planted(tmp_path, results(cifar100="cifar10"))
    assert verdict(of, 1) == OPEN and "CIFAR-10, not CIFAR-100" in verdicts(of)[1][1]
    assert verdict(of, 8) == OPEN and "CIFAR-10, not ImageNet" in verdicts(of)[8][1]


def test_the_worst_case_is_held_against_the_natural_accuracy_of_the_same_images(tmp_path):
    assert verdict(planted(tmp_path), 9) == FAILS
    assert verdict(planted(tmp_path, results(worst=(60.0, 50.0, 70.0))), 9) == HOLDS
    assert verdict(planted(tmp_path, results(worst=(30.0, 20.0, 40.0))), 9) == OPEN


def test_captions_hold_under_one_attack_and_fall_under_another(tmp_path):
    assert [verdict(planted(tmp_path), number) for number in (2, 7)] == [HOLDS, FAILS]
    assert verdict(planted(tmp_path, caption="70.0 (60.0 to 80.0)"), 7) == HOLDS
    assert verdict(planted(tmp_path, caption="28.0 (20.0 to 36.0)"), 7) == OPEN
    assert verdict(planted(tmp_path, caption="not run"), 7) == OPEN


@pytest.mark.parametrize(
    "gap, expected",
    [(("+8.0", "+5.0 to +11.0"), HOLDS), (("0.5", "-1.5 to +2.5"), OPEN), (("-3.0", "-5.0 to -1.0"), FAILS)],
)
def test_a_part_is_worth_what_the_paired_difference_says(tmp_path, gap, expected):
    of = planted(tmp_path, gap=gap)
    assert verdict(of, 3) == verdict(of, 4) == expected


def test_both_differences_count():
    up, flat, down = Measured(3, 1, 5, 9), Measured(0, -1, 1, 9), Measured(-3, -5, 0, 9)
    assert gains(up, up) == HOLDS and gains(up, flat) == OPEN and gains(up, down) == FAILS
    assert gains() == gains(up, None) == OPEN and keeps(None, up) == OPEN


def test_the_evidence_has_its_interval_and_n_and_the_papers_numbers_are_read(tmp_path):
    of = planted(tmp_path)
    said, evidence, _ = verdicts(of)[0]
    assert said.endswith("(Table 1: 71.68 of 90.03 %)") and paper(3, "BPDA 40+EOT") == "44.96 of 90.30 %"
    assert evidence == "CIFAR-10: natural 84.0 %, attacked 70.0 % (66.0 to 74.0; n = 512)"
    assert "clean +8.0 points (+5.0 to +11.0; n = 512)" in verdicts(of)[3][1]
    assert "4.0 % (2.0 to 7.0; n = 64) where the attacker may choose" in finding(of)
    with pytest.raises(ValueError, match="expected an interval"):
        measured(1, "about 3", 4)
