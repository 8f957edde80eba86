"""Does an evaluation hold? The checks of a sceptical reader, from rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from .rows import Frame
from .tables import Runs, flags_of, of_images

if TYPE_CHECKING:
    from .protocols import Attack

FEW_IMAGES = 10  # fewer are no evidence: of 10 that are all right, the 95 % interval begins at 72 %


@dataclass(frozen=True)
class Run:
    """One attack, and the rows of the audited defence under it."""

    name: str
    attack: Attack
    rows: Frame

    @property
    def right(self) -> Frame:
        """Whether the label is right in each draw, grouped by image."""
        return (self.rows["adversarial"] == self.rows["label"]).groupby(self.rows["index"])


def audit(
    runs: Runs,
    *,
    defence: str = "LGAP",
    stronger: Sequence[tuple[str, str]] = (),
    eps_sweep: Sequence[str] = (),
    eps_zero: str | None = None,
    doubled: tuple[str, str] | None = None,
) -> pd.DataFrame:
    """A table of checks, each with a verdict ("pass", "warn", "too few images" or "not run") and a detail.

    runs: {name: (attack, rows)}. stronger: names (weaker, stronger) of runs. eps_sweep: names by rising eps.
    eps_zero: a run at eps 0. doubled: a run and the same with twice the steps. A comparison of fewer than
    FEW_IMAGES images is "too few images". Raises ValueError for no run, or one without rows of the defence.
    """
    if not runs:
        raise ValueError("an audit of no runs; expected at least one")
    own = {k: Run(k, attack, of_images(rows, defence, f"{k}: ")) for k, (attack, rows) in runs.items()}

    def row(title: str, check: Callable, names: Iterable, missing: str = "") -> tuple[str, str, str]:
        if all(name in own for name in names):
            return title, *check(*(own[name] for name in names))
        return title, "not run", missing

    sweep = eps_sweep if len(eps_sweep) > 1 else [None]
    table = [
        row("inside the ball and [0, 1]", _inside, own),
        row("eps 0 changes nothing", _nothing_at_zero, [eps_zero], "no run at eps 0"),
        row("accuracy falls with eps", _falls_with_eps, sweep, "no sweep"),
    ]
    for weak, strong in stronger:
        title = f"{strong} is no weaker than {weak}"
        table.append(row(title, _no_weaker, [weak, strong], "one of them was not run"))
    for run in own.values():
        table += [(f"{run.name}: {title}", verdict, detail) for title, verdict, detail in _noticed(run)]
    missing = "no run with twice the steps"
    table.append(row("doubling the steps changes little", _doubling, doubled or [None], missing))
    return pd.DataFrame(table, columns=["check", "verdict", "detail"]).set_index("check")


def _verdict(holds: bool, n_images: int = FEW_IMAGES) -> str:
    if n_images < FEW_IMAGES:
        return "too few images"
    return "pass" if holds else "warn"


def _inside(*runs: Run) -> tuple[str, str]:
    outside = []
    for run in runs:
        inside = run.rows["inside"].astype(bool) & run.rows["linf"].notna()
        if not inside.all():
            outside.append(f"{run.name}: {len(inside) - inside.sum()} rows outside")
    if outside:
        return "warn", "; ".join(outside)
    return "pass", f"largest distance {255 * max(run.rows['linf'].max() for run in runs):.2f}/255"


def _nothing_at_zero(run: Run) -> tuple[str, str]:
    n_changed = int((run.rows["adversarial"] != run.rows["clean"]).sum())
    holds = n_changed == 0 and run.rows["linf"].max() == 0
    return _verdict(holds), f"{n_changed} of {len(run.rows)} labels differ"


def _falls_with_eps(*runs: Run) -> tuple[str, str]:
    means = pd.concat([run.right.mean() for run in runs], axis=1).dropna()  # of images that all runs have
    if means.empty:
        return "too few images", "no image is in all of them"
    signs, line, before = set(), [], None
    for run, mean in zip(runs, means.mean()):
        if before is not None:
            line.append("=" if math.isclose(before, mean) else ">" if before > mean else "<")
            signs.add(line[-1])
        line.append(f"{100 * mean:.1f} % at {run.attack.eps_255:g}/255")
        before = mean
    falls = ">" in signs and "<" not in signs
    detail = f"{' '.join(line)}, {len(means)} images" + "; did not fall" * (not falls)
    return _verdict(falls, len(means)), detail


def _no_weaker(weaker: Run, stronger: Run) -> tuple[str, str]:
    """What falls to the weaker must fall, in some draw, to the stronger; in the mean no more may stand."""
    every = pd.concat([weaker.right.all(), stronger.right.all()], axis=1).dropna().astype(bool)
    means = pd.concat([weaker.right.mean(), stronger.right.mean()], axis=1).dropna()
    every.columns = means.columns = ["weak", "strong"]
    n, wrong = every.sum(), every[~every["weak"] & every["strong"]]
    detail = f"of {len(every)} images {n['weak']} stand under the weaker, {n['strong']} under the stronger"
    if len(wrong):
        detail += f"; {len(wrong)} fall to the weaker alone, e.g. image {wrong.index[0]}"
    # with many draws few images stand in all of them, under either; so the means are compared as well
    weak, strong = means.mean()
    more = strong > weak + 1e-9
    if more:
        detail += f"; in the mean of draws {100 * weak:.1f} % and {100 * strong:.1f} %"
    return _verdict(wrong.empty and not more, len(every)), detail


def _doubling(once: Run, twice: Run) -> tuple[str, str]:
    both = pd.concat([once.right.mean(), twice.right.mean()], axis=1).dropna()
    if both.empty:
        return "too few images", "no image is in both"
    first, second = both.mean()
    gap, steps = 100 * (first - second), f"{twice.attack.n_steps} steps than with {once.attack.n_steps}"
    return _verdict(abs(gap) <= 5, len(both)), f"{gap:+.1f} points lower with {steps}, {len(both)} images"


def _noticed(run: Run) -> Iterator[tuple[str, str, str]]:
    """(title, verdict, detail) of what an attack noticed of itself."""
    attack, flags = run.attack, flags_of(run.rows)
    if attack.foreign:
        detail = f"{type(attack).__name__} is not ours: what it notes is its affair"
        yield "the attack's own flags", "not run", detail
    elif attack.optimiser == "pgd" and attack.eps_255 > 0:
        bad = run.rows.groupby("index")["bad_gradients"].first() > 0
        detail = f"{bad.sum()} of {len(bad)} images had one in {attack.n_steps * attack.n_restarts} steps"
        yield "gradient neither zero nor NaN", _verdict(not bad.any()), detail
    if attack.optimiser in ("autoattack", "square") and not attack.foreign:
        blocks = f", each flag that of a block of {attack.block}" * (attack.block > 1)
        detail = flags + blocks if flags else f"none on {run.rows['index'].nunique()} images"
        yield "AutoAttack's own flags", _verdict(not flags), detail
    elif flags:
        yield "flags of its rows", "warn", flags
