"""Downloads: the hub at a fixed revision, and the lock file of digests. Nothing here needs torch.

The lock file is {source: {file: {"sha256", "size"}}}; a source is "repository@revision" or "robustbench".
A digest that it lacks is recorded on first use, once the model has loaded whole, and checked from then on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from .files import CheckpointError, sha256, write_whole
from .profiles import ROOT, cache_root

# ---------------------------------------------------------------- the lock file


def lock_file() -> Path:
    """$LGAP_LOCK, else checkpoints/hub.lock.json."""
    return Path(os.environ.get("LGAP_LOCK") or ROOT / "checkpoints" / "hub.lock.json").expanduser()


def lock_entries(source: str) -> dict[str, dict]:
    """{file: {"sha256" (None: not known yet), "size"}} of a source."""
    return _lock().get(source, {})


def _lock() -> dict[str, dict]:
    file = lock_file()
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:  # without it nothing would be checked
        problem = "is not there"
    except ValueError:
        problem = "is not JSON"
    raise CheckpointError(f"{file} {problem}; restore it from the repository, or name another with LGAP_LOCK")


def record_digests(source: str, entries: dict[str, dict]) -> None:
    """Write {file: {"sha256", "size"}} into the lock file, where it knows no digest yet.

    Call it once the model has loaded whole: the digest of half a file would be kept for ever.
    """
    file, lock = lock_file(), _lock()
    known = lock.setdefault(source, {})
    new = {name: entry for name, entry in entries.items() if not known.get(name, {}).get("sha256")}
    if not new:
        return
    known.update(new)
    digests = ", ".join(f"{name} sha256 {entry['sha256'][:16]}..." for name, entry in sorted(new.items()))
    try:
        write_whole(file, (json.dumps(lock, indent=1, sort_keys=True) + "\n").encode())
        print(f"first use of {source}, recorded in {file.name}: {digests}")
    except OSError as error:
        remedy = "name a writable file with LGAP_LOCK"
        print(f"first use of {source}, which could not be recorded ({error}); {remedy}: {digests}")


def verify_file(
    path: Path, source: str, name: str, again: str, digest: bool = True, kept: bool = True
) -> dict[str, Any]:
    """Check a download against the lock file's entry `name`; returns its {"sha256", "size"}.

    again: the remedy for a bad file. digest: False skips the digest, which takes long. kept: a bad file stays
    at `path`, so the message says to delete it. Raises CheckpointError.
    """
    known = lock_entries(source).get(name, {})
    size, expected = known.get("size"), known.get("sha256")
    limits = f", expected {size:,} bytes" if size is not None else ""
    limits += f", expected sha256 {expected[:16]}..." if expected else ""
    if not path.is_file():
        raise CheckpointError(f"{name} of {source} is missing at {path}{limits}; {again}")
    actual_size, actual = path.stat().st_size, sha256(path) if digest else None
    digest_words = f"sha256 {actual[:16]}..., " if actual else ""
    problem = ""
    if actual_size == 0:
        problem = f"is empty{limits}"
    elif _is_web_page(path):
        problem = f"is a web page and not the file: the server sent an error or a form{limits}"
    elif size not in (None, actual_size) or (actual and expected not in (None, actual)):
        problem = f"is damaged: {digest_words}{actual_size:,} bytes{limits}"
    elif actual and not _has_the_hubs_name(path, actual):
        problem = f"is damaged: {digest_words}expected what the hub called {os.readlink(path)}"
    if not problem:
        return {"sha256": actual, "size": actual_size}
    # In the hub's cache `path` is a link to the bad file; deleting the link alone would not help.
    remedy = f"delete {path.resolve()}, then {again}" if kept else again
    raise CheckpointError(f"{path} {problem}; {remedy}")


def _is_web_page(path: Path) -> bool:
    with open(path, "rb") as f:
        return f.read(512).lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def _has_the_hubs_name(path: Path, digest: str) -> bool:
    """Whether a blob of the hub's cache fits its name: its sha256 or, if small, git's SHA-1 of it."""
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{40}", name):
        data = path.read_bytes()
        header = f"blob {len(data)}\0".encode()
        return name in (
            hashlib.sha1(header + data).hexdigest(),
            hashlib.sha1(data).hexdigest(),
        )  # mirrors: plain
    return name == digest or not re.fullmatch("[0-9a-f]{64}", name)


# ---------------------------------------------------------------- the hub


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network; every download here honours it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def snapshot(repository: str, revision: str, patterns: list[str]) -> tuple[Path, dict[str, dict]]:
    """The files of a hub repository that fit `patterns`: (their folder, their entries for `record_digests`).

    They come from the hub's cache or are fetched into it. A pickle is fetched only if the lock file names it.
    All files that the lock file knows must be present, and all files are checked. Raises CheckpointError.
    """
    from huggingface_hub import constants, hf_hub_url, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    source = f"{repository}@{revision}"
    locked, cache = lock_entries(source), cache_root()
    patterns = [*patterns, *(name for name in locked if name.endswith(".bin"))]
    known = list(filter_repo_objects(locked, allow_patterns=patterns))
    paths = {name: try_to_load_from_cache(repository, name, cache, revision) for name in known}
    folders = [Path(path).parents[name.count("/")] for name, path in paths.items() if isinstance(path, str)]
    try:
        if folders and (offline() or len(folders) == len(known)):
            folder = folders[0]  # the cache has all that can be had
        else:
            first = next(name for name in (*known, *patterns) if "*" not in name)
            _check_before_download(hf_hub_url(repository, first, revision=revision))
            where = {"revision": revision, "cache_dir": cache}
            folder = Path(snapshot_download(repository, allow_patterns=patterns, **where))
    except Exception as error:  # the hub's client raises many kinds
        cause, remedy = explain(error)
        page = f"{constants.ENDPOINT}/{repository}"
        remedy = f"{remedy}, or name a folder that holds its files in its place"
        raise CheckpointError(f"{source} could not be fetched from {page}: {cause}; {remedy}") from None
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    again = "fetch it again: run this once with the hub in reach and HF_HUB_OFFLINE unset"
    names = sorted(filter_repo_objects(present.union(known), allow_patterns=patterns))
    return folder, {name: verify_file(folder / name, source, name, again) for name in names}


def hub_file(repository: str, name: str, revision: str, kind: str) -> Path:
    """One file of the hub, in its cache; kind: "model" or "dataset". Raises the hub client's errors."""
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    path = try_to_load_from_cache(repository, name, cache_root(), revision, kind)
    if not isinstance(path, str):
        _check_before_download(hf_hub_url(repository, name, repo_type=kind, revision=revision))
        path = hf_hub_download(repository, name, repo_type=kind, revision=revision, cache_dir=cache_root())
    return Path(path)


def check_reachable(url: str) -> None:
    """Raise the hub client's error if the file at `url` would not be sent; nothing is fetched."""
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


def _check_before_download(url: str) -> None:
    """`check_reachable`, which fails in seconds where the hub's client would wait for minutes."""
    try:
        if not offline():
            check_reachable(url)
    except Exception as error:
        if (status_of(error) or 0) < 429:  # from 429 on the fault may pass, and the client tries again
            raise


# ---------------------------------------------------------------- why a download failed

LOG_IN = "log in with `hf auth login`"
PROXY = "check the network and its proxy (HTTPS_PROXY, ALL_PROXY)"
LOGIN_PAGE = "what answers is no hub, but for example a network's login page"
SLOW = "try again, or set HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT to more seconds"
# (labels, cause, remedy); the first row that has a label of the error counts. Its labels are the names of its
# classes (of the hub's client, gdown or requests), its HTTP status and its errno.
REASONS = [
    ("GatedRepoError", "it is only for those who have accepted its terms", f"accept them there and {LOG_IN}"),
    ("DisabledRepoError", "the hub has disabled it", "look on that page why"),
    ("RevisionNotFoundError", "this revision is not there, or not any more", "give another commit"),
    ("RemoteEntryNotFoundError", "a file is not there at this revision", "give another commit"),
    ("RepositoryNotFoundError", "no such repository, or a private one", f"check its name, or {LOG_IN}"),
    ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set, and the cache lacks it", "unset it to fetch this"),
    ("FileURLRetrievalError", "Google Drive sends a page, as when too many ask", "try again later"),
    ("FileMetadataError JSONDecodeError", LOGIN_PAGE, f"open it in a browser, or {PROXY}"),
    ("ProxyError 407", "the proxy does not let it through", PROXY),
    ("TimeoutException Timeout TimeoutError", "no answer came in time", SLOW),
    ("RemoteProtocolError ChunkedEncodingError IncompleteRead", "the connection broke off", "try again"),
    ("401", "the hub does not know your token", f"{LOG_IN} again, or unset HF_TOKEN"),
    ("403", "access is forbidden", f"{LOG_IN} as somebody who may read it"),
    ("404", "it is not there", "look for it on that page"),
    ("429", "too many requests came from here", f"wait a while, or {LOG_IN}"),
    ("5xx", "the server is out of order", "try again later"),
    ("HTTP", "the server refuses", "try again later"),
    ("ConnectError NetworkError URLError ConnectionError", "it cannot be reached", PROXY),
    ("ENOSPC EDQUOT EFBIG", "the disk is full ({})", "make room, or choose another LGAP_CACHE"),
    ("EACCES EPERM EROFS ENOTDIR EEXIST", "it cannot be written there ({})", "choose another LGAP_CACHE"),
    ("inconsistent", "what came is not as long as was announced", "try again"),
]


def explain(error: BaseException) -> tuple[str, str]:
    """(cause, remedy), a clause each, of an exception that ended a download."""
    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and below not in chain:
        chain.append(below)
    for link in chain:
        labels, status = _labels(link), status_of(link)
        for names, cause, remedy in REASONS:
            if labels.intersection(names.split()):
                return cause.format(link) + (f" (HTTP {status})" if status else ""), remedy
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}", "try again"


def _labels(error: BaseException) -> set[str]:
    labels = {kind.__name__ for kind in type(error).__mro__}
    status = status_of(error)
    if status:
        labels |= {"HTTP", str(status), f"{status // 100}xx"}
    if isinstance(error, OSError):
        labels.add(errno.errorcode.get(error.errno or 0, ""))
        if "onsistency check" in str(error):  # huggingface_hub: the size differs from the announced one
            labels.add("inconsistent")
    return labels


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, or None."""
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
