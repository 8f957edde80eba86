"""The picture of the method in docs/: python -m tools.diagram."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from lgap_utils.files import write_whole
from lgap_utils.picture import png
from lgap_utils.profiles import ROOT

BLUE, ORANGE, GREY = "#d8e8f5", "#fbe3cf", "#eeeeee"
# (left edge, width, text, colour) of the boxes in a row
STEPS = (
    (0.0, 1.1, "image x", GREY),
    (1.5, 1.3, "encode\n(VAE)", BLUE),
    (3.2, 1.5, "add noise\nof time t", BLUE),
    (5.1, 1.6, "denoise,\nguided", BLUE),
    (7.1, 1.3, "decode\n(VAE)", BLUE),
    (8.8, 1.5, "classify", ORANGE),
    (10.7, 0.9, "label", GREY),
)
CAPTION = (3.0, 1.9, "caption\n(BLIP)", ORANGE)
# (who, from, to, what): what a gradient passes through is solid, what is only run is dotted
ATTACKERS = (
    ("blind", [(8.8, 10.3)], [], "the classifier alone"),
    ("BPDA", [(8.8, 10.3)], [(1.5, 8.4)], "straight past the purifier"),
    ("caption", [(3.0, 4.9)], [], "the captioner alone"),
    ("full", [(1.5, 10.3)], [], "all but the caption, exactly"),
    ("joint", [(1.5, 10.3)], [], "all of it and the caption"),
)


def box(axis, left: float, bottom: float, width: float, text: str, colour: str) -> None:
    shape = FancyBboxPatch((left, bottom), width, 0.9, boxstyle="round,pad=0.02,rounding_size=0.1", fc=colour)
    axis.add_patch(shape)
    axis.text(left + width / 2, bottom + 0.45, text, ha="center", va="center", fontsize=12)


def arrow(axis, start: tuple[float, float], end: tuple[float, float], bend: float = 0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "color": "#333333", "shrinkA": 0, "shrinkB": 1}
    axis.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def draw() -> Figure:
    figure = Figure((9.7, 4.6), dpi=150)
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.set(xlim=(-0.1, 14.4), ylim=(-3.6, 2.9))
    axis.set_axis_off()
    for left, width, text, colour in STEPS:
        box(axis, left, 0, width, text, colour)
    for (left, width, *_), (following, *_) in zip(STEPS, STEPS[1:]):
        arrow(axis, (left + width + 0.03, 0.45), (following - 0.03, 0.45))
    left, width, text, colour = CAPTION
    box(axis, left, 1.7, width, text, colour)
    arrow(axis, (0.55, 0.95), (left - 0.05, 2.15), -0.25)
    arrow(axis, (left + width + 0.05, 2.15), (5.9, 0.97), -0.25)
    axis.text(6.0, 1.75, '"a brown cat"', fontsize=12, style="italic")
    axis.text(
        -0.1, -0.75, "what each attacker sees:  solid, with its gradient;  dotted, run only", fontsize=11.5
    )
    for k, (who, seen, run, what) in enumerate(ATTACKERS):
        y = -1.25 - 0.52 * k
        axis.text(-0.1, y, who, fontsize=12, va="center", weight="bold")
        for start, end in run:
            axis.plot([start, end], [y, y], color="#0072b2", lw=2, ls=(0, (1, 2)))
        for start, end in seen:
            axis.plot([start, start, end, end], [y + 0.12, y, y, y + 0.12], color="#0072b2", lw=2.5)
        if who == "joint":
            axis.plot([3.0, 3.0, 4.9, 4.9], [y + 0.22, y + 0.1, y + 0.1, y + 0.22], color="#d55e00", lw=2.5)
        axis.text(10.6, y, what, fontsize=11.5, va="center")
    return figure


if __name__ == "__main__":
    folder = ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "method.png", png(draw()))
