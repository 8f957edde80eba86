"""Model folders and their checksums, whole writes, and one writer a folder. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .profiles import ROOT, cache_root


class CheckpointError(RuntimeError):
    """A model is missing, damaged or of another kind. The message names it and the remedy."""


def downloads() -> Path:
    """The folder of downloads that do not come from the hub: $LGAP_CACHE, else data/ in the checkout."""
    return Path(cache_root() or ROOT / "data")


def locate(name: str) -> Path | None:
    """The folder of a model, looked up here, in the checkout and in $LGAP_CACHE; None for a hub id.

    Raises CheckpointError for a path that does not exist.
    """
    for folder in (Path(name).expanduser(), ROOT / name, downloads() / name):
        if folder.is_dir():
            return folder.resolve()
    if Path(name).is_absolute() or name.startswith(("checkpoints/", ".", "~")):
        raise CheckpointError(f"{name}: no such folder; `python checkpoints/make.py PROFILE` makes ours")
    return None


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_checksums(folder: str | Path) -> None:
    """Write `SHA256SUMS` of every model file below `folder`, in the format that `sha256sum -c` reads."""
    folder = Path(folder)
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in (".json", ".safetensors", ".txt")]
    lines = [f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files if p.is_file()]
    (folder / "SHA256SUMS").write_text("".join(lines))


def verify(
    folder: str | Path, again: str = "restore it from the repository, or make it again", digest: bool = True
) -> dict[str, str]:
    """Check a folder against the SHA256SUMS in it or in its parent; returns {file: digest} of all checked.

    Only this notices a flipped byte: safetensors loads one without complaint. A user's own folder without a
    SHA256SUMS passes, and the result is empty. again: the remedy for a bad file, for the message.
    digest: False only checks that all files are there. Raises CheckpointError.
    """
    folder = Path(folder)
    sums = next((p for p in (folder / "SHA256SUMS", folder.parent / "SHA256SUMS") if p.is_file()), None)
    if sums is None:
        return {}
    checked = {}
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not (len(expected) == 64 and name):
            raise CheckpointError(f"{sums} is damaged: {line[:80]!r} is no checksum; {again}")
        path = sums.parent / name
        if folder not in path.parents:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, expected sha256 {expected[:16]}...; {again}")
        actual = sha256(path) if digest else expected
        if actual != expected:
            difference = f"sha256 {actual[:16]}..., expected {expected[:16]}..."
            raise CheckpointError(f"{path} is damaged: {difference}; {again}")
        checked[name] = expected
    if not checked and sums.parent == folder:
        raise CheckpointError(f"{sums} lists no file; {again}")
    return checked


def temporary_path(path: Path) -> Path:
    """A path beside `path` that no other thread, process or machine uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically: a reader sees the old file or the new one. Raises OSError."""
    part = temporary_path(path)
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only disk refuses this, too
            part.unlink(missing_ok=True)
        message = f"{path} could not be written ({error.strerror}); what lay there before is untouched"
        raise OSError(error.errno, message) from error


# What NFS and Lustre answer where they have no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def folder_lock(folder: str | Path, wait: bool = False) -> Iterator[None]:
    """Hold the only right to write into `folder`, which is created if need be. A thread may take it twice.

    The system drops the lock when the process ends, however it ends. wait: wait for another writer.
    Raises BlockingIOError for another writer if `wait` is false, and OSError for a folder that cannot be
    written. A file system without locks is announced once and used without.
    """
    lock = _acquire(Path(folder), wait)
    try:
        yield
    finally:
        if lock:
            lock.release()


def _acquire(folder: Path, wait: bool) -> Any:
    """The lock of `folder`, held; None where the file system has no locks."""
    from filelock import FileLock, Timeout  # here, as run_all.sh --help needs no package

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", is_singleton=True, fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not wait:
                raise
            print(f"another process writes into {folder}; waiting for it", flush=True)
            lock.acquire()
        return lock
    except Timeout:
        remedy = "wait for it, or choose another folder with LGAP_OUTPUTS"
        raise BlockingIOError(f"another process writes into {folder}; {remedy}") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
            _say_once("this file system has no locks; start only one run at a time in a folder")
            return None
        message = f"{folder} cannot be written into ({error.strerror})"
        raise OSError(error.errno, f"{message}; choose another folder with LGAP_OUTPUTS") from error


@functools.cache
def _say_once(line: str) -> None:
    print(line, flush=True)
