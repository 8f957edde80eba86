#!/usr/bin/env bash
# Runs the tests and the stored notebooks again, comparing the cells tagged nbval-check-output.
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
trap 'kill $notebooks 2>/dev/null || true; rm -rf "$outputs"' EXIT

# Both at once, each with half of the cores: much of either is work for a single one. The notebooks' report follows the tests'.
OMP_NUM_THREADS=$("$python" -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')
export OMP_NUM_THREADS
status=0 notebooks=
LGAP_OUTPUTS=$outputs "$python" -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 \
    --nbval-kernel-startup-timeout=120 --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks >"$outputs/report" 2>&1 &
notebooks=$!
"$python" -m pytest tests || status=$?
wait "$notebooks" || status=$?
cat "$outputs/report"
exit "$status"
