#!/usr/bin/env bash
# Runs the tests, then the stored notebooks again, comparing the cells tagged nbval-check-output.
# Arguments go to pytest, and then the notebooks are left out:   ./run_tests.sh -k name
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/setup_env.sh"
set_up

export HF_HUB_OFFLINE=1 TQDM_DISABLE=1
if [ $# -gt 0 ]; then
    exec "$python" -m pytest --override-ini testpaths=tests "$@"
fi

# A fresh folder: evaluation resumes from the rows it finds, and would compare old rows with themselves.
outputs=$(mktemp -d)
trap 'rm -rf "$outputs"' EXIT

# One after the other: both have every core, and two that share them take longer. A failing test does not hide a failing notebook.
status=0
"$python" -m pytest tests || status=$?
LGAP_OUTPUTS=$outputs "$python" -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 \
    --nbval-kernel-startup-timeout=120 --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks || status=$?
exit "$status"
