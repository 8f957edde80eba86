"""Rows per image, kept: a folder of parquet shards of one configuration. Resuming adds what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pandas.util import hash_pandas_object

from .files import folder_lock, write_whole
from .identity import digest, own_settings, unnamed_in

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
        self.config = config
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


def open_rows(
    folder: Path, config: dict, defenses: dict, key: tuple[str, ...] = ("index",), attack: Any = None
) -> Rows:
    """The `Rows` in `folder`; in a new one, for one run, if the attack or a part has no settings of its own.

    defenses: {name: `describe_defense`}; attack: a protocols.Attack. One run's configuration stays so.
    """
    unnamed = [] if "run" in config else unnamed_in(defenses)
    remedy = "name it: lgap_utils.identity.named(part, 'a name', sigma=0.9)"
    if attack is not None and not own_settings(attack):
        unnamed.insert(0, f"the attack {attack.name!r} ({type(attack).__qualname__})")
        remedy = (
            "give its class a method settings() that returns a dict, e.g. super().settings() | {'sigma': 0.9}"
        )
    if unnamed:
        config = {**config, "run": uuid.uuid4().hex}
        folder = folder.parent / "unnamed" / f"{folder.name}-{digest(config)}"
        print(
            f"{unnamed[0]} has no settings() of its own: its rows in {folder} serve one run. To resume them,"
        )
        print(remedy, flush=True)
    return Rows(folder, config, key)


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


def packed(adv: torch.Tensor, x: torch.Tensor) -> list[bytes]:
    """For each image what turns it, x, into adv, both float32 [n, 3, h, w]: their bits' XOR, compressed.

    In planes of bytes, lowest first, by zlib; nothing where nothing changed.
    """
    bits = adv.cpu().numpy().astype("<f4").view("<i4") ^ x.cpu().numpy().astype("<f4").view("<i4")
    planes = [change.reshape(-1, 1).view(np.uint8).T.tobytes() if change.any() else b"" for change in bits]
    return [zlib.compress(each, 9) if each else b"" for each in planes]


def unpacked(changes: Iterable[bytes], x: torch.Tensor) -> torch.Tensor:
    """The images adv of `packed`, bit for bit, from the images x."""
    clean = x.cpu().numpy().astype("<f4").view("<i4")
    out = clean.copy()
    for k, change in enumerate(changes):
        if change:
            planes = np.frombuffer(zlib.decompress(change), np.uint8).reshape(4, -1)
            out[k] ^= np.ascontiguousarray(planes.T).view("<i4").reshape(out[k].shape)
    return torch.from_numpy(out.view("<f4"))


def attacked_images(rows: Frame, images: Images) -> torch.Tensor:
    """The attacked images [n, 3, h, w] of rows of `Evaluation.run`, bit for bit, one for each index in them.

    images: those that were attacked, and maybe others. A row keeps what turns the clean image into the
    attacked one, so that rows alone show no picture of a data set. Raises ValueError for other images.
    """
    first, known = rows.drop_duplicates("index"), known_images(images)
    for index, pixels in zip(first["index"], first["image"]):
        if known.get(index, ("",))[0] != pixels:
            raise ValueError(f"images: image {index} of the rows is not among them, or has other pixels")
    places = {index: place for place, index in enumerate(known)}
    return unpacked(first["change"], images[[places[i] for i in first["index"]]].x)
