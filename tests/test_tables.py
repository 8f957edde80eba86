"""Accuracies and tables are functions of rows alone: here of rows whose accuracies can be counted."""

import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from made_rows import ATTACK, CAPTION, MATRIX, STRONGER, on_paper_data, ours, rows_of

from lgap_utils import results, tables, verdicts
from lgap_utils.profiles import SMALL
from lgap_utils.protocols import NATURAL


@pytest.mark.parametrize("how, percent, k", [("mean", 50.0, 2.0), ("majority", 50.0, 2), ("worst", 25.0, 1)])
def test_accuracy_is_read_from_the_matrix_of_draws(how, percent, k):
    found = tables.accuracy(rows_of(MATRIX), how=how)
    assert (found["%"], found["k"], found["n"]) == (percent, k, 4)


def test_a_tied_vote_goes_to_the_lower_label():
    assert tables.accuracy(rows_of([[1, 0]]), how="majority")["k"] == 1
    assert tables.accuracy(rows_of([[1, 0]], labels=[1]), how="majority")["k"] == 0


def test_the_interval_of_a_mean_counts_images_and_not_draws():
    interval = lambda share: share["95 % interval"]
    half, both = interval(tables.proportion([True, False])), interval(tables.proportion([True, True]))
    assert interval(tables.accuracy(rows_of([[0] * 100, [1] * 100]))) == half
    between = f"{half.split(' to ')[0]} to {both.split(' to ')[1]}"
    assert interval(tables.accuracy(rows_of([[0, 0], [0, 1]]))) == between


def test_a_missing_draw_is_no_zero():
    with pytest.raises(ValueError, match="1 of 4 images lack a draw"):
        tables.accuracy(rows_of(MATRIX).iloc[1:])
    with pytest.raises(ValueError, match="choose from"):
        tables.accuracy(rows_of(MATRIX), how="best")


@pytest.mark.parametrize(
    "flags",
    [
        [float("nan")],
        [True, float("nan")],
        [True, 2],
        [1, 0],
        ["x"],
        [None],
        [],
        True,
        "yes",
        [[True]],
        torch.tensor([1, 0]),
        np.array([0.5]),
        pd.Series([True, pd.NA], dtype="boolean"),
    ],
    ids=str,
)
def test_a_share_is_one_of_true_and_false_alone(flags):
    with pytest.raises(ValueError, match="expected"):
        tables.proportion(flags)


@pytest.mark.parametrize(
    "flags",
    [
        [True, np.False_],
        torch.tensor([True, False]),
        list(torch.tensor([True, False])),
        np.array([True, False]),
        (True, False),
        pd.Series([True, False], index=[5, 5]),
        pd.Series([True, False], dtype="boolean"),
    ],
    ids=str,
)
def test_a_share_takes_true_and_false_as_libraries_hand_them_out(flags):
    assert (tables.proportion(flags)["k"], tables.proportion(flags)["n"]) == (1, 2)


@pytest.mark.parametrize(
    "k, n", [(2, 1), (0, 0), (-1, 3), (1, 3.5), (float("nan"), 3), (1, float("inf")), ("1", 3), (None, 3)]
)
def test_an_interval_of_what_cannot_be_counted_is_refused(k, n):
    with pytest.raises(ValueError, match="k=.* of n=.*: expected a whole number n"):
        tables.wilson(k, n)


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda rows: rows.assign(label=float("nan")), "image 0 has no label"),
        (lambda rows: rows.iloc[:0], "of no rows"),
        (lambda rows: pd.concat([rows, rows]), "4 of 4|12 of 12 images have draws that are there twice"),
        (lambda rows: rows.assign(label=range(12)), "4 of 4 images have several labels"),
        (
            lambda rows: pd.concat([rows, rows.assign(defence="other")]),
            r"rows of \['LGAP', 'other'\]; an accuracy is that of one",
        ),
    ],
)
def test_rows_that_have_no_accuracy_are_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        tables.accuracy(broken(rows_of(MATRIX)))
    with pytest.raises(ValueError, match="choose from"):
        tables.accuracy(rows_of(MATRIX), "adversarail")


CAPTIONS = ["a red cat", "a photo of a dog", "a cat and a dog", "nothing at all"]


def test_a_caption_alone_is_right_where_it_names_one_class_and_that_the_true_one():
    rows = pd.concat([rows_of([[1, 0]] * 4, defence=name) for name in ("LGAP", "other")])
    caption = rows["index"].map(lambda i: CAPTIONS[i])
    rows = rows.assign(caption=caption, caption_clean=rows["index"].map(lambda i: CAPTIONS[-1 - i]))
    found = tables.caption_readers(rows, ["cat", "dog"])
    assert list(found["adversarial"]) == [0, 1, -1, -1] and list(found["clean"]) == [-1, -1, 1, 0]
    assert set(found["defence"]) == {"caption alone"} and len(found) == 4
    ladder = tables.ladder({"any": (NATURAL, rows)}, ["cat", "dog"])
    expected = tables.as_text(tables.proportion([True, False, False, False]))
    assert ladder.loc["any", "caption alone, %"] == expected
    assert "caption alone, %" not in tables.ladder({"any": (NATURAL, rows)})


def test_two_defences_are_compared_on_the_same_images_over_all_draws():
    rows = pd.concat([rows_of([[0, 0]] * 8 + [[0, 1]] * 2), rows_of([[1]] * 10, defence="other")])
    found = tables.paired(rows, "LGAP", "other")
    assert list(found.values())[:3] == ["LGAP", "other", 90.0] and found["n"] == 10
    says = "LGAP has 10 images and other 9, which are not the same ones"
    with pytest.raises(ValueError, match=says):
        tables.paired(rows.iloc[:-1], "LGAP", "other")  # a gap is no right answer
    with pytest.raises(ValueError, match="1 of 10 images lack a draw"):
        tables.paired(rows.iloc[1:], "LGAP", "other")
    for first, second in (([], []), ([1.5], [0]), ([1], [-0.5]), ([float("nan")], [0]), (1, 0)):
        with pytest.raises(ValueError, match="expected the shares"):
            tables.difference(first, second)


@pytest.mark.parametrize("b, c, n", [(8, 0, 10), (0, 0, 16), (3, 5, 40), (10, 0, 10)])
def test_of_single_draws_the_interval_is_that_of_bonett_and_price(b, c, n):
    first = [1] * b + [0] * c + [1] * (n - b - c)
    second = [0] * b + [1] * c + [1] * (n - b - c)
    p12, p21 = (b + 1) / (n + 2), (c + 1) / (n + 2)
    reach = 1.959964 * ((p12 + p21 - (p12 - p21) ** 2) / (n + 2)) ** 0.5
    low, high = 100 * max(-1, p12 - p21 - reach), 100 * min(1, p12 - p21 + reach)
    assert tables.difference(first, second) == {
        "points": round(100 * (b - c) / n, 1),
        "95 % interval": f"{low:+.1f} to {high:+.1f}",
        "n": n,
    }


@pytest.mark.parametrize("n, draws", [(16, 1), (16, 10), (64, 10)])
def test_the_interval_of_a_difference_holds_the_true_one_nineteen_times_of_twenty(n, draws):
    """Images differ in how often they stand, and both defences find the same ones hard."""
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        hard = random.beta(0.5, 0.5, n)
        first, second = (random.binomial(draws, p) / draws for p in (hard, 0.7 * hard))
        low, high = tables.difference(first, second)["95 % interval"].split(" to ")
        held += float(low) <= 100 * 0.3 * 0.5 <= float(high)
    assert held / 400 >= 0.94


def test_common_images_and_the_worst_case_of_each():
    runs = {"a": (ATTACK, rows_of([[0, 0], [0, 1], [1, 1]])), "b": (STRONGER, rows_of([[0, 1], [0, 0]]))}
    shared = tables.common(runs)
    assert [list(rows["index"].unique()) for _, rows in shared.values()] == [[0, 1], [0, 1]]
    worst = tables.worst_case(runs)
    assert (worst["%"], worst["k"], worst["n"]) == (50.0, 1.0, 2)
    assert tables.worst_case({"b": runs["b"]})["%"] == 75.0
    apart = {"a": runs["a"], "b": (ATTACK, rows_of([[0]]).assign(index=7))}
    for wrong in (apart, {}):
        with pytest.raises(ValueError, match="no image is in all of the runs"):
            tables.worst_case(wrong)


def test_ties_of_the_majority_are_counted():
    rows = rows_of([[0, 1], [0, 0], [2, 1], [1, 1]])
    assert tables.ties(rows) == 2 and tables.ladder({"any": (ATTACK, rows)}).loc["any", "ties"] == 2


def test_a_random_defence_is_called_unreliable():
    for matrix, random in (([[0, 0]], True), ([[0]], False)):
        (row,) = tables.table_rows(rows_of(matrix), ATTACK, {"LGAP": ("LGAP", "PGD")})
        assert row["unreliable"] is random


def test_what_has_no_rows_is_named_with_what_there_is():
    rows = pd.concat([rows_of(MATRIX), rows_of(MATRIX, defence="other")]).assign(caption="", caption_clean="")
    no_such = r"no rows of the defence 'LGAB'; there are rows of \['LGAP', 'other'\]"
    for what in (
        lambda: verdicts.audit({"blind": (ATTACK, rows)}, defence="LGAB"),
        lambda: tables.ladder({"blind": (ATTACK, rows)}, defence="LGAB"),
        lambda: tables.paired(rows, "LGAP", "LGAB"),
        lambda: tables.caption_readers(rows, ["cat"], "LGAB"),
        lambda: tables.table_rows(rows, ATTACK, {"LGAB": ("LGAB", "")}),
    ):
        with pytest.raises(ValueError, match=no_such):
            what()
    with pytest.raises(ValueError, match="blind: no rows"):
        verdicts.audit({"blind": (ATTACK, rows)}, defence="LGAB")
    with pytest.raises(ValueError, match="there are no rows at all"):
        tables.table_rows(rows.iloc[:0], ATTACK, {"LGAP": ("LGAP", "")})
    for what in (verdicts.audit, tables.ladder):
        with pytest.raises(ValueError, match="of no runs"):
            what({})


def test_a_table_of_several_runs_names_methods_and_attacks():
    rows = pd.concat([rows_of(MATRIX, defence=name) for name in ("LGAP", "blur", "undefended")])
    runs = {"BPDA-40": (STRONGER, rows), "PGD": (ATTACK, rows)}
    table = tables.measured(
        runs, ["LGAP", "undefended"], {"LGAP": "LGAP"}, suffix=", tuned", paper_attacks={"BPDA-40": "BPDA"}
    )
    assert [(row["method"], row["attack"], row["whole"]) for row in table] == [
        ("LGAP", "BPDA", True),
        ("undefended, tuned", "BPDA-40", True),
        ("LGAP", "PGD", False),
        ("undefended, tuned", "PGD", True),
    ]
    assert table[2] == tables.table_rows(rows, ATTACK, {"LGAP": ("LGAP", "PGD")})[0]
    (row,) = tables.measured({"": (ATTACK, rows)}, ["blur"], whole=["blur"])
    assert (row["method"], row["attack"], row["whole"]) == ("blur", "", True)
    with pytest.raises(ValueError, match="no rows of the defence 'JPEG'"):
        tables.measured(runs, ["JPEG"])


def of_captions():
    """A table that has them as cells, as its index, as names of columns and of the index."""
    names = [f"{k} {caption}" for k, caption in enumerate(CAPTION)]
    columns = {"caption": CAPTION, CAPTION[2]: CAPTION[::-1], "n": range(len(CAPTION))}
    return pd.DataFrame(columns, index=pd.Index(names, name=CAPTION[7]))


def test_tables_are_written_in_three_forms_that_hold_the_same(tmp_path):
    own = ours(tables.proportion([True, False]), attack="a & b_c <script> \\input{x} 100 %")
    table = results.compare_with_paper(3, [own], *on_paper_data(3))
    assert tables.save_table(table, tmp_path, "t", tex=results.latex_columns(table)) is table
    back = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    assert list(back["attack"]) == list(table.index.get_level_values("attack"))
    tex = (tmp_path / "t.tex").read_text()
    body = re.sub(r"\\(?:textbackslash|[a-z]+)\s?", "", tex).replace("pt}%", "")
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") == 1 and "multirow" not in tex
    assert r"a \& b\_c" in tex and "\\input{x}" not in tex and not re.search(r"(?<!\\)[#$]|(?<!\\)%", body)
    assert "Yoon" not in tex and "data here" in tex  # the narrow one: what was run, and on what
    assert (tmp_path / "t.md").read_text().count("\n") == len(table) + 2


def test_nothing_in_a_cell_or_a_name_is_obeyed(tmp_path):
    table = of_captions()
    tables.save_table(table, tmp_path, "t")
    back = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False, engine="python")
    without_returns = [caption.replace("\r", "") for caption in CAPTION[:17]]
    assert list(back["caption"].str.replace("\r", ""))[:17] == without_returns
    tex, md = ((tmp_path / f"t.{ending}").read_text() for ending in ("tex", "md"))
    assert not re.search(r"\\(?:frac|input|write|end\{tabular\}(?!\\endgroup))", tex)
    assert all(c.isprintable() or c == "\n" for c in tex + md)
    lines = [line for line in tex.splitlines() if line.endswith("\\tabularnewline")]
    assert len(lines) == len(CAPTION) + 1 and {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {3}
    assert max(map(len, lines)) < 4000  # a page holds no caption of 10,000 characters
    assert md.count("\n") == len(CAPTION) + 2
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in md.splitlines()} == {5}
    assert not re.search(r"(?<!\\)[<$]|(?<!\\)\]\(", md) and "| 007 " in md and "| 1e5 " in md


TEX = r"""\documentclass{article}
\usepackage{booktabs}
\begin{document}
\noindent\input{TABLE}
\end{document}
"""


@pytest.mark.skipif(
    not shutil.which("pdflatex"),
    reason="no pdflatex here; `apt-get install texlive-latex-recommended` brings it in",
)
@pytest.mark.parametrize(
    "which", ["captions", "plain", "beside", "audit", "ladder", "share", "two indices", "longest"]
)
def test_latex_compiles_with_booktabs_alone_and_is_no_wider_than_the_text(which, tmp_path):
    runs = {"a rather long name, 16/255": (ATTACK, rows_of(MATRIX)), "another": (STRONGER, rows_of(MATRIX))}
    audit = verdicts.audit(runs, stronger=[tuple(runs)])
    ladder = tables.ladder({"full gradient PGD-20+EOT": (ATTACK, rows_of([[0]] * 99))}, profile=SMALL)
    all_of = tables.proportion([True] * 99)
    own = ours(all_of, all_of, method="Gaussian blur, classifier as it came")
    beside = results.compare_with_paper(3, [own], *on_paper_data(3))
    shares = pd.DataFrame({("fine-tuned", name): all_of for name in ("none", "LGAP")}).T
    table = {
        "captions": of_captions(),
        "plain": pd.DataFrame({"a": [1, 2.5]}),
        "beside": results.latex_columns(beside),
        "audit": audit,
        "ladder": ladder.drop(columns=["majority, %", "draws", "flags", "protocol"]),
        "share": shares.loc["fine-tuned"],
        "two indices": shares.rename_axis(["classifier", "profile small, CIFAR-10; blind PGD-40, 8/255"]),
        "longest": pd.DataFrame({"W" * 50: ["W" * 300], "x": ["iiii " * 99]}),
    }[which]
    tables.save_table(table, tmp_path, "t")
    (tmp_path / "page.tex").write_text(TEX.replace("TABLE", "t"))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "page.tex"]
    how = {"capture_output": True, "text": True, "errors": "replace", "timeout": 120}
    done = subprocess.run(command, cwd=tmp_path, **how)
    assert done.returncode == 0, done.stdout[-1500:]
    over = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", done.stdout)]
    assert max(over, default=0) < 1, done.stdout
    assert "Missing character" not in (tmp_path / "page.log").read_text(errors="replace")
