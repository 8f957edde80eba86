"""The models and data sets that a profile reads: which files are there, and how to get the others."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lgap_utils import files, hub
from lgap_utils.profiles import REVISIONS, ROOT, Profile, cache_root
from tools.runner import show

Sizes = dict[str, int | None]  # {file: its bytes, or None where they are not known}
PROBLEMS = (files.CheckpointError, FileNotFoundError, ValueError)


@dataclass(frozen=True)
class Check:
    what: str
    state: str  # "ok", "to fetch", "missing" or "note"
    detail: str


@dataclass(frozen=True)
class Item:
    """A model or data set that a profile reads."""

    what: str  # "captioner", "data", ...
    name: str
    place: Path  # where it lies, or where a run would put it
    check: Callable[
        [bool], str
    ]  # check(deep) -> what was checked; raises one of PROBLEMS. Not deep: no digests
    absent: Sizes  # the files that are not there
    partly: bool = False  # whether others are
    get: str = ""  # the command or page that gets what is absent
    url: str = ""  # the address that a run would fetch a file from, {} for its name; "" if it fetches nothing

    @property
    def host(self) -> str:
        return "/".join(self.url.split("/")[:3])


# ---------------------------------------------------------------- models


def models_of(profiles: list[Profile]) -> Iterator[Item | Check]:
    """For each model once, an Item, or a Check of what is wrong with its name."""
    from lgap_utils.diffpure import FILES
    from lgap_utils.models import CAPTIONER_FILES, diffusion_files

    saved = ["config.json", "model.safetensors"]
    needs = {}
    for p in profiles:
        needs[p.captioner] = "captioner", p.captioner_revision, CAPTIONER_FILES
        needs[p.diffusion] = "diffusion", p.diffusion_revision, diffusion_files(p.variant)
        needs[p.classifier] = "classifier", None, saved
        if p.rival:
            needs[p.rival] = "rival", p.rival_revision, FILES
        needs |= {name: ("rival", None, saved) for _, name, _ in p.rivals}
    for name, (what, revision, patterns) in needs.items():
        plain = [pattern for pattern in patterns if "*" not in pattern]
        try:
            yield model(what, name, revision or REVISIONS.get(name), plain)
        except PROBLEMS as error:
            yield Check(what, "missing", str(error))


def model(what: str, name: str, revision: str | None, needed: list[str]) -> Item:
    """A model in a folder, on the hub or RobustBench's. needed: files that it cannot do without."""
    if name.startswith("robustbench:"):
        return of_robustbench(what, name)
    made = re.match("checkpoints/(toy|small|paper)/", name)
    try:
        folder = files.locate(name)
    except files.CheckpointError:
        if not made:
            raise
        folder = ROOT / name
    if folder is None and revision is None:
        problem = f"{name!r} is a hub id without a revision"
        raise files.CheckpointError(f"{problem}; give its 40-digit commit, or a local folder")
    if folder is None:
        return on_hub(what, name, str(revision), needed)
    present = {file for file in needed if all((folder / part).is_file() for part in shards(folder, file))}
    if (folder / "pytorch_model.bin").is_file():
        present.add("model.safetensors")  # the captioner's loader reads it
    absent = []
    for file in needed:
        absent += [
            part for part in shards(folder, file) if file not in present and not (folder / part).is_file()
        ]
    get = f"python checkpoints/make.py {made[1]}" if made else "a whole copy of the folder"
    check = lambda deep: f"digests checked: {len(files.verify(folder, digest=deep))}"
    return Item(what, name, folder, check, dict.fromkeys(absent), bool(present), get)


def shards(folder: Path, file: str) -> list[str]:
    """The files that stand for `file` in a folder: itself, or those that an index beside it lists."""
    index = folder / f"{file}.index.json"
    if (folder / file).is_file() or not index.is_file():
        return [file]
    try:
        listed = json.loads(index.read_text())["weight_map"].values()
        return sorted({str(Path(file).with_name(shard)) for shard in listed})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise files.CheckpointError(f"{index} is damaged: it lists no files; copy the folder again") from None


def of_robustbench(what: str, name: str) -> Item:
    from lgap_utils.zoo import robustbench_entry, robustbench_file, robustbench_page

    entry = (name.removeprefix("robustbench:").split("/") + ["", ""])[:3]
    source, file = f"{'/'.join(entry)}.pt", robustbench_file(*entry)

    def check(deep: bool) -> str:
        if not file.is_file():
            return ""
        return f"sha256 {hub.verify_file(file, 'robustbench', source, 'fetch it again', deep)['sha256']}"

    if file.is_file():
        return Item(what, name, file.parent, check, {})
    page = robustbench_page(*robustbench_entry(name))  # imports robustbench, which takes seconds
    absent = {source: hub.lock_entries("robustbench").get(source, {}).get("size")}
    get = f"{page}\nfrom a browser, as {show(file)}"
    return Item(what, name, file.parent, check, absent, get=get, url=page)


def on_hub(what: str, repository: str, revision: str, needed: list[str]) -> Item:
    """A model's files in the hub's cache: those that the lock file knows, or `needed` where it knows none."""
    known = {}
    for file, entry in hub.lock_entries(f"{repository}@{revision}").items():
        if file.endswith(".bin") or not needed or Path(file).suffix != ".safetensors" or file in needed:
            known[file] = entry.get("size")
    pickled = any(file.endswith(".bin") for file in known)
    return in_repository(what, repository, revision, known if pickled else dict.fromkeys(needed) | known)


def in_repository(what: str, repository: str, revision: str, sizes: Sizes, kind="model", folder=None) -> Item:
    """Files of a hub repository, in the hub's cache or in a folder of the user's, which is taken as it is."""
    from huggingface_hub import constants, try_to_load_from_cache

    source, cache = f"{repository}@{revision}", cache_root() or constants.HF_HUB_CACHE
    present = {}
    for file in sizes:
        path = folder / file if folder else try_to_load_from_cache(repository, file, cache, revision, kind)
        if isinstance(path, str | Path) and Path(path).is_file():
            present[file] = Path(path)
    absent = {file: size for file, size in sizes.items() if file not in present}
    command = ["hf", "download", repository, "--revision", revision]
    if kind != "model":
        command += ["--repo-type", kind]
    if folder or cache_root():
        command += ["--local-dir", str(folder)] if folder else ["--cache-dir", cache]
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"

    def check(deep: bool) -> str:
        for file, path in {} if folder else present.items():
            hub.verify_file(path, source, file, "fetch it again", deep)
        return f"digests checked: {len(present)}"

    url = "" if folder else f"{page}/resolve/{revision}/{{}}"
    get = shlex.join([*command, *absent])
    return Item(what, repository, Path(folder or cache), check, absent, bool(present), get, url)


# ---------------------------------------------------------------- data sets


def data_sets(profiles: list[Profile]) -> Iterator[Item | Check]:
    """For each data set once, an Item, or a Check of what is wrong with it."""
    from lgap_utils.data import load_images

    for dataset in dict.fromkeys(p.dataset for p in profiles):
        own = [p for p in profiles if p.dataset == dataset]
        splits = {"test": max(p.n_images for p in own), "train": max(p.n_finetune for p in own)}
        try:
            item = data_set(dataset)
            for split, n in splits.items():
                if not item.absent and dataset != "toy" and (dataset, split) != ("imagenet", "train"):
                    load_images(dataset, split, 1, start=n - 1)
            yield item
        except (FileNotFoundError, ValueError) as error:
            asks = f" (the profile asks for {n} images)" if "ends before that" in str(error) else ""
            yield Check("data", "missing", f"{error}{asks}")


def data_set(dataset: str) -> Item:
    """A folder below LGAP_DATA is taken as it is: only where there is none is the hub asked."""
    from lgap_utils import data, data_files, imagenet

    check = lambda deep: validated(dataset) if deep else ""
    if dataset == "toy":
        return Item("data", "toy, drawn by the code", ROOT, check, {})
    folder = data_files.data_folder() / dataset
    terms = ""
    if dataset == "imagenet":
        if (folder / "val").is_dir():
            return Item("data", dataset, folder, check, {})
        repository, revision, names = imagenet.IMAGENET, imagenet.IMAGENET_REVISION, imagenet.IMAGENET_SHARDS
        page = f"https://huggingface.co/datasets/{repository}"
        terms = f"\nonce you have accepted its terms at {page} and logged in (hf auth login); "
        terms += f"or put class folders at {show(folder)}/val/<wnid>/"
    else:
        cifar = data.CIFARS[dataset]
        repository, revision = cifar.repository, cifar.revision
        names = [cifar.file.format(split) for split in ("train", "test")]
        whole = all((folder / name).is_file() for name in names)
        if not whole and (unpacked := data.torchvision_folder(dataset)):
            return Item("data", dataset, unpacked, check, {})
    known = hub.lock_entries(f"{repository}@{revision}")
    sizes = {name: known.get(name, {}).get("size") for name in names}
    own = folder if folder.is_dir() else None
    item = in_repository("data", repository, revision, sizes, "dataset", own)
    return replace(item, name=dataset, get=item.get + terms, check=check)


def validated(dataset: str) -> str:
    """`validate` as lines. Raises ValueError with those that are not ok."""
    lines = [(f"{what}: {detail}", ok) for what, ok, detail in validate(dataset)]
    if wrong := [line for line, ok in lines if not ok]:
        raise ValueError("\n".join(wrong))
    return "\n".join(line for line, _ in lines)


def validate(dataset: str) -> list[tuple[str, bool, str]]:
    """[(what, ok, detail)]: whether every image can be read, and whether they are the paper's.

    Reads everything, which takes a minute or so. A user's own files are ok; that they are not the hub's is
    said. Raises ValueError for an unknown name.
    """
    from lgap_utils.data import CIFARS, COUNTS, FIRST_LABELS, load_images

    if dataset == "toy":
        return [("toy", True, "drawn by the code: nothing to check")]
    if dataset not in COUNTS:
        raise ValueError(f"no data set {dataset!r}; choose from {sorted([*COUNTS, 'toy'])}")
    checks = []
    for split, count in COUNTS[dataset].items():
        what = f"{dataset} {split}"
        try:
            images = load_images(dataset, split)
        except (FileNotFoundError, ValueError) as error:
            checks.append((f"{what}: images", False, str(error)))
            continue
        checks.append((f"{what}: images", len(images) == count, f"{len(images)}, expected {count}"))
        if split == "test":
            first, expected = tuple(images.labels[:4].tolist()), FIRST_LABELS[dataset]
            checks.append((f"{what}: first labels", first == expected, f"{first}, expected {expected}"))
        detail = images.source
        if dataset in CIFARS and ".parquet sha256" in detail:
            cifar = CIFARS[dataset]
            file = cifar.file.format("test" if split == "test" else "train")
            entry = hub.lock_entries(f"{cifar.repository}@{cifar.revision}").get(file, {})
            detail += "" if (entry.get("sha256") or "-") in detail else ", other files than the hub's"
        checks.append((f"{what}: files", True, detail))
    return checks
