"""Files that models come from, each checked before anything opens it: local folders, the hub at a fixed revision, single downloads.

What is expected of a download is in the lock file: {source: {file: {"sha256", "size"}}}. A digest that is not known there is recorded
on first use, once the model has loaded whole, and checked ever after. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import uuid
from pathlib import Path

from .profiles import ROOT, cache_root


class CheckpointError(RuntimeError):
    """A model that is missing, damaged or not what it should be; the message says which, and what to do."""


# ---------------------------------------------------------------- folders


def locate(name):
    """The folder that `name` stands for, seen from here, from the checkout or from $LGAP_CACHE, or None where it is a hub id."""
    for folder in (Path(name).expanduser(), ROOT / name, downloads() / name):
        if folder.is_dir():
            return folder.resolve()
    if Path(name).is_absolute() or name.startswith(("checkpoints/", ".", "~")):
        raise CheckpointError(
            f"{name}: no such folder; models that are made here are made by `python checkpoints/make.py PROFILE`"
        )
    return None


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_checksums(folder):
    """`SHA256SUMS` of every file below `folder` that a model is loaded from, in the format `sha256sum -c` reads."""
    files = sorted(
        p for p in Path(folder).rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".txt")
    )
    (Path(folder) / "SHA256SUMS").write_text(
        "".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files)
    )


def verify(folder, again="restore it from the repository, or make it again", digest=True):
    """Check `folder` against the SHA256SUMS in it or in the folder above; {file: digest} of what was checked.

    safetensors with a flipped byte load without complaint, so this is the only thing that notices. A user's own folder
    without a SHA256SUMS is taken as it is: the result is empty.

    again: what to do about a bad file, for the message. digest: False asks only whether all that is listed is there.
    """
    folder = Path(folder)
    sums = next((p for p in (folder / "SHA256SUMS", folder.parent / "SHA256SUMS") if p.is_file()), None)
    if sums is None:
        return {}
    found = {}
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not (len(expected) == 64 and name):
            raise CheckpointError(f"{sums} is damaged: {line[:80]!r} is no checksum; {again}")
        path = sums.parent / name
        if folder not in path.parents:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, expected sha256 {expected[:16]}...; {again}")
        if digest and (seen := sha256(path)) != expected:
            raise CheckpointError(
                f"{path} is damaged: sha256 {seen[:16]}..., expected {expected[:16]}...; {again}"
            )
        found[name] = expected
    if not found and sums.parent == folder:
        raise CheckpointError(f"{sums} lists no file; {again}")
    return found


def temporary_path(path):
    """A name beside `path` that no other writer has, in this process, another one or on another machine."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")


def write_whole(path, data):
    """Write bytes so that a reader sees the old file or the new one, whatever happens in between."""
    part = temporary_path(path)
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only disk does not even say that it is not there
            part.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{path} could not be written ({error.strerror}); what lay there before is untouched"
        ) from error


# ---------------------------------------------------------------- one writer a folder

# what a file system answers that has no locks, as NFS and Lustre can
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def folder_lock(folder, wait=False):
    """Keep `folder` for the thread that asks, which may ask again; it is made where it is not there.

    The system drops the lock with the process, however that ends. wait: wait for another writer, and say so.
    Raises BlockingIOError where another writes into it and `wait` is false, and OSError where nothing can be
    written. On a file system without locks it says so once and goes on.
    """
    lock = _take(Path(folder), wait)
    try:
        yield
    finally:
        if lock:
            lock.release()


def _take(folder, wait):
    """The lock of `folder`, held, or None where its file system has none."""
    from filelock import FileLock, Timeout

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
        raise BlockingIOError(
            f"another process writes into {folder}; wait for it, or choose another folder with LGAP_OUTPUTS"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
            _say_once(
                "this file system has no locks, so nothing keeps two runs apart; "
                "start one at a time in a folder"
            )
            return None
        raise OSError(
            error.errno,
            f"{folder} cannot be written into ({error.strerror}); choose another folder with LGAP_OUTPUTS",
        ) from error


@functools.cache
def _say_once(line):
    print(line, flush=True)


def downloads():
    """Where files go that are not the hub's: below $LGAP_CACHE, else data/ in the checkout."""
    return Path(cache_root() or ROOT / "data")
