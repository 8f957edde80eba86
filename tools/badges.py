"""Writes the repository's address, named once in lgap_utils/__init__.py, in every badge and notebook."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lgap_utils import REPOSITORY  # noqa: E402

if __name__ == "__main__":
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    for file in [ROOT / "README.md", ROOT / "CITATION.cff", *sorted((ROOT / "notebooks").glob("*.ipynb"))]:
        old = file.read_text()
        new = re.sub(r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+", rf"\g<1>{owner_and_name}", old)
        new = re.sub(r"https://github\.com/[\w.-]+/lgap\b", REPOSITORY, new)
        if new != old:
            file.write_text(new)
            print(f"{file.relative_to(ROOT)}: now {REPOSITORY}")
