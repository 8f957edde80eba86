"""Attacks are a grid: an optimiser (`pgd`, `autoattack`, `square`) x a view of the defence (`blind`, `bpda`, `full`) x draws.

An optimiser knows only a model, a callable from images in [0, 1] to logits; so any model and any view fit any optimiser.
A view of a random defence is a `View`: it is also told the keys of the noise to draw, any number of them for an image.
Models and views are `nn.Module`s in evaluation mode, so the attacks of other libraries take `blind(defense)` and a `Query`, too.
`Attack` is one cell of the grid with all its numbers, and `ATTACKS` holds those of the paper's tables by name.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import sys
from dataclasses import dataclass, field
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from .defense import check_images
from .keyed import Keys, seed_of
from .memory import Room, in_parts, ran_out

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
        captions = None if self.captions is None else [self.captions[index] for index in keys.indices[::n_draws]]
        return self.defense.purify(x, captions, keys)

    def captioned(self, x, indices):
        """This view, its captions frozen to those of x as it is. Raises ValueError where two images share an index, but no caption."""
        frozen, captions = copy.copy(self), self.defense.caption(x.clone())
        frozen.captions = dict(zip(indices, captions))
        if [frozen.captions[index] for index in indices] != captions:
            raise ValueError("keys: two images have the same index and different captions; expected an index of its own for each")
        return frozen


class bpda(View):  # noqa: N801
    """BPDA view (Athalye et al. 2018): exact forward pass; backward as if purification were the identity."""

    def forward(self, x, keys):
        with torch.no_grad():
            purified = self.purify(x.detach().clone(), keys)    # of its own: a purifier may hand back what it was given
        x = x.repeat_interleave(len(keys) // len(x), 0)
        return self.defense.classify(purified + (x - x.detach()), keys)      # adds exactly 0, and x's gradient


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
    broke_at: list = field(default_factory=list)        # the first iterate the attacker saw misclassified, 0 the start; -1: none
    bad_gradients: list = field(default_factory=list)   # steps at which the gradient was zero everywhere, or not finite
    flags: list = field(default_factory=list)           # AutoAttack's own warnings, as one string


def check_numbers(most, **numbers):
    """Refuse a radius or step that is no number in [0, most]; a step may be 0 only where the radius is."""
    unit = "in units of the image, e.g. 8/255" if most == 1 else "in 1/255, e.g. 8"
    for name, value in numbers.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= most:        # NaN fails, too
            raise ValueError(f"{name}={value!r}: expected a number in [0, {most}], {unit}")
    for name, value in numbers.items():
        if value == 0 and any(numbers.values()) and name.startswith("step"):
            raise ValueError(f"{name}={value!r}: no image would move; expected a number above 0, {unit}")


def check_counts(**counts):
    """Refuse a number of steps, draws or the like that is no whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")


def check_flags(**flags):
    """Refuse a flag that is neither True nor False: "False", as any other text, would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: expected True or False")


def check_keys(keys, n):
    """Refuse what is not one key per image."""
    if keys is not None and not isinstance(keys, Keys):
        raise TypeError(f"keys: expected `Keys`, one for each image, got {type(keys).__name__}")
    if len(keys or ()) != n:
        raise ValueError(f"keys: got {len(keys or ())} for {n} images, expected one each")


def check_logits(logits, n, y, least=2, needed_by="an attack"):
    """Refuse logits that are not [n, classes], or have fewer than `least` classes, and labels y that are none of them."""
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != n:
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model: its output is {found}, expected a tensor of logits [{n}, classes]")
    classes = logits.shape[1]
    if classes < least:
        raise ValueError(f"model: its logits are of {classes} classes, and {needed_by} needs at least {least}")
    if (bad := (y < 0) | (y >= classes)).any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"labels: image {first} of {len(y)} has label {int(y[first])}, and the model's classes are 0 to {classes - 1}")


def check_labels(y, n):
    """Refuse labels that are not n whole numbers; broadcasting would hide it and count beyond 100 %."""
    if not isinstance(y, torch.Tensor) or y.dtype != torch.long:
        raise TypeError(f"labels: expected a torch.long tensor, got {getattr(y, 'dtype', type(y).__name__)}")
    if y.shape != (n,):
        raise ValueError(f"labels: got shape {list(y.shape)} for {n} images, expected one each")


def pgd(model, x, y, *, eps, step_size, n_steps, keys=None, random_start=True, n_eot=1, average="gradient", any_step=False,
        n_restarts=1, known_noise=False, masked_by=None, batch_size=64, record=None, progress=None):
    """L-inf projected gradient ascent on the cross-entropy (Madry et al. 2018): adversarial images [n, 3, h, w] in [0, 1].

    x: images in [0, 1]; y: labels [n]; eps and step_size in pixels of [0, 1], so 8/255 and not 8. keys: one per image, for
    a random start and for the draws of a `View`; without keys the start is x and the model must be a plain one.
    n_eot: draws of the defence per step; average: "gradient" (mean gradient; the usual EOT), "logits" (gradient at the mean
    logits) or "vote" (sign of the summed signs, as the authors' code has it). known_noise: the attacker's draws are the
    defender's own, else they are fresh at each step. any_step: an image is given up as broken at the first iterate that
    the attacker sees misclassified, and returned as it is there; else the last iterate counts. n_restarts: an image that
    stands at the end begins anew. masked_by: another model; an image that it mislabels is not moved, as in the authors' BPDA, where
    it is the classifier without purification. batch_size: draws per call of the model, a number or a `Room`; no result depends on it.
    progress(n): called with the number of steps done. Raises TypeError or ValueError for what cannot be meant. x and y are left as they
    are, whatever the model does to the copies that it is given.

    Images do not march in step: each has its own step number, so one that leaves makes room for the next.
    """
    room = Room.of(batch_size)
    _check_batch(model, x, y, keys, average)
    check_numbers(1, eps=eps, step_size=step_size)
    check_counts(n_steps=n_steps, n_eot=n_eot, n_restarts=n_restarts, batch_size=room.size)
    check_flags(random_start=random_start, any_step=any_step, known_noise=known_noise)
    start_keys = keys if random_start else None
    adv, step, restart = _start(x, eps, start_keys), [0] * len(x), [0] * len(x)
    broke_at, bad_gradients = [-1] * len(x), [0] * len(x)
    looks_at_last = any_step or n_restarts > 1          # the last iterate is classified too, though no step follows
    live = list(range(len(x)))
    while live:
        rows = live[:max(1, room.size // n_eot)]
        draws = None
        if keys is not None:
            steps = [0] * len(rows) if known_noise else [restart[i] * (n_steps + 1) + step[i] for i in rows]
            draws = keys[rows].at(steps, n_eot, "defence" if known_noise else None)
        at_once = n_eot if average == "logits" else min(n_eot, room.size)           # draws of one image in a call
        fits, found = room.try_(lambda: gradient(model, adv[rows], y[rows].to(x.device), draws, n_eot, average, room.size, y),
                                len(rows) * (at_once if average != "logits" or len(rows) > 1 else 1))
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
            elif not done:                              # the last look: an image that still stands may begin anew
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
SCALE = 2.0 ** 10   # of the loss, while it is differentiated: float16 networks round less of it to zero, and single precision's
                    # result is the same to the bit, a power of two being exact


def gradient(model, x, y, keys=None, n_eot=1, average="gradient", batch_size=64, labels=None):
    """Gradient of the cross-entropy at x [n, 3, h, w], and whether the mean logits over the draws are still right [n].

    keys: n_eot for each image, image after image. A plain model is asked once: it has nothing to average.
    labels: all those that must be classes of the model, where y is a part of them. Raises ValueError for one that is not.
    """
    def ask(x, keys):
        return model(x, keys) if isinstance(model, View) else model(x)

    n_eot = n_eot if isinstance(model, View) else 1
    apart = average == "vote" and n_eot > 1             # a gradient for each draw, not their sum
    group = n_eot if average == "logits" else min(n_eot, batch_size)
    if isinstance(model, View) and model.captions is None and (apart or group < n_eot):
        model = model.captioned(x, keys.indices[::n_eot])       # words are chosen once for an image, not for each of its draws
    grad, logits = torch.zeros_like(x), 0
    for first in range(0, n_eot, group):
        n = min(group, n_eot - first)
        part = keys and keys[[i * n_eot + first + d for i in range(len(x)) for d in range(n)]]
        leaf = (x.repeat_interleave(n, 0) if apart else x).detach().clone().requires_grad_(True)
        out = ask(leaf.clone(), part)                   # a copy, as the model may work in place
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


class Query(Frozen):
    """A `View` as a plain model, for attacks of other libraries: every call draws afresh, keyed by the call's number.

    keys: one for each image, all of which it is asked about at each call: an attack that drops images on its way gets one image at
    a time, with a query of its own. n_draws: each answer is the mean of the logits over so many draws. Raises TypeError or ValueError.
    """

    def __init__(self, view, keys, n_draws=1):
        super().__init__()
        if not isinstance(view, View):
            raise TypeError(f"view: expected a `View`, as `full(defense)` is, got {type(view).__name__}, which is a plain model already")
        check_keys(keys, len(keys) if isinstance(keys, Keys) else 1)
        check_counts(n_draws=n_draws)
        self.view, self.keys, self.n_draws, self.calls = view, keys, n_draws, 0

    def forward(self, x):
        if len(x) != len(self.keys):
            raise ValueError(f"x: got {len(x)} images for {len(self.keys)} keys, and cannot know which these are; attack one image at a "
                             "time, with a Query of its own")
        keys = self.keys.at([self.calls] * len(self.keys), self.n_draws)
        self.calls += 1
        logits = self.view(x, keys).view(len(x), self.n_draws, -1).mean(1)
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)       # a zero gradient, and no error, where none passes


class _Warnings(logging.Handler):
    """Keeps what AutoAttack warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.seen = []

    def emit(self, message):
        self.seen.append(message.getMessage().split(" See ")[0])


@contextlib.contextmanager
def _isolated():
    """pyautoattack counts calls in a module-wide table, seeds torch's global generator and takes over the process's trace
    function: all three are as before afterwards, so that a model's flags are its own. Yields the list of its warnings."""
    from pyautoattack import checks
    logger, handler, tracer = logging.getLogger("auto-attack"), _Warnings(), sys.gettrace()
    level, propagate = logger.level, logger.propagate
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        with torch.random.fork_rng():
            yield handler.seen
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        sys.settrace(tracer)


def blocks(indices, block):
    """Places of the images that AutoAttack takes together: neighbours of equal index // block, each alone at block 1."""
    of = (lambda place: place) if block == 1 else (lambda place: indices[place] // block)
    return [list(places) for _, places in itertools.groupby(range(len(indices)), of)]


def autoattack(model, x, y, *, eps, keys, version="standard", attacks=None, n_queries=5000, n_steps=100, n_eot=20, block=1,
               record=None, progress=None):
    """AutoAttack (Croce and Hein 2020) through pyautoattack, a block of images at a time: adversarial images [n, 3, h, w].

    version: "standard"; "rand" for a random defence (APGD-CE and APGD-DLR with n_eot draws a step); "custom" with `attacks`,
    e.g. ("square",) with `n_queries`. block: neighbours of equal index // block go together, seeded by the first one's key. The
    library draws for a batch as a whole, so an image's result depends on who shares its block: on nobody at 1. Where the model is a
    `View` each call draws fresh noise, and the point of the highest loss is returned whether or not the library's last single draw
    was fooled; scoring is the evaluation's.
    n_steps, n_eot: APGD's; 100 and 20 are AutoAttack's own. Raises TypeError or ValueError for what cannot be meant.
    """
    from pyautoattack import checks
    check_images(x)
    check_labels(y, len(x))
    check_numbers(1, eps=eps)
    check_counts(n_queries=n_queries, n_steps=n_steps, n_eot=n_eot, block=block)
    if block > 1 and isinstance(model, View):
        raise ValueError(f"block={block}: a view of a random defence is attacked one image at a time, its noise being the image's own")
    if version not in ("standard", "rand", "custom"):
        raise ValueError(f"no AutoAttack version {version!r}; choose from ['custom', 'rand', 'standard']")
    if bool(attacks) != (version == "custom"):
        raise ValueError(f"attacks={attacks!r} with version={version!r}: expected names of attacks with 'custom', and only then")
    for name in attacks or ():
        if name not in NEEDS:
            raise ValueError(f"attacks: AutoAttack has no {name!r}; choose from {sorted(NEEDS)}")
    check_keys(keys, len(x))
    out, flags = x.clone(), []
    for rows in blocks(keys.indices, block):
        some, labels, key = x[rows], y[rows].to(x.device), keys[rows[:1]]
        random = isinstance(model, View)
        plain = Query(model, key, n_eot if attacks else 1) if random else model
        with _isolated() as seen:
            library = _library(plain, y, version, attacks, n_steps, eps=eps, device=x.device, seed=seed_of(*key.rows[0]) % 2 ** 32)
            library.apgd.eot_iter = n_eot if version == "rand" else 1
            library.square.n_queries = n_queries
            if random and version != "standard":
                checks.check_range_output(library.model, some, logger=library.logger)
                checks.check_dynamic(library.model, some, logger=library.logger)
                out[rows] = _strongest(library, model, some, labels, key, n_eot)
            else:
                try:
                    out[rows] = library.run_standard_evaluation(some, labels, batch_size=len(some))[0]
                except RuntimeError as error:
                    if not ran_out(error):
                        raise
                    raise MemoryError(f"AutoAttack's {len(some)} images of a block do not fit into memory; lower `autoattack_block`. "
                                      "A block is not halved by itself, as its images share their draws") from error
        flags += ["; ".join(dict.fromkeys(seen))] * len(some)
        if progress:
            progress(len(some))
    if record is not None:
        record.flags, record.bad_gradients = flags, [int("zero gradient" in f) for f in flags]
        record.broke_at = [-1] * len(x)
    return out


NEEDS = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}     # classes that AutoAttack's losses take


def _library(model, y, version, attacks, n_steps, **settings):
    """pyautoattack's AutoAttack with APGD's plan for n_steps. Raises ValueError at the model's first answer if it has too few classes."""
    from pyautoattack import AutoAttack

    def ask(x):
        logits = model(x.clone())                       # a copy, as the model may work in place
        check_logits(logits, len(x), y, NEEDS[pickiest], f"AutoAttack's {pickiest!r} ('apgd-ce' and 'square', by version='custom', need 2)")
        # the targeted parts take all other classes, nine at most
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(9, logits.shape[1] - 1)
        return logits

    library = AutoAttack(ask, version=version, attacks=list(attacks) if attacks else None, **settings)
    pickiest = max(library.attacks_to_run, key=NEEDS.get)
    for part in (library.apgd, library.apgd_targeted):
        part.n_iter = part.n_iter_orig = n_steps
        part.n_iter_2, part.n_iter_min, part.size_decr = (max(int(share * n_steps), 1) for share in (0.22, 0.06, 0.03))
    return library


def _strongest(library, view, one, label, key, n_eot):
    """Of the points that the library's attacks end at, the one with the highest mean loss over fresh draws. Its own
    evaluation asks a random defence once, and hands back the clean image where that one answer is right."""
    points = []
    for name in library.attacks_to_run:
        torch.manual_seed(library.seed)
        if name == "square":
            library.square.init_hyperparam(one)
            points.append(library.square.attack_single_run(one, label)[1])
        elif name in ("apgd-ce", "apgd-dlr"):
            library.apgd.loss = name.removeprefix("apgd-")
            points.append(library.apgd.perturb(one, label, best_loss=True))
        else:
            raise ValueError(f"attacks: {name!r} is not made for a random defence; choose from ['apgd-ce', 'apgd-dlr', 'square']")

    def loss(point):
        with torch.no_grad():
            logits = view(point.clone(), key.at([10 ** 6], n_eot))      # a step number that no query reaches
        return F.cross_entropy(logits, label.expand(len(logits))).item()
    return max(points, key=loss)[0]


# ---------------------------------------------------------------- one cell of the grid, and the paper's


@dataclass(frozen=True)
class Attack:
    """One cell of the grid, all numbers included; attack(defense, x, y, keys) -> adversarial images [n, 3, h, w].

    An attack of your own is a subclass with another `__call__`; what it notes in `record` the tables show, and it need note nothing.
    """
    name: str                           # what a table calls it
    optimiser: str = "pgd"              # "none", "pgd", "autoattack" or "square"
    view: str = "blind"                 # what the attacker sees: "blind", "bpda" or "full"
    eps_255: float = 8                  # L-inf radius in 1/255
    step_size_255: float = 2            # paper silent: Yoon et al.'s step
    n_steps: int = 40                   # for "square": queries; for "autoattack": APGD's, whose own number is 100
    n_eot: int = 1                      # paper silent: draws of the defence per step
    average: str = "gradient"           # paper silent: over the draws; "gradient", "logits" or "vote"
    random_start: bool = True           # paper silent
    known_noise: bool = False           # the attacker's draws are the defender's
    captions: str = "anew"              # paper silent: "anew" at every step, or those of the "clean" image throughout
    masked: bool = False                # the authors' code: an image stops moving once the bare classifier is fooled
    any_step: bool = False              # paper silent: broken at any iterate, or judged at the last
    n_restarts: int = 1                 # paper silent
    version: str = "standard"           # AutoAttack's
    block: int = 1                      # images that AutoAttack takes at a time; at more than 1 they share draws

    def __post_init__(self):
        choices = {"optimiser": ("none", "pgd", "autoattack", "square"), "view": tuple(VIEWS), "average": AVERAGES,
                   "captions": ("anew", "clean"), "version": ("standard", "rand")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {list(allowed)}")
        check_numbers(255, eps_255=self.eps_255, step_size_255=self.step_size_255)
        if 0 < self.eps_255 < 0.1:
            raise ValueError(f"eps_255={self.eps_255!r}: expected a number in 1/255, that is 8 and not 8/255")
        check_counts(n_steps=self.n_steps, n_eot=self.n_eot, n_restarts=self.n_restarts, block=self.block)
        check_flags(random_start=self.random_start, known_noise=self.known_noise, masked=self.masked, any_step=self.any_step)
        if self.block > 1 and (self.optimiser != "autoattack" or self.view != "blind"):
            raise ValueError(f"block={self.block}: only AutoAttack on the blind view takes more than one image at a time")
        for name, plain in {"known_noise": False, "masked": False, "any_step": False, "n_restarts": 1, "average": "gradient"}.items():
            if self.optimiser != "pgd" and getattr(self, name) != plain:
                raise ValueError(f"{name}={getattr(self, name)!r}: only the optimiser 'pgd' has it, not {self.optimiser!r}")

    @property
    def foreign(self):
        """Whether this is somebody's own subclass, of which these fields say little."""
        return type(self) is not Attack

    @property
    def success(self):
        """What counts as broken, in words."""
        return {"none": "none", "pgd": "any step" if self.any_step else "last iterate"}.get(self.optimiser, "the attack's best point")

    def settings(self):
        """The numbers that define the attack, by name, and whose it is."""
        return dataclasses.asdict(self) | ({"is": type(self).__qualname__} if self.foreign else {})

    def describe(self):
        """The protocol in a line, for a table."""
        if self.optimiser == "none":
            return "no attack"
        if self.foreign:
            return f"{type(self).__name__}; eps {self.eps_255:g}/255"
        what = {"pgd": f"PGD-{self.n_steps}, step {self.step_size_255:g}/255",
                "square": f"Square, {self.n_steps} queries, mean of {self.n_eot} draws",
                "autoattack": f"AutoAttack {self.version}" + f", {self.n_steps} steps" * (self.n_steps != 100)
                + f", {self.n_eot} draws" * (self.version == "rand") + f", blocks of {self.block}" * (self.block > 1)}[self.optimiser]
        extras = []
        if self.optimiser == "pgd":
            if self.view != "blind":
                average = "vote of signs" if self.average == "vote" else f"mean {self.average}"
                draws = "1 draw" if self.n_eot == 1 else f"{self.n_eot} draws, {average}"
                extras += [draws + (", the defender's own" if self.known_noise else "")]
                extras += ["masked by the bare classifier"] * self.masked
            extras += ["random start"] * self.random_start + [f"{self.n_restarts} restarts"] * (self.n_restarts > 1) + [self.success]
        if self.view != "blind":
            extras += [{"anew": "captions anew", "clean": "caption of the clean image"}[self.captions]]
        return "; ".join([what, f"eps {self.eps_255:g}/255", self.view, *extras])

    def purifications(self):
        """(forward only, with a gradient) for one image; the defence's share of the attack's cost. An upper bound if any_step."""
        if self.view == "blind" or self.optimiser == "none":
            return 0, 0
        looks = (self.n_steps + (self.any_step or self.n_restarts > 1)) * self.n_restarts   # the last iterate is looked at too
        asked = self.n_eot * {"pgd": looks, "square": self.n_steps, "autoattack": 2 * self.n_steps}[self.optimiser]
        return (0, asked) if self.view == "full" and self.optimiser != "square" else (asked, 0)

    def whole(self, n):
        """n images, rounded up to whole blocks: AutoAttack does no part of one."""
        return math.ceil(n / self.block) * self.block

    def gradients(self):
        """Gradients of the bare classifier for one image of a blind attack; of AutoAttack's, those of its first part, the least."""
        return self.n_steps * self.n_restarts if self.view == "blind" and self.optimiser in ("pgd", "autoattack") else 0

    def __call__(self, defense, x, y, keys, batch_size=64, record=None, progress=None):
        if self.optimiser == "none":
            if record is not None:
                record.broke_at, record.bad_gradients, record.flags = [-1] * len(x), [0] * len(x), [""] * len(x)
            return x.clone()
        model = VIEWS[self.view](defense)
        if self.captions == "clean" and self.view != "blind":
            model = model.captioned(x, keys.indices)
        shared = {"eps": self.eps_255 / 255, "keys": keys, "record": record, "progress": progress}
        if self.optimiser == "pgd":
            return pgd(model, x, y, step_size=self.step_size_255 / 255, n_steps=self.n_steps, n_eot=self.n_eot, average=self.average,
                       random_start=self.random_start, known_noise=self.known_noise, any_step=self.any_step,
                       masked_by=blind(defense) if self.masked else None, n_restarts=self.n_restarts, batch_size=batch_size, **shared)
        if self.optimiser == "square":
            return autoattack(model, x, y, version="custom", attacks=("square",), n_queries=self.n_steps, n_eot=self.n_eot, **shared)
        return autoattack(model, x, y, version=self.version, n_steps=self.n_steps, n_eot=self.n_eot, block=self.block, **shared)


NATURAL = Attack("natural", optimiser="none", eps_255=0)
ATTACKS = {attack.name: attack for attack in (
    # Tables 1 and 2: preprocessor-blind PGD, Yoon et al.'s clf_pgd
    Attack("blind PGD-40"),
    # Table 3
    Attack("BPDA-40", view="bpda"),
    Attack("BPDA-40+EOT", view="bpda", n_eot=15, random_start=False),           # paper silent: 15 draws, as Yoon et al. have
    Attack("BPDA-40+EOT (authors' vote)", view="bpda", n_eot=15, random_start=False, average="vote"),
    Attack("BPDA-50+EOT (Hill)", view="bpda", n_steps=50, n_eot=15, average="logits", any_step=True),
    # Table 4; AutoAttack is run on the bare classifier, as the authors' code does: a transfer attack
    Attack("AutoAttack", optimiser="autoattack", n_steps=100),
    Attack("PGD-10", n_steps=10),
    # beyond the paper: what an attacker does who sees the whole defence
    Attack("PGD-20+EOT, full gradient", view="full", n_steps=20, n_eot=5),
    Attack("PGD-20+EOT, full gradient, clean caption", view="full", n_steps=20, n_eot=5, captions="clean"),
    Attack("PGD-20, full gradient, known noise", view="full", n_steps=20, known_noise=True),
    Attack("Square", optimiser="square", view="full", n_steps=100, n_eot=4),
    Attack("AutoAttack rand", optimiser="autoattack", view="full", version="rand", n_steps=100, n_eot=20),
)}


def get_attack(attack, /, **overrides):
    """The attack of this name with some fields replaced, its name too if wanted. Raises ValueError, with the choices, for an
    unknown name or field."""
    if attack not in ATTACKS:
        raise ValueError(f"no attack {attack!r}; choose from {list(ATTACKS)}")
    if unknown := sorted(set(overrides) - {f.name for f in dataclasses.fields(Attack)}):
        raise ValueError(f"an attack has no field {', '.join(unknown)}; choose from {[f.name for f in dataclasses.fields(Attack)]}")
    known = ATTACKS[attack]
    if "n_steps" in overrides:              # "blind PGD-40" with ten steps is "blind PGD-10"
        overrides = {"name": known.name.replace(f"-{known.n_steps}", f"-{overrides['n_steps']}")} | overrides
    return dataclasses.replace(known, **overrides)


def in_batches(attack, x, y, keys=None, batch_size=128):
    """`attack(x, y, keys)` over slices of a large set; the slices change no result, as keys belong to images. x and y are copied."""
    return torch.cat(in_parts(lambda p: attack(x[p].clone(), y[p].clone(), None if keys is None else keys[p]), len(x), batch_size))
