"""What loading a model takes: its folder, checked files, whole weights, and one sentence where it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .files import CheckpointError, locate, verify
from .hub import record_digests, snapshot
from .profiles import REVISIONS

# Code that comes with a model is never run, and the library does not ask whether it may.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass
class Source:
    """Where a model comes from."""

    digests: dict[str, dict] = field(default_factory=dict)  # {source: {file: entry}}, see `record_digests`
    again: str = ""  # the remedy for bad files


@contextlib.contextmanager
def loading(kind: str, name: str) -> Iterator[Source]:
    """Turn what a library raises on a bad file into a CheckpointError of one sentence that names the model.

    Digests are recorded at the end, as the model has loaded whole then.
    """
    source = Source()
    try:
        yield source
    except CheckpointError:
        raise
    except Exception as error:
        cause: Exception | None = error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if "remote_code" in str(error):  # the library's words advise to let the code run
            cause, reason = None, "its configuration asks for code of its own (auto_map), which is never run"
        remedy = f"; {source.again}" if source.again else ""
        raise CheckpointError(f"cannot load the {kind} from {name!r}: {reason}{remedy}") from cause
    for where, entries in source.digests.items():
        record_digests(where, entries)


def model_folder(name: str, revision: str | None, patterns: list[str], source: Source) -> Path:
    """The folder with a model's checked files: a local one, or a hub repository's at a fixed revision."""
    folder = locate(name)
    if folder:
        verify(folder)
        source.again = f"copy {folder} again, or make it again"
        return folder
    revision = revision or REVISIONS.get(name)
    if revision is None:
        remedy = "give its 40-digit commit, or a local folder"
        raise CheckpointError(f"{name!r} is a hub id without a revision; {remedy}")
    folder, source.digests[f"{name}@{revision}"] = snapshot(name, revision, patterns)
    source.again = f"delete {folder.parents[1]}, and it is fetched again"
    return folder


def load_whole(kind: Any, folder: Path | None, **options: Any) -> Any:
    """`kind.from_pretrained` of local files. Raises ValueError for weights that are missing or do not fit."""
    informed = {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    model, info = kind.from_pretrained(folder, local_files_only=True, **informed, **options)
    problems = []
    for fault in ("missing", "mismatched", "unexpected"):
        keys = sorted(map(str, info.get(f"{fault}_keys", ())))
        keys = [key for key in keys if not key.endswith("position_ids")]  # a buffer that older versions saved
        if keys:
            problems.append(f"{len(keys)} {fault}, e.g. {keys[0]}")
    if problems:
        model_class = f"a {kind.__name__} with this configuration"
        raise ValueError(f"the weights are not those of {model_class}: {'; '.join(problems)}")
    return model


def check_words(tokenizer: Any) -> None:
    """Refuse a tokenizer of special tokens alone, which transformers makes where its files are missing."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        files = "tokenizer.json (or vocab.json and merges.txt) is missing"
        raise ValueError(f"its {type(tokenizer).__name__} knows no word: {files}; copy the folder again")


def read_tensors(file: Path, again: str) -> dict[str, Any]:
    """The tensors of a pickle. One that holds anything else is refused, as opening it could run code."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch's words advise to switch the protection off
        reason = "it is damaged, or holds more than tensors, which could run code as it is opened"
        raise CheckpointError(f"{file} is refused: {reason}; {again}") from None
