"""Installs what requirements.txt names and this Python lacks; called by the notebooks on Colab.

What is there stays as it is, torch and numpy above all: replacing them under a running kernel breaks it.
"""

import importlib.metadata
import pathlib
import re
import subprocess
import sys


def plain(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing(text: str) -> list[str]:
    """The lines of a requirements file whose package is not installed in any version."""
    names = [distribution.metadata["Name"] for distribution in importlib.metadata.distributions()]
    installed = {plain(name) for name in names if name}
    lines = []
    for line in map(str.strip, text.splitlines()):
        name = re.match(r"[A-Za-z0-9][\w.-]*", line)
        if name and plain(name[0]) not in installed:
            lines.append(line)
    return lines


if __name__ == "__main__":
    needed = missing((pathlib.Path(__file__).parent.parent / "requirements.txt").read_text())
    if needed:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *needed], check=True)
    print(f"{len(needed)} packages installed")
