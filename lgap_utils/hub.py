"""hub."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path

from .files import CheckpointError, sha256, write_whole
from .profiles import ROOT, cache_root

# ---------------------------------------------------------------- downloads and their lock file


def lock_file():
    """$LGAP_LOCK, else checkpoints/hub.lock.json."""
    return Path(os.environ.get("LGAP_LOCK") or ROOT / "checkpoints" / "hub.lock.json").expanduser()


def lock_entries(source):
    """{file: {"sha256" (None: not known yet), "size"}} of a source: "repository@revision", or "robustbench"."""
    return _lock().get(source, {})


def _lock():
    file = lock_file()
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:  # without it every digest would be a first use, and nothing be checked
        raise CheckpointError(
            f"{file} is not there; restore it from the repository, or copy it to where LGAP_LOCK says"
        ) from None
    except ValueError:
        raise CheckpointError(
            f"{file} is not JSON; restore it from the repository, or name another with LGAP_LOCK"
        ) from None


def offline():
    """Whether HF_HUB_OFFLINE forbids the network; all downloads here honour it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def verify_file(path, source, name, again, digest=True, kept=True):
    """Refuse the download `path` if it is not the `name` that the lock file knows; raises CheckpointError.

    again: what to do about a bad file, for the message. digest: False looks only at what costs nothing, such
    as the size. kept: a bad file stays where it is, so that it has to be deleted. Returns {"sha256", "size"}
    of the file, for `record`.
    """
    known = lock_entries(source).get(name, {})
    size, expected = known.get("size"), known.get("sha256")
    wanted = f", expected {size:,} bytes" if size is not None else ""
    wanted += f", expected sha256 {expected[:16]}..." if expected else ""
    if not path.is_file():
        raise CheckpointError(f"{name} of {source} is missing at {path}{wanted}; {again}")
    # in the hub's cache `path` is a link; with that alone gone, the next download finds the same bad file again
    again = f"delete {path.resolve()}, then {again}" if kept else again
    there = path.stat().st_size
    if there == 0:
        raise CheckpointError(f"{path} is empty{wanted}; {again}")
    with open(path, "rb") as f:
        start = f.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path} is a web page and not the file: the server answered with an error or a form"
            f"{wanted}; {again}"
        )
    found = sha256(path) if digest else None
    if size not in (None, there) or (found and expected and found != expected):
        seen = f"sha256 {found[:16]}..., " if found else ""
        raise CheckpointError(f"{path} is damaged: {seen}{there:,} bytes{wanted}; {again}")
    if found and not _as_named(path, found):
        raise CheckpointError(
            f"{path} is damaged: sha256 {found[:16]}..., expected what the hub called "
            f"{os.readlink(path)}; {again}"
        )
    return {"sha256": found, "size": there}


def _as_named(path, digest):
    """Whether a file in the hub's cache is what its name there says: its sha256, or for a small one git's sha1."""
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{40}", name):
        data = path.read_bytes()
        starts = (f"blob {len(data)}\0".encode(), b"")  # a mirror may have the plain sha1 in its place
        return name in [hashlib.sha1(start + data).hexdigest() for start in starts]
    return name == digest or not re.fullmatch("[0-9a-f]{64}", name)


def record_digests(source, entries):
    """Write {file: {"sha256", "size"}} of a source into the lock file, where no digest is known there yet.

    For a model that has loaded whole: half a file would else be the truth for ever.
    """
    file, lock = lock_file(), _lock()
    known = lock.setdefault(source, {})
    if not (new := {name: entry for name, entry in entries.items() if not known.get(name, {}).get("sha256")}):
        return
    known.update(new)
    digests = ", ".join(f"{name} sha256 {entry['sha256'][:16]}..." for name, entry in sorted(new.items()))
    try:
        write_whole(file, (json.dumps(lock, indent=1, sort_keys=True) + "\n").encode())
        print(f"first use of {source}, recorded in {file.name}: {digests}")
    except OSError as error:
        print(
            f"first use of {source}, which could not be recorded ({error}); name a file that can be written, "
            f"with LGAP_LOCK: {digests}"
        )


def snapshot(repository, revision, patterns):
    """A folder with those files of a hub repository at a fixed revision that fit `patterns`: from the hub's cache, or fetched into it.

    A pickle is fetched only where the lock file names it. Files that the lock file knows must be there, and all
    are checked. Returns (the folder, what `record` takes). Raises CheckpointError.
    """
    from huggingface_hub import constants, hf_hub_url, snapshot_download, try_to_load_from_cache

    source = f"{repository}@{revision}"
    wanted = [*patterns, *(name for name in lock_entries(source) if name.endswith(".bin"))]
    known = [name for name in lock_entries(source) if any(fnmatch(name, pattern) for pattern in wanted)]
    found = {name: try_to_load_from_cache(repository, name, cache_root(), revision) for name in known}
    folders = [Path(path).parents[name.count("/")] for name, path in found.items() if isinstance(path, str)]
    try:
        if folders and (offline() or len(folders) == len(known)):
            folder = folders[0]  # nobody has to be asked
        else:
            one = next(name for name in (*known, *patterns) if "*" not in name)
            _ask_first(hf_hub_url(repository, one, revision=revision))
            folder = Path(
                snapshot_download(
                    repository, revision=revision, allow_patterns=wanted, cache_dir=cache_root()
                )
            )
    except Exception as error:  # the hub's client raises many kinds
        cause, remedy = explain(error)
        raise CheckpointError(
            f"{source} could not be fetched from {constants.ENDPOINT}/{repository}: {cause}; "
            f"{remedy}, or name a folder that holds its files in its place"
        ) from None
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    again = "fetch it again: run this once with the hub in reach and HF_HUB_OFFLINE unset"
    return folder, {
        name: verify_file(folder / name, source, name, again)
        for name in sorted(there.union(known))
        if any(fnmatch(name, pattern) for pattern in wanted)
    }


def hub_file(repository, name, revision, kind):
    """The path of one file in the hub's cache, fetched if need be; raises what the hub's client does."""
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, cache_root(), revision, kind)
    if not isinstance(found, str):
        _ask_first(hf_hub_url(repository, name, repo_type=kind, revision=revision))
        found = hf_hub_download(repository, name, repo_type=kind, revision=revision, cache_dir=cache_root())
    return Path(found)


def _ask_first(url):
    """As `ask`, before a download: the hub's client waits for minutes, or for ever, where no answer comes."""
    try:
        if not offline():
            check_reachable(url)
    except Exception as error:
        if (status_of(error) or 0) < 429:  # of what may pass, the client makes several tries
            raise


# ---------------------------------------------------------------- what a download fails of

LOG_IN = "log in with `hf auth login`"
PROXY = "check the network and its proxy (HTTPS_PROXY, ALL_PROXY)"
ROOM = "or name another folder with LGAP_CACHE"
# {class: (cause, remedy)}, by name, the particular before the general: what the hub's client, gdown and requests raise.
REASONS = {
    "GatedRepoError": (
        "it is shown only to those who have accepted its terms",
        f"accept them there and {LOG_IN}",
    ),
    "DisabledRepoError": ("the hub has disabled it", "look on that page why"),
    "RevisionNotFoundError": ("this revision is not there, or not any more", "give another commit"),
    "RemoteEntryNotFoundError": ("a file is not there at this revision", "give another commit"),
    "RepositoryNotFoundError": (
        "no such repository is there, or it is private",
        f"check its name, or {LOG_IN}",
    ),
    "OfflineModeIsEnabled": (
        "HF_HUB_OFFLINE is set, and the cache lacks it",
        "unset that with the hub in reach",
    ),
    "FileURLRetrievalError": (
        "Google Drive shows a page in place of the file, as when too many have asked",
        "try again later",
    ),
    "FileMetadataError": (
        "what answers is no hub, but for example a network's login page",
        f"open it in a browser, or {PROXY}",
    ),
    "ProxyError": ("the proxy does not let it through", PROXY),
    "TimeoutException": (
        "no answer came in time",
        "try again, or set HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
    ),
    "RemoteProtocolError": ("the connection broke off", "try again"),
    "ConnectError": ("it cannot be reached", PROXY),
}
ALSO = {
    "JSONDecodeError": "FileMetadataError",
    "Timeout": "TimeoutException",
    "TimeoutError": "TimeoutException",
    "ChunkedEncodingError": "RemoteProtocolError",
    "IncompleteRead": "RemoteProtocolError",
    "NetworkError": "ConnectError",
    "URLError": "ConnectError",
    "ConnectionError": "ConnectError",
}
STATUS = {
    401: ("the hub does not know your token", f"{LOG_IN} again, or unset HF_TOKEN"),
    403: ("access is forbidden", f"{LOG_IN} as somebody who may read it"),
    404: ("it is not there", "look for it on that page"),
    407: REASONS["ProxyError"],
    429: ("too many requests came from here", f"wait a while, or {LOG_IN}"),
}


def explain(error):
    """(what happened, what to do), a clause each, of an exception that a download ended with."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and below not in chain:
        chain.append(below)
    for each in chain:
        if found := _reason(each):
            return found
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200] if said else ''}", "try again"


def _reason(error):
    names = {ALSO.get(kind.__name__, kind.__name__) for kind in type(error).__mro__}
    named = next((REASONS[name] for name in REASONS if name in names), None)
    status = status_of(error)
    if status and (named is None or named == REASONS["ConnectError"]):  # urllib's is a URLError, too
        other = "the server is out of order" if status >= 500 else "the server refuses"
        named = STATUS.get(status, (other, "try again later"))
    if named:
        return f"{named[0]} (HTTP {status})" if status else named[0], named[1]
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({error})", f"make room, {ROOM}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"it cannot be written there ({error})", f"make the folder writable, {ROOM}"
    if "onsistency check" in str(error):  # huggingface_hub's words for another size than was announced
        return "what came is not as long as was announced", "try again"
    return None


def status_of(error):
    """The HTTP status that an exception tells of, or None."""
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)


def check_reachable(url):
    """Raise what the hub's client does if the file at `url` would not be sent; nothing is fetched.

    It goes through the proxy that the environment names, as a download does.
    """
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.errors import FileMetadataError
    from huggingface_hub.utils import get_session

    seconds = constants.HF_HUB_ETAG_TIMEOUT
    if url.startswith(f"{constants.ENDPOINT}/"):
        if get_hf_file_metadata(url, timeout=seconds).commit_hash is None:
            raise FileMetadataError(f"{url} is no file of a hub")
        return
    with get_session().stream("GET", url, timeout=seconds) as answer:
        answer.raise_for_status()
