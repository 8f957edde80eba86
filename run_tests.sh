#!/usr/bin/env bash
# Runs the tests, and the stored notebooks again, comparing the cells tagged nbval-check-output.
# Arguments go to pytest, and then the notebooks are left out:   ./run_tests.sh -k name
set -euo pipefail
script=${BASH_SOURCE[0]}
if [ -L "$script" ]; then script=$(readlink -f "$script"); fi
source "$(dirname "$script")/tools/setup_env.sh"
set_up

# torchattacks carries an old `robustbench` and asks for old packages: it gets a folder of its own, which the test of it puts on its path.
own_folder() {
    local folder
    folder=$("$python" -c 'import sys; print(sys.prefix)')/torchattacks-3.5.1
    if [ -d "$folder" ]; then return; fi
    rm -rf "$folder.part"
    if "$python" -m uv pip install --quiet --python "$python" --no-deps --target "$folder.part" torchattacks==3.5.1 ||
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder.part" torchattacks==3.5.1 ||
        uv pip install --quiet --python "$python" --no-deps --target "$folder.part" torchattacks==3.5.1; then
        mv "$folder.part" "$folder"
    else
        echo "torchattacks could not be installed into $folder, and the test of it will fail; the reason is above." >&2
    fi
}
own_folder

export HF_HUB_OFFLINE=1 TQDM_DISABLE=1
if [ $# -gt 0 ]; then
    exec "$python" -m pytest --override-ini testpaths=tests "$@"
fi

# A fresh folder: evaluation resumes from the rows it finds, and would compare old rows with themselves.
LGAP_OUTPUTS=$(mktemp -d)
trap 'rm -rf "$LGAP_OUTPUTS"' EXIT

# Two processes take a file at a time and have half of the cores each: in small batches a second thread gains next to nothing.
OMP_NUM_THREADS=$("$python" -c 'import os; print((os.cpu_count() + 1) // 2)')
export LGAP_OUTPUTS OMP_NUM_THREADS
# No notebook reaches another machine (tests/guard).
export PYTHONPATH=$root/tests/guard${PYTHONPATH:+:$PYTHONPATH} LGAP_TRESPASS=$LGAP_OUTPUTS/trespass
side_by_side() {
    "$python" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env \
        --nbval-cell-timeout=900 --nbval-kernel-startup-timeout=120 --nbval-sanitize-with tests/nbval_sanitize.cfg "$@"
}

# Notebook 03 comes before the others, which need the classifier that it fine-tunes; these from the last, as the long ones are there.
# A failing test does not hide a failing notebook.
status=0
side_by_side notebooks/03_*.ipynb tests || status=$?
side_by_side $(printf '%s\n' notebooks/*.ipynb | grep -v /03_ | sort -r) || status=$?
if [ -s "$LGAP_TRESPASS" ]; then
    echo "run_tests.sh: a notebook tried to reach $(sort -u "$LGAP_TRESPASS" | tr '\n' ' ')" >&2
    status=1
fi
exit "$status"
