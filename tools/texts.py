"""The parts of README.md and docs/ that files fill: `<!-- WHAT: ARGUMENTS -->` ... `<!-- end -->`.

    table: FILE              a Markdown file as it is
    table: FILE | A | B      these columns of a csv file
    figure: FILE | TEXT      a picture with its alternative text
    value: FILE | ROW | A    one cell of a csv file, whose rows are named in its first column
    verdicts: PROFILE        each claim, the evidence for it and the verdict, as tools/claims.py decides
    finding: PROFILE         the same in two sentences
    notebooks: PROFILE       each notebook: its question, the answer, the time that it took
    times: PROFILE           how long a run of the profile took
    badge:                   the badge of Colab, where the repository has an address

A part at the beginning of a line has its content on lines of its own, or Markdown takes it for HTML. A part
whose file is not there stays as it was. `tools/publish.py` writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lgap_utils.profiles import ROOT
from tools import badges
from tools.claims import Published, finding, text, verdicts
from tools.runner import duration

PART = re.compile(r"(<!-- (\w+):([^\n]*?) -->)(\n?)(.*?)(<!-- end -->)", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(page: str, root: Path = ROOT, base: Path | None = None) -> str:
    """The page with every part filled from files below `root`; base: the page's folder, for links.

    Raises ValueError for a part of an unknown kind.
    """
    base = base or root

    def part(match: re.Match) -> str:
        opening, kind, arguments, line, _, end = match.groups()
        if kind not in KINDS:
            raise ValueError(f"{opening}: expected one of {', '.join(KINDS)}")
        new = KINDS[kind](root, base, *(each.strip() for each in arguments.split("|")))
        if new is None:
            return match[0]
        return f"{opening}{line}{new}{line if new else ''}{end}"

    return PART.sub(part, page)


def fill(root: Path = ROOT) -> list[str]:
    """Fill every page in place; returns the names of those that changed."""
    changed = []
    for page in pages(root):
        old = page.read_text(encoding="utf-8")
        new = filled(old, root, page.parent)
        if new != old:
            page.write_text(new, encoding="utf-8")
            changed.append(page.relative_to(root).as_posix())
    return changed


def link(root: Path, base: Path, file: str) -> str:
    up = len(base.relative_to(root).parts)
    return "../" * up + file


def markdown(table: pd.DataFrame) -> str:
    cells = table.map(lambda cell: str(cell).replace("|", r"\|"))
    if "command" in cells:
        cells["command"] = "`" + cells["command"] + "`"
    lines = ["| " + " | ".join(line) + " |" for line in (cells.columns, *cells.to_numpy())]
    return "\n".join([lines[0], "|---" * len(cells.columns) + "|", *lines[1:]])


def table(root: Path, base: Path, file: str, *columns: str) -> str | None:
    if not (root / file).exists():
        return None
    if not columns:
        return (root / file).read_text(encoding="utf-8").strip()
    frame = pd.read_csv(root / file, dtype=str, keep_default_na=False)
    if missing := [name for name in columns if name not in frame]:
        raise ValueError(f"{file} has no column {missing[0]!r}; there are {list(frame)}")
    return markdown(frame[list(columns)])


def figure(root: Path, base: Path, file: str, alternative: str) -> str | None:
    return f"![{alternative}]({link(root, base, file)})" if (root / file).exists() else None


def value(root: Path, base: Path, file: str, row: str, column: str) -> str | None:
    if not (root / file).exists():
        return None
    frame = pd.read_csv(root / file, dtype=str, keep_default_na=False)
    found = frame[frame.iloc[:, 0] == row]
    if found.empty or column not in frame:
        raise ValueError(f"{file} has no row {row!r} with a column {column!r}")
    return found[column].iloc[0]


def published(root: Path, profile: str) -> Published:
    return Published(root / "outputs" / "published" / profile)


def verdict_table(root: Path, base: Path, profile: str) -> str | None:
    of = published(root, profile)
    if not of.results:
        return None
    return markdown(pd.DataFrame(verdicts(of), columns=["claim", f"measured, profile {profile}", "verdict"]))


def finding_text(root: Path, base: Path, profile: str) -> str | None:
    of = published(root, profile)
    return finding(of) if of.results else None


def seconds_of(of: Published) -> dict[str, float]:
    """{notebook: the seconds that it took}, of the published run."""
    times = of.table("00_times")
    return {} if times is None else dict(zip(times["notebook"], times["seconds"].astype(float)))


def times(root: Path, base: Path, profile: str) -> str | None:
    seconds = seconds_of(published(root, profile))
    return duration(sum(seconds.values())) if seconds else None


QUESTIONS: dict[str, tuple[str, Callable[[Published], str]]] = {
    "00": ("What does it do to my photo?", lambda of: "in pictures"),
    "01": (
        "Does the caption survive an attack on the classifier?",
        lambda of: f"it names the class on {text(of.share('01_captions', 'names the true class, attacked'))}",
    ),
    "02": ("What does purification do to an image?", lambda of: "in pictures"),
    "03": (
        "What is fine-tuning worth?",
        lambda of: f"with it, {text(of.natural(1, 'LGAP', 'PGD'))} of clean images are right",
    ),
    "04": ("Table 1: what stands under a blind attack?", lambda of: text(of.robust(1, "LGAP", "PGD"))),
    "05": ("Table 2: the same with a hundred classes", lambda of: text(of.robust(2, "LGAP", "PGD"))),
    "06": (
        "Table 3: what stands under an attacker who knows more?",
        lambda of: f"in the worst case {text(of.worst())}",
    ),
    "07": ("Table 4: 4/255 and less noise", lambda of: f"under BPDA {text(of.robust(4, 'LGAP', 'BPDA-40'))}"),
    "08": ("What is language worth?", lambda of: "with and without captions, in one figure"),
    "09": ("Your own attack, purifier, classifier, captioner", lambda of: "the smallest example of each"),
}


def notebooks(root: Path, base: Path, profile: str) -> str | None:
    of = published(root, profile)
    files = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    if not of.results or not files:
        return None
    seconds, rows = seconds_of(of), []
    for file in files:
        question, answer = QUESTIONS.get(file.stem[:2], (file.stem, lambda of: ""))
        took = duration(seconds[file.stem]) if file.stem in seconds else "not timed"
        name = f"[{file.stem[:2]}]({link(root, base, f'notebooks/{file.name}')})"
        rows.append((name, question, answer(of), took))
    return markdown(
        pd.DataFrame(rows, columns=["notebook", "question", f"answer, profile {profile}", "time"])
    )


def badge(root: Path, base: Path, *_: str) -> str:
    first = sorted(root.glob("notebooks/[0-9]*.ipynb"))
    shown = badges.badge(f"notebooks/{first[0].name}") if first else ""
    return shown if shown.startswith("[") else ""


KINDS: dict[str, Callable[..., str | None]] = {
    "table": table,
    "figure": figure,
    "value": value,
    "verdicts": verdict_table,
    "finding": finding_text,
    "notebooks": notebooks,
    "times": times,
    "badge": badge,
}


def took(folder: Path) -> str:
    """A csv file of the seconds that each executed notebook in a folder took, as papermill noted them."""
    lines = ["notebook,seconds"]
    for file in sorted(folder.glob("[0-9]*.ipynb")):
        record = json.loads(file.read_text(encoding="utf-8"))["metadata"].get("papermill", {})
        if record.get("duration") is not None:
            lines.append(f"{file.stem},{record['duration']:.1f}")
    return "\n".join(lines) + "\n"
