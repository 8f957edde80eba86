"""`python -m lgap_utils ...`: `doctor` says what a profile needs and costs, `purify` takes a photo."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import textwrap

from lgap_utils.files import CheckpointError, folder_lock
from lgap_utils.profiles import PROFILES, ROOT, get_profile, output_root
from tools import doctor, purify
from tools.request import add_profile, parameters, settings_of, values_for


def show(checks: list[doctor.Check], width: int) -> None:
    """Print a table. A command that does not fit goes on after a backslash, so that it can be pasted."""
    first = max(len(check.what) for check in checks)
    for check in checks:
        lines = []
        for line in check.detail.split("\n"):
            room = max(40, width - first - 14)
            parts = textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False)
            if line.startswith("hf "):
                parts = [part + " \\" for part in parts[:-1]] + parts[-1:]
            lines += parts
        head = f"{check.what:{first}}  {check.state:8}  "
        print(head + f"\n{' ' * len(head)}".join(lines))


def make_report(parser: argparse.ArgumentParser, profile: str, published: bool) -> None:
    from tools import report
    from tools.runner import PUBLISHED
    from tools.runner import show as show_path

    try:
        get_profile(profile)
        folder = (PUBLISHED if published else output_root()) / profile
        with folder_lock(folder) if folder.is_dir() else contextlib.nullcontext():
            print(show_path(report.build(folder, profile, published)))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def show_tables(parser: argparse.ArgumentParser, folder: str) -> None:
    """Print the tables of kept rows as Markdown."""
    from lgap_utils import kept

    try:
        for title, table in kept.tables_of(folder).items():
            print(f"## {title}\n\n{table.to_markdown()}\n")
    except (OSError, TypeError, ValueError) as error:  # TypeError: an attack of another version
        parser.error(str(error))


def main(argv: list[str] | None = None) -> None:
    about = "what a profile needs, what of it is missing, and what a run will cost"
    parser = argparse.ArgumentParser(prog="python -m lgap_utils")
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("report", help="make the page of a run again, from its rows")
    page.add_argument("profile", nargs="?", default="toy", help=f"{', '.join(PROFILES)}; default: toy")
    without = "of outputs/published, without a data set's images"
    page.add_argument("--published", action="store_true", help=without)
    again = commands.add_parser("tables", help="the tables of kept rows, without the models that made them")
    again.add_argument("folder", help="rows of attacks, e.g. outputs/published/small/rows/table1_and_3")
    photo = commands.add_parser("purify", help="a photo, attacked if asked for, and purified, as a picture")
    purify.add_arguments(photo)
    command = commands.add_parser("doctor", help=about)
    add_profile(command, "a field of the profile, as in n_images=64")
    deep = "check the digests of models and read every image, too"
    command.add_argument("--deep", action="store_true", help=deep)
    args = parser.parse_args(argv)
    if args.command == "report":
        return make_report(page, args.profile, args.published)
    if args.command == "tables":
        return show_tables(again, args.folder)
    if args.command == "purify":
        return purify.run(photo, args)
    try:
        settings = settings_of(args.profile, args.set)
    except ValueError as error:
        parser.error(str(error))
    try:
        checks = doctor.examine(args.profile, args.deep, **settings)
    except (CheckpointError, ValueError) as error:  # of the lock file, or of a table's profile
        sys.exit(str(error))
    show(checks, shutil.get_terminal_size((140, 24)).columns)
    plan = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        upper = {name.upper(): value for name, value in settings.items()}
        plan[path] = values_for(parameters(path), upper, args.profile)
    from tools.cost import print_costs  # after the checks, as it loads everything

    print_costs(plan)
    ready = doctor.can_run(checks)
    print(f"\nprofile {args.profile} {'can' if ready else 'cannot'} run here")
    sys.exit(not ready)
