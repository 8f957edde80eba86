"""`python -m lgap_utils doctor`: what a profile needs, what of it is missing, and what a run will cost."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap

from lgap_utils.files import CheckpointError
from lgap_utils.profiles import PROFILES, get_profile
from tools import doctor, runner


def command_line():
    parser = argparse.ArgumentParser(prog="python -m lgap_utils")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "doctor", help="what a profile needs, what of it is missing, and what a run will cost"
    )
    command.add_argument(
        "profile", nargs="?", default="toy", help=f"one of {', '.join(PROFILES)}; default: toy"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the profile, as in n_images=64",
    )
    command.add_argument(
        "--deep", action="store_true", help="check the digests of models and read every image, too"
    )
    return parser


def settings_of(profile, items):
    """--set's ["n_images=64", ...] as fields of the profile. Raises ValueError, with the choices."""
    get_profile(profile)
    settings = {name.lower(): value for name, value in runner.parse_settings(items).items()}
    fields = runner.profile_fields(profile)
    if unknown := sorted(set(settings) - fields):
        raise ValueError(
            f"--set {unknown[0]}: the profile has no such field; there are {', '.join(sorted(fields))}"
        )
    get_profile(profile, **settings)
    return settings


def show(checks, width):
    """The checks as a table; a command that does not fit goes on after a backslash, so that it can be pasted."""
    first = max(len(check.what) for check in checks)
    for check in checks:
        lines = []
        for line in check.detail.split("\n"):
            parts = textwrap.wrap(
                line, max(40, width - first - 14), break_long_words=False, break_on_hyphens=False
            )
            lines += [part + " \\" for part in parts[:-1]] + parts[-1:] if line.startswith("hf ") else parts
        head = f"{check.what:{first}}  {check.state:8}  "
        print(head + f"\n{' ' * len(head)}".join(lines))


def show_costs(name, settings):
    """What each notebook asks for, and how long that takes here."""
    rows, prices = [], {}
    for notebook, (p, asked) in doctor.costs(name, **settings).items():
        key = (
            p.captioner,
            p.diffusion,
            p.size,
            p.strength,
            p.num_inference_steps,
        )  # what else there is, no table changes
        if key not in prices:
            prices[key] = doctor.price(p)
        rows.append((notebook, asked, doctor.seconds(asked, prices[key])))
    columns = {"captions": 12, "forward only": 18, "with gradient": 15, "calls": 18}
    print(
        f"\n{'at most':30}{'captions':>12}{'purifications':>18}{'with gradient':>15}{'denoiser calls':>18}{'here':>10}"
    )
    for notebook, asked, took in rows:
        print(
            f"{notebook:30}"
            + "".join(f"{asked[name]:{width},}" for name, width in columns.items())
            + f"{duration(took):>10}"
        )
    in_all = None if any(took is None for *_, took in rows) else sum(took for *_, took in rows)
    print(f"{'in all':30}{duration(in_all):>73}")
    print("\n".join(dict.fromkeys(how for *_, how in prices.values())))
    print(
        "A gradient counts as three passes through the denoiser; what the classifier does alone comes on top."
    )


def duration(seconds):
    return (
        "-" if seconds is None else runner.duration(seconds) if seconds < 7200 else f"{seconds / 3600:.1f} h"
    )


def main(argv=None):
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        settings = settings_of(args.profile, args.set)
    except ValueError as error:
        parser.error(str(error))
    try:
        checks = doctor.examine(args.profile, args.deep, **settings)
    except (
        CheckpointError,
        ValueError,
    ) as error:  # of the lock file itself, or of a field that one table's settings do not go with
        sys.exit(str(error))
    show(checks, shutil.get_terminal_size((140, 24)).columns)
    show_costs(args.profile, settings)
    ready = doctor.can_run(checks)
    print(f"\nprofile {args.profile} {'can' if ready else 'cannot'} run here")
    sys.exit(not ready)


if __name__ == "__main__":
    runner.quietly(main)
