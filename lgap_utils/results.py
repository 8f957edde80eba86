"""results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

from .files import folder_lock, write_whole
from .profiles import ROOT
from .tables import as_text, interval_text, marked
from .words import DATA_SETS


def paper_numbers(table):
    """The paper's rows of one table, as printed: a DataFrame of text."""
    numbers = pd.read_csv(ROOT / "paper" / "numbers.csv", dtype=str, keep_default_na=False)
    if str(table) not in set(numbers["table"]):
        choices = sorted(numbers["table"].unique())
        raise ValueError(f"the paper has no table {table!r} of accuracies; choose from {choices}")
    return numbers[numbers["table"] == str(table)].reset_index(drop=True)


def _paper_data(table):
    return paper_numbers(table)["dataset"][0]


def _data_here(table, profile, images):
    """The data set in words; where it is the paper's but the images are others, which ones."""
    name = DATA_SETS[profile.dataset]
    if images.official or profile.dataset != _paper_data(table):
        return name
    which = re.sub(r" sha256 \w+", "", images.source) or "others"
    return f"{name}, not the paper's images but {which}"


def heading(profile, table=None, images=None):
    """Whose numbers a figure shows: "Table 2, profile small, CIFAR-10 (in the paper: CIFAR-100)".

    Without a table, the profile and its data set alone.
    """
    if table is None:
        return f"profile {profile.name}, {DATA_SETS[profile.dataset]}"
    text = f"Table {table}, profile {profile.name}, {_data_here(table, profile, images)}"
    if profile.dataset != _paper_data(table):
        text += f" (in the paper: {DATA_SETS[_paper_data(table)]})"
    elif _unlike(table, profile, images) == "other models":
        text += ", other models than the paper's"
    return text


def _unlike(table, profile, images):
    """Why our numbers are not held against the paper's: "other data", "other models", or "" if they are."""
    if profile.dataset != _paper_data(table) or not images.official:
        return "other data"
    return "" if profile.same_models else "other models"


def _by_row(rows):
    """{(method, attack): row}. Raises ValueError where two would stand in the same row."""
    out = {}
    for row in rows:
        key = row["method"], row["attack"]
        if key in out:
            raise ValueError(
                f"two rows for the method {key[0]!r} and the attack {key[1]!r}; give one of them another name"
            )
        out[key] = row
    return out


def _against(printed, row, unlike):
    """The paper's numbers against ours, in words: "inside" or "outside" of our interval, or why neither."""

    def verdict(number, found):
        if found is None:
            return "not run"
        if not number:
            return "not in the paper"
        if unlike:
            return unlike
        low, high = (
            100 * bound for bound in interval_text(found["k"], found["n"])
        )  # not the rounded ones that the table shows
        return "inside" if low <= float(number) <= high else "outside"

    natural, robust = (verdict(printed.get(name), row[name]) for name in ("natural", "robust"))
    return natural if natural == robust else f"natural {natural}, robust {robust}"


NOT_RUN = {"natural": None, "robust": None, "protocol": "quoted from the paper"}


def compare_with_paper(table, ours, profile, images):
    """The paper's table with our measurements beside it: a DataFrame in which no cell is blank.

    ours: dicts {"method", "attack", "natural", "robust" (shares, or None where not run), "protocol"}; one
    whose method and attack are a row of the paper stands in that row, the others follow. A number is called
    "inside" or "outside" of our interval only where the models (profile.same_models), the data set
    (profile.dataset) and the images (images.official) are the paper's.
    """
    mine, lines, unlike = _by_row(ours), [], _unlike(table, profile, images)
    for paper in paper_numbers(table).to_dict("records"):
        lines.append((paper, mine.pop((paper["method"], paper["attack"]), None)))
    lines += [({}, row) for row in mine.values()]
    data = _data_here(table, profile, images), DATA_SETS[_paper_data(table)]
    return pd.DataFrame([_line(paper, row, *data, unlike) for paper, row in lines]).set_index(
        ["method", "attack"]
    )


def _line(paper, row, here, there, unlike):
    """One row of `compare_with_paper`: the paper's, {} if it has none, and ours, None if it was not run."""
    measured, source = row or NOT_RUN, paper or row
    found = measured["robust"] or measured["natural"]
    flags = measured.get("flags", "")
    return {
        "method": source["method"] + "*" * (paper.get("cited") == "yes"),
        "attack": source["attack"] or "none",
        "data here": here if row else "not run",
        "data in the paper": there,
        "architecture in the paper": paper.get("architecture", "not in the paper") or "not given",
        "paper natural": paper.get("natural") or "not given",
        "paper robust": paper.get("robust") or "not given",
        "natural here, %": as_text(measured["natural"]),
        "robust here, %": marked(measured["robust"], flags),
        "n": found["n"] if found else "not run",
        "paper's number": _against(paper, measured, unlike),
        "flags": flags or ("none" if row else "not run"),
        "protocol": measured["protocol"],
    }


def latex_columns(table):
    """What a page has room for of a table made by `compare_with_paper`: the rows that were run, ours alone."""
    return table.loc[table["n"] != "not run", ["data here", "natural here, %", "robust here, %", "n"]]


def check_results(folder):
    """What folder/results.json holds, {} where there is none.

    Raises ValueError, saying what to do, for a file that `write_results` did not write whole.
    """
    file = Path(folder) / "results.json"
    try:
        results = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(
            f"{file} is torn or not JSON; restore it, or move it away and run its tables again"
        ) from None
    tables = results.items() if isinstance(results, dict) else [("", None)]
    for name, entry in tables:
        if not (
            name.startswith("table ") and isinstance(entry, dict) and {"provenance", "rows"} <= set(entry)
        ):
            raise ValueError(
                f'{file} is not a results.json of this software: expected "table 1" and so on, each with '
                "provenance and rows; move it away, or set LGAP_OUTPUTS to another folder"
            )
    return results


def write_results(folder, table, rows, profile, images, provenance):
    """Put `rows` (dicts as in `compare_with_paper`) and where they come from into folder/results.json, beside the other tables'.

    Fields are named as in RobustBench's model_info where it has them; the paper's numbers are `reported`
    only where the images are the paper's. Written whole; nothing but times and versions changes from run to
    run. Raises ValueError as `check_results` does.
    """
    check_results(folder)
    unlike = _unlike(table, profile, images)
    paper = _by_row(paper_numbers(table).to_dict("records"))
    value = lambda found, key: None if found is None else found[key]
    entries = []
    for key, row in _by_row(rows).items():
        printed = paper.get(key, {})
        reported = {} if unlike == "other data" else printed
        entry = {
            "name": row["method"],
            "attack": row["attack"],
            "footnote": row["protocol"],
            "dataset": profile.dataset,
            "paper_dataset": _paper_data(table),
            "official_images": bool(images.official),
            "clean_acc": value(row["natural"], "%"),
            "robust_acc": value(row["robust"], "%"),
            "reported": reported.get("robust") or None,
            "reported_clean_acc": reported.get("natural") or None,
            "papers_number": _against(printed, row, unlike),
        }
        for name in ("natural", "robust"):
            entry |= {
                f"{name}_{short}": value(row[name], column)
                for short, column in {"interval": "95 % interval", "k": "k", "n": "n"}.items()
            }
        entry |= {
            "unreliable": row.get("unreliable", False),
            "flags": row.get("flags", ""),
            "eps": row.get("eps"),
            "seconds": row.get("seconds"),
        }
        if (
            row.get("whole") and "AutoAttack" in row["protocol"]
        ):  # RobustBench means the model as it is deployed, not a transfer
            entry["autoattack_acc"] = entry["robust_acc"]
        entries.append(entry)
    with folder_lock(
        Path(folder) / "tables", wait=True
    ):  # of two notebooks at once, neither loses the other's table
        results = check_results(folder) | {f"table {table}": {"provenance": provenance, "rows": entries}}
        write_whole(
            Path(folder) / "results.json", (json.dumps(results, indent=1, sort_keys=True) + "\n").encode()
        )


def with_paper(table, rows, profile, images):
    """`rows` for a figure, with the paper's numbers for the same method and attack, and the paper's rows that were not run.

    Where the images are not the paper's, `rows` alone: its numbers would stand beside what they are not
    comparable with.
    """
    ours, out = _by_row(rows), []
    if _unlike(table, profile, images) == "other data":
        return list(ours.values())
    for paper in paper_numbers(table).to_dict("records"):
        row = ours.pop((paper["method"], paper["attack"]), None) or NOT_RUN
        out.append(
            {
                **row,
                "method": paper["method"],
                "attack": paper["attack"],
                "paper natural": paper["natural"],
                "paper robust": paper["robust"],
            }
        )
    return out + list(ours.values())
