"""The runner believes only a notebook whose every cell ran, and refuses a wrong request before it starts."""

import functools
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from lgap_utils.profiles import ROOT
from tools import request, runner, watch
from tools.needs import Check


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
    for module in (runner, request):
        monkeypatch.setattr(module, "PROFILES", {"toy": Profile()})
        monkeypatch.setattr(module, "get_profile", get_profile)
    monkeypatch.setattr(runner, "ready", lambda *_, **__: [])
    monkeypatch.setattr(runner, "estimate", lambda plan, known: known)
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path / "outputs"))


@pytest.fixture
def write(tmp_path):
    """write(name, *sources): a notebook whose first source is its parameters cell; returns its folder."""
    folder = tmp_path / "note books"
    folder.mkdir()

    def write(name, *sources):
        # The counts of an earlier run are stored, as in the notebooks here: they must not count as run.
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


def test_a_good_run_sets_parameters_and_ends_with_the_page(write, tmp_path, capsys):
    folder = write(
        "01_first",
        "PROFILE = 'small'\nN_IMAGES = None",
        "import os, pathlib",
        "assert PROFILE == 'toy' and N_IMAGES == 3 and pathlib.Path.cwd().name == 'note books'",
        "tables = pathlib.Path(os.environ['LGAP_OUTPUTS'], PROFILE, 'tables')\n"
        "tables.mkdir(parents=True)\n(tables / 'table1.md').write_text('| 72.5 |')",
    )
    write("02_second", "PROFILE = 'small'", "assert 'N_IMAGES' not in globals()")
    runner.main(["--set", "n_images=3"], folder)
    said = capsys.readouterr().out
    assert said.index("[1/2] 01_first") < said.index("[2/2] 02_second") < said.index("Profile toy is done")
    page = tmp_path / "outputs/toy/index.html"
    assert "Tables that this run wrote: table1." in said and said.splitlines()[-1] == str(page)
    assert "02_second" in page.read_text() and (page.parent / "pages/02_second.html").is_file()


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
        write("01_first", "PROFILE = 'toy'", "import sys\nsys.exit(0)", "print('never')")
    )


def executed(*counts, **papermill):
    """A notebook as papermill leaves it, each code cell holding `x` and the given execution count."""
    cells = [new_code_cell("x", execution_count=n) for n in counts]
    return new_notebook(
        cells=cells, metadata={"papermill": {"exception": None, "end_time": "now"} | papermill}
    )


@pytest.mark.parametrize(
    "nb, error",
    [
        (executed(1, None), None),
        (executed(1, 2, exception=True), None),
        (executed(1, 2, end_time=None), None),
        (executed(1, 2), RuntimeError("gone")),
        (executed(None, None), RuntimeError("gone")),
        (executed(), RuntimeError()),
    ],
)
def test_every_sign_of_an_unfinished_notebook_counts(nb, error):
    assert runner.check_finished(nb, error)


def test_a_finished_notebook_may_hold_empty_cells():
    nb = executed(1, 2)
    nb.cells.append(new_code_cell(" \n"))
    assert runner.check_finished(nb) is None


@pytest.mark.parametrize(
    "argv, words",
    [
        (["huge"], "no profile 'huge'; choose from ['toy']"),
        (["--only", "07"], "there are 01_first, 02_second"),
        (["--only", "01,"], "there are 01_first, 02_second"),
        (
            ["--set", "n_image=4"],
            "no selected notebook has this parameter and the profile no such field; "
            "there are LR, N_IMAGES, SEED, TITLE, n_images",
        ),
        (["--only", "02", "--set", "seed=4"], "no selected notebook has this parameter"),
        (["--set", "profile=toy"], "no selected notebook has this parameter"),
        (["--set", "seed"], "write NAME=VALUE"),
        (["--set", "import os; x=1"], "write NAME=VALUE"),
        (["--set", "seed=1", "--set", "SEED=1"], "given twice"),
        (["--set", "lr=8/255"], "LR='8/255': 01_first.ipynb has 0.1 here, so this should be of type float"),
        (["--set", "seed=[1]"], "should be of type int"),
        (["--set", "seed=None"], "should be of type int"),
        (["--set", "seed=007"], "should be of type int"),
        (["--set", "seed=one"], "should be of type int"),
        (["--set", "seed=0.5"], "should be of type int"),
        (["--set", "seed=True"], "should be of type int"),
        (["--set", "title=3"], "should be of type str"),
        (
            ["--set", "n_images=0"],
            "n_images must be positive",
        ),  # the profile's own check, on the notebooks' None
    ],
)
def test_a_wrong_request_is_refused_before_anything_starts(argv, words, write, capsys, tmp_path):
    folder = write("01_first", "PROFILE = 'toy'\nN_IMAGES = None\nLR = 0.1\nSEED = 0\nTITLE = 'a'")
    write("02_second", "PROFILE = 'toy'\nN_IMAGES = None")
    assert words in refusal(argv, folder, capsys, tmp_path)


def test_a_profile_that_cannot_run_is_refused_before_anything_starts(write, tmp_path, monkeypatch):
    monkeypatch.setattr(
        runner,
        "ready",
        lambda profile, notebooks, settings, say=True: (
            [Check("classifier", "missing", "gone")]
            * ((notebooks, settings) == (["01_first"], {"n_images": 3}))
        ),
    )
    folder = write("01_first", "PROFILE = 'toy'\nN_IMAGES = None")
    with pytest.raises(SystemExit) as stopped:
        runner.main(["--set", "n_images=3"], folder)
    assert "profile toy cannot run here; `python -m lgap_utils doctor toy` says more" in stopped.value.code
    assert not (tmp_path / "outputs").exists()


def test_other_fields_of_the_profile_go_into_settings(write, tmp_path):
    folder = write(
        "01_first",
        "PROFILE = 'toy'\nN_IMAGES = None\nSETTINGS = {}",
        "assert (N_IMAGES, SETTINGS) == (3, {})",
    )
    write("02_second", "PROFILE = 'toy'\nSETTINGS = {}", "assert SETTINGS == {'n_images': 3}")
    runner.main(["--set", "n_images=3"], folder)


@pytest.mark.parametrize(
    "cell", ["PROFILE = 'toy'\nEPS = 8 / 255", "PROFILE: str = 'toy'", "SEED = 0", "import os"]
)
def test_a_parameters_cell_that_papermill_would_misread_is_refused(cell, write, capsys, tmp_path):
    assert "01_first.ipynb" in refusal([], write("01_first", cell), capsys, tmp_path)


def test_settings_are_typed_as_python_writes_them():
    texts = ["a=1", "b=1e-3", "c=True", "d=checkpoints/toy", "e='8/255'", "f=-2", "g=", "h=None", "i=[1]"]
    settings = {"A": 1, "B": 1e-3, "C": True, "D": "checkpoints/toy", "E": "8/255", "F": -2}
    assert request.parse_settings(texts) == settings | {"G": "", "H": "None", "I": "[1]"}


@pytest.fixture
def held(tmp_path):
    """held(folder): another process has begun to write into it."""
    started = []

    def hold(folder):
        script = (
            "from lgap_utils.files import folder_lock\n"
            f"with folder_lock({str(folder)!r}): print('held', flush=True); input()"
        )
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                cwd=ROOT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_into_the_same_folder_is_refused_and_a_killed_one_leaves_no_lock(write, tmp_path, held):
    folder = write("01_first", "PROFILE = 'toy'")
    first = held(tmp_path / "outputs/toy")
    assert failure(folder) == (
        f"run_all.sh: another process writes into {tmp_path / 'outputs/toy'}; wait for it, "
        "or choose another folder with LGAP_OUTPUTS"
    )
    assert not (tmp_path / "outputs/toy/notebooks").exists()
    first.kill()
    first.wait()
    runner.main([], folder)


WRITES = """import os, pathlib
tables = pathlib.Path(os.environ['LGAP_OUTPUTS'], PROFILE, 'tables')
tables.mkdir(parents=True, exist_ok=True)
(tables / 'new.md').write_text('| 1 |')
(tables / 'again.md').write_text('| 2 |')"""


def test_only_what_the_run_wrote_is_shown(write, tmp_path, capsys):
    folder, tables = write("01_first", "PROFILE = 'toy'", WRITES), tmp_path / "outputs/toy/tables"
    write("02_second", "PROFILE = 'toy'")
    tables.mkdir(parents=True)
    for name, text in (("old", "| 3 |"), ("again", "| 2 |")):
        (tables / f"{name}.md").write_text(text)
        os.utime(tables / f"{name}.md", (1e9, 1e9))
    runner.main(["--only", "02"], folder)
    said = capsys.readouterr().out
    assert "Tables that this run wrote: none." in said
    runner.main(["--only", "01"], folder)
    said = capsys.readouterr().out
    assert "Tables that this run wrote: again, new." in said


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--set", "row=99", "--only", "02"], "ROW=99: 02_second.ipynb looks at 6 images; expected 0 to 5"),
        (["--set", "row=-1"], "ROW=-1: 01_first.ipynb looks at 8 images; expected 0 to 7"),
        (
            ["--set", "row=3", "--set", "n_images=3", "--only", "02"],
            "ROW=3: 02_second.ipynb looks at 3 images; expected 0 to 2",
        ),
        (["--set", "row=8"], "ROW=8: 01_first.ipynb looks at 8 images; expected 0 to 7"),
    ],
)
def test_a_row_that_is_not_among_the_images_is_refused(argv, words, write, capsys, tmp_path):
    folder = write("01_first", "PROFILE = 'toy'\nN_IMAGES = None\nROW = 7")
    write("02_second", "PROFILE = 'toy'\nN_IMAGES = 6\nROW = 0")
    assert words in refusal(argv, folder, capsys, tmp_path)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--set", "size=7"], "size=7"),
        (["--set", "eps_255=8/255"], "eps_255='8/255': expected a number, e.g. eps_255=8"),
        (["--set", "eps_255=1e999"], "eps_255=inf: expected a number, e.g. eps_255=8"),
        (["--set", "n_draws=None"], "n_draws='None': expected a whole number"),
        (["--set", "n_images=0"], "n_images=0"),
        (["--set", "row=6", "--only", "02"], "02_purification.ipynb looks at 6 images; expected 0 to 5"),
        (
            ["--set", "num_inference_steps=5", "--only", "07"],
            "strength=0.1 of num_inference_steps=5 gives 0 denoising steps",
        ),
        (["--set", "strength=0.01"], "strength=0.01"),
    ],
)
def test_the_settings_of_each_selected_notebook_are_checked_first(argv, words, tmp_path, monkeypatch, capsys):
    """The real profiles and notebooks: Table 4 has a strength of its own."""
    monkeypatch.undo()
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("a notebook was started"))
    with pytest.raises(SystemExit) as stopped:
        runner.main(argv)
    assert words in str(stopped.value.code) + capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("text", ["", '{"table 1": {', "[]", "\udc80"])
def test_a_torn_results_file_is_told_before_the_run_and_kept(text, write, tmp_path):
    folder, results = write("01_first", "PROFILE = 'toy'"), tmp_path / "outputs/toy/results.json"
    results.parent.mkdir(parents=True)
    results.write_text(text, errors="surrogateescape")
    said = failure(folder)
    assert str(results) in said and "move it away" in said
    assert results.read_text(errors="surrogateescape") == text and not (results.parent / "notebooks").exists()


@pytest.mark.parametrize("below", ["", "toy"])
def test_no_run_writes_where_published_results_lie(below, write, tmp_path, monkeypatch):
    assert runner.PUBLISHED == ROOT / "outputs" / "published" and runner.PUBLISHED.is_dir()
    monkeypatch.setattr(runner, "PUBLISHED", tmp_path / "published")
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path / "published" / below))
    said = failure(write("01_first", "PROFILE = 'toy'"))
    assert "published holds published results; choose another folder with LGAP_OUTPUTS" in said
    assert not (tmp_path / "published").exists()


def test_outputs_that_are_a_file_are_told_in_one_sentence(write, tmp_path):
    (tmp_path / "outputs").write_text("mine")
    said = failure(write("01_first", "PROFILE = 'toy'"))
    assert said == (
        f"run_all.sh: {tmp_path / 'outputs/toy'} cannot be written into (Not a directory); "
        "choose another folder with LGAP_OUTPUTS"
    )
    assert (tmp_path / "outputs").read_text() == "mine"


def kernel(folder, monkeypatch, text):
    """A user's own kernel python3, which Jupyter finds before this environment's."""
    (folder / "kernels/python3").mkdir(parents=True)
    (folder / "kernels/python3/kernel.json").write_text(text)
    monkeypatch.setenv("JUPYTER_PATH", str(folder))


@pytest.mark.parametrize("text", ['{"argv": ["/nonexistent/python"], "display_name": "mine"}', "{"])
def test_a_kernel_of_the_users_own_does_not_take_this_environments_place(text, write, tmp_path, monkeypatch):
    kernel(tmp_path / "mine", monkeypatch, text)
    runner.main([], write("01_first", "PROFILE = 'toy'", f"import sys\nassert sys.prefix == {sys.prefix!r}"))


def test_a_cell_that_takes_too_long_is_named(write, monkeypatch):
    """papermill, given a limit, interrupts the cell."""
    limited = functools.partial(papermill.execute_notebook, execution_timeout=10)
    monkeypatch.setattr(papermill, "execute_notebook", limited)
    said = failure(write("01_first", "PROFILE = 'toy'", "import time\ntime.sleep(60)", "print('never')"))
    assert "01_first.ipynb failed after" in said and "cell [3], `import time`: KeyboardInterrupt\n" in said
    assert "what is finished is kept: run the same command again to go on from there" in said


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_a_kernel_that_a_signal_ends_is_noticed(number, write):
    dies = f"import os, signal\nos.kill(os.getpid(), signal.{number})"
    said = failure(write("01_first", "PROFILE = 'toy'", dies, "1"))
    assert "cell [3], `import os, signal`: DeadKernelError: Kernel died" in said and runner.GO_ON in said


@pytest.mark.parametrize(
    "command",
    [
        ["tools.runner", "--list"],
        ["tools.runner", "--help"],
        ["lgap_utils", "doctor", "--help"],
        ["lgap_utils", "doctor", "toy"],
    ],
)
def test_a_reader_that_goes_away_is_no_error(command):
    piped = ["bash", "-c", '"$@" | true; exit "${PIPESTATUS[0]}"', ""]
    done = subprocess.run([*piped, sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 128 + signal.SIGPIPE)


SHARD = """import os, pathlib
rows = pathlib.Path(os.environ['LGAP_OUTPUTS'], PROFILE, 'rows', 'a')
rows.mkdir(parents=True, exist_ok=True)
(rows / f'{N}.parquet').write_bytes(b'')"""


def test_a_finished_notebook_with_the_same_settings_is_told_to_reuse_its_rows(write, capsys):
    folder = write("01_first", "PROFILE = 'toy'\nN = 1", SHARD)
    write("02_no_rows", "PROFILE = 'toy'", "1")
    said = []
    for more in ([], [], ["--set", "n=2"], ["--set", "n=2"]):
        runner.main(more, folder)
        said.append(capsys.readouterr().out.count("rows reused"))
    assert said == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "missing, status", [({"02_second"}, runner.PARTLY), ({"01_first", "02_second"}, None)]
)
def test_a_notebook_without_its_data_set_is_left_out_and_the_others_run(
    missing, status, write, tmp_path, monkeypatch, capsys
):
    folder = write("01_first", "PROFILE = 'toy'")
    write("02_second", "PROFILE = 'toy'")
    gone = Check("data", "missing", "cifar100, not in data\nget it with")
    ready = lambda profile, notebooks, settings, say=True: [gone] * bool(missing & set(notebooks))
    monkeypatch.setattr(runner, "ready", ready)
    with pytest.raises(SystemExit) as stopped:
        runner.main([], folder)
    sentence = "02_second is left out, as its data set is missing: cifar100, not in data"
    if status is None:
        assert "cannot run here" in stopped.value.code and not (tmp_path / "outputs").exists()
    else:
        assert stopped.value.code == status and sentence in capsys.readouterr().out
        assert sentence in (tmp_path / "outputs/toy/index.html").read_text()
        assert not (tmp_path / "outputs/toy/notebooks/02_second.ipynb").exists()


BAR = """import time
from lgap_utils.progress import tqdm
with tqdm(total=8, desc='BPDA-40', unit='step', mininterval=0) as bar:
    for _ in range(8):
        time.sleep(0.2)
        bar.set_postfix_str('3 of 6 images', refresh=False)
        bar.update()"""


def test_without_a_terminal_a_line_now_and_then_says_where_it_is(write, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(watch, "MINUTE", 0.2)
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(runner, "estimate", lambda plan, known: dict.fromkeys(plan, 1000.0))
    runner.main([], write("01_first", "PROFILE = 'toy'", BAR))
    said = capsys.readouterr().out
    assert "all of it takes about 17 min" in said and "cell 3 of 3 | whole run 17 min | BPDA-40: " in said
    assert " of 8 steps, 3 of 6 images, " in said and "\r" not in said
    nb = nbformat.read(tmp_path / "outputs/toy/notebooks/01_first.ipynb", as_version=4)
    assert not [cell.outputs for cell in nb.cells if cell.outputs]  # no bar is stored
    assert not (tmp_path / "outputs/toy/.status").exists() and "LGAP_STATUS" not in os.environ


def test_results_without_a_page_are_told(write, monkeypatch):
    from tools import report

    monkeypatch.setattr(report, "build", lambda *_, **__: 1 / 0)
    assert "the page could not be made (division by zero)" in failure(write("01_first", "PROFILE = 'toy'"))
