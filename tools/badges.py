"""Writes the repository's address where it is needed: python tools/badges.py takes it from the git remote.

It stands in lgap_utils/__init__.py, which everything else reads. As long as there is none, badges are hidden.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lgap_utils  # noqa: E402

NONE = "https://github.com/OWNER/lgap"  # no address yet
IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\([^)]*\)\n*|<!-- badge -->\n*")


def badge(path: str, repository: str | None = None) -> str:
    """The badge that opens this file of the repository on Colab; hidden where there is no address."""
    repository = repository or lgap_utils.REPOSITORY
    if repository == NONE:
        return "<!-- badge -->"
    place = repository.removeprefix("https://github.com/")
    return f"[![Open In Colab]({IMAGE})](https://colab.research.google.com/github/{place}/blob/main/{path})"


def address(remote: str) -> str:
    """https://github.com/OWNER/NAME of a git remote in any of its forms; Colab opens no others.

    Raises ValueError for the remote of another host.
    """
    found = re.fullmatch(
        r"(?:https?://|ssh://)?(?:[^@/]+@)?github\.com[:/]([\w.-]+)/([\w.-]+?)(?:\.git)?/?", remote
    )
    if not found:
        raise ValueError(f"the git remote {remote!r} is not one of github.com, and Colab opens no other")
    return f"https://github.com/{found[1]}/{found[2]}"


def with_badge(source: str, path: str, repository: str) -> str:
    """The first cell of a notebook with its badge on top, once."""
    return badge(path, repository) + "\n\n" + BADGE.sub("", source, count=1).lstrip("\n")


def rewritten(file: pathlib.Path, repository: str, root: pathlib.Path = ROOT) -> str:
    """The text of a file of the repository with this address in it."""
    old = file.read_text(encoding="utf-8")
    text = old.replace(lgap_utils.REPOSITORY, repository)
    if file.suffix != ".ipynb":
        return text
    notebook = json.loads(text)
    cell = notebook["cells"][0]
    source = with_badge("".join(cell["source"]), file.relative_to(root).as_posix(), repository)
    cell["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def files(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    named = ["lgap_utils/__init__.py", "CITATION.cff", "CONTRIBUTING.md", "README.md"]
    return [
        *(root / name for name in named),
        *sorted(root.glob("docs/*.md")),
        *sorted(root.glob("notebooks/*.ipynb")),
    ]


if __name__ == "__main__":
    command = ["git", "remote", "get-url", sys.argv[1] if len(sys.argv) > 1 else "origin"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        repository = address(answer.stdout.strip()) if answer.returncode == 0 else NONE
    except ValueError as error:
        sys.exit(str(error))
    for file in files():
        if (new := rewritten(file, repository)) != file.read_text(encoding="utf-8"):
            file.write_text(new, encoding="utf-8")
            print(f"{file.relative_to(ROOT)}: now {repository}")
    lgap_utils.REPOSITORY = repository
    from tools import texts

    texts.fill()
    print("no git remote: badges are hidden" if repository == NONE else f"badges lead to {repository}")
