"""The ladder: attackers who know more from rung to rung, on the same first images, in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

from .defense import LGAP
from .experiment import evaluation
from .images import Images
from .profiles import Profile
from .protocols import VIEWS, Attack, get_attack
from .tables import Runs, accuracy, as_text, of_images

Rung = tuple[Attack, int]  # and on how many of the first images
SHOWN = ("VAE round trip", "undefended")  # who is scored beside the defence, where it is at hand


def rungs(p: Profile, blind: Profile) -> list[Rung]:
    """The rungs in the order of what they know; blind: the profile of the blind attack, that of Table 1."""
    get = partial(get_attack, eps_255=p.eps_255, step_size_255=p.step_size_255)
    without = {"eps_255": blind.eps_255, "step_size_255": blind.step_size_255, "n_steps": blind.n_steps}
    transfer = get("AutoAttack", name="AutoAttack, transfer", block=p.autoattack_block, move_all=True)
    return [
        (get("blind PGD-40", **without), p.n_images),
        (transfer, p.n_images),
        (get("PGD-20 on the caption"), p.n_images),
        (get("BPDA-40", masked=p.masked_bpda), p.n_adaptive),
        (get("BPDA-40+EOT", n_eot=p.n_eot, average=p.eot_average), p.n_eot_images),
        (get("PGD-20, VAE surrogate"), p.n_surrogate),
        (get("PGD-20, one-step surrogate"), p.n_surrogate),
        (get("PGD-20, full gradient"), p.n_full),
        (get("PGD-20, joint"), p.n_full),
    ]


def curve(p: Profile, blind: Profile) -> list[Rung]:
    """The strongest rung at an eighth, a quarter, half and twice of eps, in steps of a quarter of each."""
    radii = [p.eps_255 * factor for factor in (0.125, 0.25, 0.5, 2)]
    names = [f"joint, eps {eps:g}/255" for eps in radii]
    return [
        (get_attack("PGD-20, joint", name=name, eps_255=eps, step_size_255=eps / 4), p.n_curve)
        for name, eps in zip(names, radii)
    ]


def checks(p: Profile, blind: Profile) -> list[Rung]:
    """The strongest rung at eps 0 and with twice the steps."""
    get = partial(get_attack, "PGD-20, joint", step_size_255=p.step_size_255)
    return [
        (get(name="joint, eps 0", eps_255=0, n_steps=1), p.n_controls),
        (get(name="joint, 40 steps", eps_255=p.eps_255, n_steps=40), p.n_controls),
    ]


def known_noise(p: Profile, blind: Profile) -> list[Rung]:
    """The full gradient by an attacker who has the draws by which the defence is judged."""
    name = "PGD-60, full gradient, known noise"
    own = {"eps_255": p.eps_255, "step_size_255": p.step_size_255, "n_steps": 60, "n_eot": p.n_draws}
    return [(get_attack("PGD-20, full gradient, known noise", name=name, **own), p.n_controls)]


PARTS = {"rungs": rungs, "curve": curve, "checks": checks, "known noise": known_noise}


def climb(
    profile: Profile,
    defenses: Mapping[str, LGAP],
    images: Images,
    folder: str = "table1_and_3",
    part: str = "rungs",
    blind: Profile | None = None,
) -> Runs:
    """{name: (attack, rows)} of every rung of a `part` of the ladder against the first of `defenses`.

    Rows are kept in outputs/PROFILE/rows/`folder`. Each rung has as many of the first images as the profile
    says, and is scored under the defence and under those of SHOWN. A rung that needs more than the defence
    has, as a captioner with log_likelihood, is left out with a word. Raises ValueError for another part.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r}: choose from {list(PARTS)}")
    if part == "known noise":  # each draw costs the attacker a gradient at each step
        profile, folder = dataclasses.replace(profile, n_draws=min(2, profile.n_draws)), f"{folder}_known"
    name, target = next(iter(defenses.items()))
    judges = [each for each in defenses if each == name or each in SHOWN]
    run, runs = evaluation(profile, folder, dict(defenses), images), {}
    for attack, n in PARTS[part](profile, blind or profile):
        if why := _unfit(attack, target):
            print(f"left out: {attack.name}; {why}", flush=True)
            continue
        rows = run.run(attack, images.indices[: attack.whole(n)].tolist(), judges)
        stand = accuracy(of_images(rows, name))
        print(f"{attack.name}: {as_text(stand)} % stand, n = {stand['n']}", flush=True)
        runs[attack.name] = attack, rows
    return runs


def _unfit(attack: Attack, defense: LGAP) -> str:
    """Why a defence has not what an attack looks at, or ""."""
    try:
        VIEWS[attack.view](defense)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""
