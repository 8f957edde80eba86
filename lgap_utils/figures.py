"""figures."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

import pandas as pd

from .files import write_whole
from .tables import plain_text

# ---------------------------------------------------------------- figures, whose texts may be captions


def style():
    """The look of every figure: seaborn's colour-blind palette, white ground, no chart junk. No text of a table is cut."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(
        context="notebook",
        style="ticks",
        palette="colorblind",
        rc={"axes.spines.top": False, "axes.spines.right": False},
    )
    plt.rcParams.update(
        {"figure.dpi": 66, "savefig.dpi": 160, "savefig.bbox": "tight", "figure.constrained_layout.use": True}
    )
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
    return "\n".join(textwrap.wrap(plain_text(text), wrap, max_lines=8, placeholder=" ..."))


def image_grid(rows, row_names=None, titles=None, colours=None, scale=1.25, wrap=22, fontsize=8):
    """A figure of images: `rows` holds sequences of [3, h, w] in [0, 1]; titles and colours of the same form, or None.

    All texts are shown as they are: a `$` begins no formula.
    """
    import matplotlib.pyplot as plt

    n = max(len(row) for row in rows)
    lines = max((_wrapped(t, wrap).count("\n") + 1 for line in titles or [] for t in line or []), default=0)
    figure, axes = plt.subplots(
        len(rows), n, figsize=(scale * n, (scale + 0.15 * lines) * len(rows)), squeeze=False
    )
    for r, row in enumerate(rows):
        for c in range(n):
            axis = axes[r][c]
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if c < len(row):
                axis.imshow(
                    row[c].detach().float().cpu().clamp(0, 1).permute(1, 2, 0), interpolation="nearest"
                )
                if titles and titles[r] is not None:
                    axis.set_title(
                        _wrapped(titles[r][c], wrap),
                        fontsize=fontsize,
                        pad=3,
                        parse_math=False,
                        color=colours[r][c] if colours and colours[r] is not None else "black",
                    )
        if row_names:
            axes[r][0].set_ylabel(plain_text(row_names[r]), fontsize=fontsize + 1, parse_math=False)
    return figure


def caption_under(axes, captions, wrap=22, fontsize=8):
    """Write a caption below each of the axes."""
    for axis, caption in zip(axes, captions):
        axis.set_xlabel(_wrapped(caption, wrap) or "(no caption)", fontsize=fontsize, parse_math=False)


def _name_bars(axis, names):
    """Horizontal bars from the top, in % of images, each with its name."""
    axis.set_yticks(range(len(names)), [plain_text(name) for name in names], parse_math=False)
    axis.set(xlim=(0, 100), xlabel="% of images, with the 95 % interval")
    axis.invert_yaxis()


def bars(table, axis, colour=None):
    """Horizontal bars of a table of `share` rows, with their intervals."""
    low, high = zip(*(map(float, text.split(" to ")) for text in table["95 % interval"]))
    values = table["%"].to_numpy()
    axis.barh(
        range(len(table)),
        values,
        color=colour,
        height=0.6,
        xerr=[values - pd.Series(low).to_numpy(), pd.Series(high).to_numpy() - values],
        error_kw={"lw": 1, "capsize": 2},
    )
    _name_bars(axis, table.index)


def accuracy_figure(entries, title):
    """Natural and robust accuracy of each row (dicts as in `compare_with_paper`) with intervals, and the paper's numbers where it has them.

    entries: the same dicts, with the paper's numbers as "paper natural" and "paper robust" where known (`with_paper`).
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 0.8 + 0.46 * len(entries)))
    for k, (name, colour) in enumerate((("natural", "C0"), ("robust", "C1"))):
        places = [i + 0.2 * (2 * k - 1) for i, row in enumerate(entries) if row[name]]
        found = [row[name] for row in entries if row[name]]
        if found:
            values = pd.Series([f["%"] for f in found])
            low, high = (
                pd.Series([float(f["95 % interval"].split(" to ")[side]) for f in found]) for side in (0, 1)
            )
            axis.barh(
                places,
                values,
                height=0.36,
                color=colour,
                label=f"{name}, here",
                error_kw={"lw": 1, "capsize": 2},
                xerr=[(values - low).clip(lower=0), (high - values).clip(lower=0)],
            )
        printed = [
            (float(row[f"paper {name}"]), i + 0.2 * (2 * k - 1))
            for i, row in enumerate(entries)
            if row.get(f"paper {name}")
        ]
        if printed:
            axis.scatter(
                *zip(*printed),
                marker="D",
                s=26,
                facecolor="white",
                edgecolor=colour,
                linewidth=1.5,
                zorder=3,
                label=f"{name}, the paper's",
            )
    _name_bars(
        axis,
        [
            row["method"] + f" | {row['attack']}" * bool(row["attack"]) + ", flagged" * bool(row.get("flags"))
            for row in entries
        ],
    )
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_title(_wrapped(title, 80), fontsize=11, loc="left", parse_math=False)
    return figure
