"""From rows to tables: accuracies with their intervals, as DataFrames and as files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .files import write_whole
from .rows import Frame
from .words import DATA_SETS, names_class, plain_text

if TYPE_CHECKING:
    from .profiles import Profile
    from .protocols import Attack

Share = dict[str, Any]  # {"%", "95 % interval", "k", "n"}: a number is never alone
Runs = dict[str, tuple["Attack", Frame]]  # {name in a table: (attack, rows of `Evaluation.run`)}


def wilson(k: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of k in n, as two fractions (scipy); raises ValueError unless 0 <= k <= n, n >= 1.

    Where k is a mean over draws and no whole number: from the low end of floor(k) to the high end of ceil(k).
    """
    from scipy.stats import binomtest

    if not isinstance(k, Real) or not isinstance(n, Integral) or not 0 <= k <= n or n < 1:
        raise ValueError(f"k={k!r} of n={n!r}: expected a whole number n of at least 1, and k from 0 to n")
    tests = [binomtest(whole, int(n)) for whole in (math.floor(k + 1e-9), math.ceil(k - 1e-9))]
    low, high = (test.proportion_ci(confidence_level=0.95, method="wilson") for test in tests)
    return low.low, high.high


def proportion(flags: Any) -> Share:
    """The share of True in a list, array, tensor or Series of nothing but True and False, at least one.

    Raises ValueError for anything else: a gap must not count as right or wrong.
    """
    flags = _bools(flags)
    return _share(sum(flags), len(flags))


def _bools(flags: Any) -> list[bool]:
    values = np.asarray(flags, dtype=object)
    if values.ndim != 1:
        raise ValueError(f"got {flags!r}, expected one row of True and False")
    values = [value.item() if hasattr(value, "item") else value for value in values]
    for place, value in enumerate(values):
        if not isinstance(value, bool):
            raise ValueError(f"number {place} is {value!r}, expected True or False")
    return values


def _share(k: float, n: int) -> Share:
    low, high = wilson(k, n)
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    return {"%": round(100 * k / n, 1), "95 % interval": interval, "k": round(k, 3), "n": n}


def as_text(share: Share | None, flags: str = "") -> str:
    """A share as a cell of a table: "58.7 (52.1 to 65.0)", or "... , flagged" where there are flags."""
    if share is None:
        return "not run"
    return f"{share['%']:.1f} ({share['95 % interval']})" + ", flagged" * bool(flags)


def of_images(rows: Frame, defence: str, where: str = "") -> Frame:
    """The rows of one defence. Raises ValueError, naming the defences that there are, where it has none."""
    names = list(rows["defence"].unique()) if "defence" in rows else []
    if defence not in names:
        others = f"rows of {names}" if names else "no rows at all"
        raise ValueError(f"{where}no rows of the defence {defence!r}; there are {others}")
    return rows[rows["defence"] == defence]


def _check_rows(rows: Frame, column: str) -> None:
    """Refuse rows that are not one defence's images x draws with one label for each image."""
    if column not in ("clean", "adversarial"):
        raise ValueError(f"no accuracy of the column {column!r}; choose from ['clean', 'adversarial']")
    if rows.empty:
        raise ValueError("an accuracy of no rows; expected at least one image")
    if "defence" in rows and rows["defence"].nunique() > 1:
        raise ValueError(f"rows of {list(rows['defence'].unique())}; an accuracy is that of one defence")
    if (unlabelled := rows["label"].isna()).any():
        raise ValueError(f"image {rows['index'][unlabelled].iloc[0]} has no label")
    images = rows.groupby("index")
    twice, several = images["draw"].nunique() < images.size(), images["label"].nunique() > 1
    for bad, what in ((twice, "draws that are there twice"), (several, "several labels")):
        if bad.any():
            raise ValueError(f"{int(bad.sum())} of {len(bad)} images have {what}")


def accuracy(rows: Frame, column: str = "adversarial", how: str = "mean") -> Share:
    """The share of images whose label one defence finds, from its rows of images x noise draws.

    column: "clean" or "adversarial". how: "mean" over the draws (its interval counts images, not draws),
    "majority" (the label predicted most often; the lower one of a tie) or "worst" (right in every draw).
    Raises ValueError for no rows, and for an image without a label or a draw.
    """
    right = right_of(rows, column)
    if how == "mean":
        return _share(float(right.sum()), len(right))
    if how == "majority":
        modes = rows.pivot(index="index", columns="draw", values=column).mode(axis=1)
        return proportion(modes[0] == rows.groupby("index")["label"].first())
    if how == "worst":
        return proportion(right == 1)
    raise ValueError(f"no accuracy {how!r}; choose from ['mean', 'majority', 'worst']")


def flags_of(rows: Frame) -> str:
    """What was flagged, and on how many images: "64 of 64 images: ...", or "" for nothing."""
    flagged = rows[rows["flags"].fillna("") != ""].drop_duplicates(["index", "flags"])
    n = rows["index"].nunique()
    return "; ".join(f"{k} of {n} images: {flag}" for flag, k in flagged["flags"].value_counts().items())


def table_rows(
    rows: Frame, attack: Attack, names: dict[str, tuple[str, str]], whole: Iterable[str] = ("undefended",)
) -> list[dict[str, Any]]:
    """A row of a table for each defence in names: {defence: (the method's name in the table, the attack's)}.

    whole: defences that are the bare classifier, all of which a blind attack sees. Raises ValueError for a
    defence without rows.
    """
    out = []
    for defence, (method, label) in names.items():
        own = of_images(rows, defence)
        flags, n_draws = flags_of(own), own["draw"].nunique()
        row = {"method": method, "attack": label, "natural": accuracy(own, "clean"), "robust": accuracy(own)}
        row["eps"] = f"{attack.eps_255:g}/255"
        row["seconds"] = round(float(own.drop_duplicates("index")["seconds"].sum()), 1)
        # RobustBench's word for an evaluation that noise may have misled
        row |= {"unreliable": bool(flags) or bool(own["random"].any()), "flags": flags}
        row["whole"] = attack.view != "blind" or defence in whole
        row["protocol"] = attack.describe() + f"; mean of {n_draws} draws" * (n_draws > 1)
        out.append(row)
    return out


def measured(
    runs: Runs,
    defenses: Iterable[str],
    names: dict[str, str] | None = None,
    suffix: str = "",
    paper_attacks: dict[str, str] | None = None,
    whole: Iterable[str] = ("undefended",),
) -> list[dict[str, Any]]:
    """`table_rows` of these defences in each run, {the attack's name in the table: (attack, rows)}.

    A defence is called as `names` says, else by its own name and `suffix`. paper_attacks: {the attack's name:
    the paper's}, which the rows of LGAP take.
    """
    out = []
    for label, (attack, rows) in runs.items():
        methods = {defence: ((names or {}).get(defence, defence + suffix), label) for defence in defenses}
        if "LGAP" in methods:
            methods["LGAP"] = (methods["LGAP"][0], (paper_attacks or {}).get(label, label))
        out += table_rows(rows, attack, methods, whole)
    return out


def right_of(rows: Frame, column: str = "adversarial") -> Frame:
    """For each image the share of a defence's draws that find its label; ValueError where a draw lacks."""
    _check_rows(rows, column)
    matrix = rows.pivot(index="index", columns="draw", values=column)
    if n_short := int(matrix.isna().any(axis=1).sum()):
        raise ValueError(f"{n_short} of {len(matrix)} images lack a draw; run the evaluation to its end")
    return matrix.eq(rows.groupby("index")["label"].first(), axis=0).mean(axis=1)


def difference(first: Any, second: Any) -> dict[str, Any]:
    """Mean of first - second over the same images, values in [0, 1], in points, with its 95 % interval.

    The interval of Bonett and Price (2012) for paired proportions, in a form for means over draws, too: that
    of the mean of the differences and of one +1 and one -1 more.
    """
    from scipy.stats import norm

    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if gaps.ndim != 1 or not len(gaps) or not (np.abs(gaps) <= 1).all():
        raise ValueError("expected the shares, from 0 to 1, of as many images of both, and at least one")
    more = np.append(gaps, [1, -1])
    reach = float(norm.ppf(0.975)) * more.std() / math.sqrt(len(more))
    low, high = max(-1.0, more.mean() - reach), min(1.0, more.mean() + reach)
    interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
    return {"points": round(100 * gaps.mean(), 1), "95 % interval": interval, "n": len(gaps)}


def paired(rows: Frame, first: str, second: str, column: str = "adversarial") -> dict[str, Any]:
    """The `difference` of two defences' accuracies on the same images, over all draws: a row of a table."""
    right = [right_of(of_images(rows, defence), column) for defence in (first, second)]
    if not right[0].index.equals(right[1].index):
        counts = f"{first} has {len(right[0])} images and {second} {len(right[1])}"
        raise ValueError(f"{counts}, which are not the same ones")
    return {"first": first, "second": second, **difference(*right)}


def caption_readers(rows: Frame, classes: tuple[str, ...], defence: str = "LGAP") -> Frame:
    """Rows (draw 0) of "caption alone", a rival whose label is the class that the defence's caption names.

    A caption that names no class, or several, counts as label -1: wrong.
    """

    def label(caption: str) -> int:
        named = [k for k, name in enumerate(classes) if names_class(caption, name)]
        return named[0] if len(named) == 1 else -1

    own = of_images(rows, defence)
    own = own[own["draw"] == 0]
    clean, adversarial = own["caption_clean"].map(label), own["caption"].map(label)
    return own.assign(defence="caption alone", clean=clean, adversarial=adversarial)


def ties(rows: Frame) -> int:
    """How many images of one defence have two labels that were predicted equally often, and most often."""
    matrix = rows.pivot(index="index", columns="draw", values="adversarial")
    return int(matrix.mode(axis=1).notna().sum(axis=1).gt(1).sum())


def ladder(
    runs: Runs, classes: tuple[str, ...] | None = None, defence: str = "LGAP", profile: Profile | None = None
) -> Frame:
    """Accuracies of one defence, a row for each run. Raises ValueError for no run, or one without its rows.

    classes: for a column with the accuracy of the caption alone; profile: for one with its data set. "s an
    image" is what the attack took, "ties" counts images whose majority is one (the lower label then counts).
    """
    if not runs:
        raise ValueError("a ladder of no runs; expected at least one")
    table = {}
    for name, (attack, rows) in runs.items():
        own = of_images(rows, defence, f"{name}: ")
        flags = flags_of(own)
        row: dict[str, Any] = {"data": DATA_SETS[profile.dataset]} if profile else {}
        row["natural, %"] = as_text(accuracy(own, "clean"))
        row["robust, mean of draws, %"] = as_text(accuracy(own), flags)
        row |= {"majority, %": as_text(accuracy(own, how="majority")), "ties": ties(own)}
        row["worst draw, %"] = as_text(accuracy(own, how="worst"))
        if classes:
            row["caption alone, %"] = as_text(accuracy(caption_readers(rows, classes, defence)))
        row |= {"n": own["index"].nunique(), "draws": own["draw"].nunique()}
        row["s an image"] = f"{own.drop_duplicates('index')['seconds'].mean():.2g}"
        table[name] = row | {"flags": flags or "none", "protocol": attack.describe()}
    return pd.DataFrame(table).T.rename_axis(f"{defence} under")


def common(runs: Runs, defence: str = "LGAP") -> Runs:
    """The rows of one defence on the images that all runs have. Raises ValueError where there is none."""
    own = {name: of_images(rows, defence, f"{name}: ") for name, (_, rows) in runs.items()}
    shared = set.intersection(*(set(rows["index"]) for rows in own.values())) if own else set()
    if not shared:
        raise ValueError("no image is in all of the runs")
    return {name: (runs[name][0], rows[rows["index"].isin(shared)]) for name, rows in own.items()}


def worst_case(runs: Runs, defence: str = "LGAP") -> Share:
    """The share that stands whatever rung an attacker takes for an image: per image the lowest of the runs.

    Of the means over draws, on the images that all runs have.
    """
    right = [right_of(rows) for _, rows in common(runs, defence).values()]
    lowest = pd.concat(right, axis=1).min(axis=1)
    return _share(float(lowest.sum()), len(lowest))


# ---------------------------------------------------------------- files, in which any cell may be a caption

TEXT_WIDTH, GAP = 345, 3  # points: an article's text at 10 pt, and half of what lies between two columns
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"} | {c: f"\\{c}" for c in "&%$#_{}"}


def save_table(table: Frame, folder: str | Path, name: str, tex: pd.DataFrame | None = None) -> Frame:
    """`name`.csv, .md and .tex below `folder`, each written whole; returns the table, to be shown.

    tex: what the LaTeX has in its place, as a page is narrower than a screen. It needs booktabs alone and
    fits the text of an article. Markdown and LaTeX show text as it is and obey nothing in it.
    """
    narrow = table if tex is None else tex
    texts = {"csv": table.to_csv(), "md": _markdown(table.reset_index()), "tex": _latex(narrow.reset_index())}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for ending, text in texts.items():
        write_whole(Path(folder) / f"{name}.{ending}", text.encode("utf-8", "backslashreplace"))
    return table


def _markdown(table: Frame) -> str:
    def escape(cell):
        return re.sub(r"[\\`|<$]|\](?=\()", r"\\\g<0>", plain_text(cell)) if isinstance(cell, str) else cell

    shown = table.map(escape).set_axis([escape(str(column)) for column in table], axis=1)
    # the text "007" must not become the number 7
    text = [k for k in range(shown.shape[1]) if any(isinstance(cell, str) for cell in shown.iloc[:, k])]
    return shown.to_markdown(index=False, disable_numparse=text) + "\n"


def _latex(table: Frame) -> str:
    """A tabular in footnotesize: each column as wide as it needs, long ones with equal parts of the rest."""
    lines = [[_tex_plain(cell) for cell in line] for line in (table.columns, *table.to_numpy(dtype=object))]
    needs = []
    for head, *cells in zip(*lines):
        needs.append(max(map(_points, [*cells, *head.split()]), default=9))  # a heading may be wrapped
    left, widths = TEXT_WIDTH - 2 * GAP * (len(needs) - 1), [0] * len(needs)
    for n_left, k in zip(range(len(needs), 0, -1), np.argsort(needs, kind="stable")):
        widths[k] = math.floor(min(needs[k] + 1, left / n_left))
        left -= widths[k]
    head, *body = [" & ".join(map(_tex_cell, line, widths)) + r" \tabularnewline" for line in lines]
    columns = "".join(f"p{{{width}pt}}" for width in widths)
    start = r"\begingroup\footnotesize\exhyphenpenalty=1000\setlength{\tabcolsep}{" + f"{GAP}pt}}%"
    start = [start, r"\begin{tabular}{@{}" + columns + "@{}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*start, *body, r"\bottomrule", r"\end{tabular}\endgroup", ""])


def _tex_plain(cell: Any) -> str:
    """A cell of at most 200 characters, all of which LaTeX has without a package; intervals with a dash."""
    text = re.sub(r"[^ -~À-ÖØ-öø-ÿ–—‘’“”]|[ÐÞðþ]", "?", plain_text(cell))
    text = text if len(text) <= 200 else text[:196] + " ..."
    return re.sub(r"(\d) to (\d)", r"\1–\2", text)


def _points(text: str) -> float:
    """About how wide a text is in footnotesize, and rather more than less."""
    return 4.5 * len(text) + 2.5 * sum(c.isupper() + (c in "MWmwÆ%—…") for c in text)


def _tex_cell(text: str, width: int) -> str:
    """A cell for a column of `width` points, escaped: intervals small; a longer word may be broken."""
    words = []
    for word in text.split(" "):
        interval, fits = re.fullmatch(r"\([\d.]+–[\d.]+\),?", word), _points(word) <= width
        parts = [word] if interval or fits else [word[i : i + 3] for i in range(0, len(word), 3)]
        escaped = r"\penalty5000 ".join(part.translate(str.maketrans(TEX)) for part in parts)
        words.append(rf"{{\scriptsize {escaped}}}" if interval else escaped)
    return r"\raggedright " + " ".join(words)
