"""Attacks are a grid: an optimiser (`pgd`, `autoattack`, `square`) x a view of the defence (`blind`, `bpda`, `full`) x draws.

An optimiser knows only a model, a callable from images in [0, 1] to logits; so any model and any view fit any optimiser.
A view of a random defence is a `View`: it is also told the keys of the noise to draw, any number of them for an image.
Models and views are `nn.Module`s in evaluation mode, so the attacks of other libraries take `blind(defense)` and a `Query`, too.
`Attack` is one cell of the grid with all its numbers, and `ATTACKS` holds those of the paper's tables by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .batches import BatchSize
from .checks import (
    check_counts,
    check_flags,
    check_images,
    check_keys,
    check_labels,
    check_logits,
    check_numbers,
)

# ---------------------------------------------------------------- views: what the attacker sees


class Frozen(nn.Module):
    """A module that stays in evaluation mode with all it holds: a library that calls `train()` changes nothing."""

    def __init__(self):
        super().__init__()
        self.training = False

    def train(self, mode=True):
        return self


class blind(Frozen):  # noqa: N801 - views are named like functions, as they are used
    """Preprocessor-blind view (paper section 4.1): the attacker sees the classifier and knows of no purification."""

    def __init__(self, defense, captions=None):
        super().__init__()
        self.defense = defense

    def forward(self, x):
        return self.defense.classify(x)


class View(Frozen):
    """The whole defence as a model of images *and* keys: view(x, keys) -> logits [len(keys), classes], image after image.

    captions: {image index: text}, which freezes them; None takes them anew at every call, from the images as they are.
    """

    def __init__(self, defense, captions=None):
        super().__init__()
        self.defense, self.captions = defense, captions

    def purify(self, x, keys):
        n_draws = len(keys) // len(x)
        captions = (
            None if self.captions is None else [self.captions[index] for index in keys.indices[::n_draws]]
        )
        return self.defense.purify(x, captions, keys)

    def captioned(self, x, indices):
        """This view, its captions frozen to those of x as it is. Raises ValueError where two images share an index, but no caption."""
        frozen, captions = copy.copy(self), self.defense.caption(x.clone())
        frozen.captions = dict(zip(indices, captions))
        if [frozen.captions[index] for index in indices] != captions:
            raise ValueError(
                "keys: two images have the same index and different captions; expected an index of its own for each"
            )
        return frozen


class bpda(View):  # noqa: N801
    """BPDA view (Athalye et al. 2018): exact forward pass; backward as if purification were the identity."""

    def forward(self, x, keys):
        with torch.no_grad():
            purified = self.purify(
                x.detach().clone(), keys
            )  # of its own: a purifier may hand back what it was given
        x = x.repeat_interleave(len(keys) // len(x), 0)
        return self.defense.classify(purified + (x - x.detach()), keys)  # adds exactly 0, and x's gradient


class full(View):  # noqa: N801
    """White-box view: the exact gradient through resize, VAE, every denoising step and VAE again.

    The caption is a choice of words and has no gradient; it is frozen, or chosen anew at every step.
    """

    def forward(self, x, keys):
        return self.defense.classify(self.purify(x, keys), keys)


VIEWS = {"blind": blind, "bpda": bpda, "full": full}

# ---------------------------------------------------------------- optimisers


@dataclass
class Record:
    """What happened to each image of an attack: pass one in to have it filled, with one entry per image."""

    broke_at: list = field(
        default_factory=list
    )  # the first iterate the attacker saw misclassified, 0 the start; -1: none
    bad_gradients: list = field(
        default_factory=list
    )  # steps at which the gradient was zero everywhere, or not finite
    flags: list = field(default_factory=list)  # AutoAttack's own warnings, as one string


def pgd(
    model,
    x,
    y,
    *,
    eps,
    step_size,
    n_steps,
    keys=None,
    random_start=True,
    n_eot=1,
    average="gradient",
    any_step=False,
    n_restarts=1,
    known_noise=False,
    masked_by=None,
    batch_size=64,
    record=None,
    progress=None,
):
    """L-inf projected gradient ascent on the cross-entropy (Madry et al. 2018): adversarial images [n, 3, h, w] in [0, 1].

    x: images in [0, 1]; y: labels [n]; eps and step_size in pixels of [0, 1], so 8/255 and not 8. keys: one per image, for
    a random start and for the draws of a `View`; without keys the start is x and the model must be a plain one.
    n_eot: draws of the defence per step; average: "gradient" (mean gradient; the usual EOT), "logits" (gradient at the mean
    logits) or "vote" (sign of the summed signs, as the authors' code has it). known_noise: the attacker's draws are the
    defender's own, else they are fresh at each step. any_step: an image is given up as broken at the first iterate that
    the attacker sees misclassified, and returned as it is there; else the last iterate counts. n_restarts: an image that
    stands at the end begins anew. masked_by: another model; an image that it mislabels is not moved, as in the authors' BPDA, where
    it is the classifier without purification. batch_size: draws per call of the model, a number or a `BatchSize`; no result depends on it.
    progress(n): called with the number of steps done. Raises TypeError or ValueError for what cannot be meant. x and y are left as they
    are, whatever the model does to the copies that it is given.

    Images do not march in step: each has its own step number, so one that leaves makes room for the next.
    """
    room = BatchSize.of(batch_size)
    _check_batch(model, x, y, keys, average)
    check_numbers(1, eps=eps, step_size=step_size)
    check_counts(n_steps=n_steps, n_eot=n_eot, n_restarts=n_restarts, batch_size=room.size)
    check_flags(random_start=random_start, any_step=any_step, known_noise=known_noise)
    start_keys = keys if random_start else None
    adv, step, restart = _start(x, eps, start_keys), [0] * len(x), [0] * len(x)
    broke_at, bad_gradients = [-1] * len(x), [0] * len(x)
    looks_at_last = any_step or n_restarts > 1  # the last iterate is classified too, though no step follows
    live = list(range(len(x)))
    while live:
        rows = live[: max(1, room.size // n_eot)]
        draws = None
        if keys is not None:
            steps = [0] * len(rows) if known_noise else [restart[i] * (n_steps + 1) + step[i] for i in rows]
            draws = keys[rows].at(steps, n_eot, "defence" if known_noise else None)
        at_once = n_eot if average == "logits" else min(n_eot, room.size)  # draws of one image in a call
        fits, found = room.attempt(
            lambda: gradient(model, adv[rows], y[rows].to(x.device), draws, n_eot, average, room.size, y),
            len(rows) * (at_once if average != "logits" or len(rows) > 1 else 1),
        )
        if not fits:
            continue
        grad, right = found
        moved, bad = _next(grad, adv[rows], x[rows], y[rows].to(x.device), eps, step_size, masked_by)
        for k, i in enumerate(rows):
            if broke_at[i] < 0 and not right[k]:
                broke_at[i] = restart[i] * (n_steps + 1) + step[i]
            bad_gradients[i] += bad[k]
            done = any_step and not right[k]
            if not done and step[i] < n_steps:
                adv[i], step[i] = moved[k], step[i] + 1
                done = step[i] == n_steps and not looks_at_last
            elif not done:  # the last look: an image that still stands may begin anew
                done = not right[k] or restart[i] + 1 == n_restarts
                if not done:
                    restart[i], step[i] = restart[i] + 1, 0
                    adv[i] = _start(x[[i]], eps, start_keys and start_keys[[i]], restart[i])[0]
            if done:
                live.remove(i)
        if progress:
            progress(len(rows))
    if record is not None:
        record.broke_at, record.bad_gradients, record.flags = broke_at, bad_gradients, [""] * len(x)
    return adv


def _check_batch(model, x, y, keys, average):
    """Refuse what `pgd` cannot attack."""
    check_images(x)
    check_labels(y, len(x))
    if average not in AVERAGES:
        raise ValueError(f"no average {average!r}; choose from {list(AVERAGES)}")
    if keys is not None:
        check_keys(keys, len(x))
    elif isinstance(model, View):
        raise ValueError("keys: a view of a random defence draws noise; expected one key per image")


def _start(x, eps, keys, restart=0):
    """Where an attack on x begins: in the ball of radius eps around it, or, without keys, at a copy of it."""
    if keys is None:
        return x.clone()
    noise = keys.at([restart] * len(x)).uniform(x.shape[1:], "start").to(x)
    return (x + eps * (2 * noise - 1)).clamp(0, 1)


def _next(grad, adv, x, y, eps, step_size, masked_by):
    """(the next iterate of each image, whether its gradient was zero everywhere or not finite)."""
    norm = grad.flatten(1).abs().sum(1)
    bad = (norm == 0) | ~torch.isfinite(norm)
    if masked_by is not None:
        with torch.no_grad():
            grad = grad * (masked_by(adv.clone()).argmax(1) == y).view(-1, 1, 1, 1)
    moved = adv + step_size * grad.nan_to_num(0, 0, 0).sign()
    return (x + (moved - x).clamp(-eps, eps)).clamp(0, 1), bad.tolist()


AVERAGES = ("gradient", "logits", "vote")
SCALE = (
    2.0**10
)  # of the loss, while it is differentiated: float16 networks round less of it to zero, and single precision's
# result is the same to the bit, a power of two being exact


def gradient(model, x, y, keys=None, n_eot=1, average="gradient", batch_size=64, labels=None):
    """Gradient of the cross-entropy at x [n, 3, h, w], and whether the mean logits over the draws are still right [n].

    keys: n_eot for each image, image after image. A plain model is asked once: it has nothing to average.
    labels: all those that must be classes of the model, where y is a part of them. Raises ValueError for one that is not.
    """

    def ask(x, keys):
        return model(x, keys) if isinstance(model, View) else model(x)

    n_eot = n_eot if isinstance(model, View) else 1
    apart = average == "vote" and n_eot > 1  # a gradient for each draw, not their sum
    group = n_eot if average == "logits" else min(n_eot, batch_size)
    if isinstance(model, View) and model.captions is None and (apart or group < n_eot):
        model = model.captioned(
            x, keys.indices[::n_eot]
        )  # words are chosen once for an image, not for each of its draws
    grad, logits = torch.zeros_like(x), 0
    for first in range(0, n_eot, group):
        n = min(group, n_eot - first)
        part = keys and keys[[i * n_eot + first + d for i in range(len(x)) for d in range(n)]]
        leaf = (x.repeat_interleave(n, 0) if apart else x).detach().clone().requires_grad_(True)
        out = ask(leaf.clone(), part)  # a copy, as the model may work in place
        check_logits(out, len(x) * n, y if labels is None else labels)
        draws = out.view(len(x), n, -1)
        if average == "logits":
            loss = F.cross_entropy(draws.mean(1), y, reduction="sum")
        else:
            loss = F.cross_entropy(out, y.repeat_interleave(n), reduction="sum") / (1 if apart else n_eot)
        # the second term: zero, and no error, where a purifier passes no gradient
        (g,) = torch.autograd.grad(SCALE * loss + 0 * leaf.sum(), leaf)
        g = g / SCALE
        grad += g.view(len(x), n, *x.shape[1:]).sign().sum(1) if apart else g
        logits = logits + draws.detach().sum(1)
    return grad, (logits.argmax(1) == y).tolist()
