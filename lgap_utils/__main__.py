"""`python -m lgap_utils ...`: the door to tools/cli.py, which lies in the checkout."""

import sys

from . import REPOSITORY
from .profiles import ROOT

if __name__ == "__main__":
    if not (ROOT / "tools" / "cli.py").is_file():
        sys.exit(f"python -m lgap_utils needs the checkout, not the package alone: git clone {REPOSITORY}")
    sys.path.insert(0, str(ROOT))
    from tools import cli, runner

    runner.quietly(cli.main)
