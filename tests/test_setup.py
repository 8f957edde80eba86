"""What the shell scripts do to a machine: .venv, links, line ends. In copies, and nothing is downloaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_project import ROOT, call

from lgap_utils import files

SCRIPTS = ["run_all.sh", "run_tests.sh", "tools/setup_env.sh", "requirements.txt", "pyproject.toml"]
# Stands for pip and for uv: writes down its arguments, and fails where the test wants it to.
STUB = """import os, pathlib, sys
with open(os.environ["LOG"], "a") as log:
    print("{name}", *sys.argv[1:], file=log)
sys.exit("{name}" in os.environ.get("FAILING", ""))
"""
# The true venv less its pip, whose unpacking takes seconds.
VENV = """import sys

sys.path.pop(sys.path.index(sys.modules["venv"].__path__[0].removesuffix("/venv")))
del sys.modules["venv"]
import venv
venv.create(sys.argv[1])
"""
NO_LOCKS = """import fcntl

def flock(*_):
    raise OSError(37, "No locks available")

fcntl.flock = flock
"""


def copy_scripts(checkout):
    """The scripts in `checkout`, with a runner that only says which Python runs it."""
    for name in SCRIPTS:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "tools" / "runner.py").write_text("import sys\nprint('run by', sys.prefix, *sys.argv[1:])\n")
    return checkout


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a path with a space."""
    return copy_scripts(tmp_path / "a check out")


@pytest.fixture
def run(checkout, tmp_path):
    """Call run_all.sh there; the result has what the stubs of pip and uv were asked for, as `asked`."""
    for name, text in {"pip": STUB.format(name="pip"), "uv": STUB.format(name="uv"), "venv": VENV}.items():
        (tmp_path / "stubs" / name).mkdir(parents=True)
        (tmp_path / "stubs" / name / "__init__.py").write_text("")
        (tmp_path / "stubs" / name / "__main__.py").write_text(text)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    log = tmp_path / "asked"

    def run(*arguments, script=None, **environment):
        log.write_text("")
        done = call(
            script or checkout / "run_all.sh",
            *arguments,
            LOG=str(log),
            PYTHONPATH=str(tmp_path / "stubs"),
            PATH=f"{python.parent}:{os.environ['PATH']}",
            PIP_NO_INDEX="1",
            UV_OFFLINE="1",
            **environment,
        )
        done.asked = log.read_text().splitlines()
        return done

    return run


def make_venv(folder):
    """As `uv venv` makes it: a Python that works, no pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.lstat().st_mtime_ns) for p in folder.rglob("*"))


ITSELF = "--quiet --no-deps --no-build-isolation --editable ."


def test_the_first_call_makes_an_environment_and_the_second_uses_it(checkout, run):
    (checkout / ".venv").mkdir()  # as a volume that is mounted there
    uv = f"uv pip install --python {checkout}/.venv/bin/python"
    first = [
        "pip install --quiet --disable-pip-version-check uv",
        f"{uv} -r requirements.txt",
        f"{uv} {ITSELF}",
    ]
    for asked in (first, []):
        done = run("toy", "--only", "02")
        assert done.stdout == f"run by {checkout}/.venv toy --only 02\n", done.stderr
        assert done.asked == asked


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_an_environment_is_brought_up_to_date_when_a_list_of_packages_changes(checkout, run, name):
    assert len(run().asked) == 3
    (checkout / ".venv" / "extra").write_text("mine")
    with open(checkout / name, "a") as file:
        file.write("# changed\n")
    assert len(run().asked) == 3 and (checkout / ".venv" / "extra").exists()
    assert run().asked == []


def test_a_copied_checkout_installs_itself_and_not_the_first_one(checkout, run, tmp_path):
    """A .venv that was copied with its checkout would import the package of the first one."""
    assert len(run().asked) == 3
    copied = tmp_path / "copied"
    shutil.copytree(checkout, copied, symlinks=True)
    done = run(script=copied / "run_all.sh")
    assert done.asked[-1] == f"uv pip install --python {copied}/.venv/bin/python {ITSELF}"
    assert run(script=copied / "run_all.sh").asked == []


@pytest.mark.parametrize("times", [1, 2])
def test_an_environment_that_was_not_made_here_is_named_and_left_alone(checkout, run, times):
    make_venv(checkout / ".venv")
    before = listing(checkout / ".venv")
    for _ in range(times):
        done = run()
    assert done.returncode == 1 and done.asked == [] and done.stdout == ""
    assert f"{checkout}/.venv, which was not made here, lacks torch" in done.stderr
    assert "uv pip install -r requirements.txt" in done.stderr and done.stderr.count("\n") == 1
    assert listing(checkout / ".venv") == before


def test_an_environment_that_was_not_made_here_and_has_the_packages_is_used(checkout, run):
    make_venv(checkout / ".venv")
    (checkout / "pyproject.toml").write_text(
        "[project]\ndependencies = []\noptional-dependencies.test = []\n"
    )
    before = listing(checkout / ".venv")
    done = run("toy")
    assert done.stdout == f"run by {checkout}/.venv toy\n" and done.asked == [] and done.stderr == ""
    assert listing(checkout / ".venv") == before


def as_a_file(venv):
    venv.write_text("mine")


def as_another_systems(venv):
    (venv / "Scripts").mkdir(parents=True)
    (venv / "Scripts" / "python.exe").write_text("mine")


def as_a_lost_link(venv):
    venv.symlink_to("/nonexistent")


@pytest.mark.parametrize("make", [as_a_file, as_another_systems, as_a_lost_link])
def test_what_else_is_called_venv_is_named_and_left_alone(checkout, run, make):
    make(checkout / ".venv")
    before = listing(checkout)
    done = run()
    assert done.returncode == 1 and done.stdout == "" and done.asked == []
    assert done.stderr == (
        f"run_all.sh: {checkout}/.venv, which was not made here, has no working Python 3.11 or newer; "
        "move it away and another is made in its place.\n"
    )
    assert listing(checkout) == before


@pytest.mark.parametrize("stamp", ["unfinished", "0" * 64, ""])
def test_a_half_made_or_broken_environment_of_ours_is_made_anew(checkout, run, stamp):
    (checkout / ".venv" / "lib").mkdir(parents=True)
    (checkout / ".venv" / "lib" / "torn").write_text("")
    (checkout / ".venv" / "requirements.sha256").write_text(stamp)
    done = run()
    assert done.stdout == f"run by {checkout}/.venv\n", done.stderr
    assert len(done.asked) == 3 and not (checkout / ".venv" / "lib" / "torn").exists()


def test_an_update_that_fails_costs_nothing_and_is_tried_again(checkout, run):
    make_venv(checkout / ".venv")
    stamp = checkout / ".venv" / "requirements.sha256"
    stamp.write_text("0" * 64 + "\n")
    (checkout / ".venv" / "extra").write_text("mine")
    done = run(FAILING="uv pip", UV_TORCH_BACKEND="cpu")
    assert done.returncode == 1 and done.stderr.endswith(
        "the packages could not be installed; the reason is above.\n"
    )
    assert stamp.read_text() == "0" * 64 + "\n" and (checkout / ".venv" / "extra").exists()
    assert run().returncode == 0 and (checkout / ".venv" / "extra").exists()
    assert run().asked == []


@pytest.mark.parametrize(
    "backend, said",
    [
        ({}, "the same with pip:"),
        ({"UV_TORCH_BACKEND": "cpu"}, "the same with pip, which ignores UV_TORCH_BACKEND=cpu:"),
    ],
)
def test_where_uv_fails_pip_takes_over_and_says_what_it_ignores(checkout, run, backend, said):
    make_venv(checkout / ".venv")
    (checkout / ".venv" / "requirements.sha256").write_text("0" * 64)
    done = run(FAILING="uv", **backend)
    assert said in done.stderr.splitlines()[-1] and done.returncode == 0
    pip = "pip install --disable-pip-version-check"
    assert done.asked[-2:] == [f"{pip} -r requirements.txt", f"{pip} {ITSELF}"]


def test_the_package_installs_from_the_checkout_without_a_download(tmp_path):
    """As setup_env.sh installs it, but for its checkout, which the command misses in one sentence."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "site"]
    source = tmp_path / "checkout"
    shutil.copytree(ROOT / "lgap_utils", source / "lgap_utils")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    pytest.importorskip("pip")
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source], check=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-P", "-m", "lgap_utils", "doctor", "toy"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "python -m lgap_utils needs the checkout" in done.stderr and "git clone https://" in done.stderr


def test_a_file_system_without_locks_stops_nothing(checkout, run, tmp_path):
    (tmp_path / "stubs" / "sitecustomize.py").write_text(NO_LOCKS)
    make_venv(checkout / ".venv")
    (checkout / ".venv" / "requirements.sha256").write_text("0" * 64)
    done = run()
    assert done.stdout == f"run by {checkout}/.venv\n" and "Errno" not in done.stderr


@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh"])
def test_a_link_to_a_script_and_cdpath_lead_to_the_checkout(checkout, run, tmp_path, script):
    make_venv(checkout / ".venv")
    (checkout / ".venv" / "broken").write_text("")
    (tmp_path / "elsewhere" / "tools").mkdir(parents=True)
    (tmp_path / "elsewhere" / script).symlink_to(checkout / script)
    done = run(script=tmp_path / "elsewhere" / script, CDPATH=str(tmp_path / "elsewhere"))
    assert f"{script}: {checkout}/.venv, which was not made here, lacks" in done.stderr


def git(*arguments, **options):
    return subprocess.run(["git", *arguments], capture_output=True, text=True, **options)


def test_every_file_of_a_clone_has_its_own_bytes_whatever_git_does_to_line_ends(tmp_path):
    if git("rev-parse", "HEAD", cwd=ROOT).returncode:
        pytest.skip("not a git checkout")
    for value, name in (("false", "plain"), ("true", "converted")):
        done = git("-c", f"core.autocrlf={value}", "clone", "--quiet", "--shared", ROOT, tmp_path / name)
        assert done.returncode == 0, done.stderr
        git("config", "core.autocrlf", value, cwd=tmp_path / name)
    converted = tmp_path / "converted"
    names = git("ls-files", "-z", cwd=converted).stdout.split("\0")[:-1]
    assert names and not [
        n for n in names if (converted / n).read_bytes() != (tmp_path / "plain" / n).read_bytes()
    ]
    assert git("status", "--porcelain", cwd=converted).stdout == ""
    assert files.verify(converted / "checkpoints" / "toy")
    done = call(converted / "run_all.sh", "--list")
    assert done.returncode == 0 and "toy" in done.stdout, done.stderr
