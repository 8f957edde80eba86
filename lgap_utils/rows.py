"""Rows per image, kept: a folder of parquet shards that belongs to one configuration; resuming is doing what is missing."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd

from .files import folder_lock, write_whole


class Rows:
    """A folder of parquet shards, each written whole or not at all, that belongs to one configuration.

    `key` names the columns that tell rows apart, the image's index first. Raises ValueError, naming what differs, if the
    folder belongs to another configuration. Whoever writes holds the folder: `with one_writer(rows.folder, wait=True)`.
    """

    def __init__(self, folder, config, key=("index",)):
        self.folder, self.key = Path(folder), list(key)
        config = json.loads(json.dumps(config, sort_keys=True))
        file = self.folder / "config.json"
        if not file.exists():
            with folder_lock(
                self.folder, wait=True
            ):  # or two that begin at once would each believe it is theirs
                if not file.exists():
                    write_whole(file, json.dumps(config, indent=1, sort_keys=True).encode())
        try:
            there = json.loads(file.read_text())
        except ValueError:
            raise ValueError(
                f"{file} is not JSON, so nobody knows whose rows lie beside it; move the folder away"
            ) from None
        if changed := differences(there, config):
            raise ValueError(
                f"{self.folder} holds rows of another configuration ({'; '.join(changed)}); "
                "move or delete it, or set LGAP_OUTPUTS to another folder"
            )
        # what is there is equal, but 8 may be written 8.0
        self.owner = hashlib.sha256(json.dumps(there, sort_keys=True).encode()).hexdigest()

    def read(self):
        """All rows in the order of their key, each once. A shard that is torn or of another configuration is set aside with a
        message, and its images count as missing; of rows that several shards have, those of the first count."""
        shards = [
            frame
            for path in sorted(self.folder.glob("*.parquet"))
            if (frame := self._shard(path)) is not None
        ]
        if not shards:
            return pd.DataFrame(
                {name: pd.Series(dtype=np.int64 if name == "index" else object) for name in self.key}
            )
        table = pd.concat(shards, ignore_index=True).drop_duplicates(self.key)
        return table.sort_values(self.key, ignore_index=True)

    def _shard(self, path):
        """The rows of one shard, or None where it is set aside."""
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, page_checksum_verification=True)
            frame, marks = table.to_pandas(), table.schema.metadata or {}
            if frame[self.key].duplicated().any() or marks.get(b"lgap_digest", b"").decode() != _digest(
                frame
            ):
                raise ValueError("its rows are not those that were written")
        except FileNotFoundError:  # set aside by another process since
            return None
        except Exception as error:  # whatever a broken file makes the reader raise
            return self._set_aside(path, "broken", f"is not a whole shard ({type(error).__name__})")
        if marks.get(b"lgap_owner") != self.owner.encode():
            return self._set_aside(path, "foreign", "belongs to another configuration")
        return frame

    def _set_aside(self, path, kind, why):
        aside = path.with_suffix(f".{kind}")
        try:
            os.replace(path, aside)
        except FileNotFoundError:  # another process was first
            return
        print(f"{path.name} {why}; kept as {aside.name}, images that are in no other shard run again")

    def write(self, rows):
        """Add one shard."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        frame, buffer = pd.DataFrame(rows), io.BytesIO()
        table = pa.Table.from_pandas(frame, preserve_index=False)
        marks = {b"lgap_owner": self.owner.encode(), b"lgap_digest": _digest(frame).encode()}
        pq.write_table(
            table.replace_schema_metadata({**(table.schema.metadata or {}), **marks}),
            buffer,
            write_page_checksum=True,
        )
        name = hashlib.blake2b(str(sorted(set(frame["index"]))).encode(), digest_size=6).hexdigest()
        write_whole(self.folder / f"{frame['index'].min():06d}-{name}.parquet", buffer.getvalue())

    def done(self, table, known):
        """The indices that `table`, as read, has rows of. known: {index: (digest, label)} of the images at hand.

        Raises ValueError if a row is of another image, or has another label, than the one of its index at hand.
        """
        for row in table.drop_duplicates("index").itertuples():
            image, label = known.get(row.index, (None, None))
            if image is not None and getattr(row, "image", "") != image:
                raise ValueError(
                    f"{self.folder}: image {row.index} is not the one at hand, so these are rows of other images; "
                    "move or delete the folder, or set LGAP_OUTPUTS to another one"
                )
            if image is not None and row.label != label:
                raise ValueError(
                    f"{self.folder}: image {row.index} was run with the label {row.label}, and has {label} now; "
                    "move or delete the folder, or set LGAP_OUTPUTS to another one"
                )
        return set(table["index"])

    def wanted(self, table, indices, each):
        """The rows in `table` of these images, `each` of them an image. Raises RuntimeError, naming the first that lacks some."""
        table = table[table["index"].isin(indices)].reset_index(drop=True)
        count = table["index"].value_counts()
        if short := [i for i in indices if count.get(i, 0) != each]:
            raise RuntimeError(
                f"{self.folder}: image {short[0]} has {count.get(short[0], 0)} rows of {each}, and {len(short) - 1} more "
                "images lack some; did somebody change the folder meanwhile? Run this again"
            )
        return table


def _digest(frame):
    """Of a frame's names and values. Parquet's own checksums cover pages of values, but not the names of the columns."""
    values = pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()
    return hashlib.blake2b(str(list(frame)).encode() + values, digest_size=16).hexdigest()


def differences(there, here, at=""):
    """["a.b: there 1, here 2", ...] of two configurations, nested dicts; empty where they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            d
            for k in sorted(there.keys() | here.keys())
            for d in differences(there.get(k), here.get(k), f"{at}.{k}" if at else k)
        ]
    return [] if there == here else [f"{at}: there {there!r}, here {here!r}"]


def known_images(images):
    """{index: (digest of the pixels, label)}: a row is tied to the image that it was computed from."""
    digests = (hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() for image in images.pixels.numpy())
    return dict(zip(images.indices.tolist(), zip(digests, images.labels.tolist())))
