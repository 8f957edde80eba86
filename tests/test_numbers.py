"""paper/numbers.csv holds what the paper prints in Tables 1 to 4: each number once, as it is printed."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "paper" / "numbers.csv"
ROWS = list(csv.DictReader(FILE.open(newline="", encoding="utf-8")))
TABLES = {
    # Every accuracy in the order of reading, typed from the paper apart from the file.
    "1": """95.80 0.00  90.03 71.68  93.09 85.45  86.14 80.24  84.12 78.91  96.93 63.10  48.7 37.5  75.5 23.8
            82 61  90 70  87.3 70.2  84.98 51.29""",
    "2": "58.71 39.82  77.83 43.21  59.58 25.47  61.01 28.88",
    "3": """90.30 44.96 62.63  86.14 70.01  90.60 76.87  84.12 54.9  95.00 9  94.8 40.8  88.7 55.1
            91 52.9  89.4 41.5  91.89 53.58  87.3 45.8  89.67 63.1""",
    "4": "76.76 0  69.09 57.12 45.31 52.73  64.02 34.96  55.62 26.24",
}


def of(**columns):
    """The rows with these values."""
    return [row for row in ROWS if columns.items() <= row.items()]


def test_the_columns():
    columns = "table dataset section method attack architecture natural robust cited note"
    assert list(ROWS[0]) == columns.split()
    assert all(None not in row and None not in row.values() for row in ROWS)  # as many fields in each line
    assert all(value == value.strip() and value.isascii() for row in ROWS for value in row.values())
    pairs = {("1", "cifar10"), ("2", "cifar100"), ("3", "cifar10"), ("4", "imagenet")}
    assert {(row["table"], row["dataset"]) for row in ROWS} == pairs
    assert {row["cited"] for row in ROWS} == {"yes", "no"}
    sections = {"undefended", "adversarial purification", "adversarial training"}
    assert {row["section"] for row in ROWS} == sections
    architectures = {"WRN-28-10", "ResNet-18", "ResNet-50", "ResNet-56", "ResNet-62", ""}
    assert {row["architecture"] for row in ROWS} == architectures


@pytest.mark.parametrize("table", TABLES)
def test_every_printed_number_and_no_other(table):
    """A natural accuracy that is printed once for a method stands in each of its rows here."""
    printed, last = [], None
    for row in of(table=table):
        if row["method"] != last or "natural printed once" not in row["note"]:
            printed.append(row["natural"])
        printed.append(row["robust"])
        last = row["method"]
    assert printed == TABLES[table].split()


def test_numbers_are_accuracies_in_percent():
    for row in ROWS:
        for value in (row["natural"], row["robust"]):
            assert re.fullmatch(r"\d{1,2}(\.\d{1,2})?", value) and 0 <= float(value) <= 100
        assert float(row["robust"]) < float(row["natural"])


def test_no_row_is_there_twice():
    assert max(Counter((row["table"], row["method"], row["attack"]) for row in ROWS).values()) == 1


def test_a_natural_accuracy_that_stands_in_several_rows_says_so():
    for table in TABLES:
        rows = of(table=table, method="LGAP")
        assert len({row["natural"] for row in rows}) == 1
        for row in rows:
            assert (len(rows) > 1) == ("natural printed once for the method" in row["note"])


@pytest.mark.parametrize(
    "table, attack, natural, robust",
    [
        ("1", "PGD", "90.03", "71.68"),
        ("2", "PGD", "58.71", "39.82"),
        ("3", "BPDA", "90.30", "62.63"),
        ("3", "BPDA 40+EOT", "90.30", "44.96"),
        ("4", "AA", "69.09", "57.12"),
        ("4", "BPDA-40", "69.09", "45.31"),
        ("4", "PGD-10", "69.09", "52.73"),
    ],
)
def test_what_this_repository_measures_is_found_by_table_and_attack(table, attack, natural, robust):
    (row,) = of(table=table, method="LGAP", attack=attack)
    assert (row["natural"], row["robust"], row["cited"]) == (natural, robust, "no")
    assert row["architecture"] == {"2": "", "4": "ResNet-50"}.get(table, "WRN-28-10")


def test_only_the_papers_own_rows_are_not_cited():
    assert {row["method"] for row in of(cited="no")} == {"LGAP", "Raw WideResNet", "Undefended"}
    assert [row["method"] for row in of(section="undefended")] == ["Raw WideResNet", "Undefended"]


def test_table_4_counts_images_of_2048():
    """Each of its own accuracies is k / 2048 to two decimals; 57.12 only if it was truncated."""
    counts = {}
    for row in of(table="4", cited="no"):
        for value in (row["natural"], row["robust"]):
            k = round(float(value) * 20.48)
            counts[value] = k
            exact = f"{100 * k / 2048:.4f}"
            assert float(value) == (float(exact[:-2]) if value == "57.12" else round(float(exact), 2))
    assert counts == {"76.76": 1572, "0": 0, "69.09": 1415, "57.12": 1170, "45.31": 928, "52.73": 1080}


def test_slips_of_the_paper_are_noted():
    note = lambda table, attack, method="LGAP": of(table=table, attack=attack, method=method)[0]["note"]
    assert "90.30" in note("1", "PGD") and "90.03" in note("3", "BPDA") and "8160" in note("2", "PGD")
    assert "94.78" in note("1", "PGD", "Raw WideResNet") and "76.52" in note("4", "", "Undefended")
    assert "truncated" in note("4", "AA") and "PGD-10" in note("4", "AA")
    assert "preprocessor blind" in note("4", "BPDA-40")
