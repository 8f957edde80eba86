"""Rows and table rows made by hand, whose accuracies can be counted; and captions that no file may obey."""

import dataclasses
from types import SimpleNamespace

import pandas as pd

from lgap_utils.profiles import get_profile
from lgap_utils.protocols import get_attack

MATRIX = [[0, 0, 0], [0, 1, 0], [1, 1, 0], [2, 1, 1]]  # right in 3, 2, 1 and 0 of 3 draws
ATTACK, STRONGER = get_attack("blind PGD-40"), get_attack("BPDA-40")
CAPTION = [
    "",
    "a cat",
    "$\\frac{1$",
    "a | b",
    "two\nlines\r\nand\ttabs",
    "<script>alert(1)</script>",
    "\\input{/etc/passwd} \\write18{ls}",
    "100 % & #1_x {y} ~^",
    "}{\\end{tabular}",
    "[2pt] first",
    "* starred",
    "a [link](javascript:x)",
    "`code` \\| \\",
    "007",
    "1e5",
    "nan",
    "\U0001f600 \u732b \u202egnp.exe",
    "\x00\x07\x1b[31m",
    "W" * 10_000,
    "word " * 300,
    "caf\u00e9 \u00d8 \u00df \u00f0 \u2013 \u201cq\u201d",
]


def rows_of(matrix, labels=None, defence="LGAP", **columns):
    """Rows of images x draws: matrix[i][d] is the label predicted for image i in draw d, 0 the true one."""
    plain = {"clean": 0, "inside": True, "linf": 8 / 255, "bad_gradients": 0, "flags": "", "seconds": 1.5}
    plain["random"] = len(matrix[0]) > 1
    rows = []
    for i, line in enumerate(matrix):
        label = labels[i] if labels else 0
        for draw, guess in enumerate(line):
            row = {"index": i, "label": label, "defence": defence, "draw": draw, "adversarial": guess}
            rows.append(plain | row | columns)
    return pd.DataFrame(rows)


def on_paper_data(table, official=True, **fields):
    """(profile, images) of the paper's own models, data set and images."""
    source = "all 7 images in imagenet/val by path sha256 0f; rows 0 to 6 sha256 1e"
    images = SimpleNamespace(official=official, source=source)
    return dataclasses.replace(get_profile("paper", table), **fields), images


def ours(natural=None, robust=None, attack="PGD", method="LGAP"):
    """A row of a table."""
    return {"method": method, "attack": attack, "natural": natural, "robust": robust, "protocol": "by hand"}
