"""Kept rows: damaged shards, a full disk, killed processes and two at once lose and change nothing."""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pandas as pd
import pytest
from cheap_defense import ATTACK, Noisy, attacked, evaluation, same, shards

from lgap_utils import evaluate, results, rows, tables
from lgap_utils.files import folder_lock, write_whole
from lgap_utils.rows import Rows


def test_a_configuration_that_cannot_be_read_is_nobodys(copied):
    file = copied / "bpda-3-2-draws" / "config.json"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="config.json is not JSON.*move the folder away"):
        evaluation(copied).run(ATTACK)


# ---------------------------------------------------------------- damaged shards


def cut(shard, folder):
    shard.write_bytes(shard.read_bytes()[:-9])


def empty(shard, folder):
    shard.write_bytes(b"")


def page(shard, folder):
    shard.write_text("<html>Not found</html>")


def flip(shard, folder):
    data = bytearray(shard.read_bytes())
    data[data.index(pd.read_parquet(shard)["image"][0].encode()) + 3] ^= 1
    shard.write_bytes(data)


def rename_a_column(shard, folder):
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"broke_at", b"broke_au"))


def foreign(shard, folder):
    evaluation(folder / "foreign", seed=6, batch_size=2).run(ATTACK)
    shutil.copy(shards(folder / "foreign")[1], shard)


def other_attack(shard, folder):
    evaluation(folder / "other", batch_size=2).run(dataclasses.replace(ATTACK, eps_255=1))
    shutil.copy(shards(folder / "other")[1], shard)


def columns_of_its_own(shard, folder):
    pd.DataFrame({"index": [1]}).to_parquet(shard)


@pytest.mark.parametrize(
    "harm, kind",
    [
        (cut, "broken"),
        (empty, "broken"),
        (page, "broken"),
        (flip, "broken"),
        (rename_a_column, "broken"),
        (columns_of_its_own, "broken"),
        (foreign, "foreign"),
        (other_attack, "foreign"),
    ],
)
def test_a_damaged_or_foreign_shard_is_set_aside_with_a_word_and_its_images_run_again(
    unbroken, copied, tmp_path, capsys, harm, kind
):
    shard = shards(copied)[1]
    harm(shard, tmp_path)
    damaged, purifier = shard.read_bytes(), Noisy()
    capsys.readouterr()
    assert same(evaluation(copied, purifier=purifier, batch_size=2).run(ATTACK), unbroken[1])
    aside = shard.with_suffix(f".{kind}")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "kept as" in line]
    assert line.startswith(shard.name) and aside.name in line
    assert aside.read_bytes() == damaged and shard.exists() and attacked(purifier) == {16, 19}


@pytest.mark.parametrize("name", ["000000-first.parquet", "999999-last.parquet"])
def test_a_shard_that_is_there_twice_counts_once(unbroken, copied, capsys, name):
    shutil.copy(shards(copied)[1], shards(copied)[1].with_name(name))
    purifier = Noisy()
    assert same(evaluation(copied, purifier=purifier).run(ATTACK), unbroken[1]) and not purifier.keys
    assert "kept as" not in capsys.readouterr().out and len(shards(copied)) == 5


def test_no_flipped_bit_changes_a_row_unseen(copied, capsys):
    """A bit in each byte of a column's name, where Parquet's checksums do not look, and sixty anywhere."""
    shard, *others = shards(copied)
    for other in others:
        other.unlink()
    rows = evaluation(copied).rows(ATTACK)
    whole, expected, pick, set_aside = shard.read_bytes(), rows.read(), random.Random(0), 0
    name = whole.index(b"broke_at")
    for place in [*range(name - 12, name + 12), *(pick.randrange(len(whole)) for _ in range(60))]:
        data = bytearray(whole)
        data[place] ^= 1 << pick.randrange(8)
        shard.write_bytes(data)
        table = rows.read()
        printed = capsys.readouterr().out
        assert table.empty and "kept as" in printed if printed else (table == expected).all(axis=None)
        set_aside += bool(printed)
    assert len(expected) == 2 and 40 < set_aside < 84


# ---------------------------------------------------------------- a full disk, a killed process


@pytest.mark.parametrize("failing", ["builtins.open", "os.fsync", "os.replace"])
def test_a_full_disk_ends_in_a_sentence_and_leaves_earlier_shards_whole(
    unbroken, tmp_path, monkeypatch, failing
):
    module, name = failing.split(".")
    calls, real = [], getattr(sys.modules[module], name)

    def full(first, *args, **kwargs):
        if name == "fsync" or ".parquet." in str(first):
            calls.append(first)
            if len(calls) > (18 if name == "fsync" else 14):  # in the attack's third shard
                raise OSError(28, "No space left on device")
        return real(first, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[module], name, full)
        says = r"parquet could not be written \(No space left on device\); what lay there before is untouched"
        with pytest.raises(OSError, match=says):
            evaluation(tmp_path, batch_size=2).run(ATTACK)
    kept = {index for shard in shards(tmp_path) for index in pd.read_parquet(shard)["index"]}
    assert kept and not list(tmp_path.rglob("*.part"))
    purifier = Noisy()
    assert same(evaluation(tmp_path, purifier=purifier, batch_size=2).run(ATTACK), unbroken[1])
    assert attacked(purifier) == set(unbroken[1]["index"]) - kept != set()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_anew_stays_as_it_was(tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "file", b"old")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="file could not be written"):
        patched.setattr(os, failing, full)
        write_whole(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def run_until(folder, line=None, indices=None):
    """The lines of evaluate.py and rows.py that an evaluation runs; at number `line` it kills its process."""
    ran, before = [0], sys.gettrace()

    def trace(frame, event, _):
        if frame.f_code.co_filename not in (evaluate.__file__, rows.__file__):
            return None
        ran[0] += event == "line"
        if ran[0] == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    if line:
        # tqdm's own lock outlives a killed process, and Python complains
        evaluate.tqdm.set_lock(threading.RLock())
    with contextlib.redirect_stdout(io.StringIO()):
        sys.settrace(trace)
        try:
            evaluation(folder, batch_size=1).run(ATTACK, indices)
        finally:
            sys.settrace(before)
    return ran[0]


def results_of(table, folder):
    """results.json of a run, but for times."""
    names = {name: (name, "") for name in table["defence"].unique()}
    rows = tables.table_rows(table.assign(seconds=0.0), ATTACK, names)
    toy = SimpleNamespace(dataset="toy", same_models=False), SimpleNamespace(official=False, source="")
    results.write_results(folder, 3, rows, *toy, {})
    return (folder / "results.json").read_bytes()


def test_killed_at_twenty_random_moments_and_resumed_it_ends_with_the_same_results(unbroken, tmp_path):
    """Moments are counted in lines that ran, not in seconds, so that they are the same on any machine."""
    context, pick, killed, finished = multiprocessing.get_context("forkserver"), random.Random(1), 0, 0
    half = run_until(tmp_path / "unbroken") // 2
    # else each process imports torch anew
    context.set_forkserver_preload(["lgap_utils.evaluate", "pyarrow.parquet", "pytest"])
    while killed < 20:
        process = context.Process(target=run_until, args=(tmp_path / str(finished), pick.randint(1, half)))
        process.start()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        killed += process.exitcode != 0
        finished += process.exitcode == 0
    for run in range(finished + 1):
        purifier = Noisy()
        table = evaluation(tmp_path / str(run), purifier=purifier).run(ATTACK)
        assert same(table, unbroken[1])
        assert results_of(table, tmp_path / str(run)) == results_of(unbroken[1], tmp_path)
        assert run == finished or not purifier.keys
    assert finished or len(attacked(purifier)) < 8  # the last was killed on its way, and not at its start


# ---------------------------------------------------------------- two at once in one folder


def test_two_evaluations_in_one_folder_killed_forty_times_end_with_the_same_results(unbroken, tmp_path):
    """Two write into one folder, of the same or of overlapping images; each is killed at a random line."""
    context, pick, killed = multiprocessing.get_context("forkserver"), random.Random(1), 0
    half = run_until(tmp_path / "unbroken") // 2
    context.set_forkserver_preload(["lgap_utils.evaluate", "pyarrow.parquet", "pytest"])
    folder, some, rest = tmp_path / "0", [10, 13, 16, 19, 22], [16, 19, 22, 25, 28, 31]
    while killed < 40:
        pairs = pick.choice([(None, None), (some, rest), (some, None)])
        calls = [(folder, pick.randint(1, half), indices) for indices in pairs]
        two = [context.Process(target=run_until, args=call) for call in calls]
        for process in two:
            process.start()
        for process in two:
            process.join()
            assert process.exitcode in (-signal.SIGKILL, 0)
            killed += process.exitcode != 0
        if not any(process.exitcode for process in two):
            expected = unbroken[1][unbroken[1]["index"].isin(some)].reset_index(drop=True)
            assert same(evaluation(folder).run(ATTACK, some), expected)
            folder = tmp_path / str(killed + 1)
    assert same(evaluation(folder).run(ATTACK), unbroken[1])
    assert not [*tmp_path.rglob("*.broken"), *tmp_path.rglob("*.foreign")]


def test_a_folder_that_another_writes_into_is_waited_for_and_nothing_is_done_twice(
    unbroken, tmp_path, capsys
):
    first = Noisy()
    with folder_lock(tmp_path / "bpda-3-2-draws"):
        second, tables = Noisy(), []
        run = lambda: tables.append(evaluation(tmp_path, purifier=second).run(ATTACK))
        thread = threading.Thread(target=run)
        thread.start()
        printed = ""
        while "another process writes into" not in printed:
            assert thread.is_alive(), printed
            time.sleep(0.01)
            printed += capsys.readouterr().out
        assert same(evaluation(tmp_path, purifier=first).run(ATTACK), unbroken[1])  # the holder may go on
    thread.join()
    assert same(tables[0], unbroken[1]) and len(attacked(first)) == 8 and not attacked(second)


@pytest.mark.parametrize("size", range(1, 9))
def test_shards_that_overlap_are_each_used_for_what_is_missing_elsewhere(unbroken, tmp_path, size):
    """Shards of the first images beside shards of all but one: each image counts once, none is lost."""
    indices = unbroken[1]["index"].unique().tolist()
    evaluation(tmp_path / "some").run(ATTACK, indices[:size])
    evaluation(tmp_path / "most", batch_size=3).run(ATTACK, indices[1:])
    shutil.copytree(tmp_path / "most", tmp_path / "some", dirs_exist_ok=True)
    purifier = Noisy()
    assert same(evaluation(tmp_path / "some", purifier=purifier).run(ATTACK), unbroken[1])
    assert not attacked(purifier)


def test_rows_that_vanish_while_they_are_read_are_an_error_and_no_smaller_table(
    unbroken, copied, monkeypatch
):
    read, calls = Rows.read, []

    def robbed(self):
        calls.append(self)
        if (
            len(calls) == 6
        ):  # natural and its scores; the attack's; again, as its only writer; when all is done
            shards(copied)[0].unlink()
        return read(self)

    shards(copied)[1].unlink()
    monkeypatch.setattr(Rows, "read", robbed)
    with pytest.raises(RuntimeError, match="image 10 has 0 rows of 1, 2 images lack some"):
        evaluation(copied).run(ATTACK)
