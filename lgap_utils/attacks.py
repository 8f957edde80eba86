"""Attacks are a grid: an optimiser (`pgd`, `autoattack`) x a view of the defence x draws.

An optimiser knows only a model, a callable from images in [0, 1] to logits. A `View` of a random defence also
takes the keys of the noise to draw. Other libraries' attacks take `blind(defense)` and `autoattack.Query`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .batches import BatchSize
from .defense import LGAP
from .noise import Keys
from .profiles import check_whole


class Frozen(nn.Module):
    """A module that stays in evaluation mode, whatever library calls `train()`."""

    def __init__(self):
        super().__init__()
        self.training = False

    def train(self, mode: bool = True):
        return self


class blind(Frozen):
    """Preprocessor-blind view (paper section 4.1): the attacker sees the classifier, and no purification."""

    def __init__(self, defense: LGAP):
        super().__init__()
        self.defense = defense

    def forward(self, x: Tensor) -> Tensor:
        return self.defense.classify(x)


class View(Frozen):
    """The whole defence as a model: view(x, keys) -> logits [d * n, classes].

    Row i * d + k is draw k of image i. captions: {image index: text}, which freezes them; None takes them
    anew at every call.
    """

    # of a view that aims at something else than logits; arguments and result as those of `gradient` below
    gradient: Callable[..., tuple[Tensor, list[bool]]] | None = None

    def __init__(self, defense: LGAP, captions: dict[int | str, str] | None = None):
        super().__init__()
        self.defense, self.captions = defense, captions

    def purify(self, x: Tensor, keys: Keys) -> Tensor:
        """Purified images [len(keys), 3, h, w]: each of x as often as it has keys."""
        return self.defense.purify(x, self.captions_of(x, keys), keys)

    def captions_of(self, x: Tensor, keys: Keys) -> list[str]:
        """The frozen captions of images x, or new ones."""
        keys = keys[:: len(keys) // len(x)]
        if self.captions is None:
            return self.defense.caption(x, keys)
        return [self.captions[index] for index in keys.indices]

    def captioned(self, x: Tensor, indices: Sequence[int | str]) -> View:
        """This view, its captions frozen to those of x. Raises ValueError if an index has two of them."""
        frozen, captions = copy.copy(self), self.defense.caption(x.clone(), Keys(indices))
        frozen.captions = dict(zip(indices, captions))
        if [frozen.captions[index] for index in indices] != captions:
            raise ValueError("keys: two images have the same index and different captions")
        return frozen


class bpda(View):
    """BPDA view (Athalye et al. 2018): exact forward pass; backward as if purification were the identity."""

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        with torch.no_grad():  # a copy, as a purifier may hand back what it was given
            purified = self.purify(x.detach().clone(), keys)
        x = x.repeat_interleave(len(keys) // len(x), 0)
        return self.defense.classify(purified + (x - x.detach()), keys)  # adds exactly 0, and x's gradient


class full(View):
    """White-box view: the exact gradient through resize, VAE, every denoising step and VAE again."""

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        return self.defense.classify(self.purify(x, keys), keys)


VIEWS = {"blind": blind, "bpda": bpda, "full": full}
Model = Callable[..., Tensor]

# ---------------------------------------------------------------- PGD, image by image


@dataclass
class Record:
    """What happened under an attack: pass one in to have it filled, one entry per image.

    broke_at counts iterates over all restarts, 0 the start: the first that the attacker saw misclassified, in
    its own draws. PGD looks at its last iterate only with any_step or restarts.
    """

    broke_at: list[int] = field(default_factory=list)  # see above; -1: never seen, or not recorded
    bad_gradients: list[int] = field(default_factory=list)  # steps with a gradient of zero, or not finite
    flags: list[str] = field(default_factory=list)  # AutoAttack's own warnings


@dataclass(frozen=True)
class PGD:
    """The numbers of a PGD. Raises ValueError for bad ones."""

    eps: float  # radius in pixels of [0, 1], so 8/255 and not 8
    step_size: float  # in pixels of [0, 1], too
    n_steps: int
    random_start: bool = True  # anywhere in the ball around x, if there are keys; else at x
    n_eot: int = 1  # draws of the defence per step
    average: str = "gradient"  # over the draws, one of AVERAGES
    any_step: bool = False  # an image is returned as it is where the attacker first sees it misclassified
    n_restarts: int = 1  # an image that is still right after its last step begins anew
    known_noise: bool = False  # the attacker's draws are the defender's own; else they are fresh at each step
    norm: str = "linf"  # of eps and step_size, or "l2"
    low_pass: int = 1  # the perturbation is moved in squares of so many pixels: low frequencies alone
    target: int | None = None  # the class that is aimed at; its own images are aimed at a neighbour

    def __post_init__(self):
        checks.check_choice("average", self.average, AVERAGES)
        checks.check_choice("norm", self.norm, ("linf", "l2"))
        checks.check_counts(low_pass=self.low_pass)
        if self.target is not None:
            check_whole("target", self.target, 0)
        checks.check_numbers(1, eps=self.eps, step_size=self.step_size)
        checks.check_counts(n_steps=self.n_steps, n_eot=self.n_eot, n_restarts=self.n_restarts)
        flags = ("random_start", "any_step", "known_noise")
        checks.check_flags(**{name: getattr(self, name) for name in flags})

    @property
    def n_looks(self) -> int:
        """Iterates of an image that are classified: the last of a restart only if something depends on it."""
        judge_last = self.any_step or self.n_restarts > 1
        return self.n_restarts * (self.n_steps + 1) if judge_last else self.n_steps

    def start(self, x: Tensor, keys: Keys | None, restart: int = 0) -> Tensor:
        """Where an attack on x begins: in the ball of radius eps around it, or at x."""
        if keys is None or not self.random_start:
            return x.clone()
        noise = 2 * keys.at([restart] * len(x)).uniform(x.shape[1:], "start").to(x) - 1
        noise = self.smoothed(noise) if self.low_pass > 1 else noise
        if self.norm == "l2":
            noise = noise / _length(noise)
        return (x + self.eps * noise).clamp(0, 1)

    def ascend(self, x: Tensor, adv: Tensor, grad: Tensor) -> Tensor:
        """The next iterate: a step along the gradient or its sign, and back into the ball and into [0, 1]."""
        grad = self.smoothed(grad.nan_to_num(0, 0, 0))
        if self.norm == "l2":
            change = adv + self.step_size * grad / _length(grad) - x
            return (x + change * (self.eps / _length(change)).clamp(max=1)).clamp(0, 1)
        moved = adv + self.step_size * grad.sign()
        return (x + (moved - x).clamp(-self.eps, self.eps)).clamp(0, 1)

    def smoothed(self, change: Tensor) -> Tensor:
        """A change of images [n, 3, h, w], averaged over squares of low_pass pixels."""
        if self.low_pass == 1:
            return change
        means = F.avg_pool2d(change, self.low_pass, ceil_mode=True)
        squares = means.repeat_interleave(self.low_pass, 2).repeat_interleave(self.low_pass, 3)
        return squares[:, :, : change.shape[2], : change.shape[3]]

    def aims(self, y: Tensor) -> Tensor:
        """The labels whose loss is differentiated: y, or the classes that are aimed at."""
        if self.target is None:
            return y
        neighbour = self.target - 1 if self.target else 1
        return torch.where(y == self.target, neighbour, self.target)

    def draws(self, keys: Keys | None, walks: Sequence[Walk]) -> Keys | None:
        """The keys of what the next step draws, n_eot for each image; keys: one for each of all images."""
        if keys is None:
            return None
        own = keys[[walk.row for walk in walks]]
        if self.known_noise:
            return own.at([0] * len(own), self.n_eot, "defence")
        return own.at([walk.time for walk in walks], self.n_eot)

    def draws_per_call(self, n_images: int, most: int) -> int:
        """Draws that `BatchSize.attempt` may halve; 1 if the call cannot be split. most: draws that fit."""
        if self.average != "logits":
            return n_images * min(self.n_eot, most)
        return n_images * self.n_eot if n_images > 1 else 1


def _length(x: Tensor) -> Tensor:
    """Euclidean norms [n, 1, 1, 1] of images, not zero."""
    return x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


@dataclass
class Walk:
    """One image under PGD. Images do not march in step: one that is done makes room for others."""

    row: int  # its place among the images
    time: int = 0  # iterates looked at so far, over all restarts
    broke_at: int = -1  # the time of the first that was misclassified
    bad_gradients: int = 0
    done: bool = False

    def look(self, right: bool, bad: bool, p: PGD) -> bool:
        """Note what the attacker saw of an iterate and its gradient. Returns whether the image moves on."""
        step = self.time % (p.n_steps + 1)
        if self.broke_at < 0 and not right:
            self.broke_at = self.time
        self.bad_gradients += bad
        self.time += 1
        broken = not right and (p.any_step or step == p.n_steps)
        self.done = broken or self.time == p.n_looks
        return step < p.n_steps and not broken


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    keys: Keys | None = None,
    masked_by: Model | None = None,
    batch_size: int | BatchSize = 64,
    record: Record | None = None,
    progress: Callable[[int], object] | None = None,
    **numbers: Any,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018): adversarial images like x.

    x: images [n, 3, h, w] in [0, 1]; y: labels [n]; both are left as they are. numbers: those of `PGD`. keys:
    one per image, for random starts and a `View`. masked_by: a model; images that it mislabels stay
    (the authors' BPDA, by the bare classifier). batch_size: draws per call of the model; it changes a result
    by rounding at most. progress(n): called each time with the number of images that were looked at.
    Raises TypeError or ValueError for bad input.
    """
    p, room = PGD(**numbers), BatchSize.of(batch_size)
    checks.check_counts(batch_size=room.size)
    checks.check_images(x)
    checks.check_labels(y, len(x))
    if keys is not None or isinstance(model, View):
        checks.check_keys(keys, len(x))
    y, adv, walks = y.to(x.device), p.start(x, keys), [Walk(row) for row in range(len(x))]
    aims = p.aims(y)
    while live := [walk for walk in walks if not walk.done]:
        batch = live[: max(1, room.size // p.n_eot)]
        rows, draws = [walk.row for walk in batch], p.draws(keys, batch)
        fits, result = room.attempt(
            lambda: gradient(model, adv[rows], aims[rows], draws, p.n_eot, p.average, room.size, aims),
            p.draws_per_call(len(rows), room.size),
        )
        if not fits:
            continue
        grad, right = result
        if p.target is not None:  # downhill, until the aim is what the model says
            grad, right = -grad, [not hit for hit in right]
        norm = grad.flatten(1).abs().sum(1)
        bad = ((norm == 0) | ~torch.isfinite(norm)).tolist()
        if masked_by is not None:
            with torch.no_grad():
                grad = grad * (masked_by(adv[rows]).argmax(1) == y[rows]).view(-1, 1, 1, 1)
        moved = p.ascend(x[rows], adv[rows], grad)
        for k, walk in enumerate(batch):
            if walk.look(right[k], bad[k], p):
                adv[walk.row] = moved[k]
            elif not walk.done:  # it stands at the end of its steps
                own = [walk.row]
                adv[own] = p.start(x[own], None if keys is None else keys[own], walk.time // (p.n_steps + 1))
        if progress:
            progress(len(rows))
    if record is not None:
        record.broke_at = [walk.broke_at for walk in walks]
        record.bad_gradients = [walk.bad_gradients for walk in walks]
        record.flags = [""] * len(x)
    return adv


# over draws: mean gradient (EOT), gradient at the mean logits, or sum of signs (the authors' code)
AVERAGES = ("gradient", "logits", "vote")
SCALE = 2.0**10  # of the differentiated loss: float16 rounds less of it to 0; a power of two is exact


def _slope(leaf: Tensor, draws: Tensor, y: Tensor, average: str, n_draws: int) -> Tensor:
    """Gradient at `leaf` of the cross-entropy of logits [n, d, classes]: a share of the mean over n_draws."""
    if average == "logits":
        loss = F.cross_entropy(draws.mean(1), y, reduction="sum")
    else:
        labels = y.repeat_interleave(draws.shape[1])
        loss = F.cross_entropy(draws.flatten(0, 1), labels, reduction="sum") / n_draws
    # the second term: zero, and no error, where a purifier passes no gradient
    (slope,) = torch.autograd.grad(SCALE * loss + 0 * leaf.sum(), leaf)
    return slope / SCALE


def gradient(
    model: Model,
    x: Tensor,
    y: Tensor,
    keys: Keys | None = None,
    n_eot: int = 1,
    average: str = "gradient",
    batch_size: int = 64,
    labels: Tensor | None = None,
) -> tuple[Tensor, list[bool]]:
    """Gradient of the cross-entropy at x [n, 3, h, w], and whether the mean logits of each image are right.

    y: labels [n]. keys: row i * n_eot + k is draw k of image i; a plain model has nothing to average.
    average: one of AVERAGES; for "vote" the result is the sum of the draws' signs. batch_size: draws of one
    image in a call. labels: all labels whose range is checked; None: y.
    Raises ValueError for a label that is no class of the model.
    """
    if isinstance(model, View) and model.gradient is not None:
        return model.gradient(x, y, keys, n_eot, average, batch_size)
    if not isinstance(model, View):
        n_eot = 1
    elif n_eot > 1 and model.captions is None and keys is not None:  # one caption for all draws of a step
        model = model.captioned(x, keys.indices[::n_eot])
    vote = average == "vote" and n_eot > 1
    group = n_eot if average == "logits" else min(n_eot, batch_size)
    grad, logits = torch.zeros_like(x), torch.zeros((), device=x.device)
    for first in range(0, n_eot, group):
        n = min(group, n_eot - first)
        leaf = (x.repeat_interleave(n, 0) if vote else x).detach().clone().requires_grad_(True)
        if isinstance(model, View) and keys is not None:
            part = [i for i in range(len(keys)) if first <= i % n_eot < first + n]
            out = model(leaf.clone(), keys[part])  # a copy, as the model may work in place
        else:
            out = model(leaf.clone())
        checks.check_logits(out, len(x) * n, y if labels is None else labels)
        draws = out.view(len(x), n, -1)
        slope = _slope(leaf, draws, y, average, 1 if vote else n_eot)
        grad += slope.view(len(x), n, *x.shape[1:]).sign().sum(1) if vote else slope
        logits = logits + draws.detach().sum(1)
    return grad, (logits.argmax(1) == y).tolist()
