"""`python -m lgap_utils ...`: the door to tools/cli.py."""

import sys

from .profiles import ROOT

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tools import cli, runner

    runner.quietly(cli.main)
