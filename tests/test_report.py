"""Tables and checks are functions of rows alone: here of rows made by hand, whose accuracies can be counted."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lgap_utils import figures, files, results, tables, verdicts
from lgap_utils.profiles import SMALL, TOY, get_profile
from lgap_utils.protocols import NATURAL, Attack, get_attack


@pytest.fixture(autouse=True)
def _figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def rows_of(matrix, labels=None, defence="LGAP", **columns):
    """Rows of images x draws: matrix[i][d] is the label predicted for the adversarial image i in draw d; true labels are 0."""
    labels = labels or [0] * len(matrix)
    plain = {
        "clean": 0,
        "inside": True,
        "linf": 8 / 255,
        "bad_gradients": 0,
        "flags": "",
        "broke_at": -1,
        "seconds": 1.5,
    }
    return pd.DataFrame(
        [
            {
                **plain,
                "index": i,
                "label": labels[i],
                "defence": defence,
                "draw": d,
                "adversarial": guess,
                **columns,
            }
            for i, line in enumerate(matrix)
            for d, guess in enumerate(line)
        ]
    )


MATRIX = [[0, 0, 0], [0, 1, 0], [1, 1, 0], [2, 1, 1]]  # right in 3, 2, 1 and 0 of 3 draws


@pytest.mark.parametrize("how, percent, k", [("mean", 50.0, 2.0), ("majority", 50.0, 2), ("worst", 25.0, 1)])
def test_accuracy_is_read_from_the_matrix_of_draws(how, percent, k):
    found = tables.accuracy(rows_of(MATRIX), how=how)
    assert (found["%"], found["k"], found["n"]) == (percent, k, 4)


def test_a_tied_vote_goes_to_the_lower_label():
    assert tables.accuracy(rows_of([[1, 0]]), how="majority")["k"] == 1
    assert tables.accuracy(rows_of([[1, 0]], labels=[1]), how="majority")["k"] == 0


def test_the_interval_of_a_mean_counts_images_and_not_draws():
    assert (
        tables.accuracy(rows_of([[0] * 100, [1] * 100]))["95 % interval"]
        == tables.proportion([True, False])["95 % interval"]
    )
    low, high = (
        tables.proportion(flags)["95 % interval"].split(" to ") for flags in ([True, False], [True, True])
    )
    assert tables.accuracy(rows_of([[0, 0], [0, 1]]))["95 % interval"] == f"{low[0]} to {high[1]}"


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
    "k, n", [(2, 1), (0, 0), (-1, 3), (1.5, 3), (float("nan"), 3), (1, float("inf")), ("1", 3), (None, 3)]
)
def test_an_interval_of_what_cannot_be_counted_is_refused(k, n):
    with pytest.raises(ValueError, match="k=.* of n=.*: expected whole numbers"):
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
    rows = rows.assign(
        caption=[c for c in CAPTIONS for _ in range(2)] * 2,
        caption_clean=[c for c in CAPTIONS[::-1] for _ in range(2)] * 2,
    )
    found = tables.caption_readers(rows, ["cat", "dog"])
    assert list(found["adversarial"]) == [0, 1, -1, -1] and list(found["clean"]) == [-1, -1, 1, 0]
    assert set(found["defence"]) == {"caption alone"} and len(found) == 4
    ladder = tables.ladder({"any": (NATURAL, rows)}, ["cat", "dog"])
    assert ladder.loc["any", "caption alone, %"] == tables.as_text(
        tables.proportion([True, False, False, False])
    )
    assert "caption alone, %" not in tables.ladder({"any": (NATURAL, rows)})


def on_paper_data(table, **fields):
    """(profile, images) of the paper's own models, data set and images."""
    source = "all 7 images in imagenet/val by path sha256 0f; rows 0 to 6 sha256 1e"
    images = SimpleNamespace(official=fields.pop("official", True), source=source)
    return dataclasses.replace(get_profile("paper", table), **fields), images


def ours(natural=None, robust=None, attack="PGD", method="LGAP"):
    return {"method": method, "attack": attack, "natural": natural, "robust": robust, "protocol": "by hand"}


def test_no_cell_beside_the_paper_is_blank():
    for number in (1, 2, 3, 4):
        table = results.compare_with_paper(
            number, [ours(tables.proportion([True]), method="another")], *on_paper_data(number)
        )
        assert not table.isna().any(axis=None) and (table.astype(str) != "").all(axis=None)
        assert len(table) == len(results.paper_numbers(number)) + 1
        assert table.loc[("another", "PGD"), "paper's number"] == "natural not in the paper, robust not run"


@pytest.mark.parametrize("k, verdict", [(72, "inside"), (40, "outside")])
def test_a_number_is_called_inside_where_our_interval_holds_it(k, verdict):
    flags = tables.proportion([True] * k + [False] * (100 - k))
    natural = tables.proportion([True] * 90 + [False] * 10)
    found = results.compare_with_paper(1, [ours(natural, flags)], *on_paper_data(1)).loc[
        ("LGAP", "PGD"), "paper's number"
    ]
    assert found == ("inside" if verdict == "inside" else "natural inside, robust outside")


OTHERS = [
    ({"same_models": False}, "other models"),
    ({"dataset": "toy"}, "other data"),
    ({"dataset": "cifar10"}, "other data"),
    ({"dataset": "toy", "same_models": False}, "other data"),
    ({"official": False}, "other data"),
]


@pytest.mark.parametrize("table, attack", [(2, "PGD"), (4, "AA")])
@pytest.mark.parametrize("fields, verdict", OTHERS)
def test_with_other_models_or_data_than_the_papers_no_number_is_held_against_it(
    fields, verdict, table, attack, tmp_path
):
    own, here = (
        [ours(tables.proportion([True] * 3), tables.proportion([True, False]), attack)],
        on_paper_data(table, **fields),
    )
    row = results.compare_with_paper(table, own, *here).loc[("LGAP", attack)]
    assert (
        row["paper's number"] == verdict
        and row["data in the paper"] == {2: "CIFAR-100", 4: "ImageNet"}[table]
    )
    results.write_results(tmp_path, table, own, *here, {})
    (entry,) = json.loads((tmp_path / "results.json").read_text())[f"table {table}"]["rows"]
    kept = verdict == "other models"
    assert (entry["papers_number"], entry["dataset"]) == (verdict, here[0].dataset)
    assert entry["official_images"] == here[1].official
    assert (entry["reported"] is not None) == (entry["reported_clean_acc"] is not None) == kept
    shown = results.with_paper(table, own, *here)
    assert any(row.get("paper robust") for row in shown) == kept
    assert len(shown) == (len(results.paper_numbers(table)) if kept else 1)
    figure = figures.accuracy_figure(shown, results.heading(here[0], table, here[1]))
    assert (
        any("the paper's" in text.get_text() for text in figure.axes[0].get_legend().get_texts()) == kept
    )  # diamonds


def test_every_row_and_title_says_which_images_they_are():
    own = [ours(tables.proportion([True] * 3), tables.proportion([True, False]))]
    small = dataclasses.replace(SMALL), SimpleNamespace(official=True, source="")
    table = results.compare_with_paper(2, own, *small)
    assert table.loc[("LGAP", "PGD"), "data here"] == "CIFAR-10" and set(table["data in the paper"]) == {
        "CIFAR-100"
    }
    assert table.loc[("Yoon et al.*", "PGD"), "data here"] == "not run"
    assert results.heading(SMALL, 2, small[1]) == "Table 2, profile small, CIFAR-10 (in the paper: CIFAR-100)"
    assert (
        results.heading(SMALL, 1, small[1])
        == "Table 1, profile small, CIFAR-10, other models than the paper's"
    )
    assert results.heading(get_profile("paper"), 1, small[1]) == "Table 1, profile paper, CIFAR-10"
    assert results.heading(TOY) == "profile toy, drawn scenes"
    found = results.compare_with_paper(
        4, [ours(robust=tables.proportion([True]), attack="AA")], *on_paper_data(4, official=False)
    )
    which = "ImageNet, not the paper's images but all 7 images in imagenet/val by path; rows 0 to 6"
    profile, images = on_paper_data(4, official=False)
    assert found.loc[("LGAP", "AA"), "data here"] == which and which in results.heading(profile, 4, images)
    assert set(tables.ladder({"any": (NATURAL, rows_of(MATRIX))}, profile=SMALL)["data"]) == {"CIFAR-10"}


def test_a_table_that_the_paper_does_not_have_and_a_row_that_is_there_twice_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no table 5.*choose from"):
        results.compare_with_paper(5, [], *on_paper_data(1))
    for what in (results.compare_with_paper, results.with_paper):
        with pytest.raises(ValueError, match="two rows for the method 'LGAP' and the attack 'PGD'"):
            what(1, [ours(), ours()], *on_paper_data(1))


def test_rows_of_the_paper_that_nobody_ran_say_so():
    table = results.compare_with_paper(3, [], *on_paper_data(3))
    assert (table["paper's number"] == "not run").all() and (table["robust here, %"] == "not run").all()
    assert ("Yoon et al. (sigma = 0.25)*", "BPDA 40+EOT") in table.index


CAPTION = [
    "",
    "a cat",
    "$\\frac{1$",
    "a | b",
    "two\nlines\r\nand\ttabs",
    "<script>alert(1)</script>",
    "\\input{/etc/passwd} \\write18{ls}",
    "100 % & #1_x {y} ~^",
    "}{\\end{tabular}",
    "[2pt] first",
    "* starred",
    "a [link](javascript:x)",
    "`code` \\| \\",
    "007",
    "1e5",
    "nan",
    "\U0001f600 \u732b \u202egnp.exe",
    "\x00\x07\x1b[31m",
    "W" * 10_000,
    "word " * 300,
    "caf\u00e9 \u00d8 \u00df \u00f0 \u2013 \u201cq\u201d",
]


def of_captions():
    """A table that has them as cells, as its index, as names of columns and of the index."""
    names = [f"{k} {caption}" for k, caption in enumerate(CAPTION)]
    columns = {"caption": CAPTION, CAPTION[2]: CAPTION[::-1], "n": range(len(CAPTION))}
    return pd.DataFrame(columns, index=pd.Index(names, name=CAPTION[7]))


def test_tables_are_written_in_three_forms_that_hold_the_same(tmp_path):
    table = results.compare_with_paper(
        3,
        [ours(tables.proportion([True, False]), attack="a & b_c <script> \\input{x} 100 %")],
        *on_paper_data(3),
    )
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
    back = pd.read_csv(
        tmp_path / "t.csv", dtype=str, keep_default_na=False, lineterminator=None, engine="python"
    )
    assert list(back["caption"].str.replace("\r", ""))[:17] == [c.replace("\r", "") for c in CAPTION[:16]] + [
        CAPTION[16]
    ]
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
    audit = verdicts.audit(
        {"a rather long name, 16/255": (ATTACK, rows_of(MATRIX)), "another one": (STRONGER, rows_of(MATRIX))},
        stronger=[("a rather long name, 16/255", "another one")],
    )
    ladder = tables.ladder({"full gradient PGD-20+EOT": (ATTACK, rows_of([[0]] * 99))}, profile=SMALL)
    all_of = tables.proportion([True] * 99)
    beside = results.compare_with_paper(
        3, [ours(all_of, all_of, method="Gaussian blur, classifier as it came")], *on_paper_data(3)
    )
    shares = pd.DataFrame(
        {("fine-tuned", "none"): tables.proportion([True]), ("fine-tuned", "LGAP"): tables.proportion([True])}
    ).T
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
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120
    )
    assert done.returncode == 0, done.stdout[-1500:]
    over = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", done.stdout)]
    assert max(over, default=0) < 1, done.stdout
    assert "Missing character" not in (tmp_path / "page.log").read_text(errors="replace")


def full(monkeypatch):
    def refuse(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("ending", ["csv", "md", "tex", "png", "pdf", "json"])
def test_on_a_full_disk_the_old_file_stays(ending, tmp_path, monkeypatch):
    def save(k):
        if ending in ("png", "pdf"):
            figures.save_figure(
                figures.accuracy_figure([ours(tables.proportion([True] * k))], "t"), tmp_path, "t"
            )
        elif ending == "json":
            results.write_results(tmp_path, 1, [ours(tables.proportion([True] * k))], *on_paper_data(1), {})
        else:
            tables.save_table(pd.DataFrame({"n": [k]}), tmp_path, "t")

    save(3)
    file = tmp_path / ("results.json" if ending == "json" else f"t.{ending}")
    before, names = file.read_bytes(), sorted(p.name for p in tmp_path.iterdir())
    full(monkeypatch)
    with pytest.raises(OSError, match="could not be written.*No space left on device.*untouched"):
        save(4)
    assert file.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == names
    monkeypatch.undo()
    save(4)
    assert file.read_bytes() != before


def test_results_are_kept_table_by_table_and_named_as_robustbench_names_them(tmp_path):
    rows = [ours(tables.proportion([True] * 9 + [False]), tables.proportion([True, False]))]
    results.write_results(tmp_path, 1, rows, *on_paper_data(1), {"seed": 0})
    results.write_results(tmp_path, 3, [{**rows[0], "attack": "BPDA"}], *on_paper_data(3), {"seed": 0})
    first = (tmp_path / "results.json").read_bytes()
    results.write_results(tmp_path, 1, rows, *on_paper_data(1), {"seed": 0})
    assert (tmp_path / "results.json").read_bytes() == first
    kept = json.loads(first)
    (row,) = kept["table 1"]["rows"]
    assert (row["clean_acc"], row["robust_acc"], row["reported"], row["robust_n"]) == (90.0, 50.0, "71.68", 2)
    assert kept["table 3"]["rows"][0]["reported"] == "62.63" and kept["table 1"]["provenance"] == {"seed": 0}
    assert results.check_results(tmp_path) == kept


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"table 1": {"prov',
        b"\xff\xfe\x00",
        b"<html>",
        b"[]",
        b"null",
        b"3",
        b'{"accuracy": 1}',
        b'{"table 1": []}',
        b'{"table 1": {"rows": []}}',
    ],
    ids=str,
)
def test_a_torn_or_foreign_results_file_is_refused_and_left_alone(content, tmp_path):
    assert results.check_results(tmp_path / "absent") == {}
    (tmp_path / "results.json").write_bytes(content)
    for what in (
        lambda: results.check_results(tmp_path),
        lambda: results.write_results(tmp_path, 1, [ours()], *on_paper_data(1), {}),
    ):
        with pytest.raises(
            ValueError,
            match="results.json is (torn or not JSON|not a results.json of this software).*move it away",
        ):
            what()
    assert (tmp_path / "results.json").read_bytes() == content


def test_of_two_that_write_at_once_neither_loses_the_others_table(tmp_path, monkeypatch):
    """The second begins while the first has read what there is and not yet written."""
    entered, second, whole = threading.Event(), [], files.write_whole

    def write(path, content):
        if not entered.is_set():
            entered.set()
            second[0].start()
            second[0].join(0.2)  # without a lock it would be done by now
        whole(path, content)

    second.append(
        threading.Thread(target=results.write_results, args=(tmp_path, 2, [ours()], *on_paper_data(2), {}))
    )
    monkeypatch.setattr(results, "write_whole", write)
    results.write_results(tmp_path, 1, [ours()], *on_paper_data(1), {})
    second[0].join()
    assert set(results.check_results(tmp_path)) == {"table 1", "table 2"}


ATTACK, STRONGER = get_attack("blind PGD-40"), get_attack("BPDA-40")


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
    [(1, "too few images"), (tables.FEW_IMAGES - 1, "too few images"), (tables.FEW_IMAGES, "pass")],
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


def test_a_flag_marks_the_number_wherever_it_is_shown(tmp_path):
    flag = "logits look like softmax probabilities"
    rows = rows_of([[0, 0], [0, 1]], flags=flag)
    (entry,) = tables.table_rows(rows, ATTACK, {"LGAP": ("LGAP", "PGD")})
    table = results.compare_with_paper(1, [entry], *on_paper_data(1))
    row = table.loc[("LGAP", "PGD")]
    assert row["flags"] == f"2 of 2 images: {flag}" and row["robust here, %"].endswith(", flagged")
    assert "flagged" not in row["natural here, %"]
    assert (table.drop(index=[("LGAP", "PGD")])["flags"] == "not run").all()
    assert results.latex_columns(table)["robust here, %"].iloc[0].endswith(", flagged")
    results.write_results(tmp_path, 1, [entry], *on_paper_data(1), {})
    (kept,) = json.loads((tmp_path / "results.json").read_text())["table 1"]["rows"]
    assert kept["unreliable"] is True and flag in kept["flags"]
    audit = verdicts.audit({"blind": (ATTACK, rows)}).loc["blind: flags of its rows"]
    assert audit["verdict"] == "warn" and flag in audit["detail"]
    ladder = tables.ladder({"blind": (ATTACK, rows)}).loc["blind"]
    assert flag in ladder["flags"] and ladder["robust, mean of draws, %"].endswith(", flagged")
    (axis,) = figures.accuracy_figure([entry], "t").axes
    assert axis.get_yticklabels()[0].get_text() == "LGAP | PGD, flagged"
    assert (
        not verdicts.audit({"blind": (ATTACK, rows_of(MATRIX))}).index.str.contains("flags of its rows").any()
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


def test_two_defences_are_compared_on_the_same_images():
    rows = pd.concat([rows_of([[0]] * 8 + [[1]] * 2), rows_of([[1]] * 10, defence="other")])
    assert list(tables.paired(rows, "LGAP", "other").values()) == ["LGAP", "other", 8, 0, 10, "0.0078"]
    with pytest.raises(
        ValueError, match="LGAP has draw 0 of 10 images and other of 9, which are not the same ones"
    ):
        tables.paired(rows.iloc[:-1], "LGAP", "other")  # a gap is no right answer
    with pytest.raises(ValueError, match="of no rows"):
        tables.paired(rows.assign(draw=1), "LGAP", "other")
    for first, second in (([True], [True, False]), ([], []), ([1], [0]), ([True], [None])):
        with pytest.raises(ValueError, match="expected"):
            tables.mcnemar(first, second)


def test_figures_show_ours_and_the_papers(tmp_path):
    entries = tables.table_rows(rows_of(MATRIX), NATURAL, {"LGAP": ("LGAP", "PGD")})
    figure = figures.accuracy_figure(results.with_paper(1, entries, *on_paper_data(1)), "a title")
    (axis,) = figure.axes
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    assert "LGAP | PGD" in names and len(names) == len(results.paper_numbers(1))
    figures.save_figure(figure, tmp_path, "f")
    assert (tmp_path / "f.png").stat().st_size > 1000 and (tmp_path / "f.pdf").stat().st_size > 1000


def test_no_text_of_a_figure_is_a_formula(tmp_path):
    """A caption may stand in a title, below an image or beside a bar; mathtext would stop at the first lone `$`."""
    import matplotlib.pyplot as plt

    picture = torch.zeros(3, 4, 4)
    grid = figures.image_grid([[picture] * len(CAPTION)], ["$\\frac{1$"], [CAPTION])
    figures.caption_under(grid.axes, CAPTION)
    assert (
        grid.axes[2].get_title() == grid.axes[2].get_xlabel() == "$\\frac{1$"
        and grid.axes[0].get_xlabel() == "(no caption)"
    )
    assert max(axis.get_title().count("\n") for axis in grid.axes) < 8 and grid.get_size_inches()[1] < 5
    bars, axis = plt.subplots()
    figures.bars(
        pd.DataFrame(
            {f"{k}{caption[:40]}": tables.proportion([True]) for k, caption in enumerate(CAPTION)}
        ).T,
        axis,
    )
    own = [ours(tables.proportion([True]), method=caption[:40], attack="$x") for caption in CAPTION]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        for k, figure in enumerate((grid, bars, figures.accuracy_figure(own, "of $\\frac{1$"))):
            figures.save_figure(figure, tmp_path, f"{k}")
            assert (tmp_path / f"{k}.png").stat().st_size > 1000 and (
                tmp_path / f"{k}.pdf"
            ).stat().st_size > 1000


def test_a_table_shown_is_not_cut():
    with pd.option_context("display.max_colwidth", 50, "display.max_rows", 60, "display.max_columns", 20):
        figures.style()
        html = pd.DataFrame(
            {"caption": ["word " * 100 + "<script>"], **{f"c{k}": [k] for k in range(30)}}
        )._repr_html_()
        assert html.count("word ") == 100 and "<script>" not in html and "c29" in html
        assert "n79" in pd.DataFrame({"n": [f"n{k}" for k in range(150)]})._repr_html_()
