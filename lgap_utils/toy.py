"""The toy data set: 32 x 32 colour scenes that the code draws, each from (split, index) alone.

Each is one shape of ten, the class, on a textured background. Its caption also names size, colour, place,
texture and background colour. Contrast is low and noise strong on purpose: an undefended network classifies
these scenes almost without error, and an L-inf attack of 8/255 fools it on almost all of them.
"""

from __future__ import annotations

import itertools

import numpy as np

SIDE = 32
COLOURS = {
    "red": (0.80, 0.20, 0.20),
    "green": (0.20, 0.65, 0.25),
    "blue": (0.20, 0.30, 0.80),
    "yellow": (0.85, 0.80, 0.20),
    "purple": (0.60, 0.25, 0.70),
    "orange": (0.90, 0.55, 0.15),
    "white": (0.90, 0.90, 0.90),
    "black": (0.12, 0.12, 0.12),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
ROWS, COLUMNS = {"top": -1, "": 0, "bottom": 1}, {"left": -1, "": 0, "right": 1}
CONTRAST = (0.5, 0.8)
SPLITS = {"train": 0, "validation": 1, "test": 2}


def _triangle(u: np.ndarray, v: np.ndarray, inner: float = 0.52) -> np.ndarray:
    """An equilateral triangle with inradius `inner`."""
    angles = -np.pi / 2 + np.pi / 3 + 2 * np.pi * np.arange(3) / 3
    return np.min([inner - (u * np.cos(a) + v * np.sin(a)) for a in angles], axis=0)


def _star(u: np.ndarray, v: np.ndarray, inner: float = 0.42) -> np.ndarray:
    """Five points of radius 1, valleys of radius `inner`: one edge line, mirrored and turned ten times."""
    angle = np.arctan2(u, -v) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    r = np.hypot(u, v)
    x, y = r * np.cos(angle), r * np.sin(angle)
    px, py = inner * np.cos(np.pi / 5) - 1, inner * np.sin(np.pi / 5)
    return (px * y - py * (x - 1)) / np.hypot(px, py)


def _bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(0.28 - abs(u), 0.95 - abs(v))


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    shaft = np.minimum(0.20 - abs(v), np.minimum(u + 0.95, 0.3 - u))
    return np.maximum(shaft, 0.8 * np.minimum(u - 0.05, 0.62 - 0.75 * abs(v) - 0.68 * (u - 0.05)))


# About the signed distance to a shape's edge, positive inside; u points right, v down, the radius is 1.
SHAPES = {
    "circle": lambda u, v: 0.88 - np.hypot(u, v),
    "square": lambda u, v: 0.76 - np.maximum(abs(u), abs(v)),
    "triangle": lambda u, v: _triangle(u, v - 0.12),
    "star": _star,
    "cross": lambda u, v: np.maximum(_bar(u, v), _bar(v, u)),
    "ring": lambda u, v: 0.22 - abs(np.hypot(u, v) - 0.72),
    "heart": lambda u, v: 0.5 * (1 - np.hypot(1.15 * u, -1.15 * v + 0.15 - 0.75 * np.sqrt(abs(u)))),
    "moon": lambda u, v: np.minimum(0.92 - np.hypot(u, v), np.hypot(u - 0.50, v) - 0.72),
    "arrow": _arrow,
    "diamond": lambda u, v: 0.62 * (1 - abs(u) / 0.55 - abs(v) / 0.98),
}
CLASSES = tuple(SHAPES)


def draw(split: str, index: int) -> tuple[np.ndarray, int, str]:
    """Scene `index` of a split, by these two alone: (uint8 image [32, 32, 3], label 0 to 9, caption)."""
    rng = np.random.default_rng([SPLITS[split], int(index)])
    pick = lambda options: options[int(rng.random() * len(options))]
    between = lambda low, high: low + (high - low) * rng.random()

    label = int(rng.random() * len(CLASSES))
    colour = pick(list(COLOURS))
    ground = pick([c for c in COLOURS if c != colour])
    texture, large = pick(TEXTURES), rng.random() < 0.5
    radius = between(11, 13.5) if large else between(7.5, 9.5)
    row, column = pick(list(itertools.product(ROWS, COLUMNS)))
    free = SIDE / 2 - radius - 0.5
    cx = SIDE / 2 + free * (COLUMNS[column] * 0.8 + between(-0.2, 0.2))
    cy = SIDE / 2 + free * (ROWS[row] * 0.8 + between(-0.2, 0.2))

    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    turn = between(-0.25, 0.25)
    u, v = (x - cx) / radius, (y - cy) / radius
    u, v = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
    inside = np.clip(0.5 + SHAPES[CLASSES[label]](u, v) * radius, 0, 1)[..., None]

    period, slant, shift = between(5, 8), between(0, np.pi), between(0, 8)
    a = x * np.cos(slant) + y * np.sin(slant) + shift
    b = y * np.cos(slant) - x * np.sin(slant) + shift
    wave = {
        "plain": np.zeros_like(a),
        "striped": np.sign(np.sin(2 * np.pi * a / period)),
        "dotted": 2.0 * (np.hypot(a % period - period / 2, b % period - period / 2) < 0.3 * period) - 1,
        "checkered": np.sign(np.sin(2 * np.pi * a / (1.5 * period)) * np.sin(2 * np.pi * b / (1.5 * period))),
    }[texture]

    jitter = lambda c: np.clip(np.array(COLOURS[c]) + 0.08 * (rng.random(3) - 0.5), 0, 1)
    fill, back = jitter(colour), jitter(ground)
    back = back + between(0.05, 0.09) * wave[..., None]
    contrast = between(*CONTRAST)  # the shape is a veil over the background, not a sticker
    image = back + inside * contrast * (fill - back)
    image = image + between(0.01, 0.04) * rng.standard_normal((SIDE, SIDE, 3))
    size, place = "large" if large else "small", f"{row} {column}".strip()
    where = f"at the {place}" if place else "in the middle"
    caption = f"a {size} {colour} {CLASSES[label]} {where} of a {texture} {ground} picture"
    return (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8), label, caption
