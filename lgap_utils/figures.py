"""Figures, in which any text may be a caption: it is shown as it is, and a `$` begins no formula."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .files import write_whole
from .picture import wrapped
from .words import plain_text

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def style() -> None:
    """The look of every figure: colour-blind palette, white ground, no frame. Notebooks show tables uncut."""
    import seaborn as sns
    from IPython import get_ipython

    look = {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 75, "savefig.dpi": 150}
    look |= {"savefig.bbox": "tight", "figure.constrained_layout.use": True}
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc=look)
    pd.set_option("display.max_colwidth", None, "display.max_columns", None, "display.max_rows", 200)
    if (notebook := get_ipython()) is not None:  # pixels at 150 dpi, shown at 75
        notebook.run_line_magic("config", "InlineBackend.figure_formats = ['retina']")


def save_figure(figure: Figure, folder: str | Path, name: str) -> None:
    """`name`.png and .pdf below `folder`, each written whole and without a date: equal for equal figures."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for ending, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        file = io.BytesIO()
        figure.savefig(file, format=ending, metadata=metadata)
        write_whole(folder / f"{name}.{ending}", file.getvalue())


def image_grid(
    rows: Sequence[Sequence[torch.Tensor]],
    row_names: Sequence[str] | None = None,
    titles: Sequence[Sequence[str] | None] | None = None,
    colours: Sequence[Sequence[str] | None] | None = None,
    scale: float = 1.25,
    wrap: int = 22,
    fontsize: int = 8,
) -> Figure:
    """Rows of images [3, h, w] in [0, 1]; titles and their colours in the same form, None for a row without.

    scale: inches of an image; wrap: characters in a line of a title.
    """
    import matplotlib.pyplot as plt

    n_columns = max(map(len, rows))
    texts = [[wrapped(text, wrap) for text in line or []] for line in titles or [None] * len(rows)]
    n_lines = max((text.count("\n") + 1 for line in texts for text in line), default=0)
    size = (scale * n_columns, (scale + 0.15 * n_lines) * len(rows))
    figure, axes = plt.subplots(len(rows), n_columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for r, images in enumerate(rows):
        shades = colours[r] if colours else None
        for c, image in enumerate(images):
            pixels = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0)
            axes[r, c].imshow(pixels, interpolation="nearest")
            if texts[r]:
                colour = shades[c] if shades else "black"
                axes[r, c].set_title(texts[r][c], fontsize=fontsize, pad=3, parse_math=False, color=colour)
        if row_names:
            axes[r, 0].set_ylabel(plain_text(row_names[r]), fontsize=fontsize + 1, parse_math=False)
    return figure


def caption_under(axes: Iterable[Axes], captions: Iterable[str], wrap: int = 22, fontsize: int = 8) -> None:
    """Write a caption below each of the axes."""
    for axis, caption in zip(axes, captions):
        axis.set_xlabel(wrapped(caption, wrap) or "(no caption)", fontsize=fontsize, parse_math=False)


def _errors(shares: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The percents of shares (`tables.proportion`), and how far their intervals reach down and up."""
    values = np.array([share["%"] for share in shares])
    bounds = np.array([share["95 % interval"].split(" to ") for share in shares], dtype=float)
    return values, [(values - bounds[:, 0]).clip(0), (bounds[:, 1] - values).clip(0)]


def _bars(axis: Axes, places: Sequence[float], shares: Sequence[Mapping[str, Any]], **look) -> None:
    """Horizontal bars of shares (`tables.proportion`) with their intervals."""
    values, errors = _errors(shares)
    axis.barh(places, values, xerr=errors, error_kw={"lw": 1, "capsize": 2}, **look)


def _name_bars(axis: Axes, names: Sequence[str]) -> None:
    """The names of horizontal bars, from the top."""
    axis.set_yticks(range(len(names)), [plain_text(name) for name in names], parse_math=False)
    axis.set(xlim=(0, 100), xlabel="% of images, with the 95 % interval")
    axis.invert_yaxis()


def bars(table: pd.DataFrame, axis: Axes, colour: str | Sequence[str] | None = None) -> None:
    """Horizontal bars of a table whose rows are shares (`tables.proportion`)."""
    _bars(axis, range(len(table)), table.to_dict("records"), height=0.6, color=colour)
    _name_bars(axis, list(table.index))


def accuracy_figure(entries: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Natural and robust accuracy of each entry with its interval, and the paper's numbers where it has them.

    entries: rows as from `tables.table_rows`, with the paper's numbers as from `results.with_paper`.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 0.8 + 0.46 * len(entries)))
    diamond = {"marker": "D", "s": 26, "facecolor": "white", "linewidth": 1.5, "zorder": 3}
    for name, colour, shift in (("natural", "C0", -0.2), ("robust", "C1", 0.2)):
        measured = [(i + shift, row[name]) for i, row in enumerate(entries) if row[name]]
        if measured:
            _bars(axis, *zip(*measured), height=0.36, color=colour, label=f"{name}, here")
        column = f"paper {name}"
        printed = [(float(row[column]), i + shift) for i, row in enumerate(entries) if row.get(column)]
        if printed:
            axis.scatter(*zip(*printed), edgecolor=colour, label=f"{name}, the paper's", **diamond)
    names = []
    for row in entries:
        attack = f" | {row['attack']}" if row["attack"] else ""
        names.append(row["method"] + attack + ", flagged" * bool(row.get("flags")))
    _name_bars(axis, names)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_title(wrapped(title, 80), fontsize=11, loc="left", parse_math=False)
    return figure


def lines(
    series: Mapping[str, Sequence[tuple[float, Mapping[str, Any] | None]]],
    ticks: Sequence[str],
    xlabel: str,
    title: str,
    marks: Sequence[tuple[float, float]] = (),
    marked: str = "",
) -> Figure:
    """Accuracies against the strength of an attack: a line with 95 % intervals for each name in `series`.

    series: {name: [(place, share from `tables`), ...]}, a place without a share left out. ticks: what stands
    at places 0, 1, ... marks: (place, percent) of numbers of others, called `marked`.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    for k, (name, points) in enumerate(series.items()):
        there = [(place + 0.06 * (k - (len(series) - 1) / 2), share) for place, share in points if share]
        places, values, errors = [place for place, _ in there], *_errors([share for _, share in there])
        look = {"marker": "os^v"[k % 4], "markersize": 5, "capsize": 2, "linewidth": 1.6, "elinewidth": 1}
        axis.errorbar(places, values, yerr=errors, label=plain_text(name), **look)
    if marks:
        axis.scatter(*zip(*marks), marker="D", s=42, c="white", edgecolors="black", label=marked, zorder=4)
    axis.set_xticks(range(len(ticks)), ticks, fontsize=7.5, parse_math=False)
    axis.tick_params(axis="y", labelsize=9)
    axis.set_ylim(-2, 102)
    axis.set_ylabel("% of images that stand, 95 % interval", fontsize=9)
    axis.set_xlabel(xlabel, fontsize=9)
    axis.grid(axis="y", linewidth=0.4)
    axis.set_title(wrapped(title, 78), fontsize=10, loc="left", parse_math=False)
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower center", ncols=3)
    return figure
