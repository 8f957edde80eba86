"""Runs that survive: a row per image in a folder that belongs to one configuration; resuming is doing what is missing."""
from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from .defense import check_images
from .keyed import Keys


class Rows:
    """A folder of parquet shards, each written whole or not at all, that belongs to one configuration.

    Raises ValueError, naming what differs, if the folder belongs to another one.
    """

    def __init__(self, folder, config):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        config = json.loads(json.dumps(config, sort_keys=True))
        file = self.folder / "config.json"
        if file.exists():
            there = json.loads(file.read_text())
            if changed := _difference(there, config):
                raise ValueError(f"{self.folder} holds rows of another configuration ({'; '.join(changed)}); "
                                 "move or delete it, or set LGAP_OUTPUTS to another folder")
        else:
            _write(file, json.dumps(config, indent=1, sort_keys=True).encode())

    def read(self):
        """All rows, one per index, in the order of the index. A shard that cannot be read is set aside with a message."""
        shards = []
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                shards.append(pd.read_parquet(path))
            except Exception as error:
                aside = path.with_suffix(".broken")
                os.replace(path, aside)
                print(f"{path.name} is not a whole shard ({type(error).__name__}); kept as {aside.name}, its images run again")
        if not shards:
            return pd.DataFrame({"index": pd.Series(dtype=np.int64)})
        rows = pd.concat(shards, ignore_index=True)
        return rows.drop_duplicates("index").sort_values("index", ignore_index=True)

    def write(self, rows):
        """Add one shard."""
        frame = pd.DataFrame(rows)
        name = hashlib.blake2b(str(sorted(frame["index"])).encode(), digest_size=6).hexdigest()
        _write(self.folder / f"{frame['index'].min():06d}-{name}.parquet", frame.to_parquet(index=False))


def _write(path, data):
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def _difference(there, here, at=""):
    if isinstance(there, dict) and isinstance(here, dict):
        return [d for k in sorted(there.keys() | here.keys()) for d in _difference(there.get(k), here.get(k), f"{at}.{k}" if at else k)]
    return [] if there == here else [f"{at}: there {there!r}, here {here!r}"]


def purify_rows(defense, images, folder, *, config, x=None, seed=0, batch_size=64, title="purify"):
    """Caption, purify and classify: a DataFrame with a row per image, computed once and kept in `folder`.

    images: `data.Images`; x: what to purify in their place, e.g. adversarial versions [n, 3, h, w]. Columns: index,
    label, caption, undefended and prediction (labels before and after purification), linf (how far x is from the image),
    purified (uint8 pixels as bytes, [3, h, w]), seconds (per image).
    """
    clean = images.x
    x = clean if x is None else x
    check_images(x)
    if x.shape != clean.shape:
        raise ValueError(f"x: got shape {list(x.shape)} for images of shape {list(clean.shape)}")
    rows = Rows(folder, config)
    done = set(rows.read()["index"])
    todo = [i for i, index in enumerate(images.indices.tolist()) if index not in done]
    device = next((p.device for p in defense.parameters()), torch.device("cpu"))
    with tqdm(total=len(images), initial=len(images) - len(todo), desc=title, mininterval=2) as bar:
        for start in range(0, len(todo), batch_size):
            part = todo[start:start + batch_size]
            began = time.perf_counter()
            with torch.no_grad():
                batch = x[part].to(device)
                captions = defense.caption(batch)
                purified = defense.purify(batch, captions, Keys(images.indices[part], seed))
                before, after = (defense.classify(b).argmax(1).tolist() for b in (batch, purified))
            pixels = (purified.cpu() * 255).round().to(torch.uint8)
            each = (time.perf_counter() - began) / len(part)
            rows.write([{"index": int(images.indices[i]), "label": int(images.labels[i]), "caption": captions[k],
                         "undefended": before[k], "prediction": after[k], "linf": float((x[i] - clean[i]).abs().max()),
                         "purified": pixels[k].numpy().tobytes(), "seconds": each} for k, i in enumerate(part)])
            bar.update(len(part))
    table = rows.read()
    return table[table["index"].isin(images.indices.tolist())].reset_index(drop=True)


def purified_pixels(rows, shape):
    """The `purified` column as uint8 [n, *shape]."""
    return torch.from_numpy(np.stack([np.frombuffer(b, dtype=np.uint8).reshape(shape) for b in rows["purified"]]).copy())
