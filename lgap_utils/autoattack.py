"""autoattack."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys

import torch
import torch.nn.functional as F

from .attacks import Frozen, View
from .batches import ran_out
from .checks import check_counts, check_images, check_keys, check_labels, check_logits, check_numbers
from .noise import Keys, seed_of


class Query(Frozen):
    """A `View` as a plain model, for attacks of other libraries: every call draws afresh, keyed by the call's number.

    keys: one for each image, all of which it is asked about at each call: an attack that drops images on its way gets one image at
    a time, with a query of its own. n_draws: each answer is the mean of the logits over so many draws. Raises TypeError or ValueError.
    """

    def __init__(self, view, keys, n_draws=1):
        super().__init__()
        if not isinstance(view, View):
            raise TypeError(
                f"view: expected a `View`, as `full(defense)` is, got {type(view).__name__}, which is a plain model already"
            )
        check_keys(keys, len(keys) if isinstance(keys, Keys) else 1)
        check_counts(n_draws=n_draws)
        self.view, self.keys, self.n_draws, self.calls = view, keys, n_draws, 0

    def forward(self, x):
        if len(x) != len(self.keys):
            raise ValueError(
                f"x: got {len(x)} images for {len(self.keys)} keys, and cannot know which these are; attack one image at a "
                "time, with a Query of its own"
            )
        keys = self.keys.at([self.calls] * len(self.keys), self.n_draws)
        self.calls += 1
        logits = self.view(x, keys).view(len(x), self.n_draws, -1).mean(1)
        return logits + 0 * x.flatten(1).sum(
            1, keepdim=True
        )  # a zero gradient, and no error, where none passes


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


def autoattack(
    model,
    x,
    y,
    *,
    eps,
    keys,
    version="standard",
    attacks=None,
    n_queries=5000,
    n_steps=100,
    n_eot=20,
    block=1,
    record=None,
    progress=None,
):
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
        raise ValueError(
            f"block={block}: a view of a random defence is attacked one image at a time, its noise being the image's own"
        )
    if version not in ("standard", "rand", "custom"):
        raise ValueError(f"no AutoAttack version {version!r}; choose from ['custom', 'rand', 'standard']")
    if bool(attacks) != (version == "custom"):
        raise ValueError(
            f"attacks={attacks!r} with version={version!r}: expected names of attacks with 'custom', and only then"
        )
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
            library = _library(
                plain,
                y,
                version,
                attacks,
                n_steps,
                eps=eps,
                device=x.device,
                seed=seed_of(*key.rows[0]) % 2**32,
            )
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
                    raise MemoryError(
                        f"AutoAttack's {len(some)} images of a block do not fit into memory; lower `autoattack_block`. "
                        "A block is not halved by itself, as its images share their draws"
                    ) from error
        flags += ["; ".join(dict.fromkeys(seen))] * len(some)
        if progress:
            progress(len(some))
    if record is not None:
        record.flags, record.bad_gradients = flags, [int("zero gradient" in f) for f in flags]
        record.broke_at = [-1] * len(x)
    return out


NEEDS = {
    "apgd-ce": 2,
    "apgd-dlr": 3,
    "apgd-t": 4,
    "fab": 2,
    "fab-t": 2,
    "square": 2,
}  # classes that AutoAttack's losses take


def _library(model, y, version, attacks, n_steps, **settings):
    """pyautoattack's AutoAttack with APGD's plan for n_steps. Raises ValueError at the model's first answer if it has too few classes."""
    from pyautoattack import AutoAttack

    def ask(x):
        logits = model(x.clone())  # a copy, as the model may work in place
        check_logits(
            logits,
            len(x),
            y,
            NEEDS[pickiest],
            f"AutoAttack's {pickiest!r} ('apgd-ce' and 'square', by version='custom', need 2)",
        )
        # the targeted parts take all other classes, nine at most
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(9, logits.shape[1] - 1)
        return logits

    library = AutoAttack(ask, version=version, attacks=list(attacks) if attacks else None, **settings)
    pickiest = max(library.attacks_to_run, key=NEEDS.get)
    for part in (library.apgd, library.apgd_targeted):
        part.n_iter = part.n_iter_orig = n_steps
        part.n_iter_2, part.n_iter_min, part.size_decr = (
            max(int(share * n_steps), 1) for share in (0.22, 0.06, 0.03)
        )
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
            raise ValueError(
                f"attacks: {name!r} is not made for a random defence; choose from ['apgd-ce', 'apgd-dlr', 'square']"
            )

    def loss(point):
        with torch.no_grad():
            logits = view(point.clone(), key.at([10**6], n_eot))  # a step number that no query reaches
        return F.cross_entropy(logits, label.expand(len(logits))).item()

    return max(points, key=loss)[0]
