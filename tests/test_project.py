"""The files around the code: one set of requirements behind every door, nothing unsafe in any source."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ABSTRACT = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]


def test_requirements_are_exact_versions_from_no_particular_host():
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) and not pin.url for pin in PINS)


def test_the_requirements_say_how_they_are_compiled():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    command = f"uv pip compile --universal --python-version {oldest} --extra test pyproject.toml"
    assert f"{command} -o requirements.txt" in (ROOT / "requirements.txt").read_text()


def test_the_wheels_of_cuda_are_left_to_torch():
    # A build of torch for the CPU, which UV_TORCH_BACKEND=cpu asks for, needs none of them.
    assert not [pin.name for pin in PINS if re.match(r"nvidia|cu(da|pti|\d)|triton|pytorch-triton", pin.name)]


@pytest.mark.parametrize("dependency", ABSTRACT)
def test_every_dependency_is_pinned_to_a_version_that_fits(dependency):
    need = Requirement(dependency)
    pinned = [
        str(p.specifier).removeprefix("==")
        for p in PINS
        if canonicalize_name(p.name) == canonicalize_name(need.name)
    ]
    assert pinned and all(need.specifier.contains(version, prereleases=True) for version in pinned)


def test_conda_and_pip_bring_in_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt", "-e ."]} and "pip" in conda
    (python,) = [d.removeprefix("python=") for d in conda if d.startswith("python=")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(Version(python))


# Written so that this file does not hold what it looks for.
UNSAFE = {
    "runs code from a model's repository": "trust_" + r"remote_code[\"']?\s*[=:](?!\s*False\b)",
    "unpickles a checkpoint": r"weights_only\s*=\s*False",
    "listens on every interface": r"(?<![\d.])0\.0\.0\.0",
    "opens Jupyter without a token": r"token\s*=\s*(?:''|\"\")",
}


def sources():
    """(name, text) of every source that git knows or would add; of a notebook, only its cells' sources."""
    patterns = ["*.py", "*.sh", "*.ipynb", "*.yml", "*.yaml"]
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.splitlines()):
        if (ROOT / name).is_file():
            text = (ROOT / name).read_text(encoding="utf-8")
            if name.endswith(".ipynb"):
                text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
            yield name, text


@pytest.mark.parametrize("pattern", UNSAFE.values(), ids=UNSAFE)
def test_no_source(pattern):
    found = list(sources())
    assert found and not [name for name, text in found if re.search(pattern, text)]


def test_looking_at_the_profiles_loads_no_model_library():
    script = (
        "import sys, lgap_utils, lgap_utils.profiles, tools.runner; "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def call(script, *arguments, **environment):
    """Run one of the shell scripts with nothing of this process's environment but PATH and HOME."""
    bare = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run([ROOT / script, *arguments], env=bare | environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh"])
def test_without_a_working_python_the_scripts_say_so(script, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    shim = tmp_path / "python3"  # on PATH, yet failing, as a version manager's can be
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    done = call(script, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"{script}: no Python 3.11 or newer was found; install one and run this again.\n"


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_without_the_packages_is_named(variable, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "mine"], check=True)
    done = call("run_all.sh", **{variable: str(tmp_path / "mine")})
    assert done.returncode == 1
    assert (
        f"{tmp_path / 'mine'} lacks torch" in done.stderr and "pip install -r requirements.txt" in done.stderr
    )
    assert done.stderr.count("\n") == 1


def test_help_needs_no_environment_and_lists_the_profiles():
    done = call("run_all.sh", "--help", VIRTUAL_ENV="/nonexistent")
    assert done.returncode == 0 and "toy" in done.stdout
