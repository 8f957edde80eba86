"""Runs the notebooks in order, without a browser, into outputs/PROFILE/notebooks: what `run_all.sh` calls.

A wrong request is refused before the first kernel starts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

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

PUBLISHED = ROOT / "outputs" / "published"  # tracked: nothing but tools/publish.py writes there
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


def run(path: Path, target: Path, values: Values) -> str | None:
    """Run one notebook into `target`; returns None, or what stopped it."""
    import papermill

    target.unlink(missing_ok=True)
    options = {"kernel_name": "python3", "language": "python", "cwd": path.parent, "progress_bar": False}
    quiet = ["--log-level=50"]  # or each kernel warns that it speaks unencrypted, on this machine only
    error = None
    try:
        papermill.execute_notebook(path, target, values, extra_arguments=quiet, **options)
    except Exception as caught:  # a failing cell, a dead kernel, a full disk: all end in the same report
        error = caught
    try:
        return check_finished(json.loads(target.read_text(encoding="utf-8")), error)
    except (OSError, ValueError) as unreadable:  # no file, or half of one
        return str(error or unreadable)


def ready(profile: str, notebooks: list[str], settings: Values) -> bool:
    """Print what these notebooks still need at this profile, and say whether they can run."""
    from tools.doctor import can_run, examine

    try:
        checks = examine(profile, notebooks=notebooks, **settings)
    except (CheckpointError, ValueError) as error:  # of the lock file, or of a table's profile
        sys.exit(f"run_all.sh: {error}")
    for check in checks:
        if check.state in ("missing", "to fetch"):
            print(f"{check.what}, {check.state}: {check.detail}", flush=True)
    return can_run(checks)


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


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def report(out: Path, since: int) -> None:
    """Print every Markdown table of the folder `out` that was written after `since`, then what lies where."""
    written = [path for path in sorted(out.glob("tables/*.md")) if path.stat().st_mtime_ns >= since]
    for table in written:
        print(f"\n{table.stem}\n\n{table.read_text(encoding='utf-8').strip()}")
    print("\nWhere everything lies:" if written else "\nThis run wrote no table. Where everything lies:")
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        print(f"  {show(folder)}/  {sum(p.is_file() for p in folder.rglob('*'))} files")


def run_all(plan: dict[Path, Values], out: Path) -> None:
    """Run the plan, {notebook: parameters}, into the folder `out`; the first that fails ends the process."""
    if out.is_relative_to(PUBLISHED):
        raise ValueError(
            f"{show(PUBLISHED)} holds published results; choose another folder with LGAP_OUTPUTS"
        )
    os.environ["LGAP_OUTPUTS"] = str(out.parent)  # absolute, because the kernels run in the notebooks' folder
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # a kernel `python3` of the user's may be of other packages
    os.environ.pop("JUPYTER_PATH", None)
    with folder_lock(out):
        since = check_folder(out)
        (out / "notebooks").mkdir(exist_ok=True)
        for n, (path, values) in enumerate(plan.items(), 1):
            print(f"[{n}/{len(plan)}] {path.stem} ...", flush=True)
            target, start = out / "notebooks" / path.name, time.monotonic()
            problem = run(path, target, values)
            took = duration(time.monotonic() - start)
            if problem:
                kept = f"What ran so far: {show(target)}; {GO_ON}"
                sys.exit(f"run_all.sh: {path.name} failed after {took}: {problem}\n{kept}")
            print(f"    {took}", flush=True)
        report(out, since)


def command_line() -> argparse.ArgumentParser:
    width = max(map(len, PROFILES))
    profiles = "\n".join(f"  {name:{width}}  {profile.about}" for name, profile in PROFILES.items())
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Run the notebooks in order into outputs/PROFILE.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"profiles:\n{profiles}\n\nLGAP_OUTPUTS names another folder than outputs/.",
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
    if not ready(args.profile, [path.stem for path in plan], fields_of(settings, args.profile)):
        more = f"`python -m lgap_utils doctor {args.profile}` says more"
        sys.exit(f"run_all.sh: profile {args.profile} cannot run here; {more}")
    try:
        run_all(plan, output_root() / args.profile)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        sentence = getattr(error, "strerror", None)  # files.py's own, without its number
        sys.exit(f"run_all.sh: {error if getattr(error, 'filename', None) else sentence or error}")


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
