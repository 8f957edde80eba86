"""The ladder: attackers who know more from rung to rung, on the same first images, in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .baselines import Told
from .defense import LGAP
from .experiment import evaluation
from .figures import lines
from .profiles import Profile
from .protocols import VIEWS, Attack, get_attack
from .results import heading, not_comparable, paper_numbers
from .tables import Runs, accuracy, as_text, caption_readers, common, of_images
from .words import class_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .images import Images

Rung = tuple[Attack, int]  # and on how many of the first images
SHOWN = ("VAE round trip", "undefended")  # who is scored beside the defence, where it is at hand


def rungs(p: Profile, blind: Profile) -> list[Rung]:
    """The rungs in the order of what they know; blind: the profile of the blind attack, that of Table 1."""
    get = partial(get_attack, eps_255=p.eps_255, step_size_255=p.step_size_255)
    steps = {"n_steps": p.n_steps_full}
    without = {"eps_255": blind.eps_255, "step_size_255": blind.step_size_255, "n_steps": blind.n_steps}
    return [
        (get("blind PGD-40", **without), p.n_images),
        (get("AutoAttack", name="AutoAttack transfer", block=p.autoattack_block, move_all=True), p.n_images),
        (get("PGD-20 on the caption", name="on the caption"), p.n_images),
        (get("BPDA-40", masked=p.masked_bpda), p.n_adaptive),
        (get("BPDA-40+EOT", n_eot=p.n_eot, average=p.eot_average), p.n_eot_images),
        (get("PGD-20, VAE surrogate", name="VAE surrogate"), p.n_surrogate),
        (get("PGD-20, one-step surrogate", name="one-step surrogate", **steps), p.n_surrogate),
        (get("PGD-20, full gradient", name="full gradient", **steps), p.n_full),
        (_joint(p, "joint"), p.n_full),
    ]


def _joint(p: Profile, name: str, **other: Any) -> Attack:
    """The strongest rung under another name, with other numbers."""
    own = {"eps_255": p.eps_255, "step_size_255": p.step_size_255, "n_steps": p.n_steps_full}
    return get_attack("PGD-20, joint", name=name, **own | other)


def curve(p: Profile, blind: Profile) -> list[Rung]:
    """The strongest rung at an eighth, a quarter, half and twice of eps, in steps of a quarter of each."""
    radii = [p.eps_255 * factor for factor in (0.125, 0.25, 0.5, 2)]
    of = lambda eps: _joint(p, f"joint, eps {eps:g}/255", eps_255=eps, step_size_255=eps / 4)
    return [(of(eps), p.n_curve) for eps in radii]


def checks(p: Profile, blind: Profile) -> list[Rung]:
    """The strongest rung at eps 0 and with twice the steps."""
    zero = _joint(p, "joint, eps 0", eps_255=0, n_steps=1)
    twice = _joint(p, "joint, twice the steps", n_steps=2 * p.n_steps_full)
    return [(zero, p.n_controls), (twice, p.n_curve)]


def known_noise(p: Profile, blind: Profile) -> list[Rung]:
    """The full gradient by an attacker who has the draws by which the defence is judged; thrice the steps."""
    own = {"eps_255": p.eps_255, "step_size_255": p.step_size_255, "n_eot": p.n_draws}
    own |= {"name": "known noise", "n_steps": 3 * p.n_steps_full}
    return [(get_attack("PGD-20, full gradient, known noise", **own), p.n_controls)]


def true_class(p: Profile, blind: Profile) -> list[Rung]:
    """The full gradient against a caption that is true and that no attack can change."""
    own = {"eps_255": p.eps_255, "step_size_255": p.step_size_255, "n_steps": p.n_steps_full}
    return [(get_attack("PGD-20, full gradient", name="true class told", **own), p.n_controls)]


def beyond(p: Profile, blind: Profile) -> list[Rung]:
    """The strongest rungs in another ball, at one class, in whole 1/255, and with other draws of its own."""
    full = {"eps_255": p.eps_255, "step_size_255": p.step_size_255, "n_steps": p.n_steps_full}
    length = {"norm": "l2", "eps_255": 127.5, "step_size_255": 25.5}  # 0.5, in steps of 0.1
    attacks = [
        _joint(p, "joint, L2 0.5", **length),
        _joint(p, "joint, low frequencies", low_pass=4),
        get_attack("PGD-20, full gradient", name="full gradient, at one class", target=3, **full),
        _joint(p, "joint, whole 1/255", rounded=True),
        _joint(p, "joint, second seed", seed=1),
    ]
    return [(attack, p.n_controls) for attack in attacks]


PARTS = {"rungs": rungs, "curve": curve, "checks": checks, "known noise": known_noise}
PARTS |= {"true class": true_class, "beyond": beyond}


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
    name, target = next(iter(defenses.items()))
    if part == "known noise":  # each draw costs the attacker a gradient at each step
        profile, folder = dataclasses.replace(profile, n_draws=min(2, profile.n_draws)), f"{folder}_known"
    elif part == "true class":
        target, folder = told_the_class(target, images), f"{folder}_told"
        defenses = {name: target}
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


def told_the_class(defense: LGAP, images: Images) -> LGAP:
    """The same defence with captions that name each image's true class, whatever its pixels are."""
    names = [(class_names(name) or [name])[0] for name in images.classes]
    texts = {i: f"a {names[label]}" for i, label in zip(images.indices.tolist(), images.labels.tolist())}
    captioner = Told(texts, "the true class")
    return LGAP(captioner, defense.purifier, defense.classifier, defense.classes, defense.input_size)


def _unfit(attack: Attack, defense: LGAP) -> str:
    """Why a defence has not what an attack looks at, or ""."""
    try:
        VIEWS[attack.view](defense)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def accuracies(runs: Runs, classes: tuple[str, ...], defence: str = "LGAP") -> dict[str, list]:
    """{who: [(place of the run, its accuracy), ...]} of the defence, its caption alone and those of SHOWN."""
    found = {}
    for place, (_, rows) in enumerate(runs.values()):
        readers = caption_readers(rows, classes, defence)
        parts = {defence: of_images(rows, defence), "its caption alone": readers}
        parts |= {name: rows[rows["defence"] == name] for name in SHOWN}
        for name, part in parts.items():
            if len(part):
                found.setdefault(name, []).append((place, accuracy(part)))
    return found


def ladder_figure(runs: Runs, profile: Profile, images: Images, defence: str = "LGAP") -> Figure:
    """The ladder as one picture; the paper's two numbers beside it where the data set is the paper's."""
    ticks = [f"{fill(name, 11)}\nn = {rows['index'].nunique()}" for name, (_, rows) in runs.items()]
    papers = {"BPDA": "BPDA-40", "BPDA 40+EOT": "BPDA-40+EOT"}
    numbers, marks = paper_numbers(3), []
    why = not_comparable(3, profile, images)
    for attack, name in papers.items():
        row = numbers[(numbers["method"] == "LGAP") & (numbers["attack"] == attack)]
        if name in runs and why != "other data":
            marks.append((list(runs).index(name), float(row["robust"].iloc[0])))
    title = f"Attacks on {defence}; the others judge the same images. {heading(profile)}, "
    title += f"{profile.eps_255:g}/255, mean of {profile.n_draws} draws"
    marked = "LGAP in the paper" + f", {why}" * bool(why)
    axis = "attacks, by what the attacker knows"
    return lines(accuracies(runs, images.classes, defence), ticks, axis, title, marks, marked)


def curve_figure(runs: Runs, profile: Profile, images: Images, defence: str = "LGAP") -> Figure:
    """Accuracy over eps: runs by rising eps, on the images that all have."""
    shared = common(runs, defence)
    ticks = [f"{attack.eps_255:g}/255" for attack, _ in shared.values()]
    n = len(next(iter(shared.values()))[1]["index"].unique())
    title = f"{heading(profile)}, the joint attack, n = {n}, mean of {profile.n_draws} draws"
    return lines(accuracies(shared, images.classes, defence), ticks, "eps", title)
