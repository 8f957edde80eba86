"""The runner believes nothing but a notebook whose every cell ran, and refuses a wrong request before it starts."""
from dataclasses import dataclass, replace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from lgap_utils import runner


@dataclass(frozen=True)
class Profile:
    name: str = "toy"
    about: str = "a stub"
    n_images: int = 8


def get_profile(name, **overrides):
    if name != "toy":
        raise ValueError(f"no profile {name!r}; choose from ['toy']")
    if overrides.get("n_images", 1) < 1:
        raise ValueError("n_images must be positive")
    return replace(Profile(), **overrides)


@pytest.fixture(autouse=True)
def stub_profiles(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "PROFILES", {"toy": Profile()})
    monkeypatch.setattr(runner, "get_profile", get_profile)
    monkeypatch.setattr(runner, "ready", lambda profile, notebooks, settings: True)
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path / "outputs"))


@pytest.fixture
def write(tmp_path):
    """write(name, *sources): a notebook whose first source is its parameters cell; returns the notebooks' folder."""
    folder = tmp_path / "note books"
    folder.mkdir()

    def write(name, *sources):
        # The counts of an earlier run are stored, as in the notebooks of this project: they must not count as run.
        cells = [new_code_cell(text, execution_count=n) for n, text in enumerate(sources, 1)]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
        return folder

    return write


def refusal(argv, folder, capsys, tmp_path):
    """What main() says when it refuses `argv`; nothing may have been started or written by then."""
    with pytest.raises(SystemExit) as stopped:
        runner.main(argv, folder)
    assert stopped.value.code == 2
    assert not (tmp_path / "outputs").exists()
    return capsys.readouterr().err


def failure(folder):
    with pytest.raises(SystemExit) as stopped:
        runner.main([], folder)
    return stopped.value.code


def test_a_good_run_sets_parameters_and_shows_the_tables(write, tmp_path, capsys):
    folder = write("01_first", "PROFILE = 'small'\nN_IMAGES = None", "import os, pathlib",
                   "assert PROFILE == 'toy' and N_IMAGES == 3 and pathlib.Path.cwd().name == 'note books'",
                   "tables = pathlib.Path(os.environ['LGAP_OUTPUTS'], PROFILE, 'tables')\n"
                   "tables.mkdir(parents=True)\n(tables / 'table1.md').write_text('| 72.5 |')")
    write("02_second", "PROFILE = 'small'", "assert 'N_IMAGES' not in globals()")
    runner.main(["--set", "n_images=3"], folder)
    said = capsys.readouterr().out
    assert said.index("[1/2] 01_first") < said.index("[2/2] 02_second") < said.index("| 72.5 |")
    assert (tmp_path / "outputs/toy/notebooks/02_second.ipynb").is_file()


def test_a_failing_cell_is_named_and_stops_the_run(write, tmp_path):
    folder = write("01_first", "PROFILE = 'toy'", "values = {}\nvalues['a']", "print('never')")
    write("02_second", "PROFILE = 'toy'")
    said = failure(folder)
    # Cell 2 is the one in which papermill repeats the parameters.
    assert "01_first.ipynb" in said and "cell [3], `values = {}`: KeyError: 'a'" in said
    assert str(tmp_path / "outputs/toy/notebooks/01_first.ipynb") in said
    assert not (tmp_path / "outputs/toy/notebooks/02_second.ipynb").exists()


def test_leaving_early_is_not_success(write):
    assert "cell [3], `import sys`: SystemExit: 0" in failure(
        write("01_first", "PROFILE = 'toy'", "import sys\nsys.exit(0)", "print('never')"))


def test_a_killed_kernel_is_noticed(write):
    assert "cell [3], `import os, signal`: DeadKernelError: Kernel died" in failure(
        write("01_first", "PROFILE = 'toy'", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "1"))


def executed(*counts, **papermill):
    """A notebook as papermill leaves it, each code cell holding `x` and the given execution count."""
    cells = [new_code_cell("x", execution_count=n) for n in counts]
    return new_notebook(cells=cells, metadata={"papermill": {"exception": None, "end_time": "now"} | papermill})


@pytest.mark.parametrize("nb, error", [
    (executed(1, None), None),
    (executed(1, 2, exception=True), None),
    (executed(1, 2, end_time=None), None),
    (executed(1, 2), RuntimeError("gone")),
    (executed(None, None), RuntimeError("gone")),
    (executed(), RuntimeError()),
])
def test_every_sign_of_an_unfinished_notebook_counts(nb, error):
    assert runner.check_finished(nb, error)


def test_a_finished_notebook_may_hold_empty_cells():
    nb = executed(1, 2)
    nb.cells.append(new_code_cell(" \n"))
    assert runner.check_finished(nb) is None


@pytest.mark.parametrize("argv, words", [
    (["huge"], "no profile 'huge'; choose from ['toy']"),
    (["--only", "07"], "there are 01_first, 02_second"),
    (["--only", "01,"], "there are 01_first, 02_second"),
    (["--set", "n_image=4"],
     "no selected notebook has this parameter and the profile no such field; there are LR, N_IMAGES, SEED, TITLE, n_images"),
    (["--only", "02", "--set", "seed=4"], "no selected notebook has this parameter"),
    (["--set", "profile=toy"], "no selected notebook has this parameter"),
    (["--set", "seed"], "write NAME=VALUE"),
    (["--set", "import os; x=1"], "write NAME=VALUE"),
    (["--set", "seed=1", "--set", "SEED=1"], "given twice"),
    (["--set", "lr=8/255"], "'8/255' is not a number"),
    (["--set", "lr=1e999"], "'1e999' is not a number"),
    (["--set", "seed=[1]"], "'[1]' is not a number"),
    (["--set", "seed=None"], "'None' is not a number"),
    (["--set", "seed=007"], "'007' is not a number"),
    (["--set", "seed=one"], "should be of type int"),
    (["--set", "seed=0.5"], "should be of type int"),
    (["--set", "seed=True"], "should be of type int"),
    (["--set", "title=3"], "should be of type str"),
    (["--set", "n_images=0"], "n_images must be positive"),  # the profile's own check, on the notebooks' None
])
def test_a_wrong_request_is_refused_before_anything_starts(argv, words, write, capsys, tmp_path):
    folder = write("01_first", "PROFILE = 'toy'\nN_IMAGES = None\nLR = None\nSEED = 0\nTITLE = 'a'")
    write("02_second", "PROFILE = 'toy'\nN_IMAGES = None")
    assert words in refusal(argv, folder, capsys, tmp_path)


def test_a_profile_that_cannot_run_is_refused_before_anything_starts(write, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ready", lambda profile, notebooks, settings: (notebooks, settings) != (["01_first"], {"n_images": 3}))
    folder = write("01_first", "PROFILE = 'toy'\nN_IMAGES = None")
    with pytest.raises(SystemExit) as stopped:
        runner.main(["--set", "n_images=3"], folder)
    assert "profile toy cannot run here; `python -m lgap_utils doctor toy` says more" in stopped.value.code
    assert not (tmp_path / "outputs").exists()


def test_other_fields_of_the_profile_go_into_settings(write, tmp_path):
    folder = write("01_first", "PROFILE = 'toy'\nN_IMAGES = None\nSETTINGS = {}", "assert (N_IMAGES, SETTINGS) == (3, {})")
    write("02_second", "PROFILE = 'toy'\nSETTINGS = {}", "assert SETTINGS == {'n_images': 3}")
    runner.main(["--set", "n_images=3"], folder)


@pytest.mark.parametrize("cell", ["PROFILE = 'toy'\nEPS = 8 / 255", "PROFILE: str = 'toy'", "SEED = 0", "import os"])
def test_a_parameters_cell_that_papermill_would_misread_is_refused(cell, write, capsys, tmp_path):
    assert "01_first.ipynb" in refusal([], write("01_first", cell), capsys, tmp_path)


def test_settings_are_typed_as_python_writes_them():
    settings = runner.parse_settings(["a=1", "b=1e-3", "c=True", "d=checkpoints/toy", "e='8/255'", "f=-2", "g="])
    assert settings == {"A": 1, "B": 1e-3, "C": True, "D": "checkpoints/toy", "E": "8/255", "F": -2, "G": ""}


def test_a_second_run_into_the_same_folder_is_refused(write, tmp_path):
    folder = write("01_first", "PROFILE = 'toy'")
    with runner.locked(tmp_path / "outputs/toy"):
        assert "another run is writing into" in failure(folder)
    with runner.locked(tmp_path / "outputs/toy"):
        pass
