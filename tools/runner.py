"""Runs the notebooks in order, without a browser, into outputs/PROFILE/notebooks: what `run_all.sh` calls.

A wrong request is refused before the first kernel starts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lgap_utils.files import CheckpointError, folder_lock, write_whole
from lgap_utils.profiles import PROFILES, ROOT, get_profile, output_root
from tools.request import (
    Values,
    add_profile,
    check_settings,
    fields_of,
    parameters,
    parse_settings,
    select,
    values_for,
)
from tools.watch import Watch, duration

PUBLISHED = ROOT / "outputs" / "published"  # tracked: nothing but tools/publish.py writes there
PARTLY = 3  # the exit status of a run that left out a notebook, as its data set is missing
GO_ON = "what is finished is kept: run the same command again to go on from there"


def check_finished(nb: dict, error: Exception | None = None) -> str | None:
    """None if every cell of the executed notebook ran, else where it stopped and why.

    papermill returns normally after `sys.exit(0)` in a cell, and after a kernel's death it has marked every
    cell as completed: the execution counts and its own record are looked at, too.
    """
    cells = [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    record = nb["metadata"].get("papermill", {})
    all_ran = all(c["execution_count"] is not None for c in cells)
    if error is None and all_ran and record.get("exception") is None and record.get("end_time"):
        return None
    place, why = "", f"{type(error).__name__}: {error}" if error else "it stopped here"
    for number, cell in enumerate(cells, 1):
        if cell["metadata"].get("papermill", {}).get("start_time"):
            place = f"cell [{number}], `{''.join(cell['source']).strip().splitlines()[0]}`: "
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                why = f"{output['ename']}: {output['evalue']}"
    return place + why.strip(" :\n").splitlines()[-1]


def run(path: Path, target: Path, values: Values, watch: Watch) -> str | None:
    """Run one notebook into `target`; returns None, or what stopped it."""
    import papermill

    target.unlink(missing_ok=True)
    options = {"kernel_name": "python3", "language": "python", "cwd": path.parent, "progress_bar": False}
    quiet = ["--log-level=50"]  # or each kernel warns that it speaks unencrypted, on this machine only
    error = None
    try:
        with watch:
            papermill.execute_notebook(
                path, target, values, extra_arguments=quiet, on_cell_start=watch.hook, **options
            )
    except Exception as caught:  # a failing cell, a dead kernel, a full disk: all end in the same report
        error = caught
    try:
        return check_finished(json.loads(target.read_text(encoding="utf-8")), error)
    except (OSError, ValueError) as unreadable:  # no file, or half of one
        return str(error or unreadable)


def earlier(target: Path, values: Values) -> Any:
    """The notebook's last run into `target`, if it finished with these parameters; else None."""
    try:
        nb = json.loads(target.read_text(encoding="utf-8"))
        same = nb["metadata"]["papermill"]["parameters"] == json.loads(json.dumps(values))
        return nb if same and check_finished(nb) is None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_rows(target: Path, before: Any, new: int) -> bool:
    """Note in the executed notebook how many shards of rows it wrote; True if it took all from its last run.

    before: its last run, as from `earlier`.
    """
    kept = before["metadata"].get("lgap", {}).get("shards", 0) if before else 0
    nb = json.loads(target.read_text(encoding="utf-8"))
    nb["metadata"]["lgap"] = {"shards": new or kept}
    write_whole(target, (json.dumps(nb, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    return bool(kept and not new)


def ready(profile: str, notebooks: list[str], settings: Values, say: bool = True) -> list[Any]:
    """What these notebooks still miss at this profile; say: print it, and what has to be fetched."""
    from tools.doctor import can_run, examine

    try:
        checks = examine(profile, notebooks=notebooks, **settings)
    except (CheckpointError, ValueError) as error:  # of the lock file, or of a table's profile
        sys.exit(f"run_all.sh: {error}")
    for check in checks:
        if say and check.state in ("missing", "to fetch"):
            print(f"{check.what}, {check.state}: {check.detail}", flush=True)
    return [check for check in checks if not can_run([check])]


def without_data(plan: dict[Path, Values], profile: str, settings: Values) -> tuple[dict, list[str]]:
    """(the plan, sentences on notebooks that are left out of it as their data set is missing).

    Ends the process where something else is missing, or nothing could run.
    """
    missing = ready(profile, [path.stem for path in plan], settings)
    if not missing:
        return plan, []
    rest, left_out = {}, []
    if all(check.what == "data" for check in missing):
        for path, values in plan.items():
            if own := ready(profile, [path.stem], settings, say=False):
                reason = own[0].detail.splitlines()[0]
                left_out.append(f"{path.stem} is left out, as its data set is missing: {reason}")
            else:
                rest[path] = values
    if not rest:
        more = f"`python -m lgap_utils doctor {profile}` says more"
        sys.exit(f"run_all.sh: profile {profile} cannot run here; {more}")
    return rest, left_out


def check_folder(out: Path) -> int:
    """The time of now, in ns, as the folder's file system has it.

    Raises OSError for a folder that cannot take results, ValueError for a torn results.json in it.
    """
    from lgap_utils.results import check_results

    probe = out / ".room"
    try:
        write_whole(probe, bytes(1 << 20))  # notebooks and tables need no less
        now = probe.stat().st_mtime_ns
        probe.unlink()
    except OSError as error:
        problem = f"{show(out)} has no room for results ({os.strerror(error.errno or 0)})"
        raise OSError(error.errno, f"{problem}; choose another folder with LGAP_OUTPUTS") from error
    check_results(out)
    return now


def show(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def estimate(plan: dict[Path, Values], known: dict[Path, float]) -> dict[Path, float]:
    """Seconds of each notebook: those of its last run, else what tools/cost.py expects.

    It asks in a process of its own; not for a single notebook, as that would take as long.
    """
    if len(plan) > 1 and set(plan) - set(known):
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        from tools import cost

        print("estimating how long this takes ...", flush=True)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool, contextlib.suppress(Exception):
            known = pool.submit(cost.expected, plan).result() | known
    return known


def finish(out: Path, profile: str, since: int, took: float, left_out: list[str]) -> None:
    """Make the page of the run; five lines say what it holds, and the last one where it is."""
    from tools.report import build, headline

    written = [path.stem for path in sorted(out.glob("tables/*.md")) if path.stat().st_mtime_ns >= since]
    print(f"\nProfile {profile} is done after {duration(took)}.")
    print(f"Tables that this run wrote: {', '.join(written) or 'none'}.")
    for line in headline(out):
        print(line)
    for line in left_out:
        print(line)
    print(f"The page of the run; `python -m lgap_utils report {profile}` makes it again:", flush=True)
    try:
        print(show(build(out, profile, notes=tuple(left_out))))
    except Exception as error:  # the results are whole, whatever a page makes of them
        sys.exit(f"run_all.sh: results are in {show(out)}, but the page could not be made ({error})")


def run_all(plan: dict[Path, Values], out: Path, profile: str, left_out: list[str]) -> None:
    """Run the plan, {notebook: parameters}, into the folder `out`; the first that fails ends the process."""
    if out.is_relative_to(PUBLISHED):
        raise ValueError(
            f"{show(PUBLISHED)} holds published results; choose another folder with LGAP_OUTPUTS"
        )
    os.environ["LGAP_OUTPUTS"] = str(out.parent)  # absolute, because the kernels run in the notebooks' folder
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # a kernel `python3` of the user's may be of other packages
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # no bar of a download or of loading in a stored page
    os.environ.pop("JUPYTER_PATH", None)
    with folder_lock(out):
        since, began = check_folder(out), time.monotonic()
        (out / "notebooks").mkdir(exist_ok=True)
        last = {path: earlier(out / "notebooks" / path.name, values) for path, values in plan.items()}
        known = {path: nb["metadata"]["papermill"]["duration"] or 0.0 for path, nb in last.items() if nb}
        known = estimate(plan, known)
        if set(plan) <= set(known):
            print(f"all of it takes about {duration(sum(known[path] for path in plan))}", flush=True)
        for n, (path, values) in enumerate(plan.items(), 1):
            print(f"[{n}/{len(plan)}] {path.stem} ...", flush=True)
            target, start, shards = out / "notebooks" / path.name, time.monotonic(), rows_in(out)
            ends = [start + sum(known.get(p, 0.0) for p in list(plan)[n - 1 :])] * (set(plan) <= set(known))
            watch = Watch(cells_of(path), out / ".status", lambda ends=ends: time_left(ends))
            problem = run(path, target, values, watch)
            took = duration(time.monotonic() - start)
            if problem:
                kept = f"What ran so far: {show(target)}; {GO_ON}"
                sys.exit(f"run_all.sh: {path.name} failed after {took}: {problem}\n{kept}")
            reused = note_rows(target, last[path], len(rows_in(out) - shards))
            print(f"    {took}" + ", rows reused" * reused, flush=True)
        finish(out, profile, since, time.monotonic() - began, left_out)


def rows_in(out: Path) -> set[Path]:
    return set(out.glob("rows/**/*.parquet"))


def cells_of(path: Path) -> int:
    """How many cells papermill will run: it adds one, with the parameters."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return 1 + sum(c["cell_type"] == "code" and bool("".join(c["source"]).strip()) for c in cells)


def time_left(ends: list[float]) -> str:
    """ends: the time when the run should be done, if that is known."""
    if not ends:
        return ""
    left = ends[0] - time.monotonic()
    return f"whole run {duration(left)}" if left > 0 else "whole run longer than expected"


def command_line() -> argparse.ArgumentParser:
    width = max(map(len, PROFILES))
    profiles = "\n".join(f"  {name:{width}}  {profile.about}" for name, profile in PROFILES.items())
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Run the notebooks in order into outputs/PROFILE; its index.html shows the run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"profiles:\n{profiles}\n\nLGAP_OUTPUTS names another folder than outputs/. "
        f"Exit status {PARTLY}: a notebook was left out, as its data set is missing.",
    )
    add_profile(parser, "a notebook parameter or any field of the profile, as in n_images=64 or size=256")
    only = "only the notebooks whose names begin like this"
    parser.add_argument("--only", action="append", default=[], metavar="02[,03]", help=only)
    parser.add_argument("--list", action="store_true", help="list notebooks and their parameters, and stop")
    parser.add_argument("--plan", action="store_true", help="say what the run will cost, and stop")
    return parser


def main(argv: list[str] | None = None, folder: Path = ROOT / "notebooks") -> None:
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        get_profile(args.profile)
        prefixes = [prefix for item in args.only for prefix in item.split(",")]
        notebooks = {path: parameters(path) for path in select(sorted(folder.glob("[0-9]*.ipynb")), prefixes)}
        settings = parse_settings(args.set)
        check_settings(settings, notebooks, args.profile)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for path, defaults in notebooks.items():
            print(f"{path.stem}:  " + ", ".join(f"{name}={value!r}" for name, value in defaults.items()))
        return
    plan = {path: values_for(defaults, settings, args.profile) for path, defaults in notebooks.items()}
    if args.plan:
        from tools.cost import print_costs

        return print_costs(plan)
    plan, left_out = without_data(plan, args.profile, fields_of(settings, args.profile))
    try:
        run_all(plan, output_root() / args.profile, args.profile, left_out)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        sentence = getattr(error, "strerror", None)  # files.py's own, without its number
        sys.exit(f"run_all.sh: {error if getattr(error, 'filename', None) else sentence or error}")
    if left_out:
        sys.exit(PARTLY)


def quietly(main: Callable[[], None]) -> None:
    """Call `main`. Where nobody reads its output any more, as in `... | head`, it ends without a word."""
    try:
        try:
            main()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again on its way out
        sys.exit(128 + signal.SIGPIPE)


def stopped(number: int, frame: object) -> None:
    logging.disable()  # what Jupyter has to say of a kernel's end that was asked for
    raise KeyboardInterrupt(number)


def command() -> None:
    """`main`; a signal ends it with a word on how to go on, and Jupyter shuts its kernel down."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stopped)
    try:
        quietly(main)
    except KeyboardInterrupt as stop:
        number = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
        print(f"run_all.sh: stopped by {number.name}; {GO_ON}", file=sys.stderr)
        sys.exit(128 + number)


if __name__ == "__main__":
    command()
