"""From rows to what a reader sees: intervals, tables and figures. Needs no model and no GPU."""

from __future__ import annotations

import math
import numbers
import re
from pathlib import Path

import numpy as np
import pandas as pd

from .files import write_whole
from .words import DATA_SETS

# A check that counts images says next to nothing on fewer: of 10 that all stand, the 95 % interval begins at 72 %.
FEW_IMAGES = 10


def wilson(k, n):
    """95 % Wilson interval of k successes in n, as two fractions (scipy).

    Raises ValueError unless both are whole numbers, n at least 1 and k from 0 to n.
    """
    from scipy.stats import binomtest

    if not all(isinstance(v, numbers.Real) and v % 1 == 0 for v in (k, n)) or not 0 <= k <= n or n < 1:
        raise ValueError(f"k={k!r} of n={n!r}: expected whole numbers, n at least 1 and k from 0 to n")
    interval = binomtest(int(k), int(n)).proportion_ci(confidence_level=0.95, method="wilson")
    return interval.low, interval.high


def proportion(flags):
    """{"%", "95 % interval", "k", "n"} of a column of True and False: a number is never alone.

    Raises ValueError where there is none, or one that is something else: a gap must not count as right or
    wrong.
    """
    flags = _truths(flags)
    return _share(sum(flags), len(flags))


def _truths(flags):
    """A list of bool from a list, array, tensor or Series of nothing but True and False."""
    values = np.asarray(flags, dtype=object)
    if values.ndim != 1:
        raise ValueError(f"got {flags!r}, expected one row of True and False")
    values = [value.item() if hasattr(value, "item") else value for value in values]
    for place, value in enumerate(values):
        if not isinstance(value, bool):
            raise ValueError(f"number {place} is {value!r}, expected True or False")
    return values


def interval_text(k, n):
    """`wilson` of a count that may lie between whole numbers: it then reaches from the interval of the one to that of the other."""
    return wilson(math.floor(k + 1e-9), n)[0], wilson(math.ceil(k - 1e-9), n)[1]


def _share(k, n):
    """A `share` of a count that may lie between whole numbers."""
    if not n:
        raise ValueError("a share of no images; expected at least one")
    low, high = interval_text(k, n)
    return {
        "%": round(100 * k / n, 1),
        "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}",
        "k": round(k, 3),
        "n": n,
    }


def of_images(rows, defence, where=""):
    """The rows of one defence. Raises ValueError, with the defences that there are, where it has none."""
    there = list(rows["defence"].unique()) if "defence" in rows else []
    if defence not in there:
        found = f"rows of {there}" if there else "no rows at all"
        raise ValueError(f"{where}no rows of the defence {defence!r}; there are {found}")
    return rows[rows["defence"] == defence]


def _check_rows(rows, column):
    """Refuse rows that are not one defence's matrix of images x draws with a label each."""
    if column not in ("clean", "adversarial"):
        raise ValueError(f"no accuracy of the column {column!r}; choose from ['clean', 'adversarial']")
    if rows.empty:
        raise ValueError("an accuracy of no rows; expected at least one image")
    if "defence" in rows and rows["defence"].nunique() > 1:
        raise ValueError(f"rows of {list(rows['defence'].unique())}; an accuracy is that of one defence")
    if (unlabelled := rows["label"].isna()).any():
        raise ValueError(f"image {rows['index'][unlabelled].iloc[0]} has no label")
    for names, what in (["index", "draw"], "draws that are there twice"), (["index"], "several labels"):
        each = rows.groupby(names)["label"]
        bad = each.size() > 1 if "draw" in names else each.nunique() > 1
        if bad.any():
            raise ValueError(f"{int(bad.sum())} of {len(bad)} images have {what}")


def accuracy(rows, column="adversarial", how="mean"):
    """`share` of the images whose label the defence finds, from the matrix of images x noise draws.

    rows: one defence's rows of `evaluate.Evaluation`; column: "clean" or "adversarial". how: "mean" over
    the draws (the interval is that of the images, whose number and not that of the draws counts),
    "majority" (the label predicted most often; the lower one if tied), or "worst" (right in every draw).
    Raises ValueError where an image lacks a draw or a label, and for no rows.
    """
    _check_rows(rows, column)
    matrix = rows.pivot(index="index", columns="draw", values=column)
    if matrix.isna().any(axis=None):
        raise ValueError(
            f"{int(matrix.isna().any(axis=1).sum())} of {len(matrix)} images lack a draw; run the evaluation to its end"
        )
    label = rows.groupby("index")["label"].first()
    right = matrix.eq(label, axis=0)
    if how == "majority":
        return proportion(matrix.mode(axis=1)[0] == label)
    if how == "worst":
        return proportion(right.all(axis=1))
    if how == "mean":
        return _share(float(right.mean(axis=1).sum()), len(right))
    raise ValueError(f"no accuracy {how!r}; choose from ['mean', 'majority', 'worst']")


def table_rows(rows, attack, names, whole=("undefended",)):
    """What `compare_with_paper` takes, for each defence in rows: {defence: (the method's name in the table, the attack's)}.

    whole: defences that are nothing but the classifier, so that even a blind attack sees all there is.
    Raises ValueError for a defence that has no rows.
    """
    out = []
    for defence, (method, label) in names.items():
        own = of_images(rows, defence)
        flags = flags_of(own)
        out.append(
            {
                "method": method,
                "attack": label,
                "natural": accuracy(own, "clean"),
                "robust": accuracy(own),
                "eps": f"{attack.eps_255:g}/255",
                "seconds": round(float(own.drop_duplicates("index")["seconds"].sum()), 1),
                "unreliable": bool(flags),
                "flags": flags,
                "whole": attack.view != "blind" or defence in whole,
                "protocol": attack.describe()
                + (f"; mean of {own['draw'].nunique()} draws" if own["draw"].max() else ""),
            }
        )
    return out


def flags_of(rows):
    """What was flagged, and on how many images: "64 of 64 images: ...", or "" for nothing."""
    found = rows[rows["flags"].fillna("") != ""].drop_duplicates(["index", "flags"])["flags"].value_counts()
    return "; ".join(f"{n} of {rows['index'].nunique()} images: {flag}" for flag, n in found.items())


def paired(rows, first, second, column="adversarial"):
    """Two defences on the same images and the same noise (draw 0), by an exact McNemar test: {what is counted: how many, ..., "p"}."""
    one = []
    for defence in (first, second):
        own = of_images(rows, defence)
        own = own[own["draw"] == 0]
        _check_rows(own, column)
        one.append((own[column] == own["label"]).set_axis(own["index"]).sort_index())
    if not one[0].index.equals(one[1].index):
        raise ValueError(
            f"{first} has draw 0 of {len(one[0])} images and {second} of {len(one[1])}, "
            "which are not the same ones"
        )
    b, c, p = mcnemar(*one)
    return {
        "first": first,
        "second": second,
        "right with the first alone": b,
        "with the second alone": c,
        "n": len(one[0]),
        "exact McNemar p": f"{p:.2g}",
    }


def caption_readers(rows, classes, defence="LGAP"):
    """A defence's rows as those of a rival that looks at no image and takes for its label what the caption names: "caption alone".

    rows: of `evaluate.Evaluation.run`; classes: the names. A caption that names none of them, or several, counts as label -1: wrong.
    The rows of draw 0 alone, as captions draw no noise.
    """
    from .words import names_class

    own = of_images(rows, defence)
    own = own[own["draw"] == 0]
    named = {
        caption: [k for k, name in enumerate(classes) if names_class(caption, name)]
        for caption in {*own["caption"], *own["caption_clean"]}
    }
    label = {caption: found[0] if len(found) == 1 else -1 for caption, found in named.items()}
    return own.assign(
        defence="caption alone", clean=own["caption_clean"].map(label), adversarial=own["caption"].map(label)
    )


def as_text(found):
    """A `share` as one cell of a table: "58.7 (52.1 to 65.0)"."""
    return "not run" if found is None else f"{found['%']:.1f} ({found['95 % interval']})"


def marked(found, flags):
    """`as_text`, and whether the attack that the number comes from was flagged."""
    return as_text(found) + ", flagged" * bool(found and flags)


def ladder(runs, classes=None, defence="LGAP", profile=None):
    """Accuracies of one defence under several attacks: a DataFrame with a row per attack.

    runs: {what the table calls it: (attack, rows of `evaluate.Evaluation.run`)}. classes: with their names,
    how often the caption of the attacked image names the right one has a column (`caption_readers`).
    profile: with it, its data set has one. Raises ValueError where there is no run, or a run has no rows of
    the defence.
    """
    if not runs:
        raise ValueError("a ladder of no runs; expected at least one")
    table = {}
    for name, (attack, rows) in runs.items():
        own = of_images(rows, defence, f"{name}: ")
        flags = flags_of(own)
        table[name] = {
            **({"data": DATA_SETS[profile.dataset]} if profile else {}),
            "natural, %": as_text(accuracy(own, "clean")),
            "robust, mean of draws, %": marked(accuracy(own), flags),
            "majority, %": as_text(accuracy(own, how="majority")),
            "worst draw, %": as_text(accuracy(own, how="worst")),
            **(
                {"caption alone, %": as_text(accuracy(caption_readers(rows, classes, defence)))}
                if classes
                else {}
            ),
            "n": own["index"].nunique(),
            "draws": own["draw"].nunique(),
            "flags": flags or "none",
            "protocol": attack.describe(),
        }
    return pd.DataFrame(table).T.rename_axis(f"{defence} under")


def mcnemar(first, second):
    """Exact McNemar test of two methods on the same images: (only first right, only second right, p)."""
    from scipy.stats import binomtest

    first, second = _truths(first), _truths(second)
    if len(first) != len(second) or not first:
        raise ValueError(
            f"{len(first)} images of the first and {len(second)} of the second; "
            "expected as many, and at least one"
        )
    b = sum(f and not s for f, s in zip(first, second))
    c = sum(s and not f for f, s in zip(first, second))
    return b, c, float(binomtest(b, b + c).pvalue) if b + c else 1.0


# ---------------------------------------------------------------- tables, in which any cell may be a caption


def save_table(table, folder, name, tex=None):
    """`name`.csv, .md and .tex below `folder`, each written whole; returns the table, to be shown.

    tex: what the LaTeX shows in the table's place, as a page is narrower than a screen. It needs booktabs
    alone and is as wide as the text of an article, or less. Markdown and LaTeX show all text as it is, with
    nothing in it obeyed.
    """
    folder, tex = Path(folder), table if tex is None else tex
    texts = {"csv": table.to_csv(), "md": _markdown(table.reset_index()), "tex": _latex(tex.reset_index())}
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in texts.items():
        write_whole(folder / f"{name}.{ending}", text.encode("utf-8", "backslashreplace"))
    return table


def plain_text(text):
    """Text in one line: what cannot be printed (line ends, control characters, lone surrogates) is a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _markdown(table):
    def escape(cell):
        return re.sub(r"[\\`|<$]|\](?=\()", r"\\\g<0>", plain_text(cell)) if isinstance(cell, str) else cell

    shown = table.map(escape).set_axis([escape(str(column)) for column in table], axis=1)
    text = [k for k in range(shown.shape[1]) if any(isinstance(cell, str) for cell in shown.iloc[:, k])]
    return (
        shown.to_markdown(index=False, disable_numparse=text) + "\n"
    )  # or the text "007" would be the number 7


TEXT_WIDTH, GAP = 345, 3  # points: an article's text at 10 pt, and half of what lies between two columns
TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
    | {c: f"\\{c}" for c in "&%$#_{}"}
)


def _tex_plain(cell):
    """A cell in characters that LaTeX has without a package; intervals with a dash, as they are narrower."""
    text = re.sub(r"[^ -~À-ÖØ-öø-ÿ–—‘’“”]|[ÐÞðþ]", "?", plain_text(cell))
    text = text if len(text) <= 200 else text[:196] + " ..."
    return re.sub(r"(\d) to (\d)", r"\1–\2", text)


def _points(text):
    """About how wide a text is in footnotesize, and rather more than less."""
    wider = sum(map(str.isupper, text)) + sum(text.count(wide) for wide in "MWmwÆ%—…")
    return 4.5 * len(text) + 2.5 * wider


def _tex_cell(text, width):
    """The cell for a column of `width` points: intervals small; a word too long for it may be broken."""

    def word_in_tex(word):
        if re.fullmatch(r"\([\d.]+–[\d.]+\),?", word):
            return rf"{{\scriptsize {word.translate(TEX)}}}"
        parts = [word] if _points(word) <= width else [word[i : i + 3] for i in range(0, len(word), 3)]
        return r"\penalty5000 ".join(part.translate(TEX) for part in parts)

    return r"\raggedright " + " ".join(map(word_in_tex, text.split(" ")))


def _latex(table):
    """A tabular in footnotesize, as wide as a text: each column has what it needs, long ones an equal part of the rest."""
    lines = [
        [_tex_plain(cell) for cell in line]
        for line in (table.columns, *table.itertuples(index=False, name=None))
    ]
    columns = list(zip(*lines))
    needs = [
        max(map(_points, [*cells[1:], *cells[0].split()]), default=9) for cells in columns
    ]  # a heading may be wrapped
    left, widths = TEXT_WIDTH - 2 * GAP * (len(needs) - 1), [0] * len(needs)
    for waiting, k in zip(range(len(needs), 0, -1), sorted(range(len(needs)), key=needs.__getitem__)):
        widths[k] = math.floor(min(needs[k] + 1, left / waiting))
        left -= widths[k]
    rows = [
        " & ".join(_tex_cell(*cell) for cell in zip(line, widths)) + r" \tabularnewline" for line in lines
    ]
    spec = "".join(f"p{{{width}pt}}" for width in widths)
    return "\n".join(
        [
            r"\begingroup\footnotesize\exhyphenpenalty=1000\setlength{\tabcolsep}{" + f"{GAP}pt}}%",
            r"\begin{tabular}{@{}" + spec + "@{}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}\endgroup",
            "",
        ]
    )
