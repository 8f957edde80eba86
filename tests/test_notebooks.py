"""What papermill and nbval do not check of the stored notebooks: form, size, and that they are one run."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbval.plugin import get_sanitize_patterns

import lgap_utils
from tools import badges
from tools.notebooks import SHOWS_DATA, WIDGET

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"

ABSOLUTE = re.compile(
    r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|opt|srv|var|private)/[\w.-]+|\b[A-Z]:\\+Users"
)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def nb(path):
    return nbformat.read(path, as_version=4)


def code(nb, tag=None):
    return [
        c for c in nb.cells if c.cell_type == "code" and (tag is None or tag in c.metadata.get("tags", []))
    ]


def lines(cell):
    return [line for line in cell.source.splitlines() if line.strip()]


def texts(nb):
    """Every source, and every output that is text; images are base64, in which anything can be found."""
    for cell in nb.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield str(output.get("text", ""))
            for kind, data in output.get("data", {}).items():
                if not kind.startswith("image/") or kind == "image/svg+xml":
                    yield str(data)


def test_it_is_a_valid_notebook_for_any_python(nb):
    nbformat.validate(nb)
    assert nb.metadata.kernelspec.name == "python3"


def test_parameters_are_literals(nb):
    (cell,) = code(nb, "parameters")
    body = ast.parse(cell.source).body
    assert body and all(isinstance(line, ast.Assign) for line in body)
    for line in body:
        ast.literal_eval(line.value)


def test_it_was_stored_as_one_run(nb):
    assert [c.execution_count for c in code(nb)] == list(range(1, len(code(nb)) + 1))
    assert not [o for c in code(nb) for o in c.outputs if o.output_type == "error"]


def test_something_in_it_is_compared(nb):
    checked = code(nb, "nbval-check-output")
    assert checked and all(c.outputs for c in checked)


def test_it_is_short(path, nb):
    assert path.stat().st_size <= 300_000
    assert len(nb.cells) <= 20
    assert sum(len(lines(c)) for c in code(nb)) <= 80
    assert max(len(lines(c)) for c in code(nb) if c not in code(nb, "bootstrap")) <= 12
    assert sum(len(re.findall(r"^\s*(?:async\s+)?def\s", c.source, re.M)) for c in code(nb)) <= 2


def test_opening_it_changes_nothing_and_no_bar_or_log_is_in_it(path, nb):
    assert path.read_text(encoding="utf-8") == nbformat.writes(nb) + "\n"
    outputs = [output for cell in code(nb) for output in cell.outputs]
    assert not [o for o in outputs if WIDGET in o.get("data", {}) or o.get("name") == "stderr"]
    assert not [text for text in texts(nb) if "Loading weights" in text or "HTTP Request" in text]
    assert not [o for o in outputs if "...</td>" in "".join(o.get("data", {}).get("text/html", ""))]


def test_a_cell_that_shows_images_says_so(nb):
    """Or a picture of a data set is published with the notebook."""
    for cell in code(nb):
        shows = re.search(r"image_grid|imshow|\.picture|caption_under", cell.source) is not None
        assert shows <= (SHOWS_DATA in cell.metadata.get("tags", [])), cell.source


def test_it_names_no_path_of_one_machine(nb):
    assert not [found for text in texts(nb) for found in ABSOLUTE.findall(text)]


def test_its_badge_and_bootstrap_lead_to_itself(path, nb):
    assert badges.rewritten(path, lgap_utils.REPOSITORY) == path.read_text(encoding="utf-8")
    (bootstrap,) = code(nb, "bootstrap")
    assert f'"{lgap_utils.REPOSITORY}"' in bootstrap.source


def test_every_sanitize_rule_is_read():
    text = SANITIZE.read_text()
    assert len(get_sanitize_patterns(text)) == text.count("regex:") > 0


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("took 12.3 s", "took TIME"),
        (" 50%|#####     | 4/8 [00:01<00:01,  3.2it/s]", "PROGRESS"),
        ("<Net at 0x7f00deadbeef>", "<Net at ADDRESS>"),
        ("in /tmp/ipykernel_12/3.py", "in TEMPORARY"),
        ("72.50% of 64 images, eps 8/255", "72.50% of 64 images, eps 8/255"),
    ],
)
def test_sanitizing_hides_what_varies_and_no_result(raw, clean):
    for pattern, replacement in get_sanitize_patterns(SANITIZE.read_text()):
        raw = re.sub(pattern, replacement, raw)
    assert raw == clean


@pytest.fixture(scope="module")
def bootstrap():
    """The bootstrap cell, which is the same in all notebooks."""
    cells = {
        cell.source for path in NOTEBOOKS for cell in code(nbformat.read(path, as_version=4), "bootstrap")
    }
    assert len(cells) == 1
    return cells.pop()


@pytest.mark.parametrize("place", ["", "notebooks", "notebooks/deeper"])
@pytest.mark.parametrize("checkout", ["lgap", "a folder with spaces", "dossier-été-日本"])
def test_bootstrap_finds_the_checkout(bootstrap, tmp_path, checkout, place):
    package(tmp_path / checkout)
    (tmp_path / checkout / place).mkdir(parents=True, exist_ok=True)
    assert run_cell(bootstrap, tmp_path / checkout / place).stdout.strip() == str(tmp_path / checkout)


def test_bootstrap_elsewhere_takes_pythonpath_or_says_what_to_do(bootstrap, tmp_path):
    package(tmp_path / "checkout")
    (tmp_path / "elsewhere").mkdir()
    assert run_cell(bootstrap, tmp_path / "elsewhere", tmp_path / "checkout").stdout.strip() == str(
        tmp_path / "checkout"
    )
    lost = run_cell(bootstrap, tmp_path / "elsewhere")
    assert lost.returncode == 1 and "start Jupyter in the checkout" in lost.stderr


def package(checkout):
    (checkout / "lgap_utils").mkdir(parents=True)
    (checkout / "lgap_utils" / "__init__.py").touch()


def run_cell(text, folder, python_path=""):
    return subprocess.run(
        [
            sys.executable,
            "-IS" if not python_path else "-P",
            "-c",
            f"{text}\nimport lgap_utils\nprint(pathlib.Path(lgap_utils.__file__).parents[1])",
        ],
        cwd=folder,
        env={"PYTHONPATH": str(python_path), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
    )
