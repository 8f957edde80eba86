"""From rows to what a reader sees: intervals, tables and figures. Needs no model and no GPU."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd

from .profiles import ROOT


def wilson(k, n):
    """95 % Wilson interval of k successes in n, as two fractions (scipy)."""
    from scipy.stats import binomtest
    interval = binomtest(int(k), int(n)).proportion_ci(confidence_level=0.95, method="wilson")
    return interval.low, interval.high


def share(flags):
    """{"%", "95 % interval", "k", "n"} of a column of True and False: a number is never alone."""
    return _share(int(sum(map(bool, flags))), len(flags))


def _interval(k, n):
    """`wilson` of a count that may lie between whole numbers: it then reaches from the interval of the one to that of the other."""
    return wilson(math.floor(k + 1e-9), n)[0], wilson(math.ceil(k - 1e-9), n)[1]


def _share(k, n):
    """A `share` of a count that may lie between whole numbers."""
    low, high = _interval(k, n)
    return {"%": round(100 * k / n, 1), "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}", "k": round(k, 3), "n": n}


def accuracy(rows, column="adversarial", how="mean"):
    """`share` of the images whose label the defence finds, from the matrix of images x noise draws.

    rows: one defence's rows of `evaluate.Evaluation`; column: "clean" or "adversarial". how: "mean" over the draws (the interval
    is that of the images, whose number and not that of the draws counts), "majority" (the label predicted most often; the lower
    one if tied), or "worst" (right in every draw). Raises ValueError where an image lacks a draw.
    """
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
    """
    out = []
    for defence, (method, label) in names.items():
        own = rows[rows["defence"] == defence]
        out.append({"method": method, "attack": label, "natural": accuracy(own, "clean"), "robust": accuracy(own),
                    "eps": f"{attack.eps_255:g}/255", "seconds": round(float(own.drop_duplicates("index")["seconds"].sum()), 1),
                    "unreliable": bool((own["flags"] != "").any()), "whole": attack.view != "blind" or defence in whole,
                    "protocol": attack.describe() + (f"; mean of {own['draw'].nunique()} draws" if own["draw"].max() else "")})
    return out


def paired(rows, first, second, column="adversarial"):
    """Two defences on the same images and the same noise (draw 0), by an exact McNemar test: {what is counted: how many, ..., "p"}."""
    one = rows[rows["draw"] == 0].assign(right=lambda r: r[column] == r["label"]).pivot(index="index", columns="defence", values="right")
    b, c, p = mcnemar(one[first], one[second])
    return {"first": first, "second": second, "right with the first alone": b, "with the second alone": c, "n": len(one),
            "exact McNemar p": f"{p:.2g}"}


def caption_readers(rows, classes, defence="LGAP"):
    """A defence's rows as those of a rival that looks at no image and takes for its label what the caption names: "caption alone".

    rows: of `evaluate.Evaluation.run`; classes: the names. A caption that names none of them, or several, counts as label -1: wrong.
    The rows of draw 0 alone, as captions draw no noise.
    """
    from .data import names_class
    own = rows[(rows["defence"] == defence) & (rows["draw"] == 0)]
    named = {caption: [k for k, name in enumerate(classes) if names_class(caption, name)]
             for caption in {*own["caption"], *own["caption_clean"]}}
    label = {caption: found[0] if len(found) == 1 else -1 for caption, found in named.items()}
    return own.assign(defence="caption alone", clean=own["caption_clean"].map(label), adversarial=own["caption"].map(label))


def in_words(found):
    """A `share` as one cell of a table: "58.7 (52.1 to 65.0)"."""
    return "not run" if found is None else f"{found['%']:.1f} ({found['95 % interval']})"


def ladder(runs, classes=None, defence="LGAP"):
    """Accuracies of one defence under several attacks: a DataFrame with a row per attack.

    runs: {what the table calls it: (attack, rows of `evaluate.Evaluation.run`)}. classes: with their names, how often the caption
    of the attacked image names the right one has a column (`caption_readers`).
    """
    table = {}
    for name, (attack, rows) in runs.items():
        own = rows[rows["defence"] == defence]
        table[name] = {"natural, %": in_words(accuracy(own, "clean")), "robust, mean of draws, %": in_words(accuracy(own)),
                       "majority, %": in_words(accuracy(own, how="majority")), "worst draw, %": in_words(accuracy(own, how="worst")),
                       **({"caption alone, %": in_words(accuracy(caption_readers(rows, classes, defence)))} if classes else {}),
                       "n": own["index"].nunique(), "draws": own["draw"].nunique(), "protocol": attack.describe()}
    return pd.DataFrame(table).T.rename_axis(f"{defence} under")


# ---------------------------------------------------------------- beside the paper


def paper_numbers(table):
    """The paper's rows of one table, as printed: a DataFrame of text."""
    numbers = pd.read_csv(ROOT / "paper" / "numbers.csv", dtype=str, keep_default_na=False)
    return numbers[numbers["table"] == str(table)].reset_index(drop=True)


def beside_paper(table, ours, same_models):
    """The paper's table with our measurements beside it: a DataFrame in which no cell is blank.

    ours: dicts {"method", "attack", "natural", "robust" (shares, or None where not run), "protocol"}; one whose method and
    attack are a row of the paper stands in that row, the others follow. same_models: whether ours are the paper's models and
    data; only then is a number called "inside" or "outside" of our interval.
    """
    ours, lines = {(row["method"], row["attack"]): row for row in ours}, []
    for _, paper in paper_numbers(table).iterrows():
        lines.append((paper, ours.pop((paper["method"], paper["attack"]), None)))
    lines += [(None, row) for row in ours.values()]

    def verdict(printed, found):
        if found is None:
            return "not run"
        if not printed or not same_models:
            return "other models" if printed else "not in the paper"
        low, high = (100 * bound for bound in _interval(found["k"], found["n"]))        # not the rounded ones that the table shows
        return "inside" if low <= float(printed) <= high else "outside"

    def against(natural, robust):
        return natural if natural == robust else f"natural {natural}, robust {robust}"

    out = []
    for paper, row in lines:
        measured = row or {"natural": None, "robust": None, "protocol": "quoted from the paper"}
        printed = paper if paper is not None else {"natural": "", "robust": "", "cited": "no", "architecture": "not in the paper"}
        found = measured["robust"] or measured["natural"]
        source = paper if paper is not None else row
        out.append({"method": source["method"] + ("*" if printed["cited"] == "yes" else ""), "attack": source["attack"] or "none",
                    "architecture in the paper": printed["architecture"] or "not given",
                    "paper natural": printed["natural"] or "not given", "paper robust": printed["robust"] or "not given",
                    "natural here, %": in_words(measured["natural"]), "robust here, %": in_words(measured["robust"]),
                    "n": found["n"] if found else "not run",
                    "paper's number": against(*(verdict(printed[name], measured[name]) for name in ("natural", "robust"))),
                    "protocol": measured["protocol"]})
    return pd.DataFrame(out).set_index(["method", "attack"])


def write_results(folder, table, rows, provenance):
    """Put `rows` (dicts as in `beside_paper`) and where they come from into folder/results.json, beside the other tables'.

    Fields are named as in RobustBench's model_info where it has them. Written whole; nothing but times and versions changes
    from run to run.
    """
    from .files import write_whole
    file = Path(folder) / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    paper = {(r["method"], r["attack"]): r for _, r in paper_numbers(table).iterrows()}
    value = lambda found, key: None if found is None else found[key]
    entries = []
    for row in rows:
        printed = paper.get((row["method"], row["attack"]), {})
        entry = {"name": row["method"], "attack": row["attack"], "footnote": row["protocol"], "clean_acc": value(row["natural"], "%"),
                 "robust_acc": value(row["robust"], "%"), "reported": printed.get("robust") or None,
                 "reported_clean_acc": printed.get("natural") or None}
        for name in ("natural", "robust"):
            entry |= {f"{name}_{short}": value(row[name], column) for short, column in
                      {"interval": "95 % interval", "k": "k", "n": "n"}.items()}
        entry |= {"unreliable": row.get("unreliable", False), "eps": row.get("eps"), "seconds": row.get("seconds")}
        if row.get("whole") and "AutoAttack" in row["protocol"]:        # RobustBench means the model as it is deployed, not a transfer
            entry["autoattack_acc"] = entry["robust_acc"]
        entries.append(entry)
    results[f"table {table}"] = {"provenance": provenance, "rows": entries}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())


# ---------------------------------------------------------------- does the evaluation hold?


def audit(runs, *, defence="LGAP", stronger=(), eps_sweep=(), eps_zero=None, doubled=None):
    """What a sceptical reader would check of an evaluation: a DataFrame of checks, each "pass", "warn" or "not run".

    runs: {name: (attack, rows)} as for `ladder`. stronger: pairs of names (weaker, stronger): on the images that both have, no image
    that falls to the weaker may stand, in every draw, under the stronger. eps_sweep: names by rising eps. eps_zero: a run at
    eps 0. doubled: names of a run and of the same with twice the steps.
    """
    own = {name: rows[rows["defence"] == defence] for name, (_, rows) in runs.items()}
    right = {name: rows.assign(right=rows["adversarial"] == rows["label"]).groupby("index")["right"] for name, rows in own.items()}
    checks = []

    def check(what, verdict, detail):
        checks.append({"check": what, "verdict": "not run" if verdict is None else "pass" if verdict else "warn", "detail": detail})

    outside = {name: int((~rows["inside"]).sum()) for name, rows in own.items()}
    check("inside the ball and [0, 1]", not any(outside.values()), "; ".join(f"{n}: {k} rows outside" for n, k in outside.items() if k)
          or f"largest distance {255 * max(rows['linf'].max() for rows in own.values()):.2f}/255")
    if eps_zero is None or eps_zero not in own:
        check("eps 0 changes nothing", None, "no run at eps 0")
    else:
        rows = own[eps_zero]
        changed = int((rows["adversarial"] != rows["clean"]).sum())
        check("eps 0 changes nothing", changed == 0 and rows["linf"].max() == 0, f"{changed} of {len(rows)} labels differ")
    if len(eps_sweep) < 2:
        check("accuracy falls with eps", None, "no sweep")
    else:
        each = pd.concat([right[name].mean() for name in eps_sweep], axis=1, keys=eps_sweep).dropna()     # the images all of them have
        means = list(each.mean())
        signs = ["", *("=" if math.isclose(a, b) else ">" if a > b else "<" for a, b in zip(means, means[1:]))]
        check("accuracy falls with eps", "<" not in signs, " ".join(
            f"{sign} {100 * m:.1f} % at {runs[n][0].eps_255:g}/255" for sign, n, m in zip(signs, eps_sweep, means)).strip()
            + f", {len(each)} images")
    for weaker, strong in stronger:
        what = f"{strong} is no weaker than {weaker}"
        if weaker not in own or strong not in own:
            check(what, None, "one of them was not run")
            continue
        pair = pd.concat([right[weaker].all(), right[strong].all()], axis=1, keys=["weak", "strong"]).dropna().astype(bool)
        wrong = pair[~pair["weak"] & pair["strong"]]
        kept = f"of {len(pair)} images {int(pair['weak'].sum())} stand under the weaker, {int(pair['strong'].sum())} under the stronger"
        alone = "" if wrong.empty else f"; {len(wrong)} fall to the weaker alone, e.g. image {wrong.index[0]}"
        check(what, None if pair.empty else wrong.empty, kept + alone)
    for name, (attack, _) in runs.items():
        if attack.foreign:
            check(f"{name}: the attack's own flags", None, f"{type(attack).__name__} is not ours: what it notes is its affair")
        elif attack.optimiser == "pgd" and attack.eps_255 > 0:
            bad, steps = own[name].groupby("index")["bad_gradients"].first(), attack.n_steps * attack.n_restarts
            check(f"{name}: gradient neither zero nor NaN", bool((bad == 0).all()),
                  f"{int((bad > 0).sum())} of {len(bad)} images had one in {steps} steps")
        elif attack.optimiser in ("autoattack", "square"):
            flags = own[name].groupby("index")["flags"].first()
            counts = flags[flags != ""].value_counts()
            together = f", each flag that of a block of {attack.block}" * (attack.block > 1)
            check(f"{name}: AutoAttack's own flags", counts.empty, "; ".join(f"{n} images: {f}" for f, n in counts.items()) + together
                  if len(counts) else f"none on {len(flags)} images")
    if doubled is None or not set(doubled) <= set(own):
        check("doubling the steps changes little", None, "no run with twice the steps")
    else:
        a, b = (right[name].mean() for name in doubled)
        steps = [runs[name][0].n_steps for name in doubled]
        both = a.index.intersection(b.index)
        gap = 100 * (a[both].mean() - b[both].mean())
        check("doubling the steps changes little", abs(gap) <= 5 if len(both) else None,
              f"{gap:+.1f} points lower with {steps[1]} steps than with {steps[0]}, {len(both)} images")
    return pd.DataFrame(checks).set_index("check")


def mcnemar(first, second):
    """Exact McNemar test of two methods on the same images: (only first right, only second right, p)."""
    from scipy.stats import binomtest
    b = int(sum(bool(f) and not s for f, s in zip(first, second)))
    c = int(sum(bool(s) and not f for f, s in zip(first, second)))
    return b, c, binomtest(b, b + c).pvalue if b + c else 1.0


def save_table(table, folder, name):
    """`name`.csv, .md and .tex below `folder`; returns the table, to be shown."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv")
    (folder / f"{name}.md").write_text(table.reset_index().to_markdown(index=False) + "\n")
    escaped = table.style.format(escape="latex").format_index(escape="latex").format_index(escape="latex", axis=1)
    (folder / f"{name}.tex").write_text(escaped.to_latex(hrules=True))
    return table


def style():
    """The look of every figure: seaborn's colour-blind palette, white ground, no chart junk."""
    import matplotlib.pyplot as plt
    import seaborn as sns
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"figure.dpi": 66, "savefig.dpi": 160, "savefig.bbox": "tight", "figure.constrained_layout.use": True})


def save_figure(figure, folder, name):
    """`name`.png and .pdf below `folder`; the same file for the same figure, without a date."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def image_grid(rows, row_names=None, titles=None, colours=None, scale=1.25, wrap=22, fontsize=8):
    """A figure of images: `rows` holds sequences of [3, h, w] in [0, 1]; titles and colours of the same form, or None."""
    import textwrap

    import matplotlib.pyplot as plt
    n = max(len(row) for row in rows)
    lines = max((len(textwrap.wrap(t, wrap)) for line in titles or [] for t in line or []), default=0)
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
                    axis.set_title("\n".join(textwrap.wrap(titles[r][c], wrap)), fontsize=fontsize, pad=3,
                                   color=colours[r][c] if colours and colours[r] is not None else "black")
        if row_names:
            axes[r][0].set_ylabel(row_names[r], fontsize=fontsize + 1)
    return figure


def caption_under(axes, captions, wrap=22, fontsize=8):
    """Write a caption below each of the axes."""
    import textwrap
    for axis, caption in zip(axes, captions):
        axis.set_xlabel("\n".join(textwrap.wrap(caption, wrap)) or "(no caption)", fontsize=fontsize)


def bars(table, axis, colour=None):
    """Horizontal bars of a table of `share` rows, with their intervals."""
    low, high = zip(*(map(float, text.split(" to ")) for text in table["95 % interval"]))
    values = table["%"].to_numpy()
    axis.barh(range(len(table)), values, color=colour, height=0.6,
              xerr=[values - pd.Series(low).to_numpy(), pd.Series(high).to_numpy() - values], error_kw={"lw": 1, "capsize": 2})
    axis.set(yticks=range(len(table)), yticklabels=table.index, xlim=(0, 100), xlabel="% of images, with the 95 % interval")
    axis.invert_yaxis()


def accuracy_figure(entries, title):
    """Natural and robust accuracy of each row (dicts as in `beside_paper`) with intervals, and the paper's numbers where it has them.

    entries: the same dicts, with the paper's numbers as "paper natural" and "paper robust" where known.
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
    axis.set(yticks=range(len(entries)), xlim=(0, 100), xlabel="% of images, with the 95 % interval",
             yticklabels=[row["method"] + (f" | {row['attack']}" if row["attack"] else "") for row in entries])
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_title(title, fontsize=11, loc="left")
    return figure


def with_paper(table, rows):
    """`rows` with the paper's numbers for the same method and attack, and the paper's rows that were not run, for a figure."""
    ours = {(row["method"], row["attack"]): row for row in rows}
    out = []
    for _, paper in paper_numbers(table).iterrows():
        row = ours.pop((paper["method"], paper["attack"]), None) or {"natural": None, "robust": None}
        out.append({"method": paper["method"], "attack": paper["attack"], **row,
                    "paper natural": paper["natural"], "paper robust": paper["robust"]})
    return out + list(ours.values())
