"""What a profile needs, and what of it is missing: `python -m lgap_utils doctor`.

Nothing is fetched here, and the network is asked only about what is missing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from lgap_utils import hub
from lgap_utils.profiles import ROOT, Profile, get_profile
from tools.needs import PROBLEMS, Check, Item, data_sets, models_of
from tools.runner import show


def examine(name: str, deep: bool = False, notebooks: list[str] | None = None, **settings) -> list[Check]:
    """Everything that a profile needs for some notebooks, by name, or for all.

    deep: digests of models and every image are checked, too. Raises ValueError, with the choices, for an
    unknown profile, field or value.
    """
    of_table = [re.search(r"_table(\d)", notebook) for notebook in notebooks or ()]
    tables = [match and int(match[1]) for match in of_table] or [None, 1, 2, 3, 4]
    profiles = [get_profile(name, table, **settings) for table in dict.fromkeys(tables)]
    needs = [*models_of(profiles), *data_sets(profiles)]
    wanted = [need for need in needs if isinstance(need, Item) and need.absent and need.url]
    refused, silent = ({}, {}) if hub.offline() else ask(wanted)
    checks = [need if isinstance(need, Check) else check_item(need, refused, deep) for need in needs]
    to_fetch = [item for item in wanted if refused.get(item.url) == ""]
    return [check_device(profiles[0]), check_network(wanted, silent), *checks, *check_disk(to_fetch)]


def can_run(checks: Iterable[Check]) -> bool:
    """Whether nothing is missing that a run would not fetch by itself."""
    return all(check.state != "missing" for check in checks)


def check_item(item: Item, refused: dict[str, str], deep: bool) -> Check:
    """refused: {address: why a file would not be sent, or ""}, of the addresses that were asked."""
    what = item.name
    if item.absent:
        size = size_text(item.absent.values())
        what += f" lacks {', '.join(item.absent)} ({size})" if item.partly else f", {size}"
        refusal = refused.get(item.url)
        if refusal != "":
            why = f"; {item.host}: {refusal}" if refusal else ""
            detail = f"{what}, not in {show(item.place)}{why}; get it with\n{item.get}"
            return Check(item.what, "missing", detail)
    try:
        checked = item.check(deep and not item.absent)
    except PROBLEMS as error:
        return Check(item.what, "missing", str(error))
    if item.absent:
        return Check(item.what, "to fetch", f"{what}, from {item.host}")
    where = "" if item.place in (ROOT, ROOT / item.name) else f" in {show(item.place)}"
    return Check(item.what, "ok", what + where + (f"\n{checked}" if deep else ""))


def size_text(sizes: Iterable[int | None]) -> str:
    sizes = list(sizes)
    known = sum(size for size in sizes if size)
    if not known:
        return "size not known"
    return ("at least " if None in sizes else "") + bytes_text(known)


def bytes_text(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


# ---------------------------------------------------------------- the machine and the network


def device_name(device: str) -> str:
    """The GPU's name, or "CPU (its model)"."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"CPU ({model[1].strip() if model else platform.machine()})"


def check_device(p: Profile) -> Check:
    import torch

    from lgap_utils.models import device_of

    try:
        device = device_of()
    except ValueError as error:
        return Check("device", "missing", str(error))
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return Check("device", "ok", f"{device_name('cuda')}, {bytes_text(memory)}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    what = f"{device_name('cpu')}, {os.cpu_count()} cores, {bytes_text(memory)}"
    if not p.needs_gpu:
        return Check("device", "ok", what)
    if os.environ.get("LGAP_DEVICE"):
        return Check(
            "device", "note", f"{what}: LGAP_DEVICE goes on without the GPU that {p.name} is made for"
        )
    remedy = "set LGAP_DEVICE=cpu to go on without one"
    return Check("device", "missing", f"{what}: profile {p.name} is made for a GPU; {remedy}")


def check_network(wanted: list[Item], silent: dict[str, str]) -> Check:
    """silent: {host: why} of those that gave no answer."""
    if not wanted:
        return Check("network", "ok", "not asked: nothing has to be fetched")
    if hub.offline():
        return Check("network", "note", "HF_HUB_OFFLINE is set: nothing will be fetched")
    answers = []
    for host in dict.fromkeys(item.host for item in wanted):
        answers.append(f"{host} is out of reach: {silent[host]}" if host in silent else f"{host} answers")
    return Check("network", "note" if silent else "ok", ", ".join(answers))


def ask(wanted: list[Item]) -> tuple[dict[str, str], dict[str, str]]:
    """({address: why an absent file would not be sent, or ""}, {host: why} of those that gave no answer).

    A host that gives no answer is asked once.
    """
    refused: dict[str, str] = {}
    silent: dict[str, str] = {}
    for item in wanted:
        refused[item.url] = silent.get(item.host, "")
        for file in item.absent:
            if refused[item.url]:
                break
            try:
                hub.check_reachable(item.url.replace("{}", file))
            except Exception as error:  # of the hub's client and what lies below it
                cause, remedy = hub.explain(error)
                refused[item.url] = f"{cause}; {remedy}"
                if not hub.status_of(error):
                    silent[item.host] = cause
    return refused, silent


def check_disk(to_fetch: list[Item]) -> Iterator[Check]:
    """Free space of each file system that something is fetched to."""
    needs: dict[int, tuple[Path, list]] = {}
    for item in to_fetch:
        place = next(folder for folder in (item.place, *item.place.absolute().parents) if folder.exists())
        sizes = needs.setdefault(place.stat().st_dev, (place, []))[1]
        sizes += item.absent.values()
    for place, sizes in needs.values():
        need, free = sum(size for size in sizes if size), shutil.disk_usage(place).free
        detail = f"need: {size_text(sizes)}; free at {show(place)}: {bytes_text(free)}"
        yield Check("disk", "missing" if need > free else "ok", detail)
