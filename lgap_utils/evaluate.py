"""Runs that survive: rows per image in a folder that belongs to one configuration; resuming is doing what is missing."""
from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from .attacks import NATURAL, Attack, Record, blocks, gradient
from .defense import check_images
from .files import write_whole
from .keyed import Keys
from .memory import Room, in_parts

# ---------------------------------------------------------------- rows on disk


class Rows:
    """A folder of parquet shards, each written whole or not at all, that belongs to one configuration.

    `key` names the columns that tell rows apart, the image's index first. Raises ValueError, naming what differs, if the
    folder belongs to another configuration.
    """

    def __init__(self, folder, config, key=("index",)):
        self.folder, self.key = Path(folder), list(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        config = json.loads(json.dumps(config, sort_keys=True))
        self.owner = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        file = self.folder / "config.json"
        if file.exists():
            try:
                there = json.loads(file.read_text())
            except ValueError:
                raise ValueError(f"{file} is not JSON, so nobody knows whose rows lie beside it; move the folder away") from None
            if changed := difference(there, config):
                raise ValueError(f"{self.folder} holds rows of another configuration ({'; '.join(changed)}); "
                                 "move or delete it, or set LGAP_OUTPUTS to another folder")
            config = there                          # equal, but 8 may be written 8.0
            self.owner = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        else:
            write_whole(file, json.dumps(config, indent=1, sort_keys=True).encode())

    def read(self):
        """All rows in the order of their key. A shard that is torn, of another configuration, or that repeats rows is set
        aside with a message, and its images count as missing."""
        import pyarrow.parquet as pq
        shards, seen = [], set()
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                table = pq.read_table(path, page_checksum_verification=True)
                frame = table.to_pandas()
                mine, kept = set(frame[self.key].itertuples(index=False, name=None)), table.schema.metadata or {}
                if kept.get(b"lgap_digest", b"").decode() != _digest(frame):
                    raise ValueError("its rows are not those that were written")
            except Exception as error:  # whatever a broken file makes the reader raise
                self._set_aside(path, "broken", f"is not a whole shard ({type(error).__name__})")
                continue
            if kept.get(b"lgap_owner") != self.owner.encode():
                self._set_aside(path, "foreign", "belongs to another configuration")
            elif len(mine) != len(frame) or mine & seen:
                self._set_aside(path, "duplicate", "repeats rows that another shard has")
            else:
                seen |= mine
                shards.append(frame)
        if not shards:
            return pd.DataFrame({name: pd.Series(dtype=np.int64 if name == "index" else object) for name in self.key})
        return pd.concat(shards, ignore_index=True).sort_values(self.key, ignore_index=True)

    def _set_aside(self, path, kind, why):
        aside = path.with_suffix(f".{kind}")
        os.replace(path, aside)
        print(f"{path.name} {why}; kept as {aside.name}, images that are in no other shard run again")

    def write(self, rows):
        """Add one shard."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        frame, buffer = pd.DataFrame(rows), io.BytesIO()
        table = pa.Table.from_pandas(frame, preserve_index=False)
        marks = {b"lgap_owner": self.owner.encode(), b"lgap_digest": _digest(frame).encode()}
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **marks}), buffer, write_page_checksum=True)
        name = hashlib.blake2b(str(sorted(set(frame["index"]))).encode(), digest_size=6).hexdigest()
        write_whole(self.folder / f"{frame['index'].min():06d}-{name}.parquet", buffer.getvalue())


def _digest(frame):
    """Of a frame's names and values. Parquet's own checksums cover pages of values, but not the names of the columns."""
    values = pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()
    return hashlib.blake2b(str(list(frame)).encode() + values, digest_size=16).hexdigest()


def difference(there, here, at=""):
    if isinstance(there, dict) and isinstance(here, dict):
        return [d for k in sorted(there.keys() | here.keys()) for d in difference(there.get(k), here.get(k), f"{at}.{k}" if at else k)]
    return [] if there == here else [f"{at}: there {there!r}, here {here!r}"]


@functools.cache
def method_version():
    """A digest of the code that decides a row, whatever its comments and layout: rows of another method are not mixed in."""
    files = [Path(__file__).parent / f"{name}.py" for name in ("keyed", "defense", "attacks", "baselines")]
    code = [ast.dump(ast.parse(file.read_text())) for file in files]
    return hashlib.blake2b("".join(code).encode(), digest_size=6).hexdigest()


def image_digests(pixels):
    """A short digest of each image: a row is tied to the pixels that it was computed from."""
    return [hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() for image in pixels.numpy()]


def done_of(rows, digests):
    """The indices that rows holds. Raises ValueError if one of them is of another image than digests, {index: digest}, has at hand."""
    table = rows.read()
    known = table[table["index"].isin(list(digests))]
    image = known.get("image", pd.Series("", known.index))              # no row, or rows that do not say
    if (other := image != known["index"].map(digests)).any():
        raise ValueError(f"{rows.folder}: image {known['index'][other].iloc[0]} is not the one at hand, so these are rows of other "
                         "images; move or delete the folder, or set LGAP_OUTPUTS to another one")
    return set(table["index"])


def state_digest(module):
    """Short digest of a module's parameters and buffers, so that a fine-tuned classifier is not taken for its start."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity(part):
    """What a captioner, purifier or classifier is, as far as it can be told: its settings or name, and a digest of its weights."""
    named = f"{getattr(part, '__module__', '')}.{getattr(part, '__qualname__', type(part).__name__)}"
    digest = state_digest(part) if isinstance(part, torch.nn.Module) else None
    return {"is": part.settings() if hasattr(part, "settings") else named, "weights": digest}


# ---------------------------------------------------------------- attacks, scored


class Evaluation:
    """Attacks on one defence, scored under that and, on the same adversarial images, under others.

    defenses: {name: LGAP}; attacks see the first. images: `data.Images`. n_draws: noise draws of the defence per image
    (1 for a purifier that says `random = False`). Rows lie in folder/NAME OF THE ATTACK; `config` says what else they
    depend on (see models.configuration). No result depends on batch_size, on the order of the images, or on who runs which.
    """

    def __init__(self, defenses, images, folder, *, config, n_draws=1, seed=0, batch_size=64):
        self.defenses, self.images, self.folder = dict(defenses), images, Path(folder)
        self.target = next(iter(self.defenses.values()))
        self.device = next((p.device for p in self.target.parameters()), torch.device("cpu"))
        self.n_draws, self.seed, self.room = n_draws, seed, Room(batch_size, self.device)
        parts = {name: {part: identity(getattr(d, part)) for part in ("captioner", "purifier", "classifier")} | {"input_size": d.input_size}
                 for name, d in self.defenses.items()}
        self.pixels = dict(zip(images.indices.tolist(), image_digests(images.pixels)))
        self.config = {**config, "target": next(iter(parts)), "defences": parts, "n_draws": n_draws, "seed": seed,
                       "method": method_version()}

    def run(self, attack, indices=None):
        """A DataFrame with a row per image, defence and draw, computed where it is missing and kept.

        indices: which images, by dataset index; None for all. Columns: index, label, defence, draw, clean, adversarial (the
        labels predicted), caption_clean, caption (of the adversarial image), linf and inside (the threat model), broke_at,
        bad_gradients, flags (see attacks.Record), seconds (per image), and the attack's name, eps_255, n_steps, n_eot, success.
        """
        if not isinstance(attack, Attack):
            raise TypeError(f"attack: got {attack!r}, expected an attacks.Attack; for one of your own, a subclass with another __call__")
        places = {index: place for place, index in enumerate(self.images.indices.tolist())}
        wanted = list(places) if indices is None else [int(i) for i in indices]
        if missing := [i for i in wanted if i not in places]:
            raise ValueError(f"indices: {missing[0]} is not among the {len(places)} images at hand")
        if not wanted or len(set(wanted)) != len(wanted):
            raise ValueError(f"indices: {'an image is named twice' if wanted else 'no image is named'}; expected each once")
        natural = None if attack == NATURAL else self.run(NATURAL, wanted)
        rows = Rows(self.folder / re.sub(r"[^a-z0-9]+", "-", attack.name.lower()).strip("-"),
                    {**self.config, "attack": attack.settings()}, ("index", "defence", "draw"))
        done = done_of(rows, self.pixels)
        todo = [i for i in wanted if i not in done]
        if attack.block > 1:
            todo = self._whole_blocks(attack.block, todo, places)
        if todo:
            self._compute(attack, [places[i] for i in todo], rows)
        table = rows.read()
        table = table[table["index"].isin(wanted)].reset_index(drop=True)
        if natural is not None:
            table = table.merge(natural[[*rows.key, "clean", "caption_clean"]], on=rows.key, validate="1:1")
        else:
            table = table.assign(clean=table["adversarial"], caption_clean=table["caption"])
        return table.assign(attack=attack.name, eps_255=attack.eps_255, n_steps=attack.n_steps, n_eot=attack.n_eot, success=attack.success)

    @staticmethod
    def _whole_blocks(block, todo, at_hand):
        """The images to do in the order of their blocks, index // block; a block is done as a whole or not at all."""
        blocks = {i // block for i in todo}
        if left := sorted({i for i in at_hand if i // block in blocks} - set(todo)):
            raise ValueError(f"image {left[0]} is in a block of {block} images that are attacked together, and is done already or not "
                             f"asked for; ask for whole blocks (images 0 to {block - 1} are one), or move rows of a smaller set away")
        return sorted(todo)

    def _compute(self, attack, todo, rows):
        """Attack and score the images at the places `todo`, a shard at a time."""
        plan = self.plan(attack, len(todo))
        print(plan["text"], flush=True)
        size = max(1, min(self.room.size, 60 * self.room.size // max(1, plan["cost"])))     # a shard is a minute or so, not an hour
        shards = []
        for places in blocks([int(self.images.indices[i]) for i in todo], attack.block):
            if not shards or len(shards[-1]) + len(places) > size:
                shards.append([])
            shards[-1] += [todo[place] for place in places]
        steps = attack.n_steps * attack.n_restarts if attack.optimiser == "pgd" else 1
        with tqdm(total=len(todo) * steps, desc=attack.name, unit="step", mininterval=2) as bar:
            for done, part in enumerate(shards):
                began = time.perf_counter()
                record = Record([-1] * len(part), [0] * len(part), [""] * len(part))        # for an attack that fills in nothing
                x, y = self.images[part].x.to(self.device), self.images.labels[part]
                indices = self.images.indices[part]
                adv = attack(self.target, x, y, Keys(indices, self.seed, "attack"), batch_size=self.room, record=record,
                             progress=bar.update)
                linf = (adv - x).abs().flatten(1).amax(1)
                inside = (linf <= attack.eps_255 / 255 + 1e-6) & (adv.flatten(1).amin(1) >= 0) & (adv.flatten(1).amax(1) <= 1)
                scored = {name: self.score(defense, adv, indices) for name, defense in self.defenses.items()}
                each = (time.perf_counter() - began) / len(part)
                rows.write([{"index": int(indices[k]), "image": self.pixels[int(indices[k])], "label": int(y[k]), "defence": name,
                             "draw": draw, "adversarial": prediction, "caption": captions[k], "linf": float(linf[k]),
                             "inside": bool(inside[k]), "broke_at": int(record.broke_at[k]),
                             "bad_gradients": int(record.bad_gradients[k]), "flags": record.flags[k], "seconds": each}
                            for name, (captions, predictions) in scored.items() for k in range(len(part))
                            for draw, prediction in enumerate(predictions[k])])
                bar.n, _ = sum(map(len, shards[:done + 1])) * steps, bar.refresh()         # images that broke early took fewer steps

    @torch.no_grad()
    def score(self, defense, x, indices):
        """(captions, labels predicted [n][draws]) of images under a defence; one caption per image, one label per draw."""
        n_draws = self.n_draws if getattr(defense.purifier, "random", True) else 1

        def part(p):
            said, keys = defense.caption(x[p]), Keys(indices[p], self.seed).at([0] * len(x[p]), n_draws)
            if len(x[p]) > 1:
                logits = defense(x[p], said, keys)
            else:                                                       # the draws of a single image may be taken apart, too
                logits = torch.cat(in_parts(lambda d: defense(x[p], said, keys[d]), n_draws, self.room))
            return said, logits.argmax(1).view(len(x[p]), n_draws).tolist()

        captions, labels = zip(*in_parts(part, len(x), self.room, n_draws))
        return sum(captions, []), sum(labels, [])

    def plan(self, attack, n):
        """What running `attack` on n images will take: {"text", "purifications", "seconds", "cost" (purifications per image)}."""
        forward, backward = attack.purifications()
        draws = [self.n_draws if getattr(d.purifier, "random", True) else 1 for d in self.defenses.values()]
        purifications = n * (forward + backward + sum(draws))
        few = self.images[:min(len(self.images), self.room.size)]
        with torch.no_grad():
            purify = lambda p: self.target.purify(few.x[p].to(self.device), None, Keys(few.indices[p], self.seed))
            in_parts(purify, min(2, len(few)), self.room)                           # the first call loads and plans kernels
            began = time.perf_counter()
            in_parts(purify, len(few), self.room)
            each = (time.perf_counter() - began) / len(few)
        seconds = self._seconds_of_gradients(attack, few) * n
        cost = forward + 3 * backward + sum(draws)                                  # a gradient costs about two more passes
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
        few = few[:attack.block] if attack.optimiser == "autoattack" else few
        x, y = few.x.to(self.device), few.labels.to(self.device)
        for _ in range(2):                                                          # the first call loads and plans kernels
            began = time.perf_counter()
            gradient(self.target.classify, x, y)
        return attack.gradients() * (time.perf_counter() - began) / len(few)


# ---------------------------------------------------------------- purified images, kept


def purify_rows(defense, images, folder, *, config, x=None, seed=0, batch_size=64, title="purify"):
    """Caption, purify and classify: a DataFrame with a row per image, computed once and kept in `folder`.

    images: `data.Images`; x: what to purify in their place, e.g. adversarial versions [n, 3, h, w], which `config` must tell
    apart: attacked anew they need not be the same to the last bit. Columns: index,
    image (a digest of the one in images), label, caption, undefended and prediction (labels before and after purification),
    linf (how far x is from the image), purified (uint8 pixels as bytes, [3, h, w]), seconds (per image). Raises ValueError
    where rows of the folder belong to other images.
    """
    clean = images.x
    x = clean if x is None else x
    check_images(x)
    if x.shape != clean.shape:
        raise ValueError(f"x: got shape {list(x.shape)} for images of shape {list(clean.shape)}")
    rows, digests = Rows(folder, config), dict(zip(images.indices.tolist(), image_digests(images.pixels)))
    done = done_of(rows, digests)
    todo = [i for i, index in enumerate(digests) if index not in done]
    device = next((p.device for p in defense.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def purify(p):
        part, began = todo[p], time.perf_counter()
        batch = x[part].to(device)
        captions = defense.caption(batch)
        purified = defense.purify(batch, captions, Keys(images.indices[part], seed))
        before, after = (defense.classify(b).argmax(1).tolist() for b in (batch, purified))
        pixels = (purified.cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        each = (time.perf_counter() - began) / len(part)
        rows.write([{"index": int(images.indices[i]), "image": digests[int(images.indices[i])], "label": int(images.labels[i]),
                     "caption": captions[k], "undefended": before[k], "prediction": after[k], "linf": float((x[i] - clean[i]).abs().max()),
                     "purified": pixels[k].numpy().tobytes(), "seconds": each} for k, i in enumerate(part)])
        bar.update(len(part))

    with tqdm(total=len(images), initial=len(images) - len(todo), desc=title, mininterval=2) as bar:
        in_parts(purify, len(todo), Room(batch_size, device))
    table = rows.read()
    return table[table["index"].isin(images.indices.tolist())].reset_index(drop=True)


def purified_pixels(rows, shape):
    """The `purified` column as uint8 [n, *shape]."""
    return torch.from_numpy(np.stack([np.frombuffer(b, dtype=np.uint8).reshape(shape) for b in rows["purified"]]).copy())
