"""protocols."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from .attacks import AVERAGES, VIEWS, blind, pgd
from .autoattack import autoattack
from .batches import call_in_batches
from .checks import check_counts, check_flags, check_numbers

# ---------------------------------------------------------------- one cell of the grid, and the paper's


@dataclass(frozen=True)
class Attack:
    """One cell of the grid, all numbers included; attack(defense, x, y, keys) -> adversarial images [n, 3, h, w].

    An attack of your own is a subclass with another `__call__`; what it notes in `record` the tables show, and it need note nothing.
    """

    name: str  # what a table calls it
    optimiser: str = "pgd"  # "none", "pgd", "autoattack" or "square"
    view: str = "blind"  # what the attacker sees: "blind", "bpda" or "full"
    eps_255: float = 8  # L-inf radius in 1/255
    step_size_255: float = 2  # paper silent: Yoon et al.'s step
    n_steps: int = 40  # for "square": queries; for "autoattack": APGD's, whose own number is 100
    n_eot: int = 1  # paper silent: draws of the defence per step
    average: str = "gradient"  # paper silent: over the draws; "gradient", "logits" or "vote"
    random_start: bool = True  # paper silent
    known_noise: bool = False  # the attacker's draws are the defender's
    captions: str = "anew"  # paper silent: "anew" at every step, or those of the "clean" image throughout
    masked: bool = False  # the authors' code: an image stops moving once the bare classifier is fooled
    any_step: bool = False  # paper silent: broken at any iterate, or judged at the last
    n_restarts: int = 1  # paper silent
    version: str = "standard"  # AutoAttack's
    block: int = 1  # images that AutoAttack takes at a time; at more than 1 they share draws

    def __post_init__(self):
        choices = {
            "optimiser": ("none", "pgd", "autoattack", "square"),
            "view": tuple(VIEWS),
            "average": AVERAGES,
            "captions": ("anew", "clean"),
            "version": ("standard", "rand"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {list(allowed)}")
        check_numbers(255, eps_255=self.eps_255, step_size_255=self.step_size_255)
        if 0 < self.eps_255 < 0.1:
            raise ValueError(f"eps_255={self.eps_255!r}: expected a number in 1/255, that is 8 and not 8/255")
        check_counts(n_steps=self.n_steps, n_eot=self.n_eot, n_restarts=self.n_restarts, block=self.block)
        check_flags(
            random_start=self.random_start,
            known_noise=self.known_noise,
            masked=self.masked,
            any_step=self.any_step,
        )
        if self.block > 1 and (self.optimiser != "autoattack" or self.view != "blind"):
            raise ValueError(
                f"block={self.block}: only AutoAttack on the blind view takes more than one image at a time"
            )
        for name, plain in {
            "known_noise": False,
            "masked": False,
            "any_step": False,
            "n_restarts": 1,
            "average": "gradient",
        }.items():
            if self.optimiser != "pgd" and getattr(self, name) != plain:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: only the optimiser 'pgd' has it, not {self.optimiser!r}"
                )

    @property
    def foreign(self):
        """Whether this is somebody's own subclass, of which these fields say little."""
        return type(self) is not Attack

    @property
    def success(self):
        """What counts as broken, in words."""
        return {"none": "none", "pgd": "any step" if self.any_step else "last iterate"}.get(
            self.optimiser, "the attack's best point"
        )

    def settings(self):
        """The numbers that define the attack, by name, and whose it is."""
        return dataclasses.asdict(self) | ({"is": type(self).__qualname__} if self.foreign else {})

    def describe(self):
        """The protocol in a line, for a table."""
        if self.optimiser == "none":
            return "no attack"
        if self.foreign:
            return f"{type(self).__name__}; eps {self.eps_255:g}/255"
        what = {
            "pgd": f"PGD-{self.n_steps}, step {self.step_size_255:g}/255",
            "square": f"Square, {self.n_steps} queries, mean of {self.n_eot} draws",
            "autoattack": f"AutoAttack {self.version}"
            + f", {self.n_steps} steps" * (self.n_steps != 100)
            + f", {self.n_eot} draws" * (self.version == "rand")
            + f", blocks of {self.block}" * (self.block > 1),
        }[self.optimiser]
        extras = []
        if self.optimiser == "pgd":
            if self.view != "blind":
                average = "vote of signs" if self.average == "vote" else f"mean {self.average}"
                draws = "1 draw" if self.n_eot == 1 else f"{self.n_eot} draws, {average}"
                extras += [draws + (", the defender's own" if self.known_noise else "")]
                extras += ["masked by the bare classifier"] * self.masked
            extras += (
                ["random start"] * self.random_start
                + [f"{self.n_restarts} restarts"] * (self.n_restarts > 1)
                + [self.success]
            )
        if self.view != "blind":
            extras += [{"anew": "captions anew", "clean": "caption of the clean image"}[self.captions]]
        return "; ".join([what, f"eps {self.eps_255:g}/255", self.view, *extras])

    def purifications(self):
        """(forward only, with a gradient) for one image; the defence's share of the attack's cost. An upper bound if any_step."""
        if self.view == "blind" or self.optimiser == "none":
            return 0, 0
        looks = (
            self.n_steps + (self.any_step or self.n_restarts > 1)
        ) * self.n_restarts  # the last iterate is looked at too
        asked = (
            self.n_eot
            * {"pgd": looks, "square": self.n_steps, "autoattack": 2 * self.n_steps}[self.optimiser]
        )
        return (0, asked) if self.view == "full" and self.optimiser != "square" else (asked, 0)

    def whole(self, n):
        """n images, rounded up to whole blocks: AutoAttack does no part of one."""
        return math.ceil(n / self.block) * self.block

    def gradients(self):
        """Gradients of the bare classifier for one image of a blind attack; of AutoAttack's, those of its first part, the least."""
        return (
            self.n_steps * self.n_restarts
            if self.view == "blind" and self.optimiser in ("pgd", "autoattack")
            else 0
        )

    def __call__(self, defense, x, y, keys, batch_size=64, record=None, progress=None):
        if self.optimiser == "none":
            if record is not None:
                record.broke_at, record.bad_gradients, record.flags = (
                    [-1] * len(x),
                    [0] * len(x),
                    [""] * len(x),
                )
            return x.clone()
        model = VIEWS[self.view](defense)
        if self.captions == "clean" and self.view != "blind":
            model = model.captioned(x, keys.indices)
        shared = {"eps": self.eps_255 / 255, "keys": keys, "record": record, "progress": progress}
        if self.optimiser == "pgd":
            return pgd(
                model,
                x,
                y,
                step_size=self.step_size_255 / 255,
                n_steps=self.n_steps,
                n_eot=self.n_eot,
                average=self.average,
                random_start=self.random_start,
                known_noise=self.known_noise,
                any_step=self.any_step,
                masked_by=blind(defense) if self.masked else None,
                n_restarts=self.n_restarts,
                batch_size=batch_size,
                **shared,
            )
        if self.optimiser == "square":
            return autoattack(
                model,
                x,
                y,
                version="custom",
                attacks=("square",),
                n_queries=self.n_steps,
                n_eot=self.n_eot,
                **shared,
            )
        return autoattack(
            model,
            x,
            y,
            version=self.version,
            n_steps=self.n_steps,
            n_eot=self.n_eot,
            block=self.block,
            **shared,
        )


NATURAL = Attack("natural", optimiser="none", eps_255=0)
ATTACKS = {
    attack.name: attack
    for attack in (
        # Tables 1 and 2: preprocessor-blind PGD, Yoon et al.'s clf_pgd
        Attack("blind PGD-40"),
        # Table 3
        Attack("BPDA-40", view="bpda"),
        Attack(
            "BPDA-40+EOT", view="bpda", n_eot=15, random_start=False
        ),  # paper silent: 15 draws, as Yoon et al. have
        Attack("BPDA-40+EOT (authors' vote)", view="bpda", n_eot=15, random_start=False, average="vote"),
        Attack("BPDA-50+EOT (Hill)", view="bpda", n_steps=50, n_eot=15, average="logits", any_step=True),
        # Table 4; AutoAttack is run on the bare classifier, as the authors' code does: a transfer attack
        Attack("AutoAttack", optimiser="autoattack", n_steps=100),
        Attack("PGD-10", n_steps=10),
        # beyond the paper: what an attacker does who sees the whole defence
        Attack("PGD-20+EOT, full gradient", view="full", n_steps=20, n_eot=5),
        Attack(
            "PGD-20+EOT, full gradient, clean caption", view="full", n_steps=20, n_eot=5, captions="clean"
        ),
        Attack("PGD-20, full gradient, known noise", view="full", n_steps=20, known_noise=True),
        Attack("Square", optimiser="square", view="full", n_steps=100, n_eot=4),
        Attack("AutoAttack rand", optimiser="autoattack", view="full", version="rand", n_steps=100, n_eot=20),
    )
}


def get_attack(attack, /, **overrides):
    """The attack of this name with some fields replaced, its name too if wanted. Raises ValueError, with the choices, for an
    unknown name or field."""
    if attack not in ATTACKS:
        raise ValueError(f"no attack {attack!r}; choose from {list(ATTACKS)}")
    if unknown := sorted(set(overrides) - {f.name for f in dataclasses.fields(Attack)}):
        raise ValueError(
            f"an attack has no field {', '.join(unknown)}; choose from {[f.name for f in dataclasses.fields(Attack)]}"
        )
    known = ATTACKS[attack]
    if "n_steps" in overrides:  # "blind PGD-40" with ten steps is "blind PGD-10"
        overrides = {"name": known.name.replace(f"-{known.n_steps}", f"-{overrides['n_steps']}")} | overrides
    return dataclasses.replace(known, **overrides)


def in_batches(attack, x, y, keys=None, batch_size=128):
    """`attack(x, y, keys)` over slices of a large set; the slices change no result, as keys belong to images. x and y are copied."""
    return torch.cat(
        call_in_batches(
            lambda p: attack(x[p].clone(), y[p].clone(), None if keys is None else keys[p]),
            len(x),
            batch_size,
        )
    )
