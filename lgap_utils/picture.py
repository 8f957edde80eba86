"""A picture of what became of an image: each stage with its caption, its label and how sure the label is."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_whole
from .words import plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

MARKS = {True: ("\N{CHECK MARK} ", "#00703c"), False: ("\N{BALLOT X} ", "#a3123a"), None: ("", "black")}


@dataclass(frozen=True, repr=False)
class Purified:
    """What became of one image: `image` [3, h, w] in [0, 1], `logits` [classes].

    source: the image as it was, before_logits: those of it without purification. A notebook shows a picture.
    """

    image: Tensor
    caption: str
    logits: Tensor
    trace: Any = None
    source: Tensor | None = None
    before_logits: Tensor | None = None
    classes: tuple[str, ...] | None = None

    @property
    def label(self) -> int:
        """The class of the highest logit."""
        return int(self.logits.argmax())

    def named(self, logits: Tensor | None = None) -> str:
        """The label by name and its softmax probability, "cat 97 %"; that of other logits where given."""
        logits = self.logits if logits is None else logits
        label = int(logits.argmax())
        name = f"class {label}" if self.classes is None else self.classes[label]
        return f"{name} {100 * float(logits.float().softmax(0)[label]):.0f} %"

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.image.shape))
        return f"Purified({self.named()}, caption {self.caption!r}, image {size})"

    def figure(self) -> Figure:
        """The image before and after, each with its label, and the caption."""
        after = Stage("purified", self.image, self.named())
        if self.source is None or self.before_logits is None:
            return draw([[after]])
        return draw([[Stage("as it was", self.source, self.named(self.before_logits), self.caption), after]])

    def _repr_png_(self) -> bytes:
        return png(self.figure())

    def save(self, path: str | os.PathLike) -> None:
        """Write that picture as a PNG. Raises ValueError for another ending, OSError where it cannot."""
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"{path}: expected a file that ends in .png")
        write_whole(Path(path), self._repr_png_())


@dataclass(frozen=True)
class Stage:
    """An image [3, h, w] in [0, 1] with a title, the label that it gets, and its caption, "" for none.

    right: whether the label is as it should be, which is shown as a tick or a cross; None shows neither.
    """

    title: str
    image: Tensor
    label: str = ""
    caption: str = ""
    right: bool | None = None


def wrapped(text: str, width: int, max_lines: int = 8) -> str:
    """At most `max_lines` lines of `width` characters."""
    return "\n".join(textwrap.wrap(plain_text(text), width, max_lines=max_lines, placeholder=" ..."))


def draw(rows: Sequence[Sequence[Stage]], note: str = "", inches: float = 2.4) -> Figure:
    """A figure of one row of stages for each image; `note` stands below. Any text is shown as it is."""
    from matplotlib.figure import Figure

    wide, wrap = max(map(len, rows)), int(inches * 11)
    note = wrapped(note, int(wide * inches * 12))
    height, below = inches + 1.05, 0.15 + 0.17 * len(note.splitlines())
    figure = Figure((wide * inches, height * len(rows) + below), dpi=150)
    axes = figure.subplots(len(rows), wide, squeeze=False)
    part = below / (height * len(rows) + below)
    figure.subplots_adjust(0.01, part + 0.78 / figure.get_figheight(), 0.99, 1 - 0.3 / figure.get_figheight())
    figure.subplots_adjust(wspace=0.04, hspace=1.05 / inches)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, stages in zip(axes, rows):
        for axis, stage in zip(line, stages):
            pixels = stage.image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0)
            axis.imshow(pixels, interpolation="nearest")
            axis.set_title(plain_text(stage.title), fontsize=11, pad=4, parse_math=False)
            mark, colour = MARKS[stage.right]
            look = {"ha": "center", "va": "top", "transform": axis.transAxes, "parse_math": False}
            axis.text(
                0.5, -0.03, mark + plain_text(stage.label), fontsize=11, color=colour, weight="bold", **look
            )
            caption = wrapped(f'"{stage.caption}"', wrap, 3) if stage.caption else ""
            axis.text(0.5, -0.13, caption, fontsize=9.5, style="italic", **look)
    figure.text(0.5, 0.3 * part, note, ha="center", va="bottom", fontsize=9, parse_math=False)
    return figure


def png(figure: Figure, **metadata: str) -> bytes:
    """The figure as a PNG without a date: equal for equal figures."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None} | metadata)
    return file.getvalue()
