"""From rows to what a reader sees: intervals, tables and figures. Needs no model and no GPU."""
from __future__ import annotations

import io
import json
import math
import numbers
import re
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from .files import one_writer, write_whole
from .profiles import ROOT

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


def share(flags):
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


def _interval(k, n):
    """`wilson` of a count that may lie between whole numbers: it then reaches from the interval of the one to that of the other."""
    return wilson(math.floor(k + 1e-9), n)[0], wilson(math.ceil(k - 1e-9), n)[1]


def _share(k, n):
    """A `share` of a count that may lie between whole numbers."""
    if not n:
        raise ValueError("a share of no images; expected at least one")
    low, high = _interval(k, n)
    return {"%": round(100 * k / n, 1), "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}", "k": round(k, 3), "n": n}


def _of(rows, defence, where=""):
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
        raise ValueError(f"{int(matrix.isna().any(axis=1).sum())} of {len(matrix)} images lack a draw; run the evaluation to its end")
    label = rows.groupby("index")["label"].first()
    right = matrix.eq(label, axis=0)
    if how == "majority":
        return share(matrix.mode(axis=1)[0] == label)
    if how == "worst":
        return share(right.all(axis=1))
    if how == "mean":
        return _share(float(right.mean(axis=1).sum()), len(right))
    raise ValueError(f"no accuracy {how!r}; choose from ['mean', 'majority', 'worst']")


def entries(rows, attack, names, whole=("undefended",)):
    """What `beside_paper` takes, for each defence in rows: {defence: (the method's name in the table, the attack's)}.

    whole: defences that are nothing but the classifier, so that even a blind attack sees all there is.
    Raises ValueError for a defence that has no rows.
    """
    out = []
    for defence, (method, label) in names.items():
        own = _of(rows, defence)
        flags = _flags(own)
        out.append({"method": method, "attack": label, "natural": accuracy(own, "clean"), "robust": accuracy(own),
                    "eps": f"{attack.eps_255:g}/255", "seconds": round(float(own.drop_duplicates("index")["seconds"].sum()), 1),
                    "unreliable": bool(flags), "flags": flags,
                    "whole": attack.view != "blind" or defence in whole,
                    "protocol": attack.describe() + (f"; mean of {own['draw'].nunique()} draws" if own["draw"].max() else "")})
    return out


def _flags(rows):
    """What was flagged, and on how many images: "64 of 64 images: ...", or "" for nothing."""
    found = rows[rows["flags"].fillna("") != ""].drop_duplicates(["index", "flags"])["flags"].value_counts()
    return "; ".join(f"{n} of {rows['index'].nunique()} images: {flag}" for flag, n in found.items())


def paired(rows, first, second, column="adversarial"):
    """Two defences on the same images and the same noise (draw 0), by an exact McNemar test: {what is counted: how many, ..., "p"}."""
    one = []
    for defence in (first, second):
        own = _of(rows, defence)
        own = own[own["draw"] == 0]
        _check_rows(own, column)
        one.append((own[column] == own["label"]).set_axis(own["index"]).sort_index())
    if not one[0].index.equals(one[1].index):
        raise ValueError(f"{first} has draw 0 of {len(one[0])} images and {second} of {len(one[1])}, "
                         "which are not the same ones")
    b, c, p = mcnemar(*one)
    return {"first": first, "second": second, "right with the first alone": b, "with the second alone": c,
            "n": len(one[0]), "exact McNemar p": f"{p:.2g}"}


def caption_readers(rows, classes, defence="LGAP"):
    """A defence's rows as those of a rival that looks at no image and takes for its label what the caption names: "caption alone".

    rows: of `evaluate.Evaluation.run`; classes: the names. A caption that names none of them, or several, counts as label -1: wrong.
    The rows of draw 0 alone, as captions draw no noise.
    """
    from .data import names_class
    own = _of(rows, defence)
    own = own[own["draw"] == 0]
    named = {caption: [k for k, name in enumerate(classes) if names_class(caption, name)]
             for caption in {*own["caption"], *own["caption_clean"]}}
    label = {caption: found[0] if len(found) == 1 else -1 for caption, found in named.items()}
    return own.assign(defence="caption alone", clean=own["caption_clean"].map(label), adversarial=own["caption"].map(label))


def in_words(found):
    """A `share` as one cell of a table: "58.7 (52.1 to 65.0)"."""
    return "not run" if found is None else f"{found['%']:.1f} ({found['95 % interval']})"


def _marked(found, flags):
    """`in_words`, and whether the attack that the number comes from was flagged."""
    return in_words(found) + ", flagged" * bool(found and flags)


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
        own = _of(rows, defence, f"{name}: ")
        flags = _flags(own)
        table[name] = {**({"data": DATA_SETS[profile.dataset]} if profile else {}),
                       "natural, %": in_words(accuracy(own, "clean")),
                       "robust, mean of draws, %": _marked(accuracy(own), flags),
                       "majority, %": in_words(accuracy(own, how="majority")), "worst draw, %": in_words(accuracy(own, how="worst")),
                       **({"caption alone, %": in_words(accuracy(caption_readers(rows, classes, defence)))} if classes else {}),
                       "n": own["index"].nunique(), "draws": own["draw"].nunique(), "flags": flags or "none",
                       "protocol": attack.describe()}
    return pd.DataFrame(table).T.rename_axis(f"{defence} under")


# ---------------------------------------------------------------- beside the paper

DATA_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet", "toy": "drawn scenes"}


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
            raise ValueError(f"two rows for the method {key[0]!r} and the attack {key[1]!r}; "
                             "give one of them another name")
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
        low, high = (100 * bound for bound in _interval(found["k"], found["n"]))        # not the rounded ones that the table shows
        return "inside" if low <= float(number) <= high else "outside"
    natural, robust = (verdict(printed.get(name), row[name]) for name in ("natural", "robust"))
    return natural if natural == robust else f"natural {natural}, robust {robust}"


NOT_RUN = {"natural": None, "robust": None, "protocol": "quoted from the paper"}


def beside_paper(table, ours, profile, images):
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
    return pd.DataFrame([_line(paper, row, *data, unlike) for paper, row in lines]).set_index(["method", "attack"])


def _line(paper, row, here, there, unlike):
    """One row of `beside_paper`: the paper's, {} if it has none, and ours, None if it was not run."""
    measured, source = row or NOT_RUN, paper or row
    found = measured["robust"] or measured["natural"]
    flags = measured.get("flags", "")
    return {"method": source["method"] + "*" * (paper.get("cited") == "yes"), "attack": source["attack"] or "none",
            "data here": here if row else "not run", "data in the paper": there,
            "architecture in the paper": paper.get("architecture", "not in the paper") or "not given",
            "paper natural": paper.get("natural") or "not given",
            "paper robust": paper.get("robust") or "not given",
            "natural here, %": in_words(measured["natural"]),
            "robust here, %": _marked(measured["robust"], flags),
            "n": found["n"] if found else "not run", "paper's number": _against(paper, measured, unlike),
            "flags": flags or ("none" if row else "not run"), "protocol": measured["protocol"]}


def narrow(table):
    """What a page has room for of a table made by `beside_paper`: the rows that were run, ours alone."""
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
        raise ValueError(f"{file} is torn or not JSON; restore it, or move it away and run its tables again") from None
    tables = results.items() if isinstance(results, dict) else [("", None)]
    for name, entry in tables:
        if not (name.startswith("table ") and isinstance(entry, dict) and {"provenance", "rows"} <= set(entry)):
            raise ValueError(f"{file} is not a results.json of this software: expected \"table 1\" and so on, each with "
                             "provenance and rows; move it away, or set LGAP_OUTPUTS to another folder")
    return results


def write_results(folder, table, rows, profile, images, provenance):
    """Put `rows` (dicts as in `beside_paper`) and where they come from into folder/results.json, beside the other tables'.

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
        entry = {"name": row["method"], "attack": row["attack"], "footnote": row["protocol"],
                 "dataset": profile.dataset, "paper_dataset": _paper_data(table), "official_images": bool(images.official),
                 "clean_acc": value(row["natural"], "%"), "robust_acc": value(row["robust"], "%"),
                 "reported": reported.get("robust") or None,
                 "reported_clean_acc": reported.get("natural") or None,
                 "papers_number": _against(printed, row, unlike)}
        for name in ("natural", "robust"):
            entry |= {f"{name}_{short}": value(row[name], column) for short, column in
                      {"interval": "95 % interval", "k": "k", "n": "n"}.items()}
        entry |= {"unreliable": row.get("unreliable", False), "flags": row.get("flags", ""),
                  "eps": row.get("eps"), "seconds": row.get("seconds")}
        if row.get("whole") and "AutoAttack" in row["protocol"]:        # RobustBench means the model as it is deployed, not a transfer
            entry["autoattack_acc"] = entry["robust_acc"]
        entries.append(entry)
    with one_writer(Path(folder) / "tables", wait=True):        # of two notebooks at once, neither loses the other's table
        results = check_results(folder) | {f"table {table}": {"provenance": provenance, "rows": entries}}
        write_whole(Path(folder) / "results.json", (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())


# ---------------------------------------------------------------- does the evaluation hold?


def audit(runs, *, defence="LGAP", stronger=(), eps_sweep=(), eps_zero=None, doubled=None):
    """What a sceptical reader would check of an evaluation: a DataFrame of checks, each "pass", "warn", "too few images" or "not run".

    runs: {name: (attack, rows)} as for `ladder`. stronger: pairs of names (weaker, stronger): on the images
    that both have, no image that falls to the weaker may stand, in every draw, under the stronger, nor may
    more stand in the mean of the draws. eps_sweep: names by rising eps. eps_zero: a run at eps 0. doubled:
    names of a run and of the same with twice the steps. A check that compares fewer than FEW_IMAGES images
    is "too few images", whatever it finds. Raises ValueError where a run has no rows of the defence.
    """
    if not runs:
        raise ValueError("an audit of no runs; expected at least one")
    own = {name: _of(rows, defence, f"{name}: ") for name, (_, rows) in runs.items()}
    right = {name: rows.assign(right=rows["adversarial"] == rows["label"]).groupby("index")["right"] for name, rows in own.items()}
    attacks = {name: attack for name, (attack, _) in runs.items()}
    checks = [_inside(own), _nothing_at_zero(own, eps_zero), _falls_with_eps(attacks, right, eps_sweep),
              *(_no_weaker(right, *pair) for pair in stronger),
              *(check for name, attack in attacks.items() for check in _noticed(name, attack, own[name])),
              _doubled(attacks, right, doubled)]
    return pd.DataFrame(checks, columns=["check", "verdict", "detail"]).set_index("check")


def _verdict(holds, n=FEW_IMAGES):
    """Of a check that n images were compared for."""
    if n < FEW_IMAGES:
        return "too few images"
    return "pass" if holds else "warn"


def _inside(own):
    what = "inside the ball and [0, 1]"
    outside = {name: int((~rows["inside"].astype(bool) | rows["linf"].isna()).sum())
               for name, rows in own.items()}
    if any(outside.values()):
        return what, "warn", "; ".join(f"{name}: {k} rows outside" for name, k in outside.items() if k)
    return what, "pass", f"largest distance {255 * max(rows['linf'].max() for rows in own.values()):.2f}/255"


def _nothing_at_zero(own, eps_zero):
    what = "eps 0 changes nothing"
    if eps_zero is None or eps_zero not in own:
        return what, "not run", "no run at eps 0"
    rows = own[eps_zero]
    changed = int((rows["adversarial"] != rows["clean"]).sum())
    return what, _verdict(changed == 0 and rows["linf"].max() == 0), f"{changed} of {len(rows)} labels differ"


def _falls_with_eps(attacks, right, names):
    what = "accuracy falls with eps"
    if len(names) < 2:
        return what, "not run", "no sweep"
    if absent := [name for name in names if name not in right]:
        return what, "not run", f"{absent[0]} was not run"
    each = pd.concat([right[name].mean() for name in names], axis=1, keys=names).dropna()     # images that all have
    if each.empty:
        return what, "too few images", "no image is in all of them"
    means = list(each.mean())
    signs = ["", *("=" if math.isclose(a, b) else ">" if a > b else "<" for a, b in zip(means, means[1:]))]
    falls = "<" not in signs and ">" in signs
    line = " ".join(f"{sign} {100 * m:.1f} % at {attacks[n].eps_255:g}/255" for sign, n, m in zip(signs, names, means))
    return what, _verdict(falls, len(each)), f"{line.strip()}, {len(each)} images" + "; did not fall" * (not falls)


def _no_weaker(right, weaker, strong):
    what = f"{strong} is no weaker than {weaker}"
    if weaker not in right or strong not in right:
        return what, "not run", "one of them was not run"
    pair, keys = (right[weaker], right[strong]), ["weak", "strong"]
    all_draws = pd.concat([each.all() for each in pair], axis=1, keys=keys).dropna().astype(bool)
    mean = pd.concat([each.mean() for each in pair], axis=1, keys=keys).dropna().mean()
    wrong = all_draws[~all_draws["weak"] & all_draws["strong"]]
    detail = (f"of {len(all_draws)} images {int(all_draws['weak'].sum())} stand under the weaker, "
              f"{int(all_draws['strong'].sum())} under the stronger")
    if len(wrong):
        detail += f"; {len(wrong)} fall to the weaker alone, e.g. image {wrong.index[0]}"
    # with many draws few images stand in all of them, under either; so the means are compared as well
    more = mean["strong"] > mean["weak"] + 1e-9
    if more:
        detail += f"; in the mean of draws {100 * mean['weak']:.1f} % and {100 * mean['strong']:.1f} %"
    return what, _verdict(wrong.empty and not more, len(all_draws)), detail


def _noticed(name, attack, rows):
    """What an attack noticed of itself, as checks of its own."""
    autoattack, flags = attack.optimiser in ("autoattack", "square") and not attack.foreign, _flags(rows)
    if attack.foreign:
        yield (f"{name}: the attack's own flags", "not run",
               f"{type(attack).__name__} is not ours: what it notes is its affair")
    elif attack.optimiser == "pgd" and attack.eps_255 > 0:
        bad, steps = rows.groupby("index")["bad_gradients"].first(), attack.n_steps * attack.n_restarts
        yield (f"{name}: gradient neither zero nor NaN", _verdict((bad == 0).all()),
               f"{int((bad > 0).sum())} of {len(bad)} images had one in {steps} steps")
    if autoattack:
        together = f", each flag that of a block of {attack.block}" * (attack.block > 1)
        none = f"none on {rows['index'].nunique()} images"
        yield f"{name}: AutoAttack's own flags", _verdict(not flags), flags + together if flags else none
    elif flags:
        yield f"{name}: flags of its rows", "warn", flags


def _doubled(attacks, right, names):
    what = "doubling the steps changes little"
    if names is None or not set(names) <= set(right):
        return what, "not run", "no run with twice the steps"
    a, b = (right[name].mean() for name in names)
    steps, both = [attacks[name].n_steps for name in names], a.index.intersection(b.index)
    if both.empty:
        return what, "too few images", "no image is in both"
    gap = 100 * (a[both].mean() - b[both].mean())
    return (what, _verdict(abs(gap) <= 5, len(both)),
            f"{gap:+.1f} points lower with {steps[1]} steps than with {steps[0]}, {len(both)} images")


def mcnemar(first, second):
    """Exact McNemar test of two methods on the same images: (only first right, only second right, p)."""
    from scipy.stats import binomtest
    first, second = _truths(first), _truths(second)
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} images of the first and {len(second)} of the second; "
                         "expected as many, and at least one")
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


def _plain(text):
    """Text in one line: what cannot be printed (line ends, control characters, lone surrogates) is a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _markdown(table):
    def escape(cell):
        return re.sub(r"[\\`|<$]|\](?=\()", r"\\\g<0>", _plain(cell)) if isinstance(cell, str) else cell
    shown = table.map(escape).set_axis([escape(str(column)) for column in table], axis=1)
    text = [k for k in range(shown.shape[1]) if any(isinstance(cell, str) for cell in shown.iloc[:, k])]
    return shown.to_markdown(index=False, disable_numparse=text) + "\n"         # or the text "007" would be the number 7


TEXT_WIDTH, GAP = 345, 3            # points: an article's text at 10 pt, and half of what lies between two columns
TEX = str.maketrans({"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
                     "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
                    | {c: f"\\{c}" for c in "&%$#_{}"})


def _tex_plain(cell):
    """A cell in characters that LaTeX has without a package; intervals with a dash, as they are narrower."""
    text = re.sub(r"[^ -~À-ÖØ-öø-ÿ–—‘’“”]|[ÐÞðþ]", "?", _plain(cell))
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
        parts = [word] if _points(word) <= width else [word[i:i + 3] for i in range(0, len(word), 3)]
        return r"\penalty5000 ".join(part.translate(TEX) for part in parts)
    return r"\raggedright " + " ".join(map(word_in_tex, text.split(" ")))


def _latex(table):
    """A tabular in footnotesize, as wide as a text: each column has what it needs, long ones an equal part of the rest."""
    lines = [[_tex_plain(cell) for cell in line] for line in (table.columns, *table.itertuples(index=False, name=None))]
    columns = list(zip(*lines))
    needs = [max(map(_points, [*cells[1:], *cells[0].split()]), default=9) for cells in columns]    # a heading may be wrapped
    left, widths = TEXT_WIDTH - 2 * GAP * (len(needs) - 1), [0] * len(needs)
    for waiting, k in zip(range(len(needs), 0, -1), sorted(range(len(needs)), key=needs.__getitem__)):
        widths[k] = math.floor(min(needs[k] + 1, left / waiting))
        left -= widths[k]
    rows = [" & ".join(_tex_cell(*cell) for cell in zip(line, widths)) + r" \tabularnewline" for line in lines]
    spec = "".join(f"p{{{width}pt}}" for width in widths)
    return "\n".join([r"\begingroup\footnotesize\exhyphenpenalty=1000\setlength{\tabcolsep}{" + f"{GAP}pt}}%",
                      r"\begin{tabular}{@{}" + spec + "@{}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule",
                      r"\end{tabular}\endgroup", ""])


# ---------------------------------------------------------------- figures, whose texts may be captions


def style():
    """The look of every figure: seaborn's colour-blind palette, white ground, no chart junk. No text of a table is cut."""
    import matplotlib.pyplot as plt
    import seaborn as sns
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"figure.dpi": 66, "savefig.dpi": 160, "savefig.bbox": "tight", "figure.constrained_layout.use": True})
    pd.set_option("display.max_colwidth", None, "display.max_columns", None, "display.max_rows", 200)


def save_figure(figure, folder, name):
    """`name`.png and .pdf below `folder`, each written whole; the same for the same figure, without a date."""
    folder, files = Path(folder), {"png": io.BytesIO(), "pdf": io.BytesIO()}
    figure.savefig(files["png"], format="png", metadata={"Software": None})
    figure.savefig(files["pdf"], format="pdf", metadata={"CreationDate": None})
    folder.mkdir(parents=True, exist_ok=True)
    for ending, file in files.items():
        write_whole(folder / f"{name}.{ending}", file.getvalue())


def _wrapped(text, wrap):
    """At most eight lines of so many characters."""
    return "\n".join(textwrap.wrap(_plain(text), wrap, max_lines=8, placeholder=" ..."))


def image_grid(rows, row_names=None, titles=None, colours=None, scale=1.25, wrap=22, fontsize=8):
    """A figure of images: `rows` holds sequences of [3, h, w] in [0, 1]; titles and colours of the same form, or None.

    All texts are shown as they are: a `$` begins no formula.
    """
    import matplotlib.pyplot as plt
    n = max(len(row) for row in rows)
    lines = max((_wrapped(t, wrap).count("\n") + 1 for line in titles or [] for t in line or []), default=0)
    figure, axes = plt.subplots(len(rows), n, figsize=(scale * n, (scale + 0.15 * lines) * len(rows)), squeeze=False)
    for r, row in enumerate(rows):
        for c in range(n):
            axis = axes[r][c]
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if c < len(row):
                axis.imshow(row[c].detach().float().cpu().clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
                if titles and titles[r] is not None:
                    axis.set_title(_wrapped(titles[r][c], wrap), fontsize=fontsize, pad=3, parse_math=False,
                                   color=colours[r][c] if colours and colours[r] is not None else "black")
        if row_names:
            axes[r][0].set_ylabel(_plain(row_names[r]), fontsize=fontsize + 1, parse_math=False)
    return figure


def caption_under(axes, captions, wrap=22, fontsize=8):
    """Write a caption below each of the axes."""
    for axis, caption in zip(axes, captions):
        axis.set_xlabel(_wrapped(caption, wrap) or "(no caption)", fontsize=fontsize, parse_math=False)


def _name_bars(axis, names):
    """Horizontal bars from the top, in % of images, each with its name."""
    axis.set_yticks(range(len(names)), [_plain(name) for name in names], parse_math=False)
    axis.set(xlim=(0, 100), xlabel="% of images, with the 95 % interval")
    axis.invert_yaxis()


def bars(table, axis, colour=None):
    """Horizontal bars of a table of `share` rows, with their intervals."""
    low, high = zip(*(map(float, text.split(" to ")) for text in table["95 % interval"]))
    values = table["%"].to_numpy()
    axis.barh(range(len(table)), values, color=colour, height=0.6,
              xerr=[values - pd.Series(low).to_numpy(), pd.Series(high).to_numpy() - values], error_kw={"lw": 1, "capsize": 2})
    _name_bars(axis, table.index)


def accuracy_figure(entries, title):
    """Natural and robust accuracy of each row (dicts as in `beside_paper`) with intervals, and the paper's numbers where it has them.

    entries: the same dicts, with the paper's numbers as "paper natural" and "paper robust" where known (`with_paper`).
    """
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(8.5, 0.8 + 0.46 * len(entries)))
    for k, (name, colour) in enumerate((("natural", "C0"), ("robust", "C1"))):
        places = [i + 0.2 * (2 * k - 1) for i, row in enumerate(entries) if row[name]]
        found = [row[name] for row in entries if row[name]]
        if found:
            values = pd.Series([f["%"] for f in found])
            low, high = (pd.Series([float(f["95 % interval"].split(" to ")[side]) for f in found]) for side in (0, 1))
            axis.barh(places, values, height=0.36, color=colour, label=f"{name}, here", error_kw={"lw": 1, "capsize": 2},
                      xerr=[(values - low).clip(lower=0), (high - values).clip(lower=0)])
        printed = [(float(row[f"paper {name}"]), i + 0.2 * (2 * k - 1)) for i, row in enumerate(entries) if row.get(f"paper {name}")]
        if printed:
            axis.scatter(*zip(*printed), marker="D", s=26, facecolor="white", edgecolor=colour, linewidth=1.5, zorder=3,
                         label=f"{name}, the paper's")
    _name_bars(axis, [row["method"] + f" | {row['attack']}" * bool(row["attack"]) + ", flagged" * bool(row.get("flags"))
                      for row in entries])
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_title(_wrapped(title, 80), fontsize=11, loc="left", parse_math=False)
    return figure


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
        out.append({**row, "method": paper["method"], "attack": paper["attack"],
                    "paper natural": paper["natural"], "paper robust": paper["robust"]})
    return out + list(ours.values())
