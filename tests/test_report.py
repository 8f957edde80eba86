"""Tables and checks are functions of rows alone: here of rows made by hand, whose accuracies can be counted."""
import itertools
import json
import re

import pandas as pd
import pytest

from lgap_utils import report
from lgap_utils.attacks import NATURAL, Attack, get_attack


def rows_of(matrix, labels=None, defence="LGAP", **columns):
    """Rows of images x draws: matrix[i][d] is the label predicted for the adversarial image i in draw d; true labels are 0."""
    labels = labels or [0] * len(matrix)
    plain = {"clean": 0, "inside": True, "linf": 8 / 255, "bad_gradients": 0, "flags": "", "broke_at": -1, "seconds": 1.5}
    return pd.DataFrame([{**plain, "index": i, "label": labels[i], "defence": defence, "draw": d, "adversarial": guess, **columns}
                         for i, line in enumerate(matrix) for d, guess in enumerate(line)])


MATRIX = [[0, 0, 0], [0, 1, 0], [1, 1, 0], [2, 1, 1]]      # right in 3, 2, 1 and 0 of 3 draws


@pytest.mark.parametrize("how, percent, k", [("mean", 50.0, 2.0), ("majority", 50.0, 2), ("worst", 25.0, 1)])
def test_accuracy_is_read_from_the_matrix_of_draws(how, percent, k):
    found = report.accuracy(rows_of(MATRIX), how=how)
    assert (found["%"], found["k"], found["n"]) == (percent, k, 4)


def test_a_tied_vote_goes_to_the_lower_label():
    assert report.accuracy(rows_of([[1, 0]]), how="majority")["k"] == 1
    assert report.accuracy(rows_of([[1, 0]], labels=[1]), how="majority")["k"] == 0


def test_the_interval_of_a_mean_counts_images_and_not_draws():
    assert report.accuracy(rows_of([[0] * 100, [1] * 100]))["95 % interval"] == report.share([True, False])["95 % interval"]
    low, high = (report.share(flags)["95 % interval"].split(" to ") for flags in ([True, False], [True, True]))
    assert report.accuracy(rows_of([[0, 0], [0, 1]]))["95 % interval"] == f"{low[0]} to {high[1]}"


def test_a_missing_draw_is_no_zero():
    with pytest.raises(ValueError, match="1 of 4 images lack a draw"):
        report.accuracy(rows_of(MATRIX).iloc[1:])
    with pytest.raises(ValueError, match="choose from"):
        report.accuracy(rows_of(MATRIX), how="best")


CAPTIONS = ["a red cat", "a photo of a dog", "a cat and a dog", "nothing at all"]


def test_a_caption_alone_is_right_where_it_names_one_class_and_that_the_true_one():
    rows = pd.concat([rows_of([[1, 0]] * 4, defence=name) for name in ("LGAP", "other")])
    rows = rows.assign(caption=[c for c in CAPTIONS for _ in range(2)] * 2, caption_clean=[c for c in CAPTIONS[::-1] for _ in range(2)] * 2)
    found = report.caption_readers(rows, ["cat", "dog"])
    assert list(found["adversarial"]) == [0, 1, -1, -1] and list(found["clean"]) == [-1, -1, 1, 0]
    assert set(found["defence"]) == {"caption alone"} and len(found) == 4
    ladder = report.ladder({"any": (NATURAL, rows)}, ["cat", "dog"])
    assert ladder.loc["any", "caption alone, %"] == report.in_words(report.share([True, False, False, False]))
    assert "caption alone, %" not in report.ladder({"any": (NATURAL, rows)})


def ours(natural=None, robust=None, attack="PGD", method="LGAP"):
    return {"method": method, "attack": attack, "natural": natural, "robust": robust, "protocol": "by hand"}


def test_no_cell_beside_the_paper_is_blank():
    for number in (1, 2, 3, 4):
        table = report.beside_paper(number, [ours(report.share([True]), method="another")], same_models=True)
        assert not table.isna().any(axis=None) and (table.astype(str) != "").all(axis=None)
        assert len(table) == len(report.paper_numbers(number)) + 1
        assert table.loc[("another", "PGD"), "paper's number"] == "natural not in the paper, robust not run"


@pytest.mark.parametrize("k, verdict", [(72, "inside"), (40, "outside")])
def test_a_number_is_called_inside_where_our_interval_holds_it(k, verdict):
    flags = report.share([True] * k + [False] * (100 - k))
    natural = report.share([True] * 90 + [False] * 10)
    found = report.beside_paper(1, [ours(natural, flags)], same_models=True).loc[("LGAP", "PGD"), "paper's number"]
    assert found == ("inside" if verdict == "inside" else "natural inside, robust outside")
    assert report.beside_paper(1, [ours(natural, flags)], same_models=False).loc[("LGAP", "PGD"), "paper's number"] == "other models"


def test_rows_of_the_paper_that_nobody_ran_say_so():
    table = report.beside_paper(3, [], same_models=True)
    assert (table["paper's number"] == "not run").all() and (table["robust here, %"] == "not run").all()
    assert ("Yoon et al. (sigma = 0.25)*", "BPDA 40+EOT") in table.index


def test_tables_are_written_in_three_forms_that_hold_the_same(tmp_path):
    table = report.beside_paper(3, [ours(report.share([True, False]), attack="a & b_c <script> \\input{x} 100 %")], same_models=False)
    report.save_table(table, tmp_path, "t")
    back = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    assert list(back["attack"]) == list(table.index.get_level_values("attack"))
    tex = (tmp_path / "t.tex").read_text()
    body = re.sub(r"\\(?:textbackslash|[a-z]+)\s?", "", tex)
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") == 1
    assert r"a \& b\_c" in tex and "\\input{x}" not in tex and not re.search(r"(?<!\\)[#$]|(?<!\\)%", body)
    assert len({line.count("&") - line.count("\\&") for line in tex.splitlines() if line.rstrip().endswith("\\\\")}) == 1
    assert (tmp_path / "t.md").read_text().count("\n") == len(table) + 2


def test_results_are_kept_table_by_table_and_named_as_robustbench_names_them(tmp_path):
    rows = [ours(report.share([True] * 9 + [False]), report.share([True, False]))]
    report.write_results(tmp_path, 1, rows, {"seed": 0})
    report.write_results(tmp_path, 3, [{**rows[0], "attack": "BPDA"}], {"seed": 0})
    first = (tmp_path / "results.json").read_bytes()
    report.write_results(tmp_path, 1, rows, {"seed": 0})
    assert (tmp_path / "results.json").read_bytes() == first
    results = json.loads(first)
    (row,) = results["table 1"]["rows"]
    assert (row["clean_acc"], row["robust_acc"], row["reported"], row["robust_n"]) == (90.0, 50.0, "71.68", 2)
    assert results["table 3"]["rows"][0]["reported"] == "62.63" and results["table 1"]["provenance"] == {"seed": 0}


ATTACK, STRONGER = get_attack("blind PGD-40"), get_attack("BPDA-40")


def verdicts(runs, **how):
    return report.audit(runs, **how)["verdict"]


def test_an_evaluation_that_holds_passes_and_what_was_not_made_is_said():
    found = verdicts({"blind": (ATTACK, rows_of([[0, 0], [0, 1]])), "bpda": (STRONGER, rows_of([[0, 0], [1, 1]]))},
                     stronger=[("blind", "bpda")])
    assert found["inside the ball and [0, 1]"] == found["bpda is no weaker than blind"] == "pass"
    assert found["blind: gradient neither zero nor NaN"] == "pass"
    assert (found[["eps 0 changes nothing", "accuracy falls with eps", "doubling the steps changes little"]] == "not run").all()


@pytest.mark.parametrize("check, broken, how", [
    ("inside the ball and [0, 1]", {"inside": False}, {}),
    ("blind: gradient neither zero nor NaN", {"bad_gradients": 3}, {}),
    ("eps 0 changes nothing", {"clean": 5}, {"eps_zero": "blind"}),
])
def test_each_check_of_the_audit_can_fail(check, broken, how):
    runs = {"blind": (ATTACK, rows_of(MATRIX, **broken))}
    assert verdicts(runs, **how)[check] == "warn"


def test_a_weaker_rung_that_breaks_more_is_found_image_by_image():
    runs = {"blind": (ATTACK, rows_of([[0], [1]])), "bpda": (STRONGER, rows_of([[1], [0]]))}     # as many stand, not the same
    audit = report.audit(runs, stronger=[("blind", "bpda"), ("bpda", "absent")])
    row = audit.loc["bpda is no weaker than blind"]
    assert row["verdict"] == "warn" and "image 1" in row["detail"]
    assert audit.loc["absent is no weaker than bpda", "verdict"] == "not run"


def test_of_an_attack_of_ones_own_the_audit_claims_nothing():
    class Mine(Attack):
        pass
    found = verdicts({"mine": (Mine("mine"), rows_of([[0]]))})
    assert found["mine: the attack's own flags"] == "not run" and not any("gradient" in check for check in found.index)


def test_accuracy_that_rises_with_eps_and_steps_that_still_help_are_warned_of():
    good, bad = rows_of([[0]] * 10), rows_of([[1]] * 10)
    for first, second in itertools.permutations((good, bad)):
        runs = {"a": (get_attack("PGD-10", eps_255=4), first), "b": (get_attack("PGD-10"), second)}
        assert verdicts(runs, eps_sweep=("a", "b"))["accuracy falls with eps"] == ("pass" if first is good else "warn")
        assert verdicts(runs, doubled=("a", "b"))["doubling the steps changes little"] == "warn"      # a change in either direction
    runs = {"a": (get_attack("PGD-10"), good), "b": (get_attack("PGD-10", n_steps=20), good)}
    assert verdicts(runs, doubled=("a", "b"))["doubling the steps changes little"] == "pass"


def test_rungs_of_different_size_are_compared_on_the_images_that_both_have():
    few, many = rows_of([[0]] * 2), rows_of([[0]] * 2 + [[1]] * 8)
    runs = {"eps 0": (get_attack("PGD-10", eps_255=0), many), "eps 8": (get_attack("PGD-10"), few)}
    audit = report.audit(runs, eps_sweep=("eps 0", "eps 8"), stronger=[("eps 0", "eps 8")])
    assert audit.loc["accuracy falls with eps", "verdict"] == "pass" and "2 images" in audit.loc["accuracy falls with eps", "detail"]
    assert audit.loc["eps 8 is no weaker than eps 0", "detail"].startswith("of 2 images")


def test_autoattacks_flags_are_shown():
    rows = rows_of([[0], [0]], flags="it seems to be a randomized defense!")
    audit = report.audit({"AA": (get_attack("AutoAttack"), rows)})
    row = audit.loc["AA: AutoAttack's own flags"]
    assert row["verdict"] == "warn" and "2 images: it seems to be a rand" in row["detail"]


def test_two_defences_are_compared_on_the_same_images():
    rows = pd.concat([rows_of([[0]] * 8 + [[1]] * 2), rows_of([[1]] * 10, defence="other")])
    assert list(report.paired(rows, "LGAP", "other").values()) == ["LGAP", "other", 8, 0, 10, "0.0078"]


def test_figures_show_ours_and_the_papers(tmp_path):
    entries = report.entries(rows_of(MATRIX), NATURAL, {"LGAP": ("LGAP", "PGD")})
    figure = report.accuracy_figure(report.with_paper(1, entries), "a title")
    (axis,) = figure.axes
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    assert "LGAP | PGD" in names and len(names) == len(report.paper_numbers(1))
    report.save_figure(figure, tmp_path, "f")
    assert (tmp_path / "f.png").stat().st_size > 1000 and (tmp_path / "f.pdf").stat().st_size > 1000
