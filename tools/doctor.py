"""What a profile needs, what of it is there, and what a run will cost: `python -m lgap_utils doctor`.

Nothing is fetched here, and the network is asked only for what is missing. The cost is counted from NOTEBOOKS, which says what
each notebook asks of captioner and denoiser; tests/test_doctor.py runs the notebooks, and counts.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lgap_utils import files, hub
from lgap_utils.profiles import REVISIONS, ROOT, cache_root, get_profile
from tools import runner


@dataclass(frozen=True)
class Check:
    what: str
    state: str  # "ok", "to fetch", "missing" or "note"
    detail: str


@dataclass(frozen=True)
class Item:
    """A model or data set that a profile reads."""

    what: str
    name: str
    place: Path  # where it lies, or where a run would put it
    sizes: dict  # {file: its bytes, or None where nobody knows}
    there: dict  # {file: its path} of those that are there
    get: str  # the command or page that gets the rest
    url: str  # the address that a run would fetch a file from, {} for its name; "" if none
    verify: (
        Callable  # () -> what was checked; raises CheckpointError or ValueError for what is not as expected
    )
    look: Callable = lambda: None  # as `verify`, but only what costs nothing, such as sizes

    @property
    def host(self):
        return "/".join(self.url.split("/")[:3])

    @property
    def absent(self):
        return {file: size for file, size in self.sizes.items() if file not in self.there}


def examine(name, deep=False, notebooks=None, **settings):
    """[Check] of everything that a profile needs for some notebooks, by name, or for all. deep: digests of models and every image
    are checked, too.

    Raises ValueError, with the choices, for an unknown profile, field or value.
    """
    tables = dict.fromkeys(NOTEBOOKS[n][0] if n in NOTEBOOKS else None for n in notebooks or NOTEBOOKS)
    profiles = [get_profile(name, table, **settings) for table in tables]
    found = [*_models(profiles), *_data_sets(profiles)]
    wanted = [item for item in found if isinstance(item, Item) and item.absent and item.url]
    refused, silent = ({}, {}) if hub.offline() else _ask(wanted)
    fetched = [item for item in wanted if refused.get(item.url) == ""]
    lines = [item if isinstance(item, Check) else _check(item, refused.get(item.url), deep) for item in found]
    memory = Check("memory", "note", _bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    return [_device(profiles[0]), memory, _network(wanted, silent), *lines, *_disk(fetched)]


def can_run(checks):
    """Whether nothing is missing that a run would not fetch by itself."""
    return all(check.state != "missing" for check in checks)


def _check(item, refused, deep):
    """refused: why what is absent would not be sent, "" where it would, None where nobody was asked."""
    what = item.name
    if item.absent:
        size = _size(item.absent.values())
        what = (
            f"{item.name} lacks {', '.join(item.absent)} ({size})" if item.there else f"{item.name}, {size}"
        )
        if refused != "":
            why = f"; {item.host}: {refused}" if refused else ""
            return Check(
                item.what,
                "missing",
                f"{what}, not in {runner.show(item.place)}{why}; get it with\n{item.get}",
            )
    try:
        item.look()
        if item.absent:
            return Check(item.what, "to fetch", f"{what}, from {item.host}")
        checked = f"\n{item.verify()}" if deep else ""
    except (files.CheckpointError, FileNotFoundError, ValueError) as error:
        return Check(item.what, "missing", str(error))
    where = "" if item.place in (ROOT, ROOT / item.name) else f" in {runner.show(item.place)}"
    return Check(item.what, "ok", item.name + where + checked)


def _size(sizes):
    known = sum(size for size in sizes if size)
    return "size not known" if not known else "at least " * (None in sizes) + _bytes(known)


def _bytes(n):
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


# ---------------------------------------------------------------- the machine and the network


def device_name(device):
    """A plain description: the GPU's name, or "CPU (its model)"."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"CPU ({model[1].strip() if model else platform.machine()})"


def _device(p):
    import torch

    from lgap_utils.models import device_of

    try:
        device = device_of()
    except ValueError as error:
        return Check("device", "missing", str(error))
    if device.type == "cuda":
        return Check(
            "device",
            "ok",
            f"{device_name('cuda')}, {_bytes(torch.cuda.get_device_properties(device).total_memory)}",
        )
    what = f"{device_name('cpu')}, {os.cpu_count()} cores"
    if not p.needs_gpu:
        return Check("device", "ok", what)
    if os.environ.get("LGAP_DEVICE"):
        return Check(
            "device", "note", f"{what}: LGAP_DEVICE goes on without the GPU that profile {p.name} is made for"
        )
    return Check(
        "device",
        "missing",
        f"{what}: profile {p.name} is made for a GPU; set LGAP_DEVICE=cpu to go on without one",
    )


def _network(wanted, silent):
    """silent: {host: why} of those that gave no answer."""
    if not wanted:
        return Check("network", "ok", "not asked: nothing has to be fetched")
    if hub.offline():
        return Check("network", "note", "HF_HUB_OFFLINE is set: nothing will be fetched")
    hosts = dict.fromkeys(item.host for item in wanted)
    said = [
        f"{host} is out of reach: {silent[host]}" if host in silent else f"{host} answers" for host in hosts
    ]
    return Check("network", "note" if silent else "ok", ", ".join(said))


def _ask(wanted):
    """({address: why a file that is absent would not be sent, or ""}, {host: why} of those that gave no answer).

    A host that gives none is asked once.
    """
    refused, silent = {}, {}
    for item in wanted:
        refused[item.url] = silent.get(item.host, "")
        for file in () if refused[item.url] else item.absent:
            try:
                hub.check_reachable(item.url.replace("{}", file))
            except Exception as error:  # of the hub's client and what lies below it
                cause, remedy = hub.explain(error)
                refused[item.url] = f"{cause}; {remedy}"
                if not hub.status_of(error):
                    silent[item.host] = cause
                break
    return refused, silent


def _disk(fetched):
    """Free space of each file system that something is fetched to."""
    needs = {}
    for item in fetched:
        place = next(folder for folder in (item.place, *item.place.absolute().parents) if folder.exists())
        needs.setdefault(place.stat().st_dev, (place, []))[1].extend(item.absent.items())
    for place, absent in needs.values():
        sizes = [
            size and size * (2 if file == "pytorch_model.bin" else 1) for file, size in absent
        ]  # converted, it is kept twice
        need, free = sum(size for size in sizes if size), shutil.disk_usage(place).free
        yield Check(
            "disk",
            "missing" if need > free else "ok",
            f"need: {_size(sizes)}; free at {runner.show(place)}: {_bytes(free)}",
        )


# ---------------------------------------------------------------- models and data sets


def _models(profiles):
    """For each model once, an Item, or a Check of what is wrong with its name."""
    from lgap_utils.models import CAPTIONER_FILES, diffusion_files

    wanted = {}
    for p in profiles:
        wanted[p.captioner] = "captioner", p.captioner_revision, CAPTIONER_FILES
        wanted[p.diffusion] = "diffusion", p.diffusion_revision, diffusion_files(p.variant)
        wanted[p.classifier] = "classifier", None, ["config.json", "model.safetensors"]
        wanted |= {name: ("rival", None, ["config.json", "model.safetensors"]) for _, name, _ in p.rivals}
    for name, (what, revision, patterns) in wanted.items():
        try:
            yield (
                _robustbench(what, name)
                if name.startswith("robustbench:")
                else _model(
                    what,
                    name,
                    revision or REVISIONS.get(name),
                    [pattern for pattern in patterns if "*" not in pattern],
                )
            )
        except (files.CheckpointError, ValueError) as error:
            yield Check(what, "missing", str(error))


def _model(what, name, revision, needed):
    """A model in a folder or on the hub; `needed` are files that no model of its kind can do without."""
    made = re.match("checkpoints/(toy|small|paper)/", name)
    try:
        folder = files.locate(name)
    except files.CheckpointError:
        if not made:
            raise
        folder = ROOT / name
    if folder is None and revision is None:
        raise files.CheckpointError(
            f"{name!r} is a hub id without a revision; give its 40-digit commit, or a local folder"
        )
    if folder is None:
        return _on_hub(what, name, revision, needed)
    needed = [part for file in needed for part in _shards(folder, file)]
    there = {file: folder / file for file in needed if (folder / file).is_file()}
    if (pickle := folder / "pytorch_model.bin").is_file():
        there.setdefault("model.safetensors", pickle)  # the captioner's loader converts it
    get = f"python checkpoints/make.py {made[1]}" if made else "a whole copy of the folder"
    return Item(
        what,
        name,
        folder,
        dict.fromkeys(needed),
        there,
        get,
        "",
        lambda: f"digests checked: {len(files.verify(folder))}",
        lambda: files.verify(folder, digest=False),
    )


def _shards(folder, file):
    """The files that stand for `file` in a folder: itself, or those that an index beside it lists."""
    index = folder / f"{file}.index.json"
    if (folder / file).is_file() or not index.is_file():
        return [file]
    try:
        listed = json.loads(index.read_text())["weight_map"].values()
        return sorted({str(Path(file).with_name(shard)) for shard in listed})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise files.CheckpointError(f"{index} is damaged: it lists no files; copy the folder again") from None


def _robustbench(what, name):
    from lgap_utils.zoo import robustbench_entry, robustbench_file, robustbench_page

    entry = (name.removeprefix("robustbench:").split("/") + ["", ""])[:3]
    source, file = f"{'/'.join(entry)}.pt", robustbench_file(*entry)
    sizes, there = (
        {source: hub.lock_entries("robustbench").get(source, {}).get("size")},
        {source: file} if file.is_file() else {},
    )
    page = (
        "" if there else robustbench_page(*robustbench_entry(name))
    )  # imports robustbench, which takes seconds
    check = lambda digest: hub.verify_file(file, "robustbench", source, "fetch it again", digest)
    return Item(
        what,
        name,
        file.parent,
        sizes,
        there,
        f"{page}\nfrom a browser, as {runner.show(file)}",
        page,
        lambda: f"sha256 {check(True)['sha256']}",
        lambda: there and check(False),
    )


def _on_hub(what, repository, revision, needed, kind="model", folder=None, name=None):
    """Files of a hub repository, in the hub's cache or in a folder: the lock file's, or `needed` where that does not know them."""
    from huggingface_hub import constants, try_to_load_from_cache

    source, cache = f"{repository}@{revision}", cache_root() or constants.HF_HUB_CACHE
    known = {
        file: entry.get("size")
        for file, entry in hub.lock_entries(source).items()
        if file.endswith(".bin") or not needed or Path(file).suffix != ".safetensors" or file in needed
    }
    sizes = known if any(file.endswith(".bin") for file in known) else dict.fromkeys(needed) | known
    path_of = lambda file: (
        folder / file if folder else try_to_load_from_cache(repository, file, cache, revision, kind)
    )
    there = {
        file: Path(path)
        for file in sizes
        if isinstance(path := path_of(file), str | Path) and Path(path).is_file()
    }
    where = ("--local-dir", str(folder)) if folder else ("--cache-dir", cache) if cache_root() else ()
    command = [
        "hf",
        "download",
        repository,
        "--revision",
        revision,
        *("--repo-type", kind) * (kind != "model"),
        *where,
    ]
    get = shlex.join([*command, *(file for file in sizes if file not in there)])
    check = lambda digest: [
        hub.verify_file(path, source, file, "fetch it again", digest) for file, path in there.items()
    ]
    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repository}"
    url = "" if folder else f"{page}/resolve/{revision}/{{}}"
    return Item(
        what,
        name or repository,
        Path(folder or cache),
        sizes,
        there,
        get,
        url,
        lambda: f"digests checked: {len(check(True))}",
        lambda: None if folder else check(False),
    )


def _data_sets(profiles):
    """For each data set once, an Item, or a Check of what is wrong with it."""
    from lgap_utils import data

    for dataset in dict.fromkeys(p.dataset for p in profiles):
        asked = [p for p in profiles if p.dataset == dataset]
        most = {"test": max(p.n_images for p in asked), "train": max(p.n_finetune for p in asked)}
        try:
            item = _data_set(dataset)
            for split, n in most.items() if dataset != "toy" and not item.absent else ():
                if (dataset, split) != ("imagenet", "train"):
                    data.load_images(dataset, split, 1, start=n - 1)
            yield item
        except (FileNotFoundError, ValueError) as error:
            asks = f" (the profile asks for {n} images)" if "ends before that" in str(error) else ""
            yield Check("data", "missing", f"{error}{asks}")


def _data_set(dataset):
    """A folder below LGAP_DATA is taken as it is: only where there is none is the hub asked."""
    from lgap_utils import data, data_files, imagenet

    def verify():
        lines = [(f"{what}: {said}", ok) for what, ok, said in data.validate(dataset)]
        if wrong := [line for line, ok in lines if not ok]:
            raise ValueError("\n".join(wrong))
        return "\n".join(line for line, _ in lines)

    if dataset == "toy":
        return Item("data", "toy, drawn by the code", ROOT, {}, {}, "", "", verify)
    folder = data_files.data_folder() / dataset
    if dataset == "imagenet" and (folder / "val").is_dir():
        return Item("data", dataset, folder, {}, {}, "", "", verify)
    if dataset == "imagenet":
        repository, revision, needed = imagenet.IMAGENET, imagenet.IMAGENET_REVISION, imagenet.IMAGENET_SHARDS
    else:
        cifar = data.CIFARS[dataset]
        repository, revision, needed = (
            cifar.repository,
            cifar.revision,
            [cifar.file.format(split) for split in ("train", "test")],
        )
        whole = all((folder / name).is_file() for name in needed)
        if not whole and (unpacked := data.torchvision_folder(dataset)):
            return Item("data", dataset, unpacked, {}, {}, "", "", verify)
    item = _on_hub(
        "data", repository, revision, needed, "dataset", folder if folder.is_dir() else None, dataset
    )
    terms = (
        f"\nonce you have accepted its terms at https://huggingface.co/datasets/{repository} and logged in (hf auth login); or put "
        f"class folders at {runner.show(folder)}/val/<wnid>/"
    ) * (dataset == "imagenet")
    return dataclasses.replace(item, get=item.get + terms, verify=verify)


# ---------------------------------------------------------------- what a run costs


class Tally:
    """Counts what notebooks ask of captioner and denoiser, one after the other: rows that one has kept, the next does not ask for again.

    Every method returns a Counter of "captions", purifications "forward only" and "with gradient", denoiser "calls" for these, and
    "passes", in which a gradient counts threefold, as in Evaluation.plan.
    """

    def __init__(self):
        self.p, self.kept = None, Counter()  # p: the profile for the notebook at hand

    def captions(self, n):
        return Counter({"captions": n})

    def purifications(self, n, gradient=False, **settings):
        q = dataclasses.replace(self.p, **settings)
        calls = n * denoiser_calls(q)
        return Counter(
            {
                "with gradient" if gradient else "forward only": n,
                "calls": calls,
                "passes": calls * (3 if gradient else 1),
            }
        )

    def both(self, n):
        """Images captioned and purified, once each."""
        return self.captions(n) + self.purifications(n)

    def finetune(self):
        """models.finetune, once for each data set."""
        if self.kept[self.p.dataset]:
            return Counter()
        self.kept[self.p.dataset] = 1
        return self.both(self.p.n_finetune + min(self.p.n_validation, self.p.n_finetune))

    def run(self, folder, attack, n, /, **changes):
        """Evaluation.run of LGAP and what stands beside it, of which LGAP without a caption asks the denoiser, too: without guidance."""
        from lgap_utils.protocols import NATURAL, get_attack

        total, own = Counter(), get_attack(attack, **changes)
        if own.optimiser == "autoattack":
            own = dataclasses.replace(own, block=self.p.autoattack_block)
        n = min(own.whole(n), self.p.n_images)
        for each in (NATURAL, own):
            new = n - self.kept[folder, each.name]
            self.kept[folder, each.name] += max(0, new)
            if new > 0:
                trial = min(self.p.n_images, self.p.batch_size)  # what Evaluation.plan times
                forward, gradient = each.purifications()
                looks = (
                    (forward + gradient) // each.n_eot if each.captions == "anew" else each.view != "blind"
                )
                total += self.both(trial + min(2, trial)) + self.captions(new * (looks + 1))
                total += self.purifications(new * (forward + self.p.n_draws)) + self.purifications(
                    new * gradient, True
                )
                total += self.purifications(new * self.p.n_draws, guidance_scale=1.0)
        return total

    def shown(self, dataset):
        """Six images, if their data set is in a folder."""
        from lgap_utils.data import at_hand

        return self.both(6) if at_hand(dataset) else Counter()


# {notebook: (the paper's table whose settings it has, what it asks for)}; p is its profile, t the Tally
NOTEBOOKS = {
    "01_captioning": (None, lambda p, t: [t.captions(2 * p.n_images)]),
    "02_purification": (
        None,
        lambda p, t: [
            t.both(p.n_images),
            t.both(1),
            t.purifications(7),
            *(
                t.purifications(1, strength=s, num_inference_steps=max(50, p.num_inference_steps))
                for s in (0.1, 0.3, 0.5, 0.7)
            ),
            *(
                t.purifications(1, guidance_scale=min(100, max(1, g)))
                for g in (1, p.guidance_scale / 2, p.guidance_scale, 2 * p.guidance_scale)
            ),
        ],
    ),
    "03_finetuning": (None, lambda p, t: [t.both(4 * p.n_images), t.finetune()]),
    "04_table1_cifar10_blind": (
        1,
        lambda p, t: [
            t.finetune(),
            t.run("table1_and_3", "blind PGD-40", p.n_images),
            t.run("table1_and_3", "blind PGD-40", p.n_full, name="blind PGD, eps 0"),
        ],
    ),
    "05_table2_cifar100_blind": (
        2,
        lambda p, t: [t.finetune(), t.run("table2", "blind PGD-40", p.n_images), t.shown("cifar100")],
    ),
    "06_table3_cifar10_adaptive": (
        3,
        lambda p, t: [
            t.finetune(),
            t.run("table1_and_3", "blind PGD-40", p.n_images),
            t.run("table1_and_3", "AutoAttack", p.n_images),
            t.run("table1_and_3", "BPDA-40", p.n_adaptive),
            t.run("table1_and_3", "BPDA-40+EOT", p.n_eot_images, n_eot=p.n_eot),
            t.run("table1_and_3", "PGD-20+EOT, full gradient", p.n_full),
            t.run("table1_and_3", "PGD-20+EOT, full gradient, clean caption", p.n_full),
            t.run("table1_and_3", "PGD-20, full gradient, known noise", p.n_full, n_eot=p.n_draws),
            t.run("table1_and_3", "Square", max(1, p.n_full // 4)),
            *(
                t.run(
                    "table1_and_3",
                    "BPDA-40",
                    p.n_full,
                    name=f"BPDA-40, eps {eps:g}",
                    n_steps=40 if eps else 1,
                )
                for eps in (0, p.eps_255 / 2, 2 * p.eps_255)
            ),
            t.run("table1_and_3", "BPDA-40", p.n_full, name="BPDA-80", n_steps=80),
        ],
    ),
    "07_table4_imagenet": (
        4,
        lambda p, t: [
            *(t.run("table4", attack, p.n_adaptive) for attack in ("PGD-10", "AutoAttack", "BPDA-40")),
            t.run("table4", "PGD-10", p.n_full, name="PGD-10, eps 0"),
            t.shown("imagenet"),
        ],
    ),
}


def denoiser_calls(p):
    """As LatentPurifier.denoiser_calls, of a profile."""
    return int(p.strength * p.num_inference_steps) * (2 if p.guidance_scale != 1 else 1)


def costs(name, **settings):
    """{notebook: (its profile, Counter)} of a run of all notebooks from nothing: at most so much, as attacks may end early."""
    tally, found = Tally(), {}
    for notebook, (table, asks) in NOTEBOOKS.items():
        own = runner.parameters(ROOT / "notebooks" / f"{notebook}.ipynb")
        tally.p = get_profile(name, table, **{"n_images": own["N_IMAGES"]} | settings)
        found[notebook] = tally.p, sum(asks(tally.p, tally), Counter())
    return found


def price(p):
    """(seconds per caption, seconds per denoiser pass, where they are from) on this device; None where they were not measured.

    A pass has its share of all that is done once for a purification: VAE and text encoder.
    """
    import torch

    from lgap_utils.models import device_of

    folders = [ROOT / name for name in (p.captioner, p.diffusion, p.classifier)]
    small = sum(file.stat().st_size for folder in folders for file in folder.rglob("*")) < 1e8
    try:
        device = device_of().type
        if small and all(folder.is_dir() for folder in folders):
            return *_timed(p), "timed just now on 8 images"
    except (files.CheckpointError, ValueError) as error:
        return None, None, f"not timed: {error}"
    here = {"device": device_name(device), "dtype": p.dtype, "size": str(p.size)}
    here |= {} if device == "cuda" else {"threads": str(torch.get_num_threads())}
    table = ROOT / "paper" / "speed.csv"
    true_size = {p.captioner, p.diffusion} <= set(REVISIONS)
    rows = list(csv.DictReader(table.open(newline=""))) if table.exists() and true_size else []
    rows = [row for row in rows if all(row[name] == value for name, value in here.items())]
    # of several, the one of the strength at hand, and of these the fastest
    rank = lambda row: (float(row["strength"]) != p.strength, float(row["seconds_per_image"]))
    plain, averaged = (
        min((row for row in rows if row["what"].startswith(what)), key=rank, default=None)
        for what in ("purif", "BPDA")
    )
    if plain is None:
        bench = f": python tools/bench.py --sizes {p.size} --strength {p.strength} --dtype {p.dtype}"
        return None, None, "not measured on this device" + bench * true_size
    each, caption = float(plain["seconds_per_image"]), 0
    if (
        averaged and averaged["strength"] == plain["strength"] and int(averaged["n_eot"]) > 1
    ):  # its draws share a caption
        caption = max(0, (each - float(averaged["seconds_per_image"])) / (1 - 1 / int(averaged["n_eot"])))
    calls = 2 * int(float(plain["strength"]) * int(plain["num_inference_steps"]))  # all with guidance
    return (
        caption,
        (each - caption) / calls,
        f"paper/speed.csv, strength {plain['strength']}: {plain['command']}",
    )


def _timed(p):
    """(seconds per caption, seconds per denoiser pass) of a small model, over 8 images."""
    import torch
    from transformers.utils import logging

    from lgap_utils.models import load_defense
    from lgap_utils.noise import Keys

    logging.disable_progress_bar()
    defense = load_defense(p)
    x = torch.rand(
        8, 3, defense.input_size, defense.input_size, generator=torch.Generator().manual_seed(0)
    ).to(defense.purifier.device)
    captions, took = defense.caption(x), []
    with torch.no_grad():
        defense.purify(x, captions, Keys(range(8)))  # the first calls load and plan kernels
        for call in (
            lambda: defense.caption(x),
            lambda: defense.purify(x, captions, Keys(range(8))).sum().item(),
        ):
            began = time.perf_counter()
            call()
            took.append((time.perf_counter() - began) / 8)
    return took[0], took[1] / denoiser_calls(p)


def seconds(asked, price):
    """What a Counter takes at a `price`; None where that is not known."""
    caption, each, _ = price
    return (
        None
        if each is None or (not caption and not asked["passes"])
        else asked["captions"] * caption + asked["passes"] * each
    )
