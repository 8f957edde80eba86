"""Runs the notebooks in order, without a browser, into outputs/PROFILE/notebooks: what `run_all.sh` calls.

Whatever can be wrong with the request is refused before the first kernel starts. Nothing here needs more than the
standard library until then, so that `--help` and `--list` answer on a bare Python.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time

from lgap_utils.files import folder_lock, write_whole
from lgap_utils.profiles import PROFILES, ROOT, get_profile, output_root

PUBLISHED = ROOT / "outputs" / "published"  # tracked: nothing but tools/publish.py writes there
GO_ON = "what is finished is kept: run the same command again to go on from there"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def parameters(path):
    """{NAME: default} of the notebook's cell tagged `parameters`, which holds literal assignments only."""
    try:
        (cell,) = [c for c in read(path)["cells"] if "parameters" in c["metadata"].get("tags", [])]
        found = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source(cell)).body}
    except (AttributeError, KeyError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path.name} needs one cell tagged `parameters`, holding only NAME = literal"
        ) from error
    if "PROFILE" not in found:
        raise ValueError(f"{path.name} has no parameter PROFILE")
    return found


def select(paths, prefixes):
    """The notebooks whose names begin with one of `prefixes`, in order; all of them if there is no prefix."""
    for prefix in prefixes:
        if not prefix or not any(p.name.startswith(prefix) for p in paths):
            names = ", ".join(p.stem for p in paths)
            raise ValueError(f"--only {prefix!r}: no notebook's name begins like this; there are {names}")
    return [p for p in paths if not prefixes or p.name.startswith(tuple(prefixes))]


def literal(text):
    """A number, True, False or a string; a plain word or path needs no quotes."""
    if not text:
        return ""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = text if re.fullmatch(r"[A-Za-z_./~][\w./~:@-]*", text) else None
    if not isinstance(value, bool | int | float | str) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise ValueError(
            f"{text!r} is not a number, True, False or a word; "
            "write a fraction as a decimal, or give the numerator where the name ends in it: eps_255=8"
        )
    return value


def parse_settings(items):
    """["n_images=64", ...] -> {"N_IMAGES": 64, ...}."""
    settings = {}
    for item in items:
        name, equals, text = item.partition("=")
        # papermill writes a name into the notebook as it stands, so one that is not a plain name would be run as code.
        if not equals or not name.isidentifier():
            raise ValueError(
                f"--set {item!r}: write NAME=VALUE, and the name in letters, digits and underscores"
            )
        if name.upper() in settings:
            raise ValueError(f"--set {item!r}: {name.upper()} is given twice")
        settings[name.upper()] = literal(text)
    return settings


def fits(value, default):
    """Whether `value` may stand in for `default`: the same type, or an int for a float; None is any type's default."""
    if default is None or type(value) is type(default):
        return True
    return type(value) is int and isinstance(default, float)


def check_settings(settings, defaults, profile):
    """Refuse a name that neither a notebook nor the profile has, and a value that one of them cannot take.

    defaults: {notebook: {NAME: default}}.
    """
    known = sorted({name for found in defaults.values() for name in found} - {"PROFILE", "SETTINGS"})
    fields = profile_fields(profile)
    for name, value in settings.items():
        if name not in known and name.lower() not in fields:
            raise ValueError(
                f"--set {name}: no selected notebook has this parameter and the profile no such field; "
                f"there are {', '.join(known)}, {', '.join(sorted(fields))}"
            )
        for path, found in defaults.items():
            if not fits(value, found.get(name)):
                raise ValueError(
                    f"--set {name}={value!r}: {path.name} has {found[name]!r} here, "
                    f"so this should be of type {type(found[name]).__name__}"
                )
    # A notebook's None stands for the profile's value, and the profile knows which values it can take.
    own = {name.lower(): value for name, value in settings.items() if name.lower() in fields}
    p = get_profile(profile, **own)
    for path, found in defaults.items():
        if {"ROW", "N_IMAGES"} <= found.keys():
            row, n = (settings.get(name, found[name]) for name in ("ROW", "N_IMAGES"))
            n = p.n_images if n is None else n
            if not 0 <= row < n:
                raise ValueError(f"--set ROW={row}: {path.name} looks at {n} images; expected 0 to {n - 1}")


def profile_fields(profile):
    """The names of the profile's fields that may be set."""
    return {field.name for field in dataclasses.fields(PROFILES[profile])} - {
        "name",
        "about",
        "tables",
        "rivals",
    }


def values_for(found, settings, profile):
    """What one notebook is started with: its own parameters by name, and the profile's other fields in its SETTINGS."""
    values = {"PROFILE": profile} | {name: settings[name] for name in found if name in settings}
    others = {
        name.lower(): value
        for name, value in settings.items()
        if name not in found and name.lower() in profile_fields(profile)
    }
    return values | ({"SETTINGS": others} if others and "SETTINGS" in found else {})


def check_finished(nb, error=None):
    """None if every cell of the executed notebook ran, else where it stopped and why.

    papermill's own word is not enough: it returns normally after `sys.exit(0)` in a cell, and after a kernel's death
    it has marked every cell as completed.
    """
    cells = [c for c in nb["cells"] if c["cell_type"] == "code" and source(c).strip()]
    record = nb["metadata"].get("papermill", {})
    all_ran = all(c["execution_count"] is not None for c in cells)
    if error is None and all_ran and record.get("exception") is None and record.get("end_time"):
        return None
    stopped, why = "", f"{type(error).__name__}: {error}" if error else "it stopped here"
    for number, cell in enumerate(cells, 1):
        if cell["metadata"].get("papermill", {}).get("start_time"):
            stopped = f"cell [{number}], `{source(cell).strip().splitlines()[0]}`: "
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                why = f"{output['ename']}: {output['evalue']}"
    return stopped + why.strip(" :\n").splitlines()[-1]


def run(path, target, values):
    """Run one notebook into `target`; returns None, or what stopped it."""
    import papermill

    target.unlink(missing_ok=True)
    error = None
    try:
        papermill.execute_notebook(
            path,
            target,
            values,
            kernel_name="python3",
            language="python",
            cwd=path.parent,
            progress_bar=False,
            extra_arguments=["--log-level=50"],
        )  # or each kernel warns that it speaks unencrypted, on this machine only
    except Exception as caught:  # a failing cell, a dead kernel, a full disk: all end in the same report
        error = caught
    try:
        return check_finished(read(target), error)
    except (OSError, ValueError) as unreadable:  # no file, or half of one
        return str(error or unreadable)


def show(path):
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def tables(out):
    """{table: (when it was written, in ns, and its bytes)} of the Markdown tables of the folder `out`."""
    found = {path: path.stat() for path in sorted((out / "tables").glob("*.md"))}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in found.items()}


def report(out, before):
    """Print every table of the folder `out` that is not as it was `before`, then what lies where."""
    written = [table for table, stamp in tables(out).items() if before.get(table) != stamp]
    for table in written:
        print(f"\n{table.stem}\n\n{table.read_text(encoding='utf-8').strip()}")
    print("\nWhere everything lies:" if written else "\nThis run wrote no table. Where everything lies:")
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        print(f"  {show(folder)}/  {sum(p.is_file() for p in folder.rglob('*'))} files")


def command_line():
    width = max(map(len, PROFILES))
    profiles = "\n".join(f"  {name:{width}}  {profile.about}" for name, profile in PROFILES.items())
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Run the notebooks in order into outputs/PROFILE.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"profiles:\n{profiles}\n\nLGAP_OUTPUTS names another folder than outputs/.",
    )
    parser.add_argument("profile", nargs="?", default="toy", help="one of those below; default: toy")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="02[,03]",
        help="only the notebooks whose names begin like this",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a notebook parameter or any field of the profile, as in n_images=64 or size=256",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the notebooks and their parameters, and stop"
    )
    return parser


def ready(profile, notebooks, settings):
    """Print what these notebooks still need at this profile, and say whether they can run."""
    from lgap_utils.files import CheckpointError
    from tools.doctor import can_run, examine

    try:
        checks = examine(profile, notebooks=notebooks, **settings)
    except (
        CheckpointError,
        ValueError,
    ) as error:  # of the lock file itself; of what the settings make of a table's profile
        sys.exit(f"run_all.sh: {error}")
    for check in checks:
        if check.state in ("missing", "to fetch"):
            print(f"{check.what}, {check.state}: {check.detail}", flush=True)
    return can_run(checks)


def lacking():
    """Why no notebook would find its packages, or None: the kernel `python3` may be another environment's."""
    needed = ("torch", "papermill", "ipykernel", "filelock")
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        return (
            f"{sys.executable} lacks {', '.join(absent)}; start ./run_all.sh without it, "
            "or run 'pip install -r requirements.txt' in it"
        )
    from jupyter_client import KernelManager
    from jupyter_client.kernelspec import NoSuchKernel

    try:
        manager = KernelManager(kernel_name="python3")
        python, spec = manager.format_kernel_cmd()[0], manager.kernel_spec.resource_dir
    except (NoSuchKernel, OSError, ValueError) as error:  # none, or one whose kernel.json is damaged
        return (
            f"the Jupyter kernel python3 cannot be read ({error}); "
            "run 'pip install --force-reinstall ipykernel' in this environment"
        )
    if python == sys.executable:
        return None
    where = "import os, sys; print(os.path.realpath(sys.prefix), *sys.version_info[:2])"
    try:
        answers = [
            subprocess.run([each, "-c", where], capture_output=True, text=True).stdout
            for each in (sys.executable, python)
        ]
    except OSError:
        answers = ["this one", "none"]
    if answers[0] == answers[1]:
        return None
    return (
        f"the Jupyter kernel python3 starts {python} and not {sys.executable}, which has the packages; "
        f"move {spec} away, or unset JUPYTER_PATH and JUPYTER_PREFER_ENV_PATH"
    )


def check_folder(out):
    """Refuse a folder that cannot take results, or holds a torn results.json, before anything is computed."""
    try:
        write_whole(out / ".room", bytes(1 << 20))  # notebooks and tables need no less
        (out / ".room").unlink()
    except OSError as error:
        raise OSError(
            error.errno,
            f"{show(out)} has no room for results ({os.strerror(error.errno)}); "
            "choose another folder with LGAP_OUTPUTS",
        ) from error
    from lgap_utils.results import check_results

    check_results(out)


def run_all(plan, out):
    """Run the notebooks of {path: parameters} into the folder `out`; the first that fails ends the process."""
    with folder_lock(out):
        check_folder(out)
        before = tables(out)
        (out / "notebooks").mkdir(exist_ok=True)
        for n, (path, values) in enumerate(plan.items(), 1):
            print(f"[{n}/{len(plan)}] {path.stem} ...", flush=True)
            target, start = out / "notebooks" / path.name, time.monotonic()
            problem = run(path, target, values)
            took = duration(time.monotonic() - start)
            if problem:
                sys.exit(
                    f"run_all.sh: {path.name} failed after {took}: {problem}\n"
                    f"What ran so far: {show(target)}; {GO_ON}"
                )
            print(f"    {took}", flush=True)
        report(out, before)


def main(argv=None, folder=ROOT / "notebooks"):
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        get_profile(args.profile)
        notebooks = sorted(folder.glob("[0-9]*.ipynb"))
        if not notebooks:
            raise ValueError(f"there are no notebooks in {show(folder)}")
        prefixes = [prefix for item in args.only for prefix in item.split(",")]
        defaults = {path: parameters(path) for path in select(notebooks, prefixes)}
        settings = parse_settings(args.set)
        check_settings(settings, defaults, args.profile)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for path, found in defaults.items():
            print(f"{path.stem}:  " + ", ".join(f"{name}={value!r}" for name, value in found.items()))
        return

    plan = {path: values_for(found, settings, args.profile) for path, found in defaults.items()}
    fields = {
        name.lower(): value
        for name, value in settings.items()
        if name.lower() in profile_fields(args.profile)
    }
    if problem := lacking():
        sys.exit(f"run_all.sh: {problem}")
    if not ready(args.profile, [path.stem for path in plan], fields):
        sys.exit(
            f"run_all.sh: profile {args.profile} cannot run here; `python -m lgap_utils doctor {args.profile}` says more"
        )
    outputs = output_root()
    if outputs.is_relative_to(PUBLISHED):
        sys.exit(
            f"run_all.sh: {show(PUBLISHED)} holds published results; choose another folder with LGAP_OUTPUTS"
        )
    os.environ["LGAP_OUTPUTS"] = str(outputs)  # absolute, because the kernels run in the notebooks' folder
    try:
        run_all(plan, outputs / args.profile)
    except BrokenPipeError:
        raise
    except ValueError as error:
        sys.exit(f"run_all.sh: {error}")
    except OSError as error:
        sentence = error.strerror if error.filename is None else None  # files.py's own, without its number
        sys.exit(f"run_all.sh: {sentence or error}")


def quietly(main):
    """Call `main`; where nobody reads what it prints any more, as in `... | head`, it ends without a word."""
    try:
        try:
            main()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again on its way out
        sys.exit(128 + signal.SIGPIPE)


def stopped(number, frame):
    logging.disable()  # what Jupyter has to say of a kernel's end, where that was asked for
    raise KeyboardInterrupt(number)


def command():
    """`main`; a signal ends it with a word on how to go on, and Jupyter shuts its kernel down on the way out."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stopped)
    try:
        quietly(main)
    except KeyboardInterrupt as stop:
        number = signal.Signals(*(stop.args or [signal.SIGINT]))
        print(f"run_all.sh: stopped by {number.name}; {GO_ON}", file=sys.stderr)
        sys.exit(128 + number)


if __name__ == "__main__":
    command()
