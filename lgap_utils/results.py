"""Our tables beside the paper's: for a reader, for results.json and for a figure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .figures import accuracy_figure, save_figure
from .files import folder_lock, write_whole
from .profiles import ROOT, Profile
from .rows import Frame
from .tables import Share, as_text, save_table, wilson
from .words import DATA_SETS

if TYPE_CHECKING:
    from .images import Images

Row = dict[str, Any]  # as from `tables.table_rows`; natural and robust are shares, or None where not run
NOT_RUN: Row = {"natural": None, "robust": None, "protocol": "quoted from the paper"}


def paper_numbers(table: int) -> Frame:
    """The paper's rows of one table, as printed: text. Raises ValueError for a table that it lacks."""
    numbers: Frame = pd.read_csv(ROOT / "paper" / "numbers.csv", dtype=str, keep_default_na=False)
    if str(table) not in set(numbers["table"]):
        choices = sorted(numbers["table"].unique())
        raise ValueError(f"the paper has no table {table!r} of accuracies; choose from {choices}")
    return numbers[numbers["table"] == str(table)].reset_index(drop=True)


def _paper_data(table: int) -> str:
    return paper_numbers(table)["dataset"][0]


def not_comparable(table: int, profile: Profile, images: Images) -> str:
    """Why our numbers are not compared with the paper's: "other data", "other models", or ""."""
    if profile.dataset != _paper_data(table) or not images.official:
        return "other data"
    return "" if profile.same_models else "other models"


def _data_here(table: int, profile: Profile, images: Images) -> str:
    """The data set in words; where it is the paper's but the images are others, which ones."""
    name = DATA_SETS[profile.dataset]
    if images.official or profile.dataset != _paper_data(table):
        return name
    source = re.sub(r" sha256 \w+", "", images.source) or "others"
    return f"{name}, not the paper's images but {source}"


def heading(profile: Profile, table: int | None = None, images: Images | None = None) -> str:
    """Whose numbers a figure shows: "Table 2, profile small, CIFAR-10 (in the paper: CIFAR-100)".

    Without table and images the profile and its data set alone.
    """
    if table is None or images is None:
        return f"profile {profile.name}, {DATA_SETS[profile.dataset]}"
    text = f"Table {table}, profile {profile.name}, {_data_here(table, profile, images)}"
    if profile.dataset != _paper_data(table):
        return f"{text} (in the paper: {DATA_SETS[_paper_data(table)]})"
    other_models = not_comparable(table, profile, images) == "other models"
    return text + ", other models than the paper's" * other_models


def _pairs(table: int, ours: list[Row]) -> list[tuple[dict[str, str], Row | None]]:
    """(the paper's row, ours of the same method and attack or None), then ({}, ours) for our other rows.

    Raises ValueError where two of ours have the same method and attack.
    """
    mine = {}
    for row in ours:
        key = row["method"], row["attack"]
        if key in mine:
            rows = f"two rows for the method {key[0]!r} and the attack {key[1]!r}"
            raise ValueError(f"{rows}; give one of them another name")
        mine[key] = row
    paper = paper_numbers(table).to_dict("records")
    pairs = [(printed, mine.pop((printed["method"], printed["attack"]), None)) for printed in paper]
    return pairs + [({}, row) for row in mine.values()]


def _verdict(number: str | None, share: Share | None, not_comparable: str) -> str:
    """Where the paper's number lies: "inside" or "outside" of our interval, or why neither can be said."""
    if share is None:
        return "not run"
    if not number:
        return "not in the paper"
    if not_comparable:
        return not_comparable
    low, high = wilson(share["k"], share["n"])  # not the rounded ones that the table shows
    return "inside" if 100 * low <= float(number) <= 100 * high else "outside"


def _verdicts(paper: dict[str, str], row: Row, not_comparable: str) -> str:
    natural = _verdict(paper.get("natural"), row["natural"], not_comparable)
    robust = _verdict(paper.get("robust"), row["robust"], not_comparable)
    return natural if natural == robust else f"natural {natural}, robust {robust}"


def compare_with_paper(table: int, ours: list[Row], profile: Profile, images: Images) -> pd.DataFrame:
    """The paper's table with our measurements beside it; no cell is blank.

    A row of ours stands in the paper's row of the same method and attack, the others follow. The paper's
    number is inside or outside of our interval only where models, data set and images are the paper's.
    """
    lines = []
    for paper, row in _pairs(table, ours):
        here, source = row or NOT_RUN, paper or row or {}
        share, flags = here["robust"] or here["natural"], here.get("flags", "")
        line = {
            "method": source["method"] + "*" * (paper.get("cited") == "yes"),
            "attack": source["attack"] or "none",
            "data here": _data_here(table, profile, images) if row else "not run",
            "data in the paper": DATA_SETS[_paper_data(table)],
            "architecture in the paper": paper.get("architecture", "not in the paper") or "not given",
            "paper natural": paper.get("natural") or "not given",
            "paper robust": paper.get("robust") or "not given",
            "natural here, %": as_text(here["natural"]),
            "robust here, %": as_text(here["robust"], flags),
            "n": share["n"] if share else "not run",
            "paper's number": _verdicts(paper, here, not_comparable(table, profile, images)),
            "flags": flags or ("none" if row else "not run"),
            "protocol": here["protocol"],
        }
        lines.append(line)
    return pd.DataFrame(lines).set_index(["method", "attack"])


def latex_columns(table: pd.DataFrame) -> pd.DataFrame:
    """What a page has room for of a table of `compare_with_paper`: the rows that were run, ours alone."""
    return table.loc[table["n"] != "not run", ["data here", "natural here, %", "robust here, %", "n"]]


def with_paper(table: int, rows: list[Row], profile: Profile, images: Images) -> list[Row]:
    """For a figure: `rows` with the paper's numbers, and the paper's rows that were not run.

    `rows` alone where data set or images are not the paper's, as its numbers are not comparable.
    """
    if not_comparable(table, profile, images) == "other data":
        return rows
    out = []
    for paper, row in _pairs(table, rows):
        out.append({**(row or NOT_RUN)})
        if paper:
            out[-1] |= {"method": paper["method"], "attack": paper["attack"]}
            out[-1] |= {"paper natural": paper["natural"], "paper robust": paper["robust"]}
    return out


def check_results(folder: str | Path) -> dict[str, Any]:
    """What folder/results.json holds, {} without one. Raises ValueError for a torn or foreign file."""
    file = Path(folder) / "results.json"
    try:
        results = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{file} is torn or not JSON; restore it, or move it away and run again") from None
    whole = isinstance(results, dict)
    for name, entry in results.items() if whole else ():
        whole &= (
            name.startswith("table ") and isinstance(entry, dict) and {"provenance", "rows"} <= set(entry)
        )
    if not whole:
        expected = 'expected "table 1" and so on, each with provenance and rows'
        raise ValueError(f"{file} is not a results.json of this software: {expected}; move it away")
    return results


def write_results(
    folder: str | Path, table: int, rows: list[Row], profile: Profile, images: Images, provenance: dict
) -> None:
    """Put the rows of a table and their provenance into folder/results.json, beside those of other tables.

    Fields are named as in RobustBench's model_info where it has them; the paper's numbers are `reported` only
    where the images are the paper's. Written whole. Raises ValueError as `check_results` does.
    """
    check_results(folder)
    why = not_comparable(table, profile, images)
    papers = {id(row): paper for paper, row in _pairs(table, rows)}
    entries = []
    for row in rows:
        paper = papers[id(row)]
        entry = _entry(row, {} if why == "other data" else paper)
        entry |= {"dataset": profile.dataset, "paper_dataset": _paper_data(table)}
        entry |= {"official_images": bool(images.official), "papers_number": _verdicts(paper, row, why)}
        entries.append(entry)
    with folder_lock(Path(folder) / "tables", wait=True):  # of two notebooks at once, neither loses its table
        results = check_results(folder) | {f"table {table}": {"provenance": provenance, "rows": entries}}
        text = json.dumps(results, indent=1, sort_keys=True) + "\n"
        write_whole(Path(folder) / "results.json", text.encode())


def _entry(row: Row, reported: dict[str, str]) -> dict[str, Any]:
    """A row as in results.json, with the paper's numbers that are `reported`."""
    natural, robust = row["natural"] or {}, row["robust"] or {}
    entry = {"name": row["method"], "attack": row["attack"], "footnote": row["protocol"]}
    entry |= {"clean_acc": natural.get("%"), "robust_acc": robust.get("%")}
    entry |= {
        "reported": reported.get("robust") or None,
        "reported_clean_acc": reported.get("natural") or None,
    }
    for name, share in (("natural", natural), ("robust", robust)):
        entry |= {f"{name}_interval": share.get("95 % interval")}
        entry |= {f"{name}_k": share.get("k"), f"{name}_n": share.get("n")}
    entry |= {"unreliable": row.get("unreliable", False), "flags": row.get("flags", "")}
    if external := row.get("external"):  # RobustBench's word for the lowest that others' attacks have left
        entry |= {"external": external["%"], "external_interval": external["95 % interval"]}
        entry |= {"external_n": external["n"]}
    entry |= {"eps": row.get("eps"), "seconds": row.get("seconds")}
    if row.get("whole") and "AutoAttack" in row["protocol"]:
        entry["autoattack_acc"] = entry["robust_acc"]  # RobustBench means the deployed model, not a transfer
    return entry


def finish_table(
    number: int,
    name: str,
    ours: list[Row],
    profile: Profile,
    images: Images,
    provenance: dict[str, Any],
    title: str,
    in_figure: tuple[str, ...] = (),
) -> pd.DataFrame:
    """Our rows beside the paper's table `number`, saved below profile.outputs and returned.

    Saved are tables/NAME (csv, md, tex), the table's part of results.json and figures/NAME (png, pdf).
    title: of the figure, after its `heading`. in_figure: the methods that it shows; all where empty.
    """
    table = compare_with_paper(number, ours, profile, images)
    save_table(table, profile.outputs / "tables", name, tex=latex_columns(table))
    write_results(profile.outputs, number, ours, profile, images, provenance)
    rows = [row for row in ours if not in_figure or row["method"] in in_figure]
    rows = with_paper(number, rows, profile, images)
    figure = accuracy_figure(rows, f"{heading(profile, number, images)}: {title}")
    save_figure(figure, profile.outputs / "figures", name)
    return table
