"""What the paper claims, what was measured here, and whether it holds: for the README, from published files.

The rules are written here and nowhere else. A claim of robustness holds where the 95 % interval of the
robust accuracy lies above KEPT of the natural accuracy, and does not hold where it lies below. A claim that
a part is worth something holds where the interval of a paired difference lies above 0, clean and attacked,
and does not hold where one reaches no higher than 0. The rest is open: what the interval does not decide,
what was measured on another data set than the paper's, and what was not measured.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd

from lgap_utils.profiles import ROOT
from lgap_utils.words import DATA_SETS

KEPT = Fraction(1, 3)  # of the natural accuracy; the least that the paper's own tables keep is about a half
HOLDS, FAILS, OPEN = "\N{CHECK MARK}\N{NO-BREAK SPACE}holds", "\N{BALLOT X} does not hold", "open"
FURTHER = "*Not in the paper:*"
NUMBER = r"([+-]?[\d.]+)"


@dataclass(frozen=True)
class Measured:
    """A number in percent or points with its 95 % interval and the number of images."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.1f} % ({self.low:.1f} to {self.high:.1f}; n = {self.n})"

    @property
    def points(self) -> str:
        return f"{self.value:+.1f} points ({self.low:+.1f} to {self.high:+.1f}; n = {self.n})"


def measured(value: Any, interval: str | None, n: Any) -> Measured | None:
    """None where one of the three is missing."""
    if value is None or interval is None or n is None:
        return None
    bounds = re.fullmatch(f"{NUMBER} to {NUMBER}", interval)
    if not bounds:
        raise ValueError(f"{interval!r}: expected an interval as 58.0 to 67.5")
    return Measured(float(value), float(bounds[1]), float(bounds[2]), int(n))


class Published:
    """The results of one profile in a folder; {} and None for what is not there."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "results.json"
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def table(self, name: str) -> pd.DataFrame | None:
        file = self.folder / "tables" / f"{name}.csv"
        return pd.read_csv(file, dtype=str, keep_default_na=False) if file.exists() else None

    def row(self, table: int, name: str, attack: str) -> dict[str, Any]:
        """A row of results.json."""
        rows = self.results.get(f"table {table}", {}).get("rows", [])
        found = [row for row in rows if (row["name"], row["attack"]) == (name, attack)]
        return found[0] if found else {}

    def natural(self, table: int, name: str, attack: str) -> Measured | None:
        row = self.row(table, name, attack)
        return measured(row.get("clean_acc"), row.get("natural_interval"), row.get("natural_n"))

    def robust(self, table: int, name: str, attack: str) -> Measured | None:
        row = self.row(table, name, attack)
        return measured(row.get("robust_acc"), row.get("robust_interval"), row.get("robust_n"))

    def worst(self) -> Measured | None:
        """Of Table 3's LGAP over all rungs: the lowest for each image."""
        for row in self.results.get("table 3", {}).get("rows", []):
            if row["name"] == "LGAP" and row.get("external") is not None:
                return measured(row["external"], row["external_interval"], row["external_n"])
        return None

    def cell(self, name: str, row: str, column: str) -> Measured | None:
        """A cell "58.7 (52.1 to 65.0)" of a table that names its rows in the first column and has an n."""
        table = self.table(name)
        if table is None or column not in table:
            return None
        found = table[table.iloc[:, 0] == row]
        if found.empty or not (cell := re.match(rf"{NUMBER} \((.+?)\)", found[column].iloc[0])):
            return None
        return measured(cell[1], cell[2], found["n"].iloc[0])

    def share(self, name: str, row: str) -> Measured | None:
        """A row of a table of shares, with columns %, 95 % interval and n."""
        table = self.table(name)
        found = None if table is None else table[table.iloc[:, 0] == row]
        if found is None or found.empty:
            return None
        return measured(found["%"].iloc[0], found["95 % interval"].iloc[0], found["n"].iloc[0])

    def difference(self, images: str, second: str) -> Measured | None:
        """LGAP less another on the same images, of notebook 04's table of paired differences."""
        table = self.table("04_paired")
        if table is None or "points" not in table:
            return None
        found = table[(table["images"] == images) & (table["first"] == "LGAP") & (table["second"] == second)]
        if found.empty:
            return None
        return measured(found["points"].iloc[0], found["95 % interval"].iloc[0], found["n"].iloc[0])


def keeps(natural: Measured | None, robust: Measured | None) -> str:
    """Whether more than KEPT of the natural accuracy stands."""
    if natural is None or robust is None:
        return OPEN
    bar = float(KEPT) * natural.value
    return HOLDS if robust.low > bar else FAILS if robust.high < bar else OPEN


def gains(*differences: Measured | None) -> str:
    """Whether every one of some paired differences is above 0."""
    if not differences or None in differences:
        return OPEN
    if any(each.high <= 0 for each in differences if each):
        return FAILS
    return HOLDS if all(each.low > 0 for each in differences if each) else OPEN


def paper(table: int, attack: str, printed: pd.DataFrame | None = None) -> str:
    """What the paper prints of LGAP: "71.68 of 90.03 %"."""
    if printed is None:
        printed = pd.read_csv(ROOT / "paper" / "numbers.csv", dtype=str, keep_default_na=False)
    own = printed[(printed["table"] == str(table)) & (printed["method"] == "LGAP")]
    row = own[own["attack"] == attack].iloc[0]
    return f"{row['robust']} of {row['natural']} %"


def text(number: Measured | None) -> str:
    return "not measured" if number is None else str(number)


def robustness(of: Published, claim: str, table: int, attack: str) -> tuple[str, str, str]:
    natural, robust = of.natural(table, "LGAP", attack), of.robust(table, "LGAP", attack)
    said, row = f"{claim} (Table {table}: {paper(table, attack)})", of.row(table, "LGAP", attack)
    if not natural or not robust:
        return said, "not measured", OPEN
    here, there = (DATA_SETS[row[name]] for name in ("dataset", "paper_dataset"))
    where = here if here == there else f"{here}, not {there}"
    evidence = f"{where}: natural {natural.value:.1f} %, attacked {robust}"
    return said, evidence, keeps(natural, robust) if here == there else OPEN


def caption_rung(of: Published, claim: str, rung: str) -> tuple[str, str, str]:
    """Whether captions still name the class under a rung of the ladder."""
    clean = of.share("01_captions", "names the true class, clean")
    under = of.cell("06_ladder", rung, "caption alone, %")
    return claim, f"clean {text(clean)}, attacked {text(under)}", keeps(clean, under)


def whole_ladder(of: Published) -> tuple[str, str, str]:
    worst = of.worst()
    natural = of.cell("06_common", "blind PGD-40", "natural, %")
    evidence = "not measured"
    if worst and natural:
        evidence = f"natural {natural.value:.1f} %, worst case of all rungs {worst}"
    return f"{FURTHER} it stands whichever attack is chosen", evidence, keeps(natural, worst)


def worth(of: Published, claim: str, second: str) -> tuple[str, str, str]:
    both = of.difference("clean", second), of.difference("adversarial", second)
    if not all(both):
        return claim, "not measured", OPEN
    return claim, f"clean {both[0].points}, attacked {both[1].points}", gains(*both)


def verdicts(of: Published) -> list[tuple[str, str, str]]:
    """(the claim, the evidence, the verdict) of each claim."""
    blind = "It withstands an attack that does not see the purifier"
    return [
        robustness(of, blind, 1, "PGD"),
        robustness(of, "The same with a hundred classes", 2, "PGD"),
        caption_rung(of, "Captions name the class under that attack (Figure 2)", "blind PGD-40"),
        worth(of, "The caption counts: LGAP less LGAP without a caption", "LGAP without a caption"),
        worth(of, f"{FURTHER} LGAP is worth more than its caption alone: the difference", "caption alone"),
        robustness(of, "It withstands an attacker who sees the purifier, BPDA", 3, "BPDA"),
        robustness(of, "The same, averaged over the defence's noise", 3, "BPDA 40+EOT"),
        caption_rung(of, f"{FURTHER} captions withstand an attack on the captioner", "on the caption"),
        robustness(of, "The same at half the radius and less noise", 4, "BPDA-40"),
        whole_ladder(of),
    ]


def finding(of: Published) -> str:
    """The whole of it in two sentences."""
    blind, natural, worst = of.robust(1, "LGAP", "PGD"), of.natural(1, "LGAP", "PGD"), of.worst()
    lines = []
    for start, whose in ((False, "of the paper's claims"), (True, "that go further")):
        found = [verdict for claim, _, verdict in verdicts(of) if claim.startswith(FURTHER) == start]
        counts = f"{found.count(HOLDS)} hold, {found.count(FAILS)} do not, {found.count(OPEN)} are open"
        lines.append(f"{len(found)} {whose} {counts}")
    lines = ["Of ", "; of ".join(lines), "."]
    if blind and natural:
        lines += [
            f" LGAP is right on {natural} of clean images, on {blind} under an attack that does not see it"
        ]
        lines += [f", and on {worst} where the attacker may choose among all." if worst else "."]
    return "".join(lines)
