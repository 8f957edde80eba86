"""Full and read-only disks, file systems without locks, signals, and a checkout that no run changes."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from lgap_utils import figures, files, tables
from lgap_utils.files import folder_lock
from lgap_utils.profiles import ROOT
from lgap_utils.rows import Rows

# ---------------------------------------------------------------- one writer a folder


def refused(folder):
    """What another thread is told that asks for `folder`, or None; it stands for another process."""
    said = []

    def ask():
        try:
            with folder_lock(folder):
                said.append(None)
        except BlockingIOError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return said[0]


def test_a_folder_has_folder_lock_and_who_waits_says_so(tmp_path, capsys):
    folder = tmp_path / "new" / "rows"
    with folder_lock(folder), folder_lock(folder):  # the same thread may ask again
        assert refused(folder) == (
            f"another process writes into {folder}; wait for it, or choose another folder with LGAP_OUTPUTS"
        )
        assert refused(tmp_path / "other") is None
    assert refused(folder) is None

    entered, waited = threading.Event(), []

    def wait():
        entered.set()
        with folder_lock(folder, wait=True):
            waited.append(len(released))

    released, thread = [], threading.Thread(target=wait)
    with folder_lock(folder):
        thread.start()
        entered.wait()
        said = ""
        while not said.endswith("waiting for it\n"):
            assert thread.is_alive(), said
            time.sleep(0.01)
            said += capsys.readouterr().out
        released.append(True)
    thread.join()
    assert said == f"another process writes into {folder}; waiting for it\n" and waited == [1]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("wait", [False, True])
def test_a_file_system_without_locks_is_named_once_and_stops_nothing(
    number, wait, tmp_path, monkeypatch, capsys
):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    files._say_once.cache_clear()
    ran = 0
    for _ in range(2):
        with folder_lock(tmp_path, wait):
            ran += 1
    assert ran == 2 and capsys.readouterr().out.count("this file system has no locks") == 1


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file/rows cannot be written into .Not a directory.; choose another"):
        with folder_lock(tmp_path / "file" / "rows"):
            pass
    with pytest.raises(KeyError):  # the caller's own is passed on, and the folder is free again
        with folder_lock(tmp_path / "rows"):
            raise KeyError
    assert refused(tmp_path / "rows") is None


# ---------------------------------------------------------------- full and read-only disks


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MB, which only root can make."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk):
    """Leave no room on `disk`."""
    with open(disk / "filler", "wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def make_read_only(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def contents(folder):
    there = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in there}


def some_rows(start, n=4):
    return [{"index": i, "label": i % 10, "pixels": os.urandom(3000)} for i in range(start, start + n)]


FAULTS = pytest.mark.parametrize(
    "fault, words", [(fill, "No space left on device"), (make_read_only, "Read-only file system")]
)


@FAULTS
def test_rows_that_a_disk_does_not_take_are_told_and_the_others_stay(fault, words, disk):
    rows = Rows(disk / "rows", {"seed": 0})
    rows.write(some_rows(0))
    before, table = contents(disk / "rows"), rows.read()
    fault(disk)
    with pytest.raises(OSError, match=f"(could not|cannot) be written.*{words}"):
        rows.write(some_rows(4))
    assert contents(disk / "rows") == before and rows.read().equals(table) and len(table) == 4


def test_a_freed_disk_takes_the_rows_that_were_missing(disk):
    rows = Rows(disk / "rows", {"seed": 0})
    fill(disk)
    with pytest.raises(OSError):
        rows.write(some_rows(0))
    (disk / "filler").unlink()
    rows.write(some_rows(0))
    assert len(Rows(disk / "rows", {"seed": 0}).read()) == 4


def save_figure(folder, k):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    axis.plot([i * i % 17 for i in range(k)])
    figures.save_figure(figure, folder, "chart")
    plt.close(figure)


SAVED = {
    "table": lambda folder, k: tables.save_table(pd.DataFrame({"k": range(k)}), folder, "table"),
    "figure": save_figure,
}


@FAULTS
@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
def test_what_a_disk_does_not_take_leaves_what_lay_there(save, fault, words, disk):
    save(disk / "out", 3)
    before = contents(disk / "out")
    fault(disk)
    with pytest.raises(OSError, match=words):
        save(disk / "out", 300)
    assert before and contents(disk / "out") == before


# ---------------------------------------------------------------- the runner

WAITS = """import os, pathlib, time
here = pathlib.Path(os.environ["LGAP_OUTPUTS"])
(here / "part").write_text(str(os.getpid()))
(here / "part").rename(here / "pid")
time.sleep(600)"""
FILLS = """import os, pathlib
with open(pathlib.Path(os.environ["LGAP_OUTPUTS"], "filler"), "wb", buffering=0) as f:
    try:
        while True:
            f.write(bytes(4096))
    except OSError:
        pass
print("said", "much" * 5000)"""


def notebook(folder, *sources):
    """A notebook 01_first in `folder`, whose parameters cell comes before `sources`."""
    folder.mkdir(exist_ok=True)
    cells = [new_code_cell(text) for text in ("PROFILE = 'toy'\nN_IMAGES = None", *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells), folder / "01_first.ipynb")
    return folder


def start(folder, outputs):
    """The runner as run_all.sh starts it, on the notebooks of `folder`; it asks no doctor."""
    script = textwrap.dedent(f"""
        import functools, pathlib, signal
        from tools import runner
        signal.signal(signal.SIGINT, signal.default_int_handler)    # the tests' parent may ignore Ctrl-C
        runner.ready = lambda *_: []
        runner.main = functools.partial(runner.main, [], pathlib.Path({str(folder)!r}))
        runner.command()""")
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LGAP_OUTPUTS": str(outputs)},
    )


def wait_for(condition, process=None):
    """Wait until `condition` holds; a process that has ended by then is an error, with what it said."""
    for _ in range(6000):
        if condition():
            return
        if process and process.poll() is not None:
            pytest.fail("\n".join(process.communicate()))
        time.sleep(0.02)
    pytest.fail("waited in vain for two minutes")


def processes_of(outputs):
    """[pid] of those that were started with LGAP_OUTPUTS=outputs and are no zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"LGAP_OUTPUTS={outputs}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # gone, or another user's
            pass
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for kernels in /proc")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_run_and_kernel_and_says_how_to_go_on(number, tmp_path):
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    run = start(notebook(tmp_path / "notebooks", WAITS), outputs)
    wait_for((outputs / "pid").exists, run)
    assert int((outputs / "pid").read_text()) in processes_of(outputs)
    run.send_signal(number)
    said = run.communicate()[1]
    if number == signal.SIGKILL:
        assert run.returncode == -number
    else:
        assert run.returncode == 128 + number
        assert said == (
            f"run_all.sh: stopped by {number.name}; what is finished is kept: "
            "run the same command again to go on from there\n"
        )
    wait_for(lambda: not processes_of(outputs))  # a kernel looks for its parent once a second
    with folder_lock(outputs / "toy"):
        pass


def test_a_disk_that_is_full_or_read_only_is_told_before_a_notebook_starts(disk, tmp_path):
    folder = notebook(tmp_path / "notebooks", "raise SystemExit('started')")
    fill(disk)
    for fault, words in (
        (None, "has no room for results (No space left on device)"),
        (make_read_only, "cannot be written into (Read-only file system)"),
    ):
        if fault:
            fault(disk)
        run = start(folder, disk)
        out, said = run.communicate()
        assert run.returncode == 1 and out == ""
        assert said == f"run_all.sh: {disk / 'toy'} {words}; choose another folder with LGAP_OUTPUTS\n"


def test_a_disk_that_fills_up_during_a_run_ends_it_with_a_reason_and_leaves_the_rows(disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
    Rows(disk / "toy/rows/mine", {"seed": 0}).write(some_rows(0))
    before = contents(disk / "toy/rows")
    run = start(notebook(tmp_path / "notebooks", FILLS, "print('never')"), disk)
    out, said = run.communicate()
    print(said)
    assert run.returncode == 1 and "No space left on device" in said and "run the same command again" in said
    assert "Traceback" not in said and contents(disk / "toy/rows") == before


# ---------------------------------------------------------------- a whole checkout


def git(folder, *arguments):
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a git checkout: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clone of the working tree, as git sees it, less the models of `small`."""
    names = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    clone = tmp_path_factory.mktemp("a clone") / "lgap"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("checkpoints/small/"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    git(clone, "init")
    git(clone, "add", "--all")
    return clone


def call(checkout, *command, **environment):
    """A command in the clone, with this environment's packages and outputs where a user has them."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("LGAP_", "CONDA_"))}
    return subprocess.Popen(
        command,
        cwd=checkout,
        env=mine | {"VIRTUAL_ENV": sys.prefix, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_in_a_fresh_clone_changes_no_file_that_git_knows(checkout):
    done = call(checkout, "./run_all.sh", "toy", "--only", "01", "--set", "n_images=2", "--set", "n_steps=2")
    out, said = done.communicate()
    assert done.returncode == 0, said
    assert "Tables that this run wrote: 01_captions.\n" in out  # its own, and none of the clone's
    assert (checkout / "outputs/toy/tables/01_captions.md").is_file()
    assert git(checkout, "diff", "--name-only") == ""
    assert git(checkout, "ls-files", "--others", "--exclude-standard") == ""


GROWS = """import pathlib, sys, time
sys.path.insert(0, str(pathlib.Path.cwd().parent))
from lgap_utils.rows import Rows
from lgap_utils.profiles import get_profile
rows = Rows(get_profile(PROFILE).outputs / "rows" / "mine", {})
print("found", len(rows.read()))
for i in range(len(rows.read()), N_IMAGES):
    rows.write([{"index": i, "label": i}])
print("whole:", list(rows.read()["index"]) == list(range(N_IMAGES)))"""


@needs_proc
def test_run_all_stopped_by_a_signal_leaves_whole_rows_and_goes_on_from_there(checkout, tmp_path):
    shutil.rmtree(checkout / "notebooks")
    notebook(checkout / "notebooks", GROWS)
    run = call(checkout, "./run_all.sh", "--set", "n_images=1000000", LGAP_OUTPUTS=str(tmp_path))
    shards = lambda: sorted((tmp_path / "toy/rows/mine").glob("*.parquet"))
    wait_for(lambda: len(shards()) > 3, run)
    run.send_signal(signal.SIGTERM)
    said = run.communicate()[1]
    assert run.returncode == 128 + signal.SIGTERM and "Traceback" not in said
    assert "run the same command again to go on from there" in said
    wait_for(lambda: not processes_of(tmp_path))
    kept = len(shards())
    assert [len(pd.read_parquet(shard)) for shard in shards()] == [1] * kept
    again = call(checkout, "./run_all.sh", "--set", f"n_images={kept + 2}", LGAP_OUTPUTS=str(tmp_path))
    said = again.communicate()[1]
    assert again.returncode == 0, said
    text = (tmp_path / "toy/notebooks/01_first.ipynb").read_text()
    assert f"found {kept}\\n" in text and "whole: True" in text


def test_a_notebook_that_reaches_for_the_network_is_caught(tmp_path):
    script = """if True:
        import os, socket, urllib.request
        for reach in (lambda: socket.create_connection(("192.0.2.1", 80), 1),
                      lambda: urllib.request.urlopen("http://example.org", timeout=1),
                      lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.2", 53)),
                      lambda: socket.socket().connect_ex(("192.0.2.3", 80))):
            try:
                reach()
            except OSError as error:
                assert "a notebook tried to reach" in str(error), error
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
        print(os.environ.get("HF_HUB_OFFLINE"))"""
    guard = {
        "PYTHONPATH": str(ROOT / "tests/guard"),
        "LGAP_TRESPASS": str(tmp_path / "trespass"),
        "HF_HUB_OFFLINE": "1",
        "no_proxy": "*",
    }
    command = [sys.executable, "-c", script, "ipykernel_launcher"]
    done = subprocess.run(command, env=os.environ | guard, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr
    noted = (tmp_path / "trespass").read_text().split()
    assert noted == ["192.0.2.1", "example.org", "192.0.2.2", "192.0.2.3"]
    # the stored notebooks run so, and one attempt fails the whole
    script = (ROOT / "run_tests.sh").read_text()
    assert "PYTHONPATH=$root/tests/guard" in script and 'if [ -s "$LGAP_TRESPASS" ]; then' in script
