"""AutoAttack on a model or a random defence, and a random defence as a model for other libraries' attacks."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .attacks import Frozen, Model, Record, View
from .batches import ran_out
from .noise import Keys, seed_of


class Query(Frozen):
    """A `View` as a plain model: query(x) -> logits [n, classes]; each call draws noise of its own.

    keys: one for each image of every call. An attack that drops images on its way gets one image at a time,
    with a query of its own. n_draws: the logits are the mean over so many draws. Raises TypeError or
    ValueError.
    """

    def __init__(self, view: View, keys: Keys, n_draws: int = 1):
        super().__init__()
        if not isinstance(view, View):
            got = f"got {type(view).__name__}, which is a plain model already"
            raise TypeError(f"view: expected a `View`, as `full(defense)` is, {got}")
        checks.check_keys(keys, len(keys) if isinstance(keys, Keys) else 1)
        checks.check_counts(n_draws=n_draws)
        self.view, self.keys, self.n_draws, self.calls = view, keys, n_draws, 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(self.keys):
            got = f"got {len(x)} images for {len(self.keys)} keys"
            raise ValueError(f"x: {got}; attack one image at a time, with a Query of its own")
        keys = self.keys.at([self.calls] * len(self.keys), self.n_draws)
        self.calls += 1
        logits = self.view(x, keys).view(len(x), self.n_draws, -1).mean(1)
        no_error = 0 * x.flatten(1).sum(1, keepdim=True)  # but a zero gradient, where none passes
        return logits + no_error


def blocks(indices: Sequence[Any], block: int) -> list[list[int]]:
    """Places of the images that AutoAttack takes together: neighbours of equal index // block."""
    if block == 1:
        return [[place] for place in range(len(indices))]
    groups = itertools.groupby(range(len(indices)), lambda place: indices[place] // block)
    return [list(places) for _, places in groups]


# the attacks of the library, and how many classes their losses need
NEEDS = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}


def autoattack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    keys: Keys,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    n_queries: int = 5000,
    n_steps: int = 100,
    n_eot: int = 20,
    block: int = 1,
    move_all: bool = False,
    record: Record | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """AutoAttack (Croce and Hein 2020) through pyautoattack: adversarial images for x [n, 3, h, w] in [0, 1].

    y: labels [n]; eps: in pixels of [0, 1]. version: "standard"; "rand" for a random defence (APGD with n_eot
    draws a step); "custom" with names of `attacks`, as ("square",) with `n_queries`. n_steps: APGD's. block:
    neighbours of equal index // block go together and share draws, seeded by the first one's key. A `View`
    draws fresh noise at each call; the point of the highest loss is returned, even if the last draw is right.
    move_all: AutoAttack hands back clean what the model mislabels already, or what it could not break; then
    APGD's point of the highest cross-entropy takes its place.
    Raises TypeError or ValueError for bad input, MemoryError for a block that does not fit.
    """
    checks.check_images(x)
    checks.check_labels(y, len(x))
    checks.check_keys(keys, len(x))
    checks.check_numbers(1, eps=eps)
    checks.check_counts(n_queries=n_queries, n_steps=n_steps, n_eot=n_eot, block=block)
    _check_version(version, attacks)
    if block > 1 and isinstance(model, View):
        raise ValueError(f"block={block}: a view of a random defence is attacked one image at a time")
    out, flags = x.clone(), []
    for rows in blocks(keys.indices, block):
        key = keys[rows[:1]]
        with _isolated():
            plain = Query(model, key, n_eot if attacks else 1) if isinstance(model, View) else model
            seed = seed_of(*key.rows[0]) % 2**32
            library = _library(plain, y, version, attacks, n_steps, eps=eps, device=x.device, seed=seed)
            library.logger = library.apgd.logger = library.apgd_targeted.logger = logger = _Flags()
            library.apgd.eot_iter = n_eot if version == "rand" else 1
            library.square.n_queries = n_queries
            own = x[rows], y[rows].to(x.device)
            out[rows] = _attacked(library, model, *own, key, n_eot)
            if move_all:
                out[rows] = _moved(library, *own, out[rows])
        flags += ["; ".join(dict.fromkeys(logger.texts))] * len(rows)
        if progress:
            progress(len(rows))
    if record is not None:
        record.flags, record.broke_at = flags, [-1] * len(x)
        record.bad_gradients = [int("zero gradient" in flag) for flag in flags]
    return out


def _check_version(version: str, attacks: Sequence[str] | None) -> None:
    checks.check_choice("version", version, ("custom", "rand", "standard"))
    if bool(attacks) != (version == "custom"):
        expected = "expected names of attacks with 'custom', and only then"
        raise ValueError(f"attacks={attacks!r} with version={version!r}: {expected}")
    for name in attacks or ():
        checks.check_choice("attacks", name, sorted(NEEDS))


def _library(model: Model, y: Tensor, version: str, attacks: Any, n_steps: int, **settings: Any) -> Any:
    """pyautoattack's AutoAttack with APGD's plan for n_steps; its model refuses too few classes."""
    from pyautoattack import AutoAttack

    new: Any = AutoAttack

    def ask(x):
        logits = model(x.clone())  # a copy, as the model may work in place
        needed_by = f"AutoAttack's {pickiest!r} ('apgd-ce' and 'square', by version='custom', need 2)"
        checks.check_logits(logits, len(x), y, NEEDS[pickiest], needed_by)
        # the targeted parts take all other classes, nine at most
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(9, logits.shape[1] - 1)
        return logits

    library = new(ask, version=version, attacks=list(attacks) if attacks else None, **settings)
    pickiest = max(library.attacks_to_run, key=lambda name: NEEDS[name])
    for part in (library.apgd, library.apgd_targeted):
        part.n_iter = part.n_iter_orig = n_steps
        part.n_iter_2 = max(int(0.22 * n_steps), 1)
        part.n_iter_min = max(int(0.06 * n_steps), 1)
        part.size_decr = max(int(0.03 * n_steps), 1)
    return library


def _attacked(library: Any, model: Model, x: Tensor, y: Tensor, key: Keys, n_eot: int) -> Tensor:
    """The images of one block after the library's attacks; flags of a random defence go to its logger."""
    from pyautoattack import checks as own_checks

    if isinstance(model, View) and library.version != "standard":
        own_checks.check_range_output(library.model, x, logger=library.logger)
        own_checks.check_dynamic(library.model, x, logger=library.logger)
        return _strongest(library, model, x, y, key, n_eot)
    try:
        return library.run_standard_evaluation(x, y, batch_size=len(x))[0]
    except RuntimeError as error:
        if not ran_out(error):
            raise
        what = f"AutoAttack's {len(x)} images of a block"  # which is not halved, as they share their draws
        raise MemoryError(f"{what} do not fit into memory; lower `autoattack_block`") from error


def _moved(library: Any, x: Tensor, y: Tensor, adv: Tensor) -> Tensor:
    """`adv`, with the point of the highest cross-entropy in the ball where it is x [n, 3, h, w] still."""
    still = ((adv - x).abs().flatten(1).amax(1) == 0).nonzero().flatten()
    if len(still):
        torch.manual_seed(library.seed)
        library.apgd.loss = "ce"
        points = library.apgd.perturb(x[still], y[still], best_loss=True)
        adv = adv.index_copy(0, still, points.to(adv))
    return adv


def _strongest(library: Any, view: View, x: Tensor, y: Tensor, key: Keys, n_eot: int) -> Tensor:
    """Of the points that the library's attacks end at, the one with the highest mean loss over fresh draws.

    Its own evaluation asks a random defence once, and returns the clean image if that answer is right.
    """
    points = []
    for name in library.attacks_to_run:
        checks.check_choice("attacks on a random defence", name, ("apgd-ce", "apgd-dlr", "square"))
        torch.manual_seed(library.seed)
        if name == "square":
            library.square.init_hyperparam(x)
            points.append(library.square.attack_single_run(x, y)[1])
        else:
            library.apgd.loss = name.removeprefix("apgd-")
            points.append(library.apgd.perturb(x, y, best_loss=True))

    def loss(point):
        with torch.no_grad():
            logits = view(point.clone(), key.at([10**6], n_eot))  # a step number that no query reaches
        return F.cross_entropy(logits, y.expand(len(logits))).item()

    return max(points, key=loss)[0]


class _Flags:
    """A logger that keeps AutoAttack's warnings, and nothing else."""

    def __init__(self):
        self.texts = []

    def warning(self, text):
        self.texts.append(text.split(" See ")[0])

    def debug(self, text):
        pass


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """pyautoattack counts calls in a table of its own, seeds torch's generator and sets the trace function.

    All three are put back, and the table starts at zero, so that a model's flags are its own.
    """
    from pyautoattack.checks import funcs

    tracer = sys.gettrace()
    funcs.update(dict.fromkeys(funcs, 0))
    try:
        with torch.random.fork_rng():
            yield
    finally:
        funcs.update(dict.fromkeys(funcs, 0))
        sys.settrace(tracer)
