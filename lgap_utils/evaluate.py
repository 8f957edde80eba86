"""Attacks on a defence, scored image by image; and purified images. Both are rows that are kept and taken up again."""

from __future__ import annotations

import re
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .attacks import Record, gradient
from .autoattack import blocks
from .batches import BatchSize, call_in_batches
from .checks import check_counts, check_images, look_like_softmax
from .defense import LGAP, METHOD
from .files import folder_lock
from .identity import digest, identity, unnamed_in
from .noise import Keys
from .protocols import NATURAL, Attack
from .rows import Rows, known_images


def describe_defense(defense):
    """What a defence is, as plain data: the identity of each of its parts, and the size that it classifies at."""
    parts = {part: identity(getattr(defense, part)) for part in ("captioner", "purifier", "classifier")}
    if type(defense) is not LGAP:  # a subclass may purify or classify in its own way
        parts["defence"] = identity(defense)
    return parts | {"input_size": defense.input_size}


def rows_of(folder, slug, config, parts, key=("index",), also=()):
    """`Rows` in folder/slug where every part says what it is; else in a folder of their own below folder/unnamed, with a word.

    parts: {name: `describe_defense` defence}; also: what else does not say what it is.
    """
    if not (unnamed := [*unnamed_in(parts), *also]):
        return Rows(Path(folder) / slug, config, key)
    place = Path(folder) / "unnamed" / f"{slug}-{digest(config)}"
    if not place.exists():
        print(
            f"{unnamed[0]} has no settings() of its own and cannot be told from another one: its rows serve this run alone, in "
            f"{place}. To have them resumed, say what it is: lgap_utils.identity.named(part, 'a name', sigma=0.9)",
            flush=True,
        )
    return Rows(place, config, key)


def folder_name(name):
    """A folder's name for an attack's; letters that are not ASCII's are told apart by a digest."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain if plain and name.isascii() else f"{plain or 'attack'}-{digest(name)[:6]}"


# ---------------------------------------------------------------- attacks, scored


SOFTMAX = "logits look like softmax probabilities"  # a flag of rows


class Evaluation:
    """Attacks on one defence, scored under that and, on the same adversarial images, under others.

    defenses: {name: LGAP}; attacks see the first. images: `data.Images`. n_draws: noise draws of the defence per image
    (1 for a purifier that says `random = False`). Rows lie in folder/NAME OF THE ATTACK and are taken up again where defences,
    attack, seed and draws are the same (see identity.py); `config`, a dict, says what else they depend on. No result depends on
    batch_size, on the order of the images, or on who runs which.
    """

    def __init__(self, defenses, images, folder, *, config, n_draws=1, seed=0, batch_size=64):
        check_counts(n_draws=n_draws, batch_size=batch_size)
        self.defenses, self.images, self.folder = dict(defenses), images, Path(folder)
        self.target = next(iter(self.defenses.values()))
        self.device = next((p.device for p in self.target.parameters()), torch.device("cpu"))
        self.n_draws, self.seed, self.batch_size = n_draws, seed, BatchSize(batch_size, self.device)
        self.given, self.known = config, known_images(images)

    def run(self, attack, indices=None):
        """A DataFrame with a row per image, defence and draw, computed where it is missing and kept.

        indices: which images, by dataset index; None for all. Columns: index, label, defence, draw, clean, adversarial (the
        labels predicted), caption_clean, caption (of the adversarial image), linf and inside (the threat model), broke_at,
        bad_gradients, flags (see attacks.Record), seconds (per image), and the attack's name, eps_255, n_steps, n_eot, success.
        Where another process writes into the same folder, it is waited for, and what it did is not done again.
        """
        if not isinstance(attack, Attack):
            raise TypeError(
                f"attack: got {attack!r}, expected an attacks.Attack; for one of your own, a subclass with another __call__"
            )
        places = {index: place for place, index in enumerate(self.images.indices.tolist())}
        wanted = list(places) if indices is None else [int(i) for i in indices]
        if missing := [i for i in wanted if i not in places]:
            raise ValueError(f"indices: {missing[0]} is not among the {len(places)} images at hand")
        if not wanted or len(set(wanted)) != len(wanted):
            raise ValueError(
                f"indices: {'an image is named twice' if wanted else 'no image is named'}; expected each once"
            )
        natural = None if attack == NATURAL else self.run(NATURAL, wanted)
        rows = self.rows(attack)
        table = rows.read()
        if set(wanted) - rows.done(table, self.known):
            with folder_lock(rows.folder, wait=True):
                done = rows.done(rows.read(), self.known)  # somebody else may have done some meanwhile
                todo = [i for i in wanted if i not in done]
                if attack.block > 1:
                    todo = self._whole_blocks(attack.block, todo, places)
                if todo:
                    self._compute(attack, [places[i] for i in todo], rows)
            table = rows.read()
        table = rows.wanted(table, wanted, sum(self.draws_of(defense) for defense in self.defenses.values()))
        if natural is not None:
            table = table.merge(natural[[*rows.key, "clean", "caption_clean"]], on=rows.key, validate="1:1")
        else:
            table = table.assign(clean=table["adversarial"], caption_clean=table["caption"])
        return table.assign(
            attack=attack.name,
            eps_255=attack.eps_255,
            n_steps=attack.n_steps,
            n_eot=attack.n_eot,
            success=attack.success,
        )

    def rows(self, attack):
        """The kept `Rows` of an attack: those of this configuration, with everything that a row depends on."""
        parts = {name: describe_defense(defense) for name, defense in self.defenses.items()}
        config = {
            **self.given,
            "target": next(iter(parts)),
            "defences": parts,
            "n_draws": self.n_draws,
            "seed": self.seed,
            "method": METHOD,
            "attack": attack.settings(),
        }
        also = []
        if attack.foreign and "settings" not in vars(type(attack)):
            also = [f"the attack {attack.name!r} ({type(attack).__qualname__})"]
        if also or unnamed_in(parts):
            config["run"] = uuid.uuid4().hex  # it may be another by the next run
        return rows_of(
            self.folder, folder_name(attack.name), config, parts, ("index", "defence", "draw"), also
        )

    def draws_of(self, defense):
        """By how many draws an image is judged under a defence: one where the purifier draws no noise."""
        return self.n_draws if getattr(defense.purifier, "random", True) else 1

    @staticmethod
    def _whole_blocks(block, todo, at_hand):
        """The images to do in the order of their blocks, index // block; a block is done as a whole or not at all."""
        blocks = {i // block for i in todo}
        if left := sorted({i for i in at_hand if i // block in blocks} - set(todo)):
            raise ValueError(
                f"image {left[0]} is in a block of {block} images that are attacked together, and is done already or not "
                f"asked for; ask for whole blocks (images 0 to {block - 1} are one), or move rows of a smaller set away"
            )
        return sorted(todo)

    def _compute(self, attack, todo, rows):
        """Attack and score the images at the places `todo`, a shard at a time."""
        plan = self.plan(attack, len(todo))
        print(plan["text"], flush=True)
        size = max(
            1, min(self.batch_size.size, 60 * self.batch_size.size // max(1, plan["cost"]))
        )  # a shard is a minute or so, not an hour
        shards = []
        for places in blocks([int(self.images.indices[i]) for i in todo], attack.block):
            if not shards or len(shards[-1]) + len(places) > size:
                shards.append([])
            shards[-1] += [todo[place] for place in places]
        steps = attack.n_steps * attack.n_restarts if attack.optimiser == "pgd" else 1
        with tqdm(total=len(todo) * steps, desc=attack.name, unit="step", mininterval=2) as bar:
            for done, part in enumerate(shards):
                rows.write(self._shard(attack, self.images[part], bar.update))
                bar.n, _ = (
                    sum(map(len, shards[: done + 1])) * steps,
                    bar.refresh(),
                )  # images that broke early took fewer steps

    def _shard(self, attack, images, progress):
        """The rows of a few images, attacked together."""
        began, n = time.perf_counter(), len(images)
        record = Record([-1] * n, [0] * n, [""] * n)  # for an attack that fills in nothing
        x, y, indices = images.x.to(self.device), images.labels, images.indices
        # clones, as an attack may work in place: its distance is that from the images as they were
        adv = attack(
            self.target,
            x.clone(),
            y.clone(),
            Keys(indices, self.seed, "attack"),
            batch_size=self.batch_size,
            record=record,
            progress=progress,
        )
        adv = self._checked(attack, adv, x, indices)
        linf = (adv - x).abs().flatten(1).amax(1)
        inside = (
            (linf <= attack.eps_255 / 255 + 1e-6)
            & (adv.flatten(1).amin(1) >= 0)
            & (adv.flatten(1).amax(1) <= 1)
        )
        scored = {name: self.score(defense, adv, indices) for name, defense in self.defenses.items()}
        each = (time.perf_counter() - began) / n
        out = []
        for name, (captions, predictions, flag) in scored.items():
            for k, index in enumerate(indices.tolist()):
                flags = "; ".join(filter(None, (record.flags[k], flag)))
                row = {"index": index, "image": self.known[index][0], "label": int(y[k]), "defence": name}
                found = {
                    "caption": captions[k],
                    "linf": float(linf[k]),
                    "inside": bool(inside[k]),
                    "broke_at": int(record.broke_at[k]),
                    "bad_gradients": int(record.bad_gradients[k]),
                    "flags": flags,
                    "seconds": each,
                }
                out += [
                    {**row, "draw": draw, "adversarial": label, **found}
                    for draw, label in enumerate(predictions[k])
                ]
        return out

    @staticmethod
    def _checked(attack, adv, x, indices):
        """An attack's images, detached. Raises TypeError or ValueError where they cannot be scored."""
        if not isinstance(adv, torch.Tensor) or adv.shape != x.shape:
            raise TypeError(
                f"attack {attack.name!r}: it gave {list(getattr(adv, 'shape', [])) or type(adv).__name__}, "
                f"expected a tensor of images {list(x.shape)}"
            )
        adv = adv.detach().to(x)
        if (bad := ~torch.isfinite(adv).flatten(1).all(1)).any():
            raise ValueError(
                f"attack {attack.name!r}: its image {int(indices[int(bad.nonzero()[0])])} holds NaN or inf"
            )
        return adv

    @torch.no_grad()
    def score(self, defense, x, indices):
        """(captions, labels predicted [n][draws], "" or a flag) of images under a defence; one caption an image, one label a draw."""
        n_draws, probabilities = self.draws_of(defense), []

        def part(p):
            said, keys = defense.caption(x[p]), Keys(indices[p], self.seed).at([0] * len(x[p]), n_draws)
            if len(x[p]) > 1:
                logits = defense(x[p], said, keys)
            else:  # the draws of a single image may be taken apart, too
                logits = torch.cat(
                    call_in_batches(lambda d: defense(x[p], said, keys[d]), n_draws, self.batch_size)
                )
            probabilities.append(look_like_softmax(logits.float()))
            return said, logits.argmax(1).view(len(x[p]), n_draws).tolist()

        captions, labels = zip(*call_in_batches(part, len(x), self.batch_size, n_draws))
        return sum(captions, []), sum(labels, []), SOFTMAX if all(probabilities) else ""

    def plan(self, attack, n):
        """What running `attack` on n images will take: {"text", "purifications", "seconds", "cost" (purifications per image)}."""
        forward, backward = attack.purifications()
        draws = [self.draws_of(defense) for defense in self.defenses.values()]
        purifications = n * (forward + backward + sum(draws))
        few = self.images[: min(len(self.images), self.batch_size.size)]
        with torch.no_grad():
            purify = lambda p: self.target.purify(
                few.x[p].to(self.device), None, Keys(few.indices[p], self.seed)
            )
            call_in_batches(
                purify, min(2, len(few)), self.batch_size
            )  # the first call loads and plans kernels
            began = time.perf_counter()
            call_in_batches(purify, len(few), self.batch_size)
            each = (time.perf_counter() - began) / len(few)
        seconds = self._seconds_of_gradients(attack, few) * n
        cost = forward + 3 * backward + sum(draws)  # a gradient costs about two more passes
        calls = purifications * getattr(self.target.purifier, "denoiser_calls", 0)
        text = f"{attack.name}: {n} images, {purifications:,} purifications, {calls:,} denoiser calls"
        left = n * cost * each + seconds
        text += "; at least " if attack.optimiser == "autoattack" else "; about "
        text += f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
        return {"text": text, "purifications": purifications, "seconds": left, "cost": cost}

    def _seconds_of_gradients(self, attack, few):
        """Of a blind attack's gradients of the classifier, for one image, from a few timed ones."""
        if not attack.gradients():
            return 0.0
        few = few[: attack.block] if attack.optimiser == "autoattack" else few
        x, y = few.x.to(self.device), few.labels.to(self.device)
        for _ in range(2):  # the first call loads and plans kernels
            began = time.perf_counter()
            gradient(self.target.classify, x, y)
        return attack.gradients() * (time.perf_counter() - began) / len(few)


# ---------------------------------------------------------------- purified images, kept


def purify_rows(defense, images, folder, *, config, x=None, seed=0, batch_size=64, title="purify"):
    """Caption, purify and classify: a DataFrame with a row per image, computed once and kept in `folder`.

    images: `data.Images`; x: what to purify in their place, e.g. adversarial versions [n, 3, h, w]. `config`, a dict, must then
    say which, under "attack": attacked anew, images need not be the same to the last bit. Columns: index,
    image (a digest of the one in images), label, caption, undefended and prediction (labels before and after purification),
    linf (how far x is from the image), purified (uint8 pixels as bytes, [3, h, w]), seconds (per image). Raises ValueError
    where rows of the folder belong to other images, another defence, seed or `config`.
    """
    clean = images.x
    if x is not None and not config.get("attack"):
        raise ValueError(
            "x: whose images these are cannot be told from their rows; say it, as in attack=attack.settings()"
        )
    x = clean if x is None else x
    check_images(x)
    if x.shape != clean.shape:
        raise ValueError(f"x: got shape {list(x.shape)} for images of shape {list(clean.shape)}")
    parts = {"LGAP": describe_defense(defense)}
    config = {**config, "defence": parts["LGAP"], "seed": seed, "method": METHOD}
    if unnamed_in(parts):
        config["run"] = uuid.uuid4().hex
    folder = Path(folder)
    rows, known = rows_of(folder.parent, folder.name, config, parts), known_images(images)
    table = rows.read()
    if set(known) - rows.done(table, known):
        with folder_lock(rows.folder, wait=True):
            done = rows.done(rows.read(), known)
            todo = [i for i, index in enumerate(known) if index not in done]
            _purify(defense, images, x, todo, rows, known, seed, batch_size, title)
        table = rows.read()
    return rows.wanted(table, list(known), 1)


def _purify(defense, images, x, todo, rows, known, seed, batch_size, title):
    """Purify x at the places `todo` and write a shard for each batch."""
    device = next((p.device for p in defense.parameters()), torch.device("cpu"))
    linf = (x - images.x).abs().flatten(1).amax(1)

    @torch.no_grad()
    def purify(p):
        part, began = todo[p], time.perf_counter()
        batch = x[part].to(device)
        captions = defense.caption(batch)
        purified = defense.purify(batch, captions, Keys(images.indices[part], seed))
        before, after = (defense.classify(b).argmax(1).tolist() for b in (batch, purified))
        pixels = (purified.cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        each = (time.perf_counter() - began) / len(part)
        shard = []
        for k, i in enumerate(part):
            index = int(images.indices[i])
            shard.append(
                {
                    "index": index,
                    "image": known[index][0],
                    "label": int(images.labels[i]),
                    "caption": captions[k],
                    "undefended": before[k],
                    "prediction": after[k],
                    "linf": float(linf[i]),
                    "purified": pixels[k].numpy().tobytes(),
                    "seconds": each,
                }
            )
        rows.write(shard)
        bar.update(len(part))

    with tqdm(total=len(images), initial=len(images) - len(todo), desc=title, mininterval=2) as bar:
        call_in_batches(purify, len(todo), BatchSize(batch_size, device))


def purified_pixels(rows, shape):
    """The `purified_rows` column as uint8 [n, *shape]."""
    return torch.from_numpy(
        np.stack([np.frombuffer(b, dtype=np.uint8).reshape(shape) for b in rows["purified"]]).copy()
    )
