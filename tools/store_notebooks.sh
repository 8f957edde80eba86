#!/usr/bin/env bash
# Runs every notebook at profile toy in a fresh output folder and stores it with its outputs, cleaned of timings.
# To be called after a notebook or anything below it changed; the stored results are what run_tests.sh compares with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
set_up

LGAP_OUTPUTS=$(mktemp -d)
# One thread, as run_tests.sh has on two cores: with another number fine-tuning rounds to other weights.
export LGAP_OUTPUTS TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
trap 'rm -rf "$LGAP_OUTPUTS"' EXIT
for notebook in notebooks/[0-9]*.ipynb; do
    echo "$notebook"
    "$python" -m jupyter execute --inplace --kernel_name=python3 "$notebook"
    "$python" -m nbstripout --keep-output --keep-count \
        --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info" "$notebook"
    "$python" -m tools.notebooks "$notebook"
done
# The tables that the README shows come from the same run.
"$python" tools/publish.py toy
