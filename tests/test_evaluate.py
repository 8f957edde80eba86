"""An evaluation ends with the same rows however it was cut, ordered, shared out, broken off or damaged; and the cheap purifiers."""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lgap_utils import baselines, evaluate, results, rows, tables
from lgap_utils.baselines import with_purifier
from lgap_utils.defense import LGAP
from lgap_utils.evaluate import Evaluation, purified_pixels, purify_rows
from lgap_utils.files import folder_lock, write_whole
from lgap_utils.identity import named
from lgap_utils.images import Images
from lgap_utils.noise import Keys, generator, seed_of
from lgap_utils.protocols import NATURAL, Attack
from lgap_utils.rows import Rows

SHAPE, N_DRAWS, SEED = (3, 4, 4), 3, 5
WEIGHTS = torch.randn(10, *SHAPE, generator=generator("weights"))
ATTACK = Attack("BPDA-3, 2 draws", view="bpda", eps_255=16, step_size_255=6, n_steps=3, n_eot=2)


def net(x):
    """Ten logits, each a sum over one image: bit for bit the same in any batch."""
    return ((x + x * x)[:, None] * WEIGHTS).flatten(2).sum(2)


def words(x):
    return [f"a picture of {seed_of(*image.flatten().tolist()) % 1000}" for image in x]


net, words = named(net, "sums"), named(words, "numbers")


class Noisy:
    """A cheap random purifier that keeps the keys it was called with."""

    def __init__(self, strength=0.1):
        self.strength, self.keys = strength, []

    def settings(self):
        return {"strength": self.strength}

    def __call__(self, x, captions, keys):
        self.keys += keys.rows
        return x + self.strength * keys.normal(x.shape[1:], "noise")


def some_images(n=8):
    pixels = (255 * torch.rand(n, *SHAPE, generator=generator("images"))).byte()
    return Images(pixels, net(pixels / 255).argmax(1), 3 * torch.arange(n) + 10, tuple("0123456789"))


def evaluation(folder, images=None, purifier=None, batch_size=8, config=None, **settings):
    target = LGAP(words, purifier or Noisy(), net)
    return Evaluation(
        {"LGAP": target, "undefended": with_purifier(target, baselines.undefended())},
        some_images() if images is None else images,
        folder,
        config=config or {"weights": "1"},
        **{"n_draws": N_DRAWS, "seed": SEED, "batch_size": batch_size} | settings,
    )


def same(table, expected):
    """Every column but the time that it took, bit for bit."""
    pd.testing.assert_frame_equal(
        table.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True
    )
    return True


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A whole run: its folder, which must not be changed, and its table."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, evaluation(folder, batch_size=2).run(ATTACK)


@pytest.fixture
def copied(unbroken, tmp_path):
    """A copy of the whole run to do harm to."""
    return shutil.copytree(unbroken[0], tmp_path / "copy")


def shards(folder, attack="bpda-3-2-draws"):
    return sorted((folder / attack).glob("*.parquet"))


def attacked(purifier):
    """The images that an attack asked about."""
    return {index for _, index, stage, _, _ in purifier.keys if stage == "attack"}


class Mine(Attack):
    """An attack of a user's own: it notes nothing."""

    def __call__(self, defense, x, y, keys, batch_size=64, record=None, progress=None):
        return (x + self.eps_255 / 255).clamp(0, 1)


def test_an_attack_of_ones_own_is_neither_called_nor_resumed_as_pgd(tmp_path):
    run = evaluation(tmp_path)
    table, attack = run.run(Mine("mine")), Mine("mine")
    assert (
        attack.describe() == "Mine; eps 8/255"
        and set(table["inside"]) == {True}
        and set(table["broke_at"]) == {-1}
    )
    assert run.run(Attack("mine"))["n_steps"].eq(40).all() and shards(tmp_path, "mine")
    with pytest.raises(TypeError, match="attack: got <function .*expected an attacks.Attack"):
        run.run(lambda x, y: x)


# ---------------------------------------------------------------- parts that work in place, and attacks that give no images


class InPlace(Attack):
    settings = lambda self: {"name": self.name}

    def __call__(self, defense, x, y, keys, batch_size=64, record=None, progress=None):
        y.zero_()
        return x.add_(2 * self.eps_255 / 255).clamp_(0, 1)


def test_an_attack_that_works_in_place_is_measured_from_the_image_as_it_was(tmp_path):
    table, x = evaluation(tmp_path).run(InPlace("in place", eps_255=8)), some_images().x
    linf = ((x + 16 / 255).clamp(0, 1) - x).flatten(1).amax(1)
    assert np.allclose(table.drop_duplicates("index")["linf"], linf) and not table["inside"].any()
    assert table.drop_duplicates("index")["label"].tolist() == some_images().labels.tolist()


@pytest.mark.parametrize(
    "answer, says",
    [
        (lambda x: None, "it gave NoneType, expected a tensor of images"),
        (lambda x: x[:1], r"it gave \[1, 3, 4, 4\], expected a tensor of images \[8, 3, 4, 4\]"),
        (lambda x: x / 0, "its image 10 holds NaN or inf"),
    ],
)
def test_an_attack_that_gives_no_images_is_named(tmp_path, answer, says):
    class Wrong(Attack):
        def __call__(self, defense, x, y, keys, **_):
            return answer(x)

    with pytest.raises((TypeError, ValueError), match=f"attack 'wrong': {says}"):
        evaluation(tmp_path).run(Wrong("wrong"))


@pytest.mark.filterwarnings("ignore:classifier. its outputs look like softmax")
def test_rows_of_a_classifier_that_answers_with_probabilities_are_flagged(tmp_path):
    soft = named(lambda x: net(x).softmax(1), "softmax")
    run = Evaluation(
        {
            "soft": LGAP(words, baselines.undefended(), soft),
            "plain": LGAP(words, baselines.undefended(), net),
        },
        some_images(),
        tmp_path,
        config={},
    )
    flags = run.run(ATTACK).groupby("defence")["flags"].unique()
    assert list(flags["soft"]) == [evaluate.SOFTMAX] and list(flags["plain"]) == [""]


@pytest.mark.parametrize("n_draws", [0, -1, 2.0, True])
def test_a_number_of_draws_that_is_none_is_refused(tmp_path, n_draws):
    with pytest.raises(ValueError, match="n_draws=.*: expected a whole number of at least 1"):
        evaluation(tmp_path, n_draws=n_draws)


@pytest.mark.parametrize(
    "names, apart", [(("атака", "攻撃"), True), (("", "?"), True), (("A b", "A  b"), False)]
)
def test_attacks_are_told_apart_whatever_their_names_are_written_in(names, apart):
    first, second = map(evaluate.folder_name, names)
    assert first and second and re.fullmatch("[a-z0-9-]+", first + second) and (first != second) == apart
    assert evaluate.folder_name("blind PGD-40") == "blind-pgd-40"


# ---------------------------------------------------------------- what a row says


def test_there_is_a_row_for_each_image_defence_and_draw_and_it_says_what_happened(unbroken):
    images, table, defense = some_images(), unbroken[1], LGAP(words, Noisy(), net)
    x, y, indices = images.x, images.labels, images.indices.tolist()
    assert table[["index", "defence", "draw"]].values.tolist() == [
        row for i in indices for row in ([i, "LGAP", 0], [i, "LGAP", 1], [i, "LGAP", 2], [i, "undefended", 0])
    ]
    adv = ATTACK(defense, x, y, Keys(indices, SEED, "attack"))
    for i, index in enumerate(indices):
        mine = table[table["index"] == index]
        for column, image in (("clean", x[i : i + 1]), ("adversarial", adv[i : i + 1])):
            answers = (
                defense(image, keys=Keys([index], SEED).at([0], N_DRAWS)).argmax(1).tolist()
                + net(image).argmax(1).tolist()
            )
            assert mine[column].tolist() == answers
            assert mine["caption" if column == "adversarial" else "caption_clean"].tolist() == words(
                image
            ) * 3 + [""]
        assert (
            set(mine["label"]) == {int(y[i])}
            and set(mine["inside"]) == {True}
            and (mine["seconds"] > 0).all()
        )
        assert np.allclose(mine["linf"], (adv[i] - x[i]).abs().max(), atol=1e-7)
    assert (table["adversarial"] != table["clean"]).any() and table["clean"].nunique() > 2
    constant = {
        "attack": ATTACK.name,
        "eps_255": 16,
        "n_steps": 3,
        "n_eot": 2,
        "success": "last iterate",
        "flags": "",
        "bad_gradients": 0,
    }
    assert {name: set(table[name]) for name in constant} == {
        name: {value} for name, value in constant.items()
    }


def test_the_clean_columns_are_those_of_the_natural_run(unbroken, copied):
    purifier = Noisy()
    natural = evaluation(copied, purifier=purifier).run(NATURAL)
    assert not purifier.keys  # it was run already, as part of the attack's run
    assert natural["adversarial"].tolist() == natural["clean"].tolist() == unbroken[1]["clean"].tolist()
    assert natural["caption"].tolist() == unbroken[1]["caption_clean"].tolist() and set(natural["linf"]) == {
        0
    }


class Cheat(Attack):
    def __call__(self, *args, **kwargs):
        return (super().__call__(*args, **kwargs | {"record": None}) + 0.1).clamp(0, 1)


def test_an_attack_that_leaves_the_ball_is_marked_and_one_that_reports_nothing_is_no_error(tmp_path):
    table = evaluation(tmp_path).run(Cheat(**dataclasses.asdict(ATTACK)))
    assert (
        not table["inside"].any()
        and (table["linf"] > 16 / 255 + 1e-6).all()
        and set(table["broke_at"]) == {-1}
    )


def test_the_plan_counts_what_will_be_purified(tmp_path):
    purifier = Noisy()
    mine = evaluation(tmp_path, purifier=purifier)
    plan = mine.plan(ATTACK, 8)
    assert plan["purifications"] == 8 * (3 * 2 + N_DRAWS + 1) == 80
    assert plan["text"].startswith(f"{ATTACK.name}: 8 images, 80 purifications")
    mine.run(NATURAL)
    purifier.keys.clear()
    mine.run(ATTACK)
    assert len(purifier.keys) == 8 * (3 * 2 + N_DRAWS) + 2 + 8  # two and eight to see how long it will take


# ---------------------------------------------------------------- however it is cut


def test_running_out_of_memory_changes_no_row(unbroken, tmp_path):
    class Small(Noisy):
        settings = lambda self: {"class": "Noisy", "strength": self.strength}

        def __call__(self, x, captions, keys):
            if len(keys) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().__call__(x, captions, keys)

    run = evaluation(tmp_path, purifier=Small(), batch_size=8)
    assert run.batch_size.size == 8
    small = run.run(ATTACK)
    assert run.batch_size.size <= 2 and same(small, unbroken[1])


def test_a_block_is_attacked_as_a_whole_or_not_at_all(quick, tmp_path):
    """Images 10, 13, ... 31 at hand: 10; 13; 16, 19; 22, 25 and 28, 31 share blocks of 6 from 6, 12, 18, 24 and 30."""
    attack, images = Attack("AA", optimiser="autoattack", n_steps=3, block=12), some_images()
    whole = evaluation(tmp_path / "whole", batch_size=3).run(attack)
    shared = evaluation(tmp_path / "shared", batch_size=1)
    parts = [shared.run(attack, indices) for indices in ([25, 31, 28], [13, 22, 16, 19], [10])]
    assert same(pd.concat(parts).sort_values(["index", "defence", "draw"], ignore_index=True), whole)
    with pytest.raises(ValueError, match="image 16 is in a block of 12 images that are attacked together"):
        evaluation(tmp_path / "cut").run(attack, [13, 22])
    assert len(images) == 8


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 0, 1, 6, 3, 4]], ids=["in order", "shuffled"]
)
def test_batch_size_and_order_change_no_row(unbroken, tmp_path, batch_size, order):
    assert same(evaluation(tmp_path, some_images()[order], batch_size=batch_size).run(ATTACK), unbroken[1])


@pytest.mark.parametrize(
    "parts", [([10, 13, 16], [19, 22, 25, 28, 31]), ([31, 10], [22, 25], [13, 28, 16, 19])]
)
@pytest.mark.parametrize("apart", [False, True], ids=["one folder", "folders copied together"])
def test_whoever_runs_which_images_changes_no_row(unbroken, tmp_path, parts, apart):
    for k, part in enumerate(parts):
        table = evaluation(tmp_path / str(k * apart)).run(ATTACK, part)
        assert same(table, unbroken[1][unbroken[1]["index"].isin(part)].reset_index(drop=True))
        shutil.copytree(
            tmp_path / str(k * apart), tmp_path / "0", dirs_exist_ok=True
        ) if apart and k else None
    purifier = Noisy()
    assert same(evaluation(tmp_path / "0", purifier=purifier).run(ATTACK), unbroken[1]) and not purifier.keys


def test_resuming_does_what_is_missing_and_nothing_else(unbroken, copied):
    lost = shards(copied)[1]
    lost.unlink()
    purifier = Noisy()
    assert same(evaluation(copied, purifier=purifier).run(ATTACK), unbroken[1])
    assert attacked(purifier) == {16, 19} and len(shards(unbroken[0])) == 4


@pytest.mark.parametrize(
    "indices, says",
    [
        ([10, 11], "indices: 11 is not among the 8 images at hand"),
        ([10, 13, 10], "indices: .*twice"),
        ([], "indices: no image"),
    ],
)
def test_images_that_are_not_at_hand_or_named_twice_are_refused(tmp_path, indices, says):
    with pytest.raises(ValueError, match=says):
        evaluation(tmp_path).run(ATTACK, indices)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- whose rows they are


class Sharp(Noisy):
    """Another purifier whose settings are the same."""

    def settings(self):
        return super().settings()


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"seed": 6}, "seed: there 5, here 6"),
        ({"n_draws": 2}, "n_draws: there 3, here 2"),
        ({"config": {"weights": "2"}}, "weights: there '1', here '2'"),
        ({"purifier": Noisy(0.2)}, "defences.LGAP.purifier.is.strength: there 0.1, here 0.2"),
        ({"purifier": Sharp()}, "defences.LGAP.purifier.is.class: there 'Noisy', here 'Sharp'"),
    ],
)
def test_rows_of_another_configuration_are_refused_and_the_difference_is_named(copied, changed, says):
    before = {path: path.read_bytes() for path in copied.rglob("*.*")}
    with pytest.raises(ValueError, match=rf"another configuration \({re.escape(says)}\).*move or delete it"):
        evaluation(copied, **changed).run(ATTACK)
    assert {path: path.read_bytes() for path in copied.rglob("*.*")} == before


def test_rows_of_another_attack_target_or_method_are_refused(copied, monkeypatch):
    with pytest.raises(ValueError, match=re.escape("(attack.eps_255: there 16, here 8)")):
        evaluation(copied).run(dataclasses.replace(ATTACK, eps_255=8))
    other = evaluation(copied)
    with pytest.raises(ValueError, match="target: there 'LGAP', here 'undefended'"):
        Evaluation(
            dict(reversed(other.defenses.items())),
            other.images,
            copied,
            config={"weights": "1"},
            n_draws=3,
            seed=5,
        ).run(ATTACK)
    monkeypatch.setattr(evaluate, "METHOD", 2)
    with pytest.raises(ValueError, match="method: there 3, here 2"):
        evaluation(copied).run(ATTACK)


def test_another_classifier_or_another_image_of_the_same_index_is_refused(copied):
    mine, other = (
        evaluation(copied),
        named(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10)), "linear"),
    )
    with pytest.raises(ValueError, match="defences.LGAP.classifier.is.name: there 'sums', here 'linear'"):
        Evaluation(
            {name: LGAP(words, d.purifier, other) for name, d in mine.defenses.items()},
            mine.images,
            copied,
            config={"weights": "1"},
            n_draws=N_DRAWS,
            seed=SEED,
        ).run(ATTACK)
    changed = dataclasses.replace(mine.images, pixels=mine.images.pixels.clone())
    changed.pixels[2, 0, 0, 0] ^= 1
    held = sorted(copied.rglob("*.parquet"))
    with pytest.raises(ValueError, match="image 16 is not the one at hand.*rows of other images"):
        evaluation(copied, changed).run(ATTACK)
    assert sorted(copied.rglob("*.parquet")) == held


def test_a_number_may_be_written_in_two_ways(unbroken, copied):
    purifier = Noisy()
    assert (
        evaluation(copied, purifier=purifier)
        .run(dataclasses.replace(ATTACK, eps_255=16.0))["label"]
        .equals(unbroken[1]["label"])
    )
    assert not purifier.keys and not list(copied.rglob("*.foreign"))


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
    data[data.index(b"a picture of") + 3] ^= 1
    shard.write_bytes(data)


def rename_a_column(shard, folder):
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"adversarial", b"adversariak"))


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
    """A bit in each byte of a column's name and description, where Parquet's own checksums do not look, and sixty anywhere."""
    shard, *others = shards(copied)
    for other in others:
        other.unlink()
    rows = evaluation(copied).rows(ATTACK)
    whole, expected, pick, set_aside = shard.read_bytes(), rows.read(), random.Random(0), 0
    name = whole.index(b"adversarial")
    for place in [*range(name - 12, name + 12), *(pick.randrange(len(whole)) for _ in range(60))]:
        data = bytearray(whole)
        data[place] ^= 1 << pick.randrange(8)
        shard.write_bytes(data)
        table = rows.read()
        said = capsys.readouterr().out
        assert table.empty and "kept as" in said if said else (table == expected).all(axis=None)
        set_aside += bool(said)
    assert len(expected) == 2 * (N_DRAWS + 1) and 40 < set_aside < 84


# ---------------------------------------------------------------- a disk that is full, a process that is killed


@pytest.mark.parametrize("failing", ["builtins.open", "os.fsync", "os.replace"])
def test_a_full_disk_ends_in_a_sentence_and_leaves_earlier_shards_whole(
    unbroken, tmp_path, monkeypatch, failing
):
    module, name = failing.split(".")
    calls, real = [], getattr(sys.modules[module], name)

    def full(first, *args, **kwargs):
        if name == "fsync" or ".parquet." in str(first):
            calls.append(first)
            if len(calls) > 7:
                raise OSError(28, "No space left on device")
        return real(first, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[module], name, full)
        with pytest.raises(
            OSError,
            match=r"parquet could not be written \(No space left on device\); what lay there before is untouched",
        ):
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
    """An evaluation that kills its process at its line-th line of evaluate.py and rows.py; the number of lines if it does not."""
    ran, before = [0], sys.gettrace()

    def trace(frame, event, _):
        if frame.f_code.co_filename not in (evaluate.__file__, rows.__file__):
            return None
        ran[0] += event == "line"
        if ran[0] == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    if line:
        evaluate.tqdm.set_lock(
            threading.RLock()
        )  # tqdm's own outlives a killed process, and Python complains
    with contextlib.redirect_stdout(io.StringIO()):
        sys.settrace(trace)
        try:
            evaluation(folder, batch_size=1).run(ATTACK, indices)
        finally:
            sys.settrace(before)
    return ran[0]


def results_of(table, folder):
    """results.json of a run, but for times."""
    rows = tables.table_rows(
        table.assign(seconds=0.0), ATTACK, {name: (name, "") for name in table["defence"].unique()}
    )
    toy = SimpleNamespace(dataset="toy", same_models=False), SimpleNamespace(official=False, source="")
    results.write_results(folder, 3, rows, *toy, {})
    return (folder / "results.json").read_bytes()


def test_killed_at_twenty_random_moments_and_resumed_it_ends_with_the_same_results(unbroken, tmp_path):
    """Moments are counted in lines that ran, not in seconds, so that they are the same on any machine."""
    context, pick, killed, finished = multiprocessing.get_context("forkserver"), random.Random(1), 0, 0
    half = run_until(tmp_path / "unbroken") // 2
    context.set_forkserver_preload(
        ["lgap_utils.evaluate", "pyarrow.parquet", "pytest"]
    )  # else each process imports torch anew
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
        assert same(table, unbroken[1]) and results_of(table, tmp_path / str(run)) == results_of(
            unbroken[1], tmp_path
        )
        assert run == finished or not purifier.keys
    assert finished or 0 < len(attacked(purifier)) < 8  # the last was killed on its way, and not at its start


# ---------------------------------------------------------------- two at once in one folder


def one_of_two(folder, line, indices):
    """As `run_until`, about some of the images."""
    run_until(folder, line, indices)


def test_two_evaluations_in_one_folder_killed_forty_times_end_with_the_same_results(unbroken, tmp_path):
    """Two processes write into one folder at a time, of the same images or of overlapping ones; each is killed at a random line."""
    context, pick, killed = multiprocessing.get_context("forkserver"), random.Random(1), 0
    half = run_until(tmp_path / "unbroken") // 2
    context.set_forkserver_preload(["lgap_utils.evaluate", "pyarrow.parquet", "pytest"])
    folder, some, rest = tmp_path / "0", [10, 13, 16, 19, 22], [16, 19, 22, 25, 28, 31]
    while killed < 40:
        pairs = pick.choice([(None, None), (some, rest), (some, None)])
        two = [
            context.Process(target=one_of_two, args=(folder, pick.randint(1, half), indices))
            for indices in pairs
        ]
        for process in two:
            process.start()
        for process in two:
            process.join()
            assert process.exitcode in (-signal.SIGKILL, 0)
            killed += process.exitcode != 0
        if not any(process.exitcode for process in two):
            assert same(
                evaluation(folder).run(ATTACK, some),
                unbroken[1][unbroken[1]["index"].isin(some)].reset_index(drop=True),
            )
            folder = tmp_path / str(killed + 1)
    assert same(evaluation(folder).run(ATTACK), unbroken[1])
    assert not [*tmp_path.rglob("*.broken"), *tmp_path.rglob("*.foreign")]


def test_a_folder_that_another_writes_into_is_waited_for_and_nothing_is_done_twice(
    unbroken, tmp_path, capsys
):
    first = Noisy()
    with folder_lock(tmp_path / "bpda-3-2-draws"):
        second, found = Noisy(), []
        thread = threading.Thread(
            target=lambda: found.append(evaluation(tmp_path, purifier=second).run(ATTACK))
        )
        thread.start()
        said = ""
        while "another process writes into" not in said:
            assert thread.is_alive(), said
            time.sleep(0.01)
            said += capsys.readouterr().out
        assert same(evaluation(tmp_path, purifier=first).run(ATTACK), unbroken[1])  # the holder may go on
    thread.join()
    assert same(found[0], unbroken[1]) and len(attacked(first)) == 8 and not attacked(second)


@pytest.mark.parametrize("size", range(1, 9))
def test_shards_that_overlap_are_each_used_for_what_is_missing_elsewhere(unbroken, tmp_path, size):
    """Shards of the first `size` images, copied beside shards of all: each image counts once, and none is lost."""
    indices = unbroken[1]["index"].unique().tolist()
    evaluation(tmp_path / "some").run(ATTACK, indices[:size])
    evaluation(tmp_path / "most", batch_size=3).run(ATTACK, indices[1:])
    shutil.copytree(tmp_path / "most", tmp_path / "some", dirs_exist_ok=True)
    purifier = Noisy()
    assert same(evaluation(tmp_path / "some", purifier=purifier).run(ATTACK), unbroken[1]) and not attacked(
        purifier
    )


def test_rows_that_vanish_while_they_are_read_are_an_error_and_no_smaller_table(
    unbroken, copied, monkeypatch
):
    read, calls = Rows.read, []

    def robbed(self):
        calls.append(self)
        if len(calls) == 4:  # natural; the attack's; again, as its only writer; when all is done
            shards(copied)[0].unlink()
        return read(self)

    shards(copied)[1].unlink()
    monkeypatch.setattr(Rows, "read", robbed)
    with pytest.raises(RuntimeError, match="image 10 has 0 rows of 4, and 1 more images lack some"):
        evaluation(copied).run(ATTACK)


# ---------------------------------------------------------------- purified images, kept


def test_purified_images_are_kept_and_taken_up_again(tmp_path):
    images, purifier = some_images(), Noisy()
    defense = LGAP(words, purifier, net)
    purify_rows(defense, images[2:5], tmp_path, config={}, seed=SEED, batch_size=2)
    purifier.keys.clear()
    table = purify_rows(defense, images, tmp_path, config={}, seed=SEED, batch_size=3)
    assert {key[1] for key in purifier.keys} == {10, 13, 25, 28, 31}
    assert same(purify_rows(defense, images, tmp_path / "whole", config={}, seed=SEED), table)
    purified = Noisy()(images.x, None, Keys(images.indices, SEED))
    assert torch.equal(purified_pixels(table, SHAPE), (purified.clamp(0, 1) * 255).round().to(torch.uint8))
    assert (
        table["prediction"].tolist() == net(purified).argmax(1).tolist()
        and table["undefended"].tolist() == images.labels.tolist()
    )
    with pytest.raises(ValueError, match="image 10 is not the one at hand.*rows of other images"):
        purify_rows(
            defense, dataclasses.replace(images, pixels=255 - images.pixels), tmp_path, config={}, seed=SEED
        )
    with pytest.raises(
        ValueError,
        match=f"image 10 was run with the label {images.labels[0]}, and has {9 - images.labels[0]} now",
    ):
        purify_rows(
            defense, dataclasses.replace(images, labels=9 - images.labels), tmp_path, config={}, seed=SEED
        )
    with pytest.raises(ValueError, match="seed: there 5, here 6"):
        purify_rows(defense, images, tmp_path, config={}, seed=6)
    with pytest.raises(ValueError, match="defence.purifier.is.strength: there 0.1, here 0.3"):
        purify_rows(LGAP(words, Noisy(0.3), net), images, tmp_path, config={}, seed=SEED)
    with pytest.raises(ValueError, match=r"x: got shape \[2, 3, 4, 4\] for images of shape \[8, 3, 4, 4\]"):
        purify_rows(defense, images, tmp_path, config={"attack": {"eps": 1}}, x=images.x[:2])
    with pytest.raises(
        ValueError, match="x: whose images these are cannot be told from their rows; say it, as in attack="
    ):
        purify_rows(defense, images, tmp_path, config={}, x=images.x)


def test_purified_images_of_two_at_once_or_of_overlapping_shards_are_each_there_once(tmp_path):
    images, purifier = some_images(), Noisy()
    defense = LGAP(words, purifier, net)
    whole = purify_rows(defense, images, tmp_path / "whole", config={}, seed=SEED)
    purifier.keys.clear()
    threads = [
        threading.Thread(
            target=purify_rows,
            args=(defense, images[part], tmp_path / "rows"),
            kwargs={"config": {}, "seed": SEED, "batch_size": 2},
        )
        for part in (slice(0, 5), slice(3, 8))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key[1] for key in purifier.keys) == images.indices.tolist()  # none was purified twice
    purify_rows(defense, images[:3], tmp_path / "other", config={}, seed=SEED, batch_size=3)
    shutil.copytree(tmp_path / "other", tmp_path / "rows", dirs_exist_ok=True)
    assert same(purify_rows(defense, images, tmp_path / "rows", config={}, seed=SEED), whole)
