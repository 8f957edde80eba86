"""verdicts."""

from __future__ import annotations

import math

import pandas as pd

from .tables import FEW_IMAGES, flags_of, of_images

# ---------------------------------------------------------------- does the evaluation hold?


def audit(runs, *, defence="LGAP", stronger=(), eps_sweep=(), eps_zero=None, doubled=None):
    """What a sceptical reader would check of an evaluation: a DataFrame of checks, each "pass", "warn", "too few images" or "not run".

    runs: {name: (attack, rows)} as for `ladder`. stronger: pairs of names (weaker, stronger): on the images
    that both have, no image that falls to the weaker may stand, in every draw, under the stronger, nor may
    more stand in the mean of the draws. eps_sweep: names by rising eps. eps_zero: a run at eps 0. doubled:
    names of a run and of the same with twice the steps. A check that compares fewer than FEW_IMAGES images
    is "too few images", whatever it finds. Raises ValueError where a run has no rows of the defence.
    """
    if not runs:
        raise ValueError("an audit of no runs; expected at least one")
    own = {name: of_images(rows, defence, f"{name}: ") for name, (_, rows) in runs.items()}
    right = {
        name: rows.assign(right=rows["adversarial"] == rows["label"]).groupby("index")["right"]
        for name, rows in own.items()
    }
    attacks = {name: attack for name, (attack, _) in runs.items()}
    checks = [
        _inside(own),
        _nothing_at_zero(own, eps_zero),
        _falls_with_eps(attacks, right, eps_sweep),
        *(_no_weaker(right, *pair) for pair in stronger),
        *(check for name, attack in attacks.items() for check in _noticed(name, attack, own[name])),
        _doubled(attacks, right, doubled),
    ]
    return pd.DataFrame(checks, columns=["check", "verdict", "detail"]).set_index("check")


def _verdict(holds, n=FEW_IMAGES):
    """Of a check that n images were compared for."""
    if n < FEW_IMAGES:
        return "too few images"
    return "pass" if holds else "warn"


def _inside(own):
    what = "inside the ball and [0, 1]"
    outside = {
        name: int((~rows["inside"].astype(bool) | rows["linf"].isna()).sum()) for name, rows in own.items()
    }
    if any(outside.values()):
        return what, "warn", "; ".join(f"{name}: {k} rows outside" for name, k in outside.items() if k)
    return what, "pass", f"largest distance {255 * max(rows['linf'].max() for rows in own.values()):.2f}/255"


def _nothing_at_zero(own, eps_zero):
    what = "eps 0 changes nothing"
    if eps_zero is None or eps_zero not in own:
        return what, "not run", "no run at eps 0"
    rows = own[eps_zero]
    changed = int((rows["adversarial"] != rows["clean"]).sum())
    return what, _verdict(changed == 0 and rows["linf"].max() == 0), f"{changed} of {len(rows)} labels differ"


def _falls_with_eps(attacks, right, names):
    what = "accuracy falls with eps"
    if len(names) < 2:
        return what, "not run", "no sweep"
    if absent := [name for name in names if name not in right]:
        return what, "not run", f"{absent[0]} was not run"
    each = pd.concat(
        [right[name].mean() for name in names], axis=1, keys=names
    ).dropna()  # images that all have
    if each.empty:
        return what, "too few images", "no image is in all of them"
    means = list(each.mean())
    signs = ["", *("=" if math.isclose(a, b) else ">" if a > b else "<" for a, b in zip(means, means[1:]))]
    falls = "<" not in signs and ">" in signs
    line = " ".join(
        f"{sign} {100 * m:.1f} % at {attacks[n].eps_255:g}/255" for sign, n, m in zip(signs, names, means)
    )
    return (
        what,
        _verdict(falls, len(each)),
        f"{line.strip()}, {len(each)} images" + "; did not fall" * (not falls),
    )


def _no_weaker(right, weaker, strong):
    what = f"{strong} is no weaker than {weaker}"
    if weaker not in right or strong not in right:
        return what, "not run", "one of them was not run"
    pair, keys = (right[weaker], right[strong]), ["weak", "strong"]
    all_draws = pd.concat([each.all() for each in pair], axis=1, keys=keys).dropna().astype(bool)
    mean = pd.concat([each.mean() for each in pair], axis=1, keys=keys).dropna().mean()
    wrong = all_draws[~all_draws["weak"] & all_draws["strong"]]
    detail = (
        f"of {len(all_draws)} images {int(all_draws['weak'].sum())} stand under the weaker, "
        f"{int(all_draws['strong'].sum())} under the stronger"
    )
    if len(wrong):
        detail += f"; {len(wrong)} fall to the weaker alone, e.g. image {wrong.index[0]}"
    # with many draws few images stand in all of them, under either; so the means are compared as well
    more = mean["strong"] > mean["weak"] + 1e-9
    if more:
        detail += f"; in the mean of draws {100 * mean['weak']:.1f} % and {100 * mean['strong']:.1f} %"
    return what, _verdict(wrong.empty and not more, len(all_draws)), detail


def _noticed(name, attack, rows):
    """What an attack noticed of itself, as checks of its own."""
    autoattack, flags = attack.optimiser in ("autoattack", "square") and not attack.foreign, flags_of(rows)
    if attack.foreign:
        yield (
            f"{name}: the attack's own flags",
            "not run",
            f"{type(attack).__name__} is not ours: what it notes is its affair",
        )
    elif attack.optimiser == "pgd" and attack.eps_255 > 0:
        bad, steps = rows.groupby("index")["bad_gradients"].first(), attack.n_steps * attack.n_restarts
        yield (
            f"{name}: gradient neither zero nor NaN",
            _verdict((bad == 0).all()),
            f"{int((bad > 0).sum())} of {len(bad)} images had one in {steps} steps",
        )
    if autoattack:
        together = f", each flag that of a block of {attack.block}" * (attack.block > 1)
        none = f"none on {rows['index'].nunique()} images"
        yield f"{name}: AutoAttack's own flags", _verdict(not flags), flags + together if flags else none
    elif flags:
        yield f"{name}: flags of its rows", "warn", flags


def _doubled(attacks, right, names):
    what = "doubling the steps changes little"
    if names is None or not set(names) <= set(right):
        return what, "not run", "no run with twice the steps"
    a, b = (right[name].mean() for name in names)
    steps, both = [attacks[name].n_steps for name in names], a.index.intersection(b.index)
    if both.empty:
        return what, "too few images", "no image is in both"
    gap = 100 * (a[both].mean() - b[both].mean())
    return (
        what,
        _verdict(abs(gap) <= 5, len(both)),
        f"{gap:+.1f} points lower with {steps[1]} steps than with {steps[0]}, {len(both)} images",
    )
