"""Puts what a run measured where readers find it:   python tools/publish.py PROFILE

Copies tables, charts, results.json, the rows of Tables 1 to 4 and the fine-tuned classifier from
outputs/PROFILE (or $LGAP_OUTPUTS) to outputs/published/PROFILE, except for what .gitignore names, and fills
the README and docs/ from them (tools/texts.py). No run reads or writes there.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lgap_utils.files import folder_lock  # noqa: E402
from lgap_utils.profiles import PROFILES, output_root  # noqa: E402
from tools import texts  # noqa: E402

RESULTS = (
    *("results.json", "tables/*.csv", "tables/*.md", "tables/*.tex", "figures/*.png"),
    *("rows/table*/**/*.parquet", "rows/table*/**/config.json"),
    *("classifier_*/*.json", "classifier_*/*.safetensors", "classifier_*/SHA256SUMS"),
)


def ignored(root: pathlib.Path, files: Iterable[pathlib.Path]) -> set[pathlib.Path]:
    """Those of `files`, paths below `root`, that .gitignore names. Raises RuntimeError outside of git."""
    command = ["git", "check-ignore", "--no-index", "--stdin", "-z"]
    names = "\0".join(map(str, files))
    answer = subprocess.run(command, cwd=root, input=names, capture_output=True, text=True)
    if answer.returncode not in (0, 1):
        raise RuntimeError(f"publishing needs a git checkout, as .gitignore decides: {answer.stderr.strip()}")
    return {pathlib.Path(name) for name in answer.stdout.split("\0") if name}


def publish(source: pathlib.Path, root: pathlib.Path, profile: str) -> int:
    """Copy the results in `source` to outputs/published/PROFILE below `root`; returns the number of files."""
    json.loads((source / "results.json").read_text())  # a torn one is not published
    target = pathlib.Path("outputs", "published", profile)
    files = {target / file.relative_to(source): file for pattern in RESULTS for file in source.glob(pattern)}
    for file in ignored(root, files):
        del files[file]
    # Shards of an earlier run would be read together with those of this one.
    for folder in {file.parent for file in files if file.suffix == ".parquet"}:
        shutil.rmtree(root / folder, ignore_errors=True)
    for file, measured in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(measured, root / file)
    if len(times := texts.took(source / "notebooks").splitlines()) > 1:
        (root / target / "tables" / "00_times.csv").write_text("\n".join(times) + "\n")
    texts.fill(root)
    return len(files)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PROFILES:
        sys.exit(f"usage: python tools/publish.py PROFILE, which is one of {', '.join(PROFILES)}")
    measured = output_root() / sys.argv[1]
    if not (measured / "results.json").exists():
        sys.exit(f"{measured} holds no results.json: ./run_all.sh {sys.argv[1]} makes one")
    try:
        with folder_lock(measured):
            print(f"{publish(measured, ROOT, sys.argv[1])} files to outputs/published/{sys.argv[1]}")
            page = pathlib.Path("outputs", "published", sys.argv[1], "index.html")
            if not ignored(ROOT, [page]):
                from tools import report

                print(report.publish(measured, ROOT / page.parent, sys.argv[1]).relative_to(ROOT))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"tools/publish.py: {error}")
