"""Files that models come from, each checked before anything opens it: local folders, the hub at a fixed revision, single downloads.

What is expected of a download is in the lock file: {source: {file: {"sha256", "size"}}}. A digest that is not known there is recorded
on first use and checked ever after. Nothing here needs torch.
"""
from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
from fnmatch import fnmatch
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
        raise CheckpointError(f"{name}: no such folder; models that are made here are made by `python checkpoints/make.py PROFILE`")
    return None


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_checksums(folder):
    """`SHA256SUMS` of every file below `folder` that a model is loaded from, in the format `sha256sum -c` reads."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".txt"))
    (Path(folder) / "SHA256SUMS").write_text("".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))


def verify(folder):
    """Check `folder` against the SHA256SUMS in it or in the folder above; {file: digest} of what was checked.

    safetensors with a flipped byte load without complaint, so this is the only thing that notices. A user's own folder
    without a SHA256SUMS is taken as it is: the result is empty.
    """
    folder = Path(folder)
    sums = next((p for p in (folder / "SHA256SUMS", folder.parent / "SHA256SUMS") if p.is_file()), None)
    if sums is None:
        return {}
    found = {}
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition("  ")
        if not (len(expected) == 64 and name):
            raise CheckpointError(f"{sums} is damaged: {line[:80]!r} is no checksum; restore it from the repository")
        path = sums.parent / name
        if folder not in path.parents:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; restore it with `git checkout -- {path.name}` or make it again")
        if (digest := sha256(path)) != expected:
            raise CheckpointError(f"{path} is damaged: sha256 {digest[:16]}..., expected {expected[:16]}...; "
                                  "restore it from the repository")
        found[name] = digest
    if not found and sums.parent == folder:
        raise CheckpointError(f"{sums} lists no file; restore it from the repository")
    return found


def write_whole(path, data):
    """Write bytes so that a reader sees the old file or the new one, whatever happens in between."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):      # a read-only disk does not even say that it is not there
            part.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written ({error.strerror}); what lay there before is untouched") from error


# ---------------------------------------------------------------- one writer a folder

# what a file system answers that has no locks, as NFS and Lustre can
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def one_writer(folder, wait=False):
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
        raise BlockingIOError(f"another process writes into {folder}; wait for it, "
                              "or choose another folder with LGAP_OUTPUTS") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
            _say_once("this file system has no locks, so nothing keeps two runs apart; "
                      "start one at a time in a folder")
            return None
        raise OSError(error.errno, f"{folder} cannot be written into ({error.strerror}); "
                                   "choose another folder with LGAP_OUTPUTS") from error


@functools.cache
def _say_once(line):
    print(line, flush=True)


# ---------------------------------------------------------------- downloads and their lock file

def lock_file():
    """$LGAP_LOCK, else checkpoints/hub.lock.json."""
    return Path(os.environ.get("LGAP_LOCK") or ROOT / "checkpoints" / "hub.lock.json").expanduser()


def locked(source):
    """{file: {"sha256" (None: not known yet), "size"}} of a source: "repository@revision", or "robustbench"."""
    return _lock().get(source, {})


def _lock():
    file = lock_file()
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:           # without it every digest would be a first use, and nothing be checked
        raise CheckpointError(f"{file} is not there; restore it from the repository, or copy it to where LGAP_LOCK says") from None
    except ValueError:
        raise CheckpointError(f"{file} is not JSON; restore it from the repository, or name another with LGAP_LOCK") from None


def offline():
    """Whether HF_HUB_OFFLINE forbids the network; all downloads here honour it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def check(path, source, name, again):
    """Refuse the download `path` if it is not the `name` that the lock file knows; record its digest where none is known yet.

    again: what to do about a bad file, for the message. Returns the digest.
    """
    if not path.is_file():
        raise CheckpointError(f"{name} of {source} is missing at {path}; {again}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; delete it, then {again}")
    with open(path, "rb") as f:
        start = f.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page and no model: the server answered with an error or a form; delete it, then {again}")
    known, digest = locked(source).get(name, {}), sha256(path)
    # the hub's own cache names a large file by its digest, so one that was cut short is told even where the lock knows nothing
    expected = known.get("sha256") or (path.resolve().name if re.fullmatch("[0-9a-f]{64}", path.resolve().name) else digest)
    if digest != expected:
        size = f", {path.stat().st_size:,} bytes of {known['size']:,}" if known.get("size") else ""
        raise CheckpointError(f"{path} is damaged: sha256 {digest[:16]}..., expected {expected[:16]}...{size}; delete it, then {again}")
    if not known.get("sha256"):
        _record(source, name, {"sha256": digest, "size": path.stat().st_size})
    return digest


def _record(source, name, entry):
    file, lock = lock_file(), _lock()
    lock.setdefault(source, {})[name] = entry
    try:
        write_whole(file, (json.dumps(lock, indent=1, sort_keys=True) + "\n").encode())
        print(f"first use of {name} of {source}: sha256 {entry['sha256'][:16]}... recorded in {file.name}")
    except OSError as error:
        print(f"first use of {name} of {source}: its sha256 could not be recorded ({error}); name a file that can, with LGAP_LOCK")


def snapshot(repository, revision, patterns):
    """A folder with those files of a hub repository at a fixed revision that fit `patterns`: from the hub's cache, or fetched into it.

    A pickle is fetched only where the lock file names it. Files that the lock file knows must be there, and all are checked.
    """
    from huggingface_hub import snapshot_download
    source = f"{repository}@{revision}"
    wanted = [*patterns, *(name for name in locked(source) if name.endswith(".bin"))]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, cache_dir=cache_root()))
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    for name in sorted(there.union(locked(source))):
        if any(fnmatch(name, pattern) for pattern in wanted):
            check(folder / name, source, name, "fetch it again: run this once with the hub in reach and HF_HUB_OFFLINE unset")
    return folder


def downloads():
    """Where files go that are not the hub's: below $LGAP_CACHE, else data/ in the checkout."""
    return Path(cache_root() or ROOT / "data").expanduser()
