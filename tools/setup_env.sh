# Sourced by run_all.sh and run_tests.sh: finds a Python that has what requirements.txt lists.
#
# After `set_up`, the working directory is the checkout and $python is an interpreter of the active conda or virtual
# environment, or else of .venv, which is made on the first call with this checkout installed in it (editable), and
# brought up to date when requirements.txt or pyproject.toml changes or the checkout was moved.
# A .venv that somebody else made is used as an active environment is: nothing in it is changed. It need not have
# this package installed, as scripts and notebooks find the checkout by themselves.

# Child programs that handle Ctrl-C themselves return as if they had failed, and the script would go on.
trap 'exit 130' INT

caller=$PWD
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root=$PWD

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

# Starts it rather than looking it up: version managers leave names on PATH that fail when they are run.
is_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    for python in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if is_python "$python"; then return; fi
    done
    die "no Python 3.11 or newer was found; install one and run this again."
}

# Prints the dependencies in pyproject.toml that $python does not have, or has in a version that does not fit.
unmet() {
    "$python" - <<'EOP'
import tomllib
from importlib.metadata import version


def is_met(dependency):
    try:
        from packaging.requirements import Requirement
        need = Requirement(dependency)
        return need.specifier.contains(version(need.name), prereleases=True)
    except ImportError:
        return False


with open("pyproject.toml", "rb") as f:
    project = tomllib.load(f)["project"]
dependencies = project["dependencies"] + project["optional-dependencies"]["test"]
print(*[d for d in dependencies if not is_met(d)], sep=", ")
EOP
}

# use_given FOLDER NAME REMEDY: an environment that was not made here is taken as it is, or what is amiss is said.
use_given() {
    local missing
    python=$1/bin/python
    is_python "$python" || die "$2 has no working Python 3.11 or newer; $3."
    missing=$(unmet) || die "the packages of $2 could not be listed."
    [ -z "$missing" ] || die "$2 lacks $missing; run 'uv pip install -r requirements.txt' or, \
where it has pip, 'pip install -r requirements.txt' in it, or $3."
}

# The packages of requirements.txt, then this checkout itself, built with what is then there: no second download.
# uv takes seconds where pip takes minutes; pip is the second choice because it reads the user's pip settings.
install_requirements() {
    local itself=(--quiet --no-deps --no-build-isolation --editable .)
    if "$python" -m pip install --quiet --disable-pip-version-check uv &&
        "$python" -m uv pip install --python "$python" -r requirements.txt &&
        "$python" -m uv pip install --python "$python" "${itself[@]}"; then return; fi
    echo "uv did not succeed; the same with pip${UV_TORCH_BACKEND:+, which ignores UV_TORCH_BACKEND=$UV_TORCH_BACKEND}:" >&2
    "$python" -m pip install --disable-pip-version-check -r requirements.txt &&
        "$python" -m pip install --disable-pip-version-check "${itself[@]}"
}

# True of anything but an empty folder: what somebody else put there must not be lost.
is_occupied() {
    [ -L "$1" ] || { [ -e "$1" ] && [ -n "$(ls -A "$1")" ]; }
}

use_own() {
    local stamp=.venv/requirements.sha256 wanted have=""
    find_python
    # Two first calls at once must not build the same folder: the second waits here for the first, where files can
    # be locked. The lock ends with the descriptor, so a killed call leaves none behind.
    exec 9<requirements.txt
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null || true
    wanted=$("$python" - "$root" <<'EOP'
import hashlib, os, sys

digest = hashlib.sha256(os.fsencode(sys.argv[1]))   # a copy of a checkout must not import from the first one
for name in ("requirements.txt", "pyproject.toml"):
    with open(name, "rb") as f:
        digest.update(f.read())
print(digest.hexdigest())
EOP
)
    # The stamp says that .venv was made here. Without it nothing below may touch what is there.
    if [ -f "$stamp" ]; then
        have=$(<"$stamp")
    elif is_occupied .venv; then
        exec 9<&-
        use_given "$root/.venv" "$root/.venv, which was not made here," "move it away and another is made in its place"
        return
    fi
    if [ "$have" = unfinished ] || ! is_python .venv/bin/python; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$python cannot make virtual environments; on Debian or Ubuntu, 'apt install python3-venv' adds that."
        have=""
        if is_occupied .venv; then rm -rf .venv; fi
        mkdir -p .venv
        echo unfinished >"$stamp"
        "$python" -m venv .venv || die ".venv could not be made; the reason is above."
    fi
    python=$root/.venv/bin/python
    if [ "$have" != "$wanted" ]; then
        echo "Bringing this package and those of requirements.txt into .venv (several GB the first time)." >&2
        echo unfinished >"$stamp"
        if ! install_requirements; then
            # An update that could not be had must not cost the environment that was there before.
            if [ -n "$have" ]; then echo "$have" >"$stamp"; fi
            die "the packages could not be installed; the reason is above."
        fi
        echo "$wanted" >"$stamp"
    fi
    exec 9<&-
}

set_up() {
    local name value active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    # The notebooks run in their own folder, where a path relative to the caller's would mean another place.
    for name in LGAP_DATA LGAP_OUTPUTS LGAP_CACHE LGAP_LOCK; do
        value=${!name:-}
        case $value in
            "" | /* | "~"*) ;;
            *) export "$name=$caller/$value" ;;
        esac
    done
    export HF_HUB_DISABLE_TELEMETRY=1
    # Where it is set, nothing is kept compiled, and each notebook takes twice as long to start.
    unset PYTHONDONTWRITEBYTECODE
    if [ -n "$active" ] && ! [ "$active" -ef .venv ]; then
        use_given "$active" "the active environment $active" "deactivate it and .venv is used instead"
    else
        use_own
    fi
}
