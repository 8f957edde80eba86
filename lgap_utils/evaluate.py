"""Attacks on a defence, scored image by image: rows that are kept and resumed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .attacks import Record, gradient
from .autoattack import blocks
from .batches import BatchSize, call_in_batches
from .checks import check_counts, look_like_softmax
from .defense import LGAP, METHOD
from .identity import digest, identity
from .images import Images
from .noise import Keys
from .profiles import check_whole
from .progress import tqdm
from .protocols import NATURAL, Attack
from .rows import Frame, Rows, known_images, open_rows, packed, unpacked
from .rows import attacked_images as attacked_images  # of the rows that are made here
from .workers import spread
from .zoo import before_unpickling

KEY = ["index", "defence", "draw"]  # of a row
SOFTMAX = "logits look like softmax probabilities"  # a flag of rows


def describe_defense(defense: LGAP) -> dict[str, Any]:
    """{part: `identity`} of a defence's parts, and the size in pixels that it classifies at."""
    parts = {part: identity(getattr(defense, part)) for part in ("captioner", "purifier", "classifier")}
    if type(defense) is not LGAP:  # a subclass may purify or classify in its own way
        parts["defence"] = identity(defense)
    return {**parts, "input_size": defense.input_size}


def folder_name(name: str) -> str:
    """A folder's name for an attack's; a digest keeps names apart that are not ASCII."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain if plain and name.isascii() else f"{plain or 'attack'}-{digest(name)[:6]}"


class Evaluation:
    """Attacks on the first of `defenses` ({name: LGAP}); their images are scored under all of them.

    n_draws: noise draws of the defence per image; 1 for a purifier with `random = False`. Attacked images are
    kept in folder/NAME OF THE ATTACK, what a defence makes of them in a folder of its own below, so that a
    further defence costs no further attack. Rows of another target or defence, another attack, seed, n_draws,
    `config` or METHOD are refused (ValueError). batch_size changes a result by rounding at most; order and
    process change none.
    """

    def __init__(
        self,
        defenses: dict[str, LGAP],
        images: Images,
        folder: str | Path,
        *,
        config: dict[str, Any],
        n_draws: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        workers: int = 0,
    ):
        check_counts(n_draws=n_draws, batch_size=batch_size)
        check_whole("workers", workers, 0)
        self.defenses, self.images, self.folder = dict(defenses), images, Path(folder)
        self.target = next(iter(self.defenses.values()))
        self.device = next((p.device for p in self.target.parameters()), torch.device("cpu"))
        self.n_draws, self.seed, self.batch_size = n_draws, seed, BatchSize(batch_size, self.device)
        self.config, self.known = config, known_images(images)
        self.places = {index: place for place, index in enumerate(self.known)}
        self.workers, self.crew = workers, ""  # crew: how many workers there are, in words

    def to(self, device: torch.device) -> Evaluation:
        """This evaluation, its defences moved to a device."""
        for defense in self.defenses.values():
            defense.to(device)
        self.device, self.batch_size = device, BatchSize(self.batch_size.size, device)
        return self

    def run(
        self, attack: Attack, indices: Sequence[int] | None = None, defenses: Iterable[str] | None = None
    ) -> pd.DataFrame:
        """A row per image, defence and draw; those that are missing are computed and kept.

        indices: which images, by dataset index; None for all. defenses: under which the attacked images are
        scored, by name; None for all. Columns: index, image (digest of its pixels), label, defence, draw,
        clean and adversarial (labels predicted), caption_clean and caption (of the adversarial image), random
        (whether the defence draws noise), linf, inside (of ball and [0, 1]), broke_at, bad_gradients, flags
        (see attacks.Record), seconds (of the attack, per image), change (see `attacked_images`), attack,
        eps_255, n_steps, n_eot, success.
        Raises TypeError for no Attack, ValueError for a wrong index or name.
        """
        if not isinstance(attack, Attack):
            own = "for one of your own, a subclass with another __call__"
            raise TypeError(f"attack: got {attack!r}, expected a protocols.Attack; {own}")
        indices = list(self.places) if indices is None else [int(i) for i in indices]
        for i in indices:
            if i not in self.places:
                raise ValueError(f"indices: {i} is not among the {len(self.places)} images at hand")
        if not indices or len(set(indices)) != len(indices):
            raise ValueError("indices: no image, or one twice; expected at least one, each once")
        names = list(self.defenses if defenses is None else dict.fromkeys(defenses))
        if not names or set(names) - set(self.defenses):
            raise ValueError(f"defenses: got {names}, expected some of {list(self.defenses)}")
        natural = None if attack == NATURAL else self.run(NATURAL, indices, names)
        rows = self.rows(attack)
        attacked = rows.complete(indices, self.known, 1, partial(self._compute, attack, rows))
        scores = pd.concat([self._scored(rows, attacked, name) for name in names])
        table = scores.merge(attacked.drop(columns=["image", "label"]), on="index", validate="m:1")
        table = table.sort_values(KEY, ignore_index=True)
        table["flags"] = ["; ".join(filter(None, both)) for both in zip(table["flags"], table.pop("softmax"))]
        if natural is None:
            table = table.assign(clean=table["adversarial"], caption_clean=table["caption"])
        else:
            table = table.merge(natural[[*KEY, "clean", "caption_clean"]], on=KEY, validate="1:1")
        columns = {name: getattr(attack, name) for name in ("eps_255", "n_steps", "n_eot", "success")}
        return table.assign(attack=attack.name, **columns)

    def rows(self, attack: Attack) -> Rows:
        """The kept `Rows` of an attack's images, one for each, under all that they depend on."""
        name, target = next(iter(self.defenses.items()))
        config = {**self.config, "target": {"name": name} | describe_defense(target), "seed": self.seed}
        config |= {"method": METHOD, "attack": attack.settings()}
        folder = self.folder / folder_name(attack.name)
        return open_rows(folder, config, {name: describe_defense(target)}, attack=attack)

    def _scored(self, rows: Rows, attacked: Frame, name: str) -> pd.DataFrame:
        """The kept rows of attacked images under one defence, one for each draw."""
        defense = self.defenses[name]
        parts, n_draws = describe_defense(defense), self.draws_of(defense)
        config = {**rows.config, "defence": {"name": name} | parts, "n_draws": n_draws}
        scores = open_rows(rows.folder / folder_name(name), config, {name: parts}, ("index", "draw"))
        changes = dict(zip(attacked["index"], attacked["change"]))

        def compute(indices: list[int]) -> None:
            parts, right = [], []
            for some in self._cut(indices, self.batch_size.size):
                parts.append((name, self.images[[self.places[i] for i in some]], [changes[i] for i in some]))
            title = f"{rows.config['attack']['name']}: {name} judges"
            with tqdm(total=len(indices), desc=title, unit="image", mininterval=2) as bar:
                for judged in self._spread(Evaluation._judged, parts):
                    scores.write(judged)
                    right += [row["adversarial"] == row["label"] for row in judged]
                    share = f"{100 * sum(right) / len(right):.1f} % right so far"
                    bar.set_postfix_str(share + self.crew, refresh=False)
                    bar.update(len(judged) // n_draws)

        table = scores.complete(attacked["index"].tolist(), self.known, n_draws, compute)
        return table.assign(defence=name)

    def _spread(self, work: Callable[..., Any], tasks: list[Any]) -> Iterator[list[dict[str, Any]]]:
        """The rows that work(self, *task) makes of each task, here or by workers."""

        def say(text: str) -> None:
            self.crew = f", {text}"

        return spread(self, self.device, work, tasks, self.workers, say, before_unpickling())

    def _cut(self, indices: list[int], size: int) -> list[list[int]]:
        """Parts of `size` indices, or fewer where every worker is to have one."""
        size = min(size, -(-len(indices) // max(1, self.workers)))
        return [indices[first : first + size] for first in range(0, len(indices), size)]

    def _judged(self, name: str, images: Images, changes: list[bytes]) -> list[dict[str, Any]]:
        """The rows of a few attacked images under a defence."""
        defense, adv = self.defenses[name], unpacked(changes, images.x).to(self.device)
        captions, labels, flag = self.score(defense, adv, images.indices)
        rows, random = [], bool(getattr(defense.purifier, "random", True))
        for k, index in enumerate(images.indices.tolist()):
            image, label = self.known[index]
            row = {"index": index, "image": image, "label": label, "caption": captions[k], "random": random}
            rows += [{**row, "draw": d, "adversarial": p, "softmax": flag} for d, p in enumerate(labels[k])]
        return rows

    def draws_of(self, defense: LGAP) -> int:
        """By how many draws an image is judged under a defence: one where the purifier draws no noise."""
        return self.n_draws if getattr(defense.purifier, "random", True) else 1

    def _compute(self, attack: Attack, rows: Rows, indices: list[int]) -> None:
        """Attack and score the images of these indices, a shard at a time: a batch, or less if costly."""
        if attack.block > 1:
            indices = self._whole_blocks(attack.block, indices)
        plan = self.plan(attack, len(indices))
        print(plan["text"], flush=True)
        size = self.batch_size.size
        size = max(1, min(size, 60 * size // max(1, plan["cost"])))
        if self.workers:
            size = min(size, -(-len(indices) // self.workers))
        shards = [[]]
        for block in blocks(indices, attack.block):
            if shards[-1] and len(shards[-1]) + len(block) > size:
                shards.append([])
            shards[-1] += [self.places[indices[k]] for k in block]
        n_steps = attack.n_steps * attack.n_restarts if attack.optimiser == "pgd" else 1
        with tqdm(total=len(indices) * n_steps, desc=attack.name, unit="step", mininterval=2) as bar:
            n_done, tasks = 0, [(attack, self.images[places]) for places in shards]
            shard = Evaluation._shard if self.workers else partial(Evaluation._shard, progress=bar.update)
            for made in self._spread(shard, tasks):
                rows.write(made)
                n_done += len(made)
                bar.set_postfix_str(f"{n_done} of {len(indices)} images{self.crew}", refresh=False)
                bar.n = n_done * n_steps  # images that broke early took fewer steps
                bar.refresh()

    def _whole_blocks(self, block: int, indices: list[int]) -> list[int]:
        """The indices in the order of their blocks, index // block. Raises ValueError for part of a block."""
        started = {i // block for i in indices}
        if rest := [i for i in self.places if i // block in started and i not in indices]:
            raise ValueError(
                f"image {min(rest)} is in a block of {block} images that are attacked together, and is done "
                f"or not asked for; ask for whole blocks (0 to {block - 1} is one), or move kept rows away"
            )
        return sorted(indices)

    def _shard(self, attack: Attack, images: Images, progress: Any = None) -> list[dict[str, Any]]:
        """The rows of a few images, attacked together, one for each."""
        began, n = time.perf_counter(), len(images)
        x, y, keys = images.x.to(self.device), images.labels, Keys(images.indices, self.seed, "attack")
        record = Record([-1] * n, [0] * n, [""] * n)  # for an attack that fills in nothing
        how = {"batch_size": self.batch_size, "record": record, "progress": progress}
        # clones, as an attack may work in place: its distance is that from the images as they were
        adv = _checked(attack, attack(self.target, x.clone(), y.clone(), keys, **how), x, keys)
        linf, values = (adv - x).abs().flatten(1).amax(1), adv.flatten(1)
        near = attack.distance(x, adv) <= attack.eps_255 / 255 * (1 + 1e-5) + 1e-6
        inside = near & (values.amin(1) >= 0) & (values.amax(1) <= 1)
        changes, seconds = packed(adv, x), (time.perf_counter() - began) / n
        return [
            {
                **{"index": index, "image": self.known[index][0], "label": int(y[k])},
                **{"linf": float(linf[k]), "inside": bool(inside[k]), "broke_at": int(record.broke_at[k])},
                **{"bad_gradients": int(record.bad_gradients[k]), "flags": record.flags[k]},
                **{"seconds": seconds, "change": changes[k]},
            }
            for k, index in enumerate(images.indices.tolist())
        ]

    @torch.no_grad()
    def score(self, defense: LGAP, x: torch.Tensor, indices: torch.Tensor) -> tuple[list, list, str]:
        """Images x [n, 3, h, w] under a defence: (n captions, n lists with a label a draw, "" or a flag)."""
        n_draws = self.draws_of(defense)
        captions, labels, softmax = [], [], []

        def score_part(p: slice) -> None:
            keys = Keys(indices[p], self.seed)
            texts, keys = defense.caption(x[p], keys), keys.at([0] * len(x[p]), n_draws)
            if len(x[p]) > 1:
                logits = defense(x[p], texts, keys)
            else:  # the draws of a single image may be taken apart, too
                draws = call_in_batches(lambda d: defense(x[p], texts, keys[d]), n_draws, self.batch_size)
                logits = torch.cat(draws)
            captions.extend(texts)
            labels.extend(logits.argmax(1).view(len(x[p]), n_draws).tolist())
            softmax.append(look_like_softmax(logits.float()))

        call_in_batches(score_part, len(x), self.batch_size, n_draws)
        return captions, labels, SOFTMAX if all(softmax) else ""

    def plan(self, attack: Attack, n: int) -> dict[str, Any]:
        """What an attack on n images takes: {"text", "purifications", "seconds", "cost"}; it times a batch.

        cost: purifications of an image without a gradient; one with a gradient counts as 3.
        """
        forward, backward = attack.purifications()
        purifications = n * (forward + backward)
        cost = forward + 3 * backward  # a gradient costs about two more passes
        few = self.images[: min(len(self.images), self.batch_size.size)]
        x, y = few.x.to(self.device), few.labels.to(self.device)
        purify = torch.no_grad()(lambda p: self.target.purify(x[p], None, Keys(few.indices[p], self.seed)))
        call_in_batches(purify, min(2, len(x)), self.batch_size)  # the first call loads and plans kernels
        seconds = n * cost * _seconds(lambda: call_in_batches(purify, len(x), self.batch_size)) / len(x)
        if attack.gradients():  # a blind attack's, of the classifier
            x, y = (x[: attack.block], y[: attack.block]) if attack.optimiser == "autoattack" else (x, y)
            gradient(self.target.classify, x, y)
            each = _seconds(lambda: gradient(self.target.classify, x, y)) / len(x)
            seconds += n * attack.gradients() * each
        calls = purifications * getattr(self.target.purifier, "denoiser_calls", 0)
        seconds /= max(1, self.workers)
        about = "at least" if attack.optimiser == "autoattack" else "about"
        duration = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        counts = f"{n} images, {purifications:,} purifications, {calls:,} denoiser calls"
        text = f"{attack.name}: {counts}; {about} {duration}"
        return {"text": text, "purifications": purifications, "seconds": seconds, "cost": cost}


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _checked(attack: Attack, adv: Any, x: torch.Tensor, keys: Keys) -> torch.Tensor:
    """An attack's images, detached. Raises TypeError or ValueError where they cannot be scored."""
    if not isinstance(adv, torch.Tensor) or adv.shape != x.shape:
        got = list(adv.shape) if isinstance(adv, torch.Tensor) else type(adv).__name__
        raise TypeError(f"attack {attack.name!r}: it gave {got}, expected a tensor of images {list(x.shape)}")
    adv = adv.detach().to(x)
    if (bad := ~torch.isfinite(adv).flatten(1).all(1)).any():
        raise ValueError(
            f"attack {attack.name!r}: its image {keys.indices[int(bad.nonzero()[0])]} holds NaN or inf"
        )
    return adv


def purified_pixels(rows: pd.DataFrame, shape: Sequence[int]) -> torch.Tensor:
    """The column `purified` of `purify_rows` as uint8 [n, *shape]."""
    return torch.from_numpy(np.stack([np.frombuffer(b, np.uint8).reshape(shape) for b in rows["purified"]]))
