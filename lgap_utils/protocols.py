"""`Attack` is one cell of the grid of attacks with all its numbers; `ATTACKS` holds the paper's by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import attacks, checks
from .attacks import PGD, Record, blind, pgd
from .autoattack import autoattack
from .batches import BatchSize, call_in_batches
from .defense import LGAP
from .noise import Keys
from .profiles import check_whole
from .surrogates import caption, joint, one_step, vae

VIEWS = attacks.VIEWS | {"vae": vae, "one step": one_step, "caption": caption, "joint": joint}
# views without the purifier, or with a part of it alone
CHEAP_VIEWS = ("blind", "vae", "caption")
PGD_ONLY = ("known_noise", "masked", "any_step", "n_restarts", "average", "norm", "low_pass", "target")
PGD_FIELDS = ("n_steps", "n_eot", "average", "random_start", "known_noise", "any_step", "n_restarts")
PGD_FIELDS += ("norm", "low_pass", "target")
# {view: the fields that it has no use for}
UNUSED: dict[str, tuple[str, ...]] = {"vae": ("captions",), "joint": ("captions", "target")}
UNUSED["caption"] = ("captions", "n_eot", "average", "known_noise", "any_step", "n_restarts", "target")


@dataclass(frozen=True)
class Attack:
    """One cell of the grid, all numbers included; attack(defense, x, y, keys) -> adversarial images like x.

    An attack of your own is a subclass with another `__call__`. Tables show what it notes in `record`, if
    anything. Raises ValueError for bad fields.
    """

    name: str  # what a table calls it
    optimiser: str = "pgd"  # "none", "pgd", "autoattack" or "square"
    view: str = "blind"  # what the attacker sees, one of VIEWS
    eps_255: float = 8  # radius in 1/255
    step_size_255: float = 2  # paper silent: Yoon et al.'s step
    norm: str = "linf"  # of the radius and the step, or "l2": a length of 0.5 is 127.5/255
    n_steps: int = 40  # for "square": queries; for "autoattack": APGD's, whose own number is 100
    n_eot: int = 1  # paper silent: draws of the defence per step
    average: str = "gradient"  # paper silent: over the draws; "gradient", "logits" or "vote"
    random_start: bool = True  # paper silent
    known_noise: bool = False  # the attacker's draws are the defender's
    captions: str = "anew"  # paper silent: "anew" at every step, or those of the "clean" image throughout
    masked: bool = False  # the authors' code: an image stops moving once the bare classifier is fooled
    any_step: bool = False  # paper silent: broken at any iterate, or judged at the last
    n_restarts: int = 1  # paper silent
    low_pass: int = 1  # the perturbation moves in squares of so many pixels
    target: int | None = None  # a class to aim at, in place of any wrong one
    rounded: bool = False  # the perturbation is cut to whole 1/255, as an image file holds it
    seed: int = 0  # of the attacker's own draws, beside the evaluation's
    version: str = "standard"  # AutoAttack's
    block: int = 1  # images that AutoAttack takes at a time; at more than 1 they share draws
    move_all: bool = False  # AutoAttack moves what the classifier mislabels already, too (see `autoattack`)

    def __post_init__(self):
        checks.check_choice("optimiser", self.optimiser, ("none", "pgd", "autoattack", "square"))
        checks.check_choice("view", self.view, tuple(VIEWS))
        checks.check_choice("captions", self.captions, ("anew", "clean"))
        checks.check_choice("version", self.version, ("standard", "rand"))
        checks.check_numbers(255, eps_255=self.eps_255, step_size_255=self.step_size_255)
        if 0 < self.eps_255 < 0.1:
            raise ValueError(f"eps_255={self.eps_255!r}: expected a number in 1/255, that is 8 and not 8/255")
        self._pgd()  # checks what it takes
        checks.check_counts(block=self.block)
        checks.check_flags(masked=self.masked, move_all=self.move_all, rounded=self.rounded)
        check_whole("seed", self.seed, 0)
        if self.block > 1 and (self.optimiser != "autoattack" or self.view != "blind"):
            raise ValueError(f"block={self.block}: only AutoAttack on the blind view takes several images")
        if self.move_all and (self.optimiser != "autoattack" or self.view != "blind"):
            raise ValueError("move_all=True: only AutoAttack on the blind view leaves images where they are")
        if self.view in ("caption", "joint") and self.optimiser != "pgd":
            raise ValueError(
                f"optimiser={self.optimiser!r}: only the optimiser 'pgd' has the view {self.view!r}"
            )
        if self.optimiser != "pgd":
            self._refuse(PGD_ONLY, f"only the optimiser 'pgd' has it, not {self.optimiser!r}")
        self._refuse(UNUSED.get(self.view, ()), f"the view {self.view!r} has no use for it")

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raise ValueError for a field of these that is not at its default."""
        for name in names:
            value = getattr(self, name)
            if value != getattr(Attack, name):
                raise ValueError(f"{name}={value!r}: {why}")

    def __call__(
        self,
        defense: LGAP,
        x: Tensor,
        y: Tensor,
        keys: Keys,
        batch_size: int | BatchSize = 64,
        record: Record | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Adversarial images for x [n, 3, h, w] in [0, 1] with labels y [n]; arguments as those of `pgd`."""
        if self.optimiser == "none":
            if record is not None:
                n = len(x)
                record.broke_at, record.bad_gradients, record.flags = [-1] * n, [0] * n, [""] * n
            return x.clone()
        if self.seed:
            keys = keys.at([0] * len(keys), stage=f"attack {self.seed}")
        adv = self._attacked(defense, x, y, keys, batch_size, record, progress)
        return x + ((adv - x) * 255).round(decimals=3).trunc() / 255 if self.rounded else adv

    def _attacked(
        self, defense: LGAP, x: Tensor, y: Tensor, keys: Keys, batch_size: Any, record: Any, progress: Any
    ) -> Tensor:
        model = VIEWS[self.view](defense)
        if isinstance(model, caption):
            model = model.aimed(x, y, keys.indices)
        elif self.captions == "clean" and self.view != "blind":
            model = model.captioned(x, keys.indices)
        settings: dict[str, Any] = {"keys": keys, "record": record, "progress": progress}
        if self.optimiser == "pgd":
            masked_by = blind(defense) if self.masked else None
            settings |= dataclasses.asdict(self._pgd())
            return pgd(model, x, y, masked_by=masked_by, batch_size=batch_size, **settings)
        settings |= {"eps": self.eps_255 / 255, "n_eot": self.n_eot}
        if self.optimiser == "square":
            settings |= {"version": "custom", "attacks": ("square",), "n_queries": self.n_steps}
        else:
            settings |= {"version": self.version, "n_steps": self.n_steps, "block": self.block}
            settings |= {"move_all": self.move_all}
        return autoattack(model, x, y, **settings)

    def _pgd(self) -> PGD:
        numbers = {name: getattr(self, name) for name in PGD_FIELDS}
        return PGD(eps=self.eps_255 / 255, step_size=self.step_size_255 / 255, **numbers)

    def distance(self, x: Tensor, adv: Tensor) -> Tensor:
        """How far images [n, 3, h, w] were moved, in pixels of [0, 1] and this attack's norm: [n]."""
        change = (adv - x).flatten(1)
        return change.norm(dim=1) if self.norm == "l2" else change.abs().amax(1)

    @property
    def foreign(self) -> bool:
        """Whether this is a subclass of somebody's own, of which these fields say little."""
        return type(self) is not Attack

    @property
    def success(self) -> str:
        """What counts as broken, in words."""
        if self.optimiser == "pgd":
            return "any step" if self.any_step else "last iterate"
        return "none" if self.optimiser == "none" else "the attack's best point"

    def settings(self) -> dict[str, Any]:
        """The numbers that define the attack, by name, and whose it is."""
        return dataclasses.asdict(self) | ({"is": type(self).__qualname__} if self.foreign else {})

    def describe(self) -> str:
        """The protocol in a line, for a table."""
        if self.optimiser == "none":
            return "no attack"
        if self.foreign:
            return f"{type(self).__name__}; eps {self.eps_255:g}/255"
        radius = f"L2 {self.eps_255 / 255:g}" if self.norm == "l2" else f"eps {self.eps_255:g}/255"
        words = [self._describe_optimiser(), radius, self.view]
        if self.optimiser == "pgd":
            words += self._describe_pgd()
        if self.view == "caption":
            words.append("towards the likeliest wrong class")
        elif self.view not in ("blind", "vae"):
            words.append("captions anew" if self.captions == "anew" else "caption of the clean image")
        if self.rounded:
            words.append("cut to whole 1/255")
        if self.seed:
            words.append(f"attack seed {self.seed}")
        return "; ".join(words)

    def _describe_optimiser(self) -> str:
        if self.optimiser == "pgd":
            step = f"{self.step_size_255 / 255:g}" if self.norm == "l2" else f"{self.step_size_255:g}/255"
            return f"PGD-{self.n_steps}, step {step}"
        if self.optimiser == "square":
            return f"Square, {self.n_steps} queries, mean of {self.n_eot} draws"
        words = [f"AutoAttack {self.version}"]
        if self.n_steps != 100:
            words.append(f"{self.n_steps} steps")
        if self.version == "rand":
            words.append(f"{self.n_eot} draws")
        if self.block > 1:
            words.append(f"blocks of {self.block}")
        if self.move_all:
            words.append("every image moved")
        return ", ".join(words)

    def _describe_pgd(self) -> list[str]:
        words = []
        if self.view not in ("blind", "caption"):
            average = "vote of signs" if self.average == "vote" else f"mean {self.average}"
            draws = "1 draw" if self.n_eot == 1 else f"{self.n_eot} draws, {average}"
            words.append(draws + (", the defender's own" if self.known_noise else ""))
            if self.masked:
                words.append("masked by the bare classifier")
        if self.random_start:
            words.append("random start")
        if self.n_restarts > 1:
            words.append(f"{self.n_restarts} restarts")
        if self.low_pass > 1:
            words.append(f"in squares of {self.low_pass} pixels")
        if self.target is not None:
            words.append(f"aimed at class {self.target}")
        return [*words, self.success]

    def purifications(self) -> tuple[int, int]:
        """(forward only, with a gradient) for one image, the defence's share of the cost; at most."""
        if self.view in CHEAP_VIEWS or self.optimiser == "none":
            return 0, 0
        calls = {"pgd": self._pgd().n_looks, "square": self.n_steps, "autoattack": 2 * self.n_steps}
        n_draws = calls[self.optimiser] * self.n_eot
        forward_only = self.view == "bpda" or self.optimiser == "square"
        return (n_draws, 0) if forward_only else (0, n_draws)

    def whole(self, n: int) -> int:
        """n images, rounded up to whole blocks: AutoAttack does no part of one."""
        return math.ceil(n / self.block) * self.block

    def gradients(self) -> int:
        """Gradients of the bare classifier for one image of a blind attack; of AutoAttack, at least."""
        counts = self.view == "blind" and self.optimiser in ("pgd", "autoattack")
        return self.n_steps * self.n_restarts if counts else 0


NATURAL = Attack("natural", optimiser="none", eps_255=0)
_ATTACKS = [
    # Tables 1 and 2: preprocessor-blind PGD, Yoon et al.'s clf_pgd
    Attack("blind PGD-40"),
    # Table 3; paper silent: 15 draws, as Yoon et al. have
    Attack("BPDA-40", view="bpda"),
    Attack("BPDA-40+EOT", view="bpda", n_eot=15, random_start=False),
    Attack("BPDA-40+EOT (authors' vote)", view="bpda", n_eot=15, random_start=False, average="vote"),
    Attack("BPDA-50+EOT (Hill)", view="bpda", n_steps=50, n_eot=15, average="logits", any_step=True),
    # Table 4; AutoAttack is run on the bare classifier, as the authors' code does: a transfer attack
    Attack("AutoAttack", optimiser="autoattack", n_steps=100),
    Attack("PGD-10", n_steps=10),
    # beyond the paper: what an attacker does who sees the whole defence
    Attack("PGD-20, full gradient, known noise", view="full", n_steps=20, known_noise=True),
    Attack("Square", optimiser="square", view="full", n_steps=100, n_eot=4),
    # cheap surrogates of the purifier; the captioner as a target, alone and with the full gradient
    Attack("PGD-20, VAE surrogate", view="vae", n_steps=20),
    Attack("PGD-20, one-step surrogate", view="one step", n_steps=20),
    Attack("PGD-20 on the caption", view="caption", n_steps=20),
    Attack("PGD-20, full gradient", view="full", n_steps=20, n_eot=2),
    Attack("PGD-20, joint", view="joint", n_steps=20, n_eot=2),
    Attack("AutoAttack rand", optimiser="autoattack", view="full", version="rand", n_steps=100, n_eot=20),
]
ATTACKS = {attack.name: attack for attack in _ATTACKS}


def get_attack(attack: str, /, **overrides: Any) -> Attack:
    """The attack of this name with some fields replaced. Raises ValueError for unknown ones."""
    if attack not in ATTACKS:
        raise ValueError(f"no attack {attack!r}; choose from {list(ATTACKS)}")
    names = [f.name for f in dataclasses.fields(Attack)]
    if unknown := sorted(set(overrides) - set(names)):
        raise ValueError(f"an attack has no field {', '.join(unknown)}; choose from {names}")
    known = ATTACKS[attack]
    if "n_steps" in overrides:  # "blind PGD-40" with ten steps is "blind PGD-10"
        overrides = {"name": known.name.replace(f"-{known.n_steps}", f"-{overrides['n_steps']}")} | overrides
    return dataclasses.replace(known, **overrides)


def in_batches(
    attack: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    keys: Keys | None = None,
    batch_size: int | BatchSize = 128,
) -> Tensor:
    """`attack(x, y, keys)` over slices of a large set, which change no result, as keys belong to images.

    x [n, 3, h, w] and y [n] are copied, so an attack may work in place.
    """
    call = lambda p: attack(x[p].clone(), y[p].clone(), None if keys is None else keys[p])
    return torch.cat(call_in_batches(call, len(x), batch_size))
