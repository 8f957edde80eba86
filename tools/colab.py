"""Installs what the notebooks need and this Python lacks, by name; called by the notebooks on Colab.

What is there stays as it is, torch and numpy above all: replacing them under a running kernel breaks it.
Where it is older than pyproject.toml allows, the run ends with a sentence.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).resolve().parent.parent
# One resolution, so that all of it is replaced where one part is missing or too old ...
TOGETHER = ("diffusers", "transformers", "tokenizers", "huggingface-hub", "safetensors")
# ... and what is installed where it is missing.
ALONE = ("robustbench", "pyautoattack", "torchdiffeq", "geotorch", "timm")


def installed(name: str) -> str | None:
    """The version of a package that is there, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins(text: str) -> dict[str, str]:
    """{package: its line} of a requirements file."""
    found = {}
    for line in map(str.strip, text.splitlines()):
        if match := re.match(r"([A-Za-z0-9][\w.-]*)==", line):
            found[match[1].lower().replace("_", "-")] = line
    return found


def unfit() -> dict[str, str]:
    """{package: "torch 2.4, expected >=2.6"} for each that pyproject.toml refuses."""
    found = {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        version = installed(requirement.name)
        if version and not requirement.specifier.contains(Version(version), prereleases=True):
            name = requirement.name.replace("_", "-")
            found[name] = f"{name} {version}, expected {requirement.specifier}"
    return found


def wanted() -> list[str]:
    """The lines of requirements.txt that are to be installed, of at most ten packages."""
    refused, absent = unfit(), [name for name in (*TOGETHER, *ALONE) if installed(name) is None]
    names = [name for name in ALONE if name in absent or name in refused]
    if any(name in absent or name in refused for name in TOGETHER):
        names = [*TOGETHER, *names]
    lines = pins((ROOT / "requirements.txt").read_text())
    return [lines[name] for name in names]


if __name__ == "__main__":
    needed = wanted()
    if needed:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *needed], check=True)
    importlib.invalidate_caches()
    if refused := unfit():
        sys.exit(f"this Python has {'; '.join(refused.values())}: take a newer image of the runtime")
    print(f"{len(needed)} packages installed")
