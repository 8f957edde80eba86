#!/usr/bin/env bash
# Runs every notebook, headless, into outputs/PROFILE:   ./run_all.sh [PROFILE] [--only 02] [--set n_images=64]
# Without a profile it is `toy`; ./run_all.sh --help lists the profiles. --plan says what the run will cost, and stops.
# The first call makes .venv.
set -euo pipefail
script=${BASH_SOURCE[0]}
if [ -L "$script" ]; then script=$(readlink -f "$script"); fi
source "$(dirname "$script")/tools/setup_env.sh"

case ${1:-} in
    -h | --help | --list) find_python ;;   # these need no package, hence no environment
    *) set_up ;;
esac
exec "$python" -m tools.runner "$@"
