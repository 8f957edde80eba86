"""Does an evaluation hold? The checks of a sceptical reader, from rows alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from .rows import Frame
from .tables import Runs, difference, flags_of, of_images, right_of

if TYPE_CHECKING:
    from .protocols import Attack

FEW_IMAGES = 10  # fewer are no evidence: of 10 that are all right, the 95 % interval begins at 72 %
NOTHING, LITTLE = 2, 10  # percent that may stand at the largest eps; points that twice the steps may take


@dataclass(frozen=True)
class Run:
    """One attack, and the rows of the audited defence under it."""

    name: str
    attack: Attack
    rows: Frame

    @property
    def right(self) -> Frame:
        """For each image the share of draws in which the label is found."""
        return right_of(self.rows)


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
        row("every attacked image is moved", _moved, own),
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


def _moved(*runs: Run) -> tuple[str, str]:
    """An image that was not moved was not attacked; a transfer of AutoAttack may leave some as they are."""
    still = []
    for run in runs:
        if run.attack.eps_255 > 0:
            first = run.rows.drop_duplicates("index")
            n = len(first) - int((first["linf"] > 0).sum())
            still += [f"{run.name}: {n} of {len(first)}"] * (n > 0)
    return ("warn", "; ".join(still)) if still else ("pass", "each attacked image differs from the clean one")


def _nothing_at_zero(run: Run) -> tuple[str, str]:
    n_changed = int((run.rows["adversarial"] != run.rows["clean"]).sum())
    holds = n_changed == 0 and run.rows["linf"].max() == 0
    return _verdict(holds), f"{n_changed} of {len(run.rows)} labels differ"


def _falls_with_eps(*runs: Run) -> tuple[str, str]:
    """Strictly, until at most NOTHING percent are left; and so few must be left at the end."""
    means = pd.concat([run.right for run in runs], axis=1).dropna()  # of images that all runs have
    if means.empty:
        return "too few images", "no image is in all of them"
    shares = [100 * mean for mean in means.mean()]
    line = ", ".join(f"{share:.1f} % at {run.attack.eps_255:g}/255" for run, share in zip(runs, shares))
    wrong = [after for before, after in itertools.pairwise(shares) if after >= before and after > NOTHING]
    says = "; does not fall at each step" * bool(wrong)
    says += f"; more than {NOTHING} % are left" * (shares[-1] > NOTHING)
    return _verdict(not says, len(means)), f"{line}; {len(means)} images{says}"


def _gap(first: Run, second: Run) -> tuple[dict | None, str]:
    """(`tables.difference` of first and second on the images of both, in words); None without any."""
    both = pd.concat([first.right, second.right], axis=1).dropna()
    if both.empty:
        return None, "no image is in both"
    gap = difference(both.iloc[:, 0], both.iloc[:, 1])
    stand = " and ".join(f"{100 * mean:.1f} %" for mean in both.mean())
    return gap, f"{stand} stand, {gap['points']:+.1f} points ({gap['95 % interval']}), {gap['n']} images"


def _no_weaker(weaker: Run, stronger: Run) -> tuple[str, str]:
    gap, detail = _gap(stronger, weaker)
    return _verdict(gap is not None and gap["points"] <= 0, gap["n"] if gap else 0), detail


def _doubling(once: Run, twice: Run) -> tuple[str, str]:
    """Neither may it take more than chance would, nor may the interval reach further than LITTLE."""
    gap, detail = _gap(once, twice)
    detail += f", with {once.attack.n_steps} and {twice.attack.n_steps} steps"
    if gap is None:
        return "too few images", detail
    low, high = (float(end) for end in gap["95 % interval"].split(" to "))
    if low <= 0 and high > LITTLE:
        return "too few images", f"{detail}; that can be more than {LITTLE} points"
    return _verdict(low <= 0, gap["n"]), detail


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
        if attack.version == "standard" and run.rows["random"].any():  # which the bare classifier cannot say
            detail = "it draws noise, so this is a transfer and no AutoAttack of the defence"
            yield "AutoAttack suits the defence", "warn", detail
    elif flags:
        yield "flags of its rows", "warn", flags
