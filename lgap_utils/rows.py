"""Rows per image, kept: a folder of parquet shards of one configuration. Resuming adds what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pandas.util import hash_pandas_object

from .files import folder_lock, write_whole

if TYPE_CHECKING:
    from .images import Images

Frame = Any  # a pandas.DataFrame; by pandas' own annotations `frame[...]` could be anything
Known = dict[int, tuple[str, int]]  # {index: (digest of the pixels, label)}
ADVICE = "move or delete the folder, or set LGAP_OUTPUTS to another one"


class Rows:
    """A folder of parquet shards of one configuration, each written whole or not at all.

    key: the columns that identify a row, "index" first. Raises ValueError, naming the difference, for a
    folder of another configuration.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any], key: tuple[str, ...] = ("index",)):
        self.folder, self.key = Path(folder), list(key)
        config = json.loads(json.dumps(config, sort_keys=True))
        file = self.folder / "config.json"
        if not file.exists():
            with folder_lock(self.folder, wait=True):  # two that begin at once must not both claim it
                if not file.exists():
                    write_whole(file, json.dumps(config, indent=1, sort_keys=True).encode())
        try:
            kept = json.loads(file.read_text())
        except ValueError:
            raise ValueError(f"{file} is not JSON, so its rows are nobody's; move the folder away") from None
        if changed := "; ".join(differences(kept, config)):
            raise ValueError(f"{self.folder} holds rows of another configuration ({changed}); {ADVICE}")
        # of the kept one: an equal number may be written in two ways, 8 and 8.0
        self.owner = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def read(self) -> pd.DataFrame:
        """All rows in the order of their key, each once: of rows in several shards the first one's count."""
        shards = [self._shard(path) for path in sorted(self.folder.glob("*.parquet"))]
        shards = [shard for shard in shards if shard is not None]
        if not shards:
            return pd.DataFrame(columns=self.key).astype({"index": "int64"})
        table = pd.concat(shards, ignore_index=True).drop_duplicates(self.key)
        return table.sort_values(self.key, ignore_index=True)

    def _shard(self, path: Path) -> pd.DataFrame | None:
        """The rows of a shard; None for a torn or foreign one, which is set aside with a message."""
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, page_checksum_verification=True)
            frame, marks = table.to_pandas(), table.schema.metadata or {}
            if marks.get(b"lgap_digest") != _digest(frame) or frame[self.key].duplicated().any():
                raise ValueError("its rows are not those that were written")
            if marks.get(b"lgap_owner") == self.owner.encode():
                return frame
            kind, why = "foreign", "belongs to another configuration"
        except FileNotFoundError:  # set aside by another process since
            return None
        except Exception as error:  # whatever a broken file makes the reader raise
            kind, why = "broken", f"is not a whole shard ({type(error).__name__})"
        aside = path.with_suffix(f".{kind}")
        with contextlib.suppress(FileNotFoundError):  # another process was first
            os.replace(path, aside)
            print(f"{path.name} {why}; kept as {aside.name}, images that are in no other shard run again")
        return None

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add one shard. The writer holds the folder: `with folder_lock(rows.folder, wait=True)`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        frame, buffer = pd.DataFrame(rows), io.BytesIO()
        table = pa.Table.from_pandas(frame, preserve_index=False)
        marks = {b"lgap_owner": self.owner.encode(), b"lgap_digest": _digest(frame)}
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **marks})
        pq.write_table(table, buffer, write_page_checksum=True)
        indices = sorted(set(frame["index"]))
        name = hashlib.blake2b(str(indices).encode(), digest_size=6).hexdigest()
        write_whole(self.folder / f"{indices[0]:06d}-{name}.parquet", buffer.getvalue())

    def done(self, table: Frame, known: Known) -> set[int]:
        """The indices in `table`. Raises ValueError for one whose pixels or label are not those `known`."""
        columns = [name for name in ("index", "image", "label") if name in table]
        for row in table[columns].drop_duplicates("index").to_dict("records"):
            index = row["index"]
            image, label = known.get(index, (None, None))
            if image is not None and row.get("image") != image:
                raise ValueError(f"{self.folder}: image {index} is not the one at hand; {ADVICE}")
            if image is not None and row["label"] != label:
                labels = f"was run with the label {row['label']}, and has {label} now"
                raise ValueError(f"{self.folder}: image {index} {labels}; {ADVICE}")
        return set(table["index"])

    def complete(
        self, indices: list[int], known: Known, n_rows: int, compute: Callable[[list[int]], None]
    ) -> pd.DataFrame:
        """The rows of these images, n_rows each; compute(indices) writes those that are missing.

        Waits for another process that writes into the folder, and repeats nothing that it did. Raises
        RuntimeError, naming an image, where rows are missing afterwards.
        """
        table: Frame = self.read()
        if set(indices) - self.done(table, known):
            with folder_lock(self.folder, wait=True):
                done = self.done(self.read(), known)  # another process may have added some
                if missing := [i for i in indices if i not in done]:
                    compute(missing)
            table = self.read()
        table = table[table["index"].isin(indices)].reset_index(drop=True)
        count = table["index"].value_counts()
        if short := [i for i in indices if count.get(i, 0) != n_rows]:
            rows = f"image {short[0]} has {count.get(short[0], 0)} rows of {n_rows}"
            advice = "did somebody change the folder meanwhile? Run this again"
            raise RuntimeError(f"{self.folder}: {rows}, {len(short)} images lack some; {advice}")
        return table


def _digest(frame: Frame) -> bytes:
    """Of names and values: Parquet's own checksums cover pages of values, but no names of columns."""
    hashes = hash_pandas_object(frame, index=False)  # pyright: ignore[reportCallIssue] # pandas loads it lazily
    return (
        hashlib.blake2b(str(list(frame)).encode() + hashes.to_numpy().tobytes(), digest_size=16)
        .hexdigest()
        .encode()
    )


def differences(there: Any, here: Any, at: str = "") -> list[str]:
    """["a.b: there 1, here 2", ...] of two configurations, nested dicts; empty where they are equal."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return [] if there == here else [f"{at}: there {there!r}, here {here!r}"]
    out = []
    for name in sorted(there.keys() | here.keys()):
        out += differences(there.get(name), here.get(name), f"{at}.{name}" if at else name)
    return out


def known_images(images: Images) -> Known:
    """{index: (digest of the pixels, label)}: a row is tied to the image that it was computed from."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() for image in images.pixels.numpy()]
    return dict(zip(images.indices.tolist(), zip(digests, images.labels.tolist())))
