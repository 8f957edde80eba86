"""Figures show our numbers and the paper's, and every text as it is."""

import warnings

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from made_rows import CAPTION, MATRIX, on_paper_data, ours, rows_of

from lgap_utils import figures, results, tables
from lgap_utils.protocols import NATURAL


@pytest.fixture(autouse=True)
def _figures():
    yield
    plt.close("all")


def test_figures_show_ours_and_the_papers(tmp_path):
    entries = tables.table_rows(rows_of(MATRIX), NATURAL, {"LGAP": ("LGAP", "PGD")})
    figure = figures.accuracy_figure(results.with_paper(1, entries, *on_paper_data(1)), "a title")
    (axis,) = figure.axes
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    assert "LGAP | PGD" in names and len(names) == len(results.paper_numbers(1))
    figures.save_figure(figure, tmp_path, "f")
    assert (tmp_path / "f.png").stat().st_size > 1000 and (tmp_path / "f.pdf").stat().st_size > 1000


def test_no_text_of_a_figure_is_a_formula(tmp_path):
    """A caption may stand in a title, below an image or beside a bar; mathtext would stop at a lone `$`."""
    picture = torch.zeros(3, 4, 4)
    grid = figures.image_grid([[picture] * len(CAPTION)], ["$\\frac{1$"], [CAPTION])
    figures.caption_under(grid.axes, CAPTION)
    assert grid.axes[2].get_title() == grid.axes[2].get_xlabel() == "$\\frac{1$"
    assert grid.axes[0].get_xlabel() == "(no caption)"
    assert max(axis.get_title().count("\n") for axis in grid.axes) < 8 and grid.get_size_inches()[1] < 5
    bars, axis = plt.subplots()
    shares = {f"{k}{caption[:40]}": tables.proportion([True]) for k, caption in enumerate(CAPTION)}
    figures.bars(pd.DataFrame(shares).T, axis)
    own = [ours(tables.proportion([True]), method=caption[:40], attack="$x") for caption in CAPTION]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        for k, figure in enumerate((grid, bars, figures.accuracy_figure(own, "of $\\frac{1$"))):
            figures.save_figure(figure, tmp_path, f"{k}")
            for ending in ("png", "pdf"):
                assert (tmp_path / f"{k}.{ending}").stat().st_size > 1000


def test_a_table_shown_is_not_cut():
    with pd.option_context("display.max_colwidth", 50, "display.max_rows", 60, "display.max_columns", 20):
        figures.style()
        wide = {"caption": ["word " * 100 + "<script>"]} | {f"c{k}": [k] for k in range(30)}
        html = pd.DataFrame(wide)._repr_html_()
        assert html.count("word ") == 100 and "<script>" not in html and "c29" in html
        assert "n79" in pd.DataFrame({"n": [f"n{k}" for k in range(150)]})._repr_html_()
