"""How the package is built: which way imports go, and how long and how nested its parts may be."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    file for folder in ("lgap_utils", "tools", "checkpoints") for file in sorted((ROOT / folder).glob("*.py"))
]
PACKAGE = [file for file in SOURCES if file.parent.name == "lgap_utils"]

# From the ground up, as CONTRIBUTING.md draws them. A module imports from its own floor or from those below.
FLOORS = (
    ("profiles", "noise", "batches", "workers", "words", "toy", "identity", "progress"),
    ("files", "checks"),
    ("hub", "images", "picture"),
    ("data_files", "loading", "rows", "train", "defense"),
    ("imagenet", "zoo", "baselines", "attacks"),
    ("data", "autoattack", "surrogates", "diffpure"),
    ("models", "protocols"),
    ("evaluate", "purified", "tables"),
    ("experiment", "verdicts", "figures"),
    ("results", "kept"),
    ("ladders",),
    ("language",),
)


def imports_of(file: Path) -> set[str]:
    """The modules of lgap_utils that a module of it imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def test_no_import_climbs():
    floor = {module: number for number, modules in enumerate(FLOORS) for module in modules}
    graph = {file.stem: imports_of(file) for file in PACKAGE if not file.stem.startswith("__")}
    assert graph.keys() == floor.keys()
    climbs = [f"{a} imports {b}" for a, below in graph.items() for b in below if floor[b] > floor[a]]
    assert not climbs
    for module in graph:
        assert module not in reached_from(module, graph), f"{module} imports itself, through others"


def reached_from(module: str, graph: dict[str, set[str]]) -> set[str]:
    """All modules that a module's imports lead to."""
    reached, todo = set(), [module]
    while todo:
        new = graph[todo.pop()] - reached
        reached |= new
        todo += new
    return reached


def test_the_package_knows_nothing_of_the_tools():
    for file in PACKAGE:
        if file.name != "__main__.py":
            assert not [
                line
                for line in file.read_text().splitlines()
                if "import tools" in line or "from tools" in line
            ]


def test_contributing_draws_every_module():
    picture = (ROOT / "CONTRIBUTING.md").read_text().split("```mermaid")[1].split("```")[0]
    drawn = set(re.findall(r"^    ([\w; ]+)$", picture, re.M))
    nodes = {node.strip() for line in drawn for node in line.split(";")} | {"experiment"}
    assert nodes == {module for modules in FLOORS for module in modules}


def lines_of(files: list[Path]) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


def test_the_package_and_the_tools_stay_thin():
    assert lines_of(PACKAGE) <= 7350
    assert lines_of([file for file in SOURCES if file.parent.name == "tools"]) <= 3000


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_file_is_short_and_its_functions_are_short_and_flat(file):
    assert lines_of([file]) <= 350
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
            assert depth_of(node) <= 4, f"{node.name} is nested too deep"


def depth_of(function: ast.FunctionDef) -> int:
    """How many blocks lie in each other in a function; an `elif` is no deeper than its `if`."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try)

    def below(node: ast.AST, depth: int) -> int:
        deepest = depth
        for name, child in ast.iter_fields(node):
            for item in child if isinstance(child, list) else [child]:
                if isinstance(item, ast.AST) and not isinstance(item, ast.FunctionDef):
                    is_elif = name == "orelse" and isinstance(node, ast.If) and isinstance(item, ast.If)
                    deepest = max(deepest, below(item, depth + (isinstance(item, blocks) and not is_elif)))
        return deepest

    return below(function, 0)


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)


def test_ruff_finds_nothing_to_mend_or_to_format():
    for command in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        done = run("ruff", *command, ".")
        assert done.returncode == 0, done.stdout


def test_the_types_of_the_package_fit():
    done = run("basedpyright", "--pythonpath", sys.executable)
    assert done.returncode == 0, done.stdout


def test_no_two_places_share_six_lines():
    places = defaultdict(list)
    for file in [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))]:
        stripped = [line.strip() for line in file.read_text().splitlines()]
        kept = [
            (number, line)
            for number, line in enumerate(stripped, 1)
            if len(line) > 3 and not line.startswith(("import ", "from "))
        ]
        for start in range(len(kept) - 5):
            places["\n".join(line for _, line in kept[start : start + 6])].append(
                f"{file.name}:{kept[start][0]}"
            )
    assert not [found for found in places.values() if len(found) > 1]


def test_importing_the_package_loads_no_heavy_library():
    script = "import sys, lgap_utils, lgap_utils.profiles; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {
        "torch",
        "numpy",
        "pandas",
        "scipy",
        "PIL",
        "diffusers",
        "transformers",
        "matplotlib",
        "robustbench",
    }
    assert not heavy & set(loaded.stdout.split())


def test_pre_commit_runs_the_versions_that_the_tests_run():
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.startswith(("ruff==", "nbstripout=="))
    )
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["rev"].removeprefix("v") for repo in repos} == set(pins.values())
