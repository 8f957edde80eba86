"""Our numbers beside the paper's: what is compared, what is not, and what results.json keeps."""

import dataclasses
import errno
import json
import os
import threading
from types import SimpleNamespace

import pandas as pd
import pytest
from made_rows import ATTACK, MATRIX, on_paper_data, ours, rows_of

from lgap_utils import figures, files, results, tables, verdicts
from lgap_utils.profiles import SMALL, TOY, get_profile
from lgap_utils.protocols import NATURAL


def test_no_cell_beside_the_paper_is_blank():
    for number in (1, 2, 3, 4):
        own = ours(tables.proportion([True]), method="another")
        table = results.compare_with_paper(number, [own], *on_paper_data(number))
        assert not table.isna().any(axis=None) and (table.astype(str) != "").all(axis=None)
        assert len(table) == len(results.paper_numbers(number)) + 1
        assert table.loc[("another", "PGD"), "paper's number"] == "natural not in the paper, robust not run"


@pytest.mark.parametrize("k, verdict", [(72, "inside"), (40, "outside")])
def test_a_number_is_called_inside_where_our_interval_holds_it(k, verdict):
    flags = tables.proportion([True] * k + [False] * (100 - k))
    natural = tables.proportion([True] * 90 + [False] * 10)
    table = results.compare_with_paper(1, [ours(natural, flags)], *on_paper_data(1))
    expected = "inside" if verdict == "inside" else "natural inside, robust outside"
    assert table.loc[("LGAP", "PGD"), "paper's number"] == expected


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
    own = [ours(tables.proportion([True] * 3), tables.proportion([True, False]), attack)]
    here = on_paper_data(table, **fields)
    row = results.compare_with_paper(table, own, *here).loc[("LGAP", attack)]
    assert row["paper's number"] == verdict
    assert row["data in the paper"] == {2: "CIFAR-100", 4: "ImageNet"}[table]
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
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any("the paper's" in text for text in legend) == kept  # diamonds


def test_every_row_and_title_says_which_images_they_are():
    own = [ours(tables.proportion([True] * 3), tables.proportion([True, False]))]
    small = dataclasses.replace(SMALL), SimpleNamespace(official=True, source="")
    table = results.compare_with_paper(2, own, *small)
    assert table.loc[("LGAP", "PGD"), "data here"] == "CIFAR-10"
    assert set(table["data in the paper"]) == {"CIFAR-100"}
    assert table.loc[("Yoon et al.*", "PGD"), "data here"] == "not run"
    assert results.heading(SMALL, 2, small[1]) == "Table 2, profile small, CIFAR-10 (in the paper: CIFAR-100)"
    other_models = "Table 1, profile small, CIFAR-10, other models than the paper's"
    assert results.heading(SMALL, 1, small[1]) == other_models
    assert results.heading(get_profile("paper"), 1, small[1]) == "Table 1, profile paper, CIFAR-10"
    assert results.heading(TOY) == "profile toy, drawn scenes"
    profile, images = on_paper_data(4, official=False)
    own = [ours(robust=tables.proportion([True]), attack="AA")]
    table = results.compare_with_paper(4, own, profile, images)
    which = "ImageNet, not the paper's images but all 7 images in imagenet/val by path; rows 0 to 6"
    assert table.loc[("LGAP", "AA"), "data here"] == which and which in results.heading(profile, 4, images)
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
    unflagged = verdicts.audit({"blind": (ATTACK, rows_of(MATRIX))})
    assert not unflagged.index.str.contains("flags of its rows").any()


@pytest.mark.parametrize("ending", ["csv", "md", "tex", "png", "pdf", "json"])
def test_on_a_full_disk_the_old_file_stays(ending, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(k):
        own = [ours(tables.proportion([True] * k))]
        if ending in ("png", "pdf"):
            figures.save_figure(figures.accuracy_figure(own, "t"), tmp_path, "t")
        elif ending == "json":
            results.write_results(tmp_path, 1, own, *on_paper_data(1), {})
        else:
            tables.save_table(pd.DataFrame({"n": [k]}), tmp_path, "t")

    save(3)
    file = tmp_path / ("results.json" if ending == "json" else f"t.{ending}")
    before, names = file.read_bytes(), sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(os, "fsync", refuse)
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
    says = "results.json is (torn or not JSON|not a results.json of this software).*move it away"
    with pytest.raises(ValueError, match=says):
        results.check_results(tmp_path)
    with pytest.raises(ValueError, match=says):
        results.write_results(tmp_path, 1, [ours()], *on_paper_data(1), {})
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

    other = (tmp_path, 2, [ours()], *on_paper_data(2), {})
    second.append(threading.Thread(target=results.write_results, args=other))
    monkeypatch.setattr(results, "write_whole", write)
    results.write_results(tmp_path, 1, [ours()], *on_paper_data(1), {})
    second[0].join()
    assert set(results.check_results(tmp_path)) == {"table 1", "table 2"}


def test_one_call_saves_all_that_is_kept_of_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    shares = tables.proportion([True] * 9 + [False]), tables.proportion([True, False])
    own = [ours(*shares), ours(*shares, attack="none", method="undefended")]
    profile, images = on_paper_data(1)
    titles, drawn = [], figures.accuracy_figure
    monkeypatch.setattr(
        results, "accuracy_figure", lambda rows, title: titles.append((title, rows)) or drawn(rows, title)
    )
    table = results.finish_table(
        1, "04_table1", own, profile, images, {"seed": 0}, "blind PGD, 8/255", in_figure=("LGAP",)
    )
    assert table.equals(results.compare_with_paper(1, own, profile, images))
    files_below = {path.relative_to(profile.outputs).as_posix() for path in profile.outputs.rglob("*.*")}
    assert files_below >= {f"tables/04_table1.{ending}" for ending in ("csv", "md", "tex")}
    assert files_below >= {"figures/04_table1.png", "figures/04_table1.pdf", "results.json"}
    assert "Yoon" not in (profile.outputs / "tables/04_table1.tex").read_text()
    kept = results.check_results(profile.outputs)["table 1"]
    assert kept["provenance"] == {"seed": 0} and [row["name"] for row in kept["rows"]] == [
        "LGAP",
        "undefended",
    ]
    ((title, rows),) = titles
    assert title == "Table 1, profile paper, CIFAR-10: blind PGD, 8/255"
    assert rows == results.with_paper(1, own[:1], profile, images)
