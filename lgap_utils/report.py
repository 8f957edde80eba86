"""From rows to what a reader sees: intervals, tables and figures. Needs no model and no GPU."""
from __future__ import annotations

from pathlib import Path

import pandas as pd


def wilson(k, n):
    """95 % Wilson interval of k successes in n, as two fractions (scipy)."""
    from scipy.stats import binomtest
    interval = binomtest(int(k), int(n)).proportion_ci(confidence_level=0.95, method="wilson")
    return interval.low, interval.high


def share(flags):
    """{"%", "95 % interval", "k", "n"} of a column of True and False: a number is never alone."""
    k, n = int(sum(map(bool, flags))), len(flags)
    low, high = wilson(k, n)
    return {"%": round(100 * k / n, 1), "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}", "k": k, "n": n}


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
