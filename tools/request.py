"""What a command line asks for: a profile, its settings, and the notebooks with their parameters.

Only the standard library is needed, so that `run_all.sh --help` and `--list` answer on a bare Python.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lgap_utils.profiles import PROFILES, get_profile

Values = dict[str, Any]  # {NAME: value}


def add_profile(parser: argparse.ArgumentParser, what: str) -> None:
    """The arguments PROFILE and --set; what: that may be set."""
    parser.add_argument("profile", nargs="?", default="toy", help=f"{', '.join(PROFILES)}; default: toy")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=what)


def parameters(path: Path) -> Values:
    """{NAME: default} of the notebook's cell tagged `parameters`, which holds literal assignments only."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    try:
        (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        lines: list[Any] = ast.parse("".join(cell["source"])).body
        defaults = {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (AttributeError, SyntaxError, ValueError) as error:
        problem = "needs one cell tagged `parameters`, holding only NAME = literal"
        raise ValueError(f"{path.name} {problem}") from error
    if "PROFILE" not in defaults:
        raise ValueError(f"{path.name} has no parameter PROFILE")
    return defaults


def select(paths: list[Path], prefixes: Sequence[str]) -> list[Path]:
    """The notebooks whose names begin with one of `prefixes`, in order; all of them if there is no prefix."""
    if not paths:
        raise ValueError("there are no notebooks")
    for prefix in prefixes:
        if not prefix or not any(p.name.startswith(prefix) for p in paths):
            names = ", ".join(p.stem for p in paths)
            raise ValueError(f"--only {prefix!r}: no notebook's name begins like this; there are {names}")
    return [p for p in paths if not prefixes or p.name.startswith(tuple(prefixes))]


def literal(text: str) -> bool | int | float | str:
    """A number, True or False as Python writes them; anything else as the text that it is."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, bool | int | float | str) else text


def parse_settings(items: Sequence[str]) -> Values:
    """["n_images=64", ...] -> {"N_IMAGES": 64, ...}."""
    settings: Values = {}
    for item in items:
        name, equals, text = item.partition("=")
        # papermill writes a name into the notebook as it stands: one that is not plain would run as code
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {item!r}: write NAME=VALUE, NAME in letters, digits and underscores")
        if name.upper() in settings:
            raise ValueError(f"--set {item!r}: {name.upper()} is given twice")
        settings[name.upper()] = literal(text)
    return settings


def profile_fields(profile: str) -> set[str]:
    """The names of the profile's fields that may be set."""
    fields = {field.name for field in dataclasses.fields(PROFILES[profile])}
    return fields - {"name", "about", "tables", "rivals"}


def fields_of(settings: Values, profile: str) -> Values:
    """Those of the settings that are fields of the profile, by the names of the fields."""
    fields = profile_fields(profile)
    return {name.lower(): value for name, value in settings.items() if name.lower() in fields}


def check_settings(settings: Values, notebooks: dict[Path, Values], profile: str) -> None:
    """Raise ValueError for a name that nobody has, and for a value that a notebook or the profile refuses.

    notebooks: {path: {NAME: default}}, where a default of None stands for the profile's value.
    """
    known = {name for defaults in notebooks.values() for name in defaults} - {"PROFILE", "SETTINGS"}
    fields = profile_fields(profile)
    if unknown := [name for name in settings if name not in known and name.lower() not in fields]:
        problem = "no selected notebook has this parameter and the profile no such field"
        names = ", ".join(sorted(known) + sorted(fields))
        raise ValueError(f"--set {unknown[0]}: {problem}; there are {names}")
    n_images = get_profile(profile, **fields_of(settings, profile)).n_images
    for path, defaults in notebooks.items():
        given = {name: value for name, value in settings.items() if defaults.get(name) is not None}
        for name, value in given.items():
            kind = type(defaults[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                has = f"{path.name} has {defaults[name]!r} here"
                raise ValueError(f"--set {name}={value!r}: {has}, so this should be of type {kind.__name__}")
        row, n = (defaults | given).get("ROW", 0), settings.get("N_IMAGES", defaults.get("N_IMAGES"))
        n = n_images if n is None else n
        if not 0 <= row < n:
            raise ValueError(f"--set ROW={row}: {path.name} looks at {n} images; expected 0 to {n - 1}")


def values_for(defaults: Values, settings: Values, profile: str) -> Values:
    """What a notebook starts with: its own parameters by name, other fields of the profile in SETTINGS."""
    own = {name: value for name, value in settings.items() if name in defaults}
    others = fields_of({name: settings[name] for name in settings if name not in own}, profile)
    with_settings = {"SETTINGS": others} if others and "SETTINGS" in defaults else {}
    return {"PROFILE": profile} | own | with_settings


def settings_of(profile: str, items: Sequence[str]) -> Values:
    """--set's ["n_images=64", ...] as fields of the profile. Raises ValueError, with the choices."""
    get_profile(profile)
    settings = {name.lower(): value for name, value in parse_settings(items).items()}
    fields = profile_fields(profile)
    if unknown := sorted(set(settings) - fields):
        names = ", ".join(sorted(fields))
        raise ValueError(f"--set {unknown[0]}: the profile has no such field; there are {names}")
    get_profile(profile, **settings)
    return settings
