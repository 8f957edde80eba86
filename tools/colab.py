"""Installs what requirements.txt names and this Python lacks; called by the notebooks on Colab.

What is there stays as it is, torch and numpy above all: replacing them under a running kernel breaks it.
"""

import importlib.metadata
import pathlib
import re
import subprocess
import sys


def missing(text):
    """The lines of a requirements file whose package is not installed in any version."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    installed = {
        re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower()
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }
    return [
        line
        for line in lines
        if re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line).group()).lower() not in installed
    ]


if __name__ == "__main__":
    needed = missing((pathlib.Path(__file__).parent.parent / "requirements.txt").read_text())
    if needed:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *needed], check=True)
    print(f"{len(needed)} packages installed")
