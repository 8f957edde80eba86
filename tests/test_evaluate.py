"""What a row of an attack or of a purified image says; no batch size, order or resuming changes one."""

import dataclasses
import re
import shutil
import threading
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from cheap_defense import (
    ATTACK,
    N_DRAWS,
    SEED,
    SHAPE,
    Noisy,
    attacked,
    evaluation,
    net,
    same,
    shards,
    some_images,
    words,
)

from lgap_utils import baselines, evaluate, rows
from lgap_utils.defense import LGAP
from lgap_utils.evaluate import Evaluation, purified_pixels
from lgap_utils.identity import named
from lgap_utils.noise import Keys
from lgap_utils.protocols import NATURAL, Attack
from lgap_utils.purified import purify_rows


class Mine(Attack):
    """An attack of a user's own: it notes nothing."""

    def __call__(self, defense, x, y, keys, batch_size=64, record=None, progress=None):
        return (x + self.eps_255 / 255).clamp(0, 1)


def test_an_attack_of_ones_own_is_neither_called_nor_resumed_as_pgd(tmp_path):
    run = evaluation(tmp_path)
    table = run.run(Mine("mine"))
    assert Mine("mine").describe() == "Mine; eps 8/255"
    assert set(table["inside"]) == {True} and set(table["broke_at"]) == {-1}
    assert run.run(Attack("mine"))["n_steps"].eq(40).all() and shards(tmp_path, "mine")
    with pytest.raises(TypeError, match="attack: got <function .*expected a protocols.Attack"):
        run.run(lambda x, y: x)


# ---------------------------------------------------------------- attacks in place, or without images


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
    classifiers = {"soft": soft, "plain": net}
    defenses = {name: LGAP(words, baselines.undefended(), net) for name, net in classifiers.items()}
    table = Evaluation(defenses, some_images(), tmp_path, config={}).run(ATTACK)
    flags = table.groupby("defence")["flags"].unique()
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
    judged = [["LGAP", 0], ["LGAP", 1], ["LGAP", 2], ["undefended", 0]]
    assert table[["index", "defence", "draw"]].values.tolist() == [
        [i, *row] for i in indices for row in judged
    ]
    adv = ATTACK(defense, x, y, Keys(indices, SEED, "attack"))
    for i, index in enumerate(indices):
        mine = table[table["index"] == index]
        for column, caption, images in (("clean", "caption_clean", x), ("adversarial", "caption", adv)):
            image = images[i : i + 1]
            draws = defense(image, keys=Keys([index], SEED).at([0], N_DRAWS)).argmax(1).tolist()
            assert mine[column].tolist() == draws + net(image).argmax(1).tolist()
            assert mine[caption].tolist() == words(image) * 3 + [""]
        assert set(mine["label"]) == {int(y[i])} and set(mine["inside"]) == {True}
        assert (mine["seconds"] > 0).all()
        assert np.allclose(mine["linf"], (adv[i] - x[i]).abs().max(), atol=1e-7)
    assert (table["adversarial"] != table["clean"]).any() and table["clean"].nunique() > 2
    constant = {"attack": ATTACK.name, "eps_255": 16, "n_steps": 3, "n_eot": 2, "success": "last iterate"}
    for name, value in (constant | {"flags": "", "bad_gradients": 0}).items():
        assert set(table[name]) == {value}


def test_the_clean_columns_are_those_of_the_natural_run(unbroken, copied):
    purifier = Noisy()
    natural = evaluation(copied, purifier=purifier).run(NATURAL)
    assert not purifier.keys  # it was run already, as part of the attack's run
    assert natural["adversarial"].tolist() == natural["clean"].tolist() == unbroken[1]["clean"].tolist()
    assert natural["caption"].tolist() == unbroken[1]["caption_clean"].tolist()
    assert set(natural["linf"]) == {0}


class Cheat(Attack):
    def __call__(self, *args, **kwargs):
        return (super().__call__(*args, **kwargs | {"record": None}) + 0.1).clamp(0, 1)


def test_an_attack_that_leaves_the_ball_is_marked_and_one_that_reports_nothing_is_no_error(tmp_path):
    table = evaluation(tmp_path).run(Cheat(**dataclasses.asdict(ATTACK)))
    assert not table["inside"].any() and (table["linf"] > 16 / 255 + 1e-6).all()
    assert set(table["broke_at"]) == {-1}


def test_the_plan_counts_what_will_be_purified(tmp_path):
    purifier = Noisy()
    mine = evaluation(tmp_path, purifier=purifier)
    plan = mine.plan(ATTACK, 8)
    assert plan["purifications"] == 8 * 3 * 2 == 48
    assert plan["text"].startswith(f"{ATTACK.name}: 8 images, 48 purifications")
    mine.run(NATURAL)
    purifier.keys.clear()
    mine.run(ATTACK)
    assert len(purifier.keys) == 8 * (3 * 2 + N_DRAWS) + 2 + 8  # two and eight to see how long it will take


# ---------------------------------------------------------------- attacked images, kept


def test_attacked_images_come_back_bit_for_bit_and_rows_alone_are_no_picture(unbroken):
    images, table = some_images(), unbroken[1]
    adv = ATTACK(LGAP(words, Noisy(), net), images.x, images.labels, Keys(images.indices, SEED, "attack"))
    assert torch.equal(evaluate.attacked_images(table, images[[3, 1, 0, 2, 4, 5, 6, 7]]), adv)
    assert torch.equal(evaluate.attacked_images(table[table["index"] == 16], images), adv[2:3])
    assert table.groupby("index")["change"].nunique().eq(1).all()
    assert set(evaluation(unbroken[0]).run(NATURAL)["change"]) == {b""}
    other = dataclasses.replace(images, pixels=255 - images.pixels)
    with pytest.raises(ValueError, match="image 10 of the rows is not among them, or has other pixels"):
        evaluate.attacked_images(table, other)


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.5, 0.5), (1 / 3, 1e-38), (-0.0, 0.0)])
def test_any_float_is_kept_as_it_is(values):
    x, adv = (torch.full((2, 3, 5, 7), value) for value in values)
    adv[1] = x[1]
    kept = rows.packed(adv, x)
    assert torch.equal(rows.unpacked(kept, x).view(torch.int32), adv.view(torch.int32)) and kept[1] == b""


def test_a_further_defence_is_scored_and_attacks_nothing(unbroken, tmp_path):
    """The folder does not care who asked for which defence first; a changed one is refused."""
    few = evaluation(tmp_path).run(ATTACK, defenses=["undefended"])
    assert set(few["defence"]) == {"undefended"}
    purifier = Noisy()
    assert same(evaluation(tmp_path, purifier=purifier).run(ATTACK), unbroken[1]) and not attacked(purifier)
    assert same(evaluation(tmp_path).run(ATTACK, defenses=["undefended"]), few)
    changed = evaluation(tmp_path)
    changed.defenses["undefended"] = baselines.with_purifier(changed.target, baselines.blur(1.0))
    with pytest.raises(ValueError, match="undefended holds rows of another .*defence.purifier.is.purifier"):
        changed.run(ATTACK)
    for names in (["LGAB"], []):
        with pytest.raises(ValueError, match=r"defenses: got .*, expected some of \['LGAP', 'undefended'\]"):
            evaluation(tmp_path).run(ATTACK, defenses=names)


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
    """Of the images 10, 13, ... 31 these share blocks of 12: 10; 13, 16, 19, 22; 25, 28, 31."""
    attack = Attack("AA", optimiser="autoattack", n_steps=3, block=12)
    whole = evaluation(tmp_path / "whole", batch_size=3).run(attack)
    shared = evaluation(tmp_path / "shared", batch_size=1)
    parts = [shared.run(attack, indices) for indices in ([25, 31, 28], [13, 22, 16, 19], [10])]
    assert same(pd.concat(parts).sort_values(["index", "defence", "draw"], ignore_index=True), whole)
    with pytest.raises(ValueError, match="image 16 is in a block of 12 images that are attacked together"):
        evaluation(tmp_path / "cut").run(attack, [13, 22])


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
        folder = tmp_path / str(k * apart)
        table = evaluation(folder).run(ATTACK, part)
        assert same(table, unbroken[1][unbroken[1]["index"].isin(part)].reset_index(drop=True))
        if folder != tmp_path / "0":
            shutil.copytree(folder, tmp_path / "0", dirs_exist_ok=True)
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
        ([10, 13, 10], "indices: .*each once"),
        ([], "indices: no image.*at least one"),
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
        ({"purifier": Noisy(0.2)}, "target.purifier.is.strength: there 0.1, here 0.2"),
        ({"purifier": Sharp()}, "target.purifier.is.class: there 'Noisy', here 'Sharp'"),
    ],
)
def test_rows_of_another_configuration_are_refused_and_the_difference_is_named(copied, changed, says):
    before = {path: path.read_bytes() for path in copied.rglob("*.*")}
    expected = rf"another configuration \({re.escape(says)}\).*move or delete the folder"
    with pytest.raises(ValueError, match=expected):
        evaluation(copied, **changed).run(ATTACK)
    assert {path: path.read_bytes() for path in copied.rglob("*.*")} == before


def test_rows_of_another_attack_target_or_method_are_refused(copied, monkeypatch):
    with pytest.raises(ValueError, match=re.escape("(attack.eps_255: there 16, here 8)")):
        evaluation(copied).run(dataclasses.replace(ATTACK, eps_255=8))
    other = evaluation(copied)
    other.defenses = dict(reversed(other.defenses.items()))
    with pytest.raises(ValueError, match="target.captioner.*target.name: there 'LGAP', here 'undefended'"):
        other.run(ATTACK)
    monkeypatch.setattr(evaluate, "METHOD", 2)
    with pytest.raises(ValueError, match="method: there 3, here 2"):
        evaluation(copied).run(ATTACK)


def test_another_classifier_or_another_image_of_the_same_index_is_refused(copied):
    mine, images = evaluation(copied), some_images()
    mine.target.classifier = named(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10)), "linear")
    with pytest.raises(ValueError, match="target.classifier.is.name: there 'sums', here 'linear'"):
        mine.run(ATTACK)
    changed = dataclasses.replace(images, pixels=images.pixels.clone())
    changed.pixels[2, 0, 0, 0] ^= 1
    held = sorted(copied.rglob("*.parquet"))
    with pytest.raises(ValueError, match="image 16 is not the one at hand"):
        evaluation(copied, changed).run(ATTACK)
    assert sorted(copied.rglob("*.parquet")) == held


def test_a_number_may_be_written_in_two_ways(unbroken, copied):
    purifier = Noisy()
    table = evaluation(copied, purifier=purifier).run(dataclasses.replace(ATTACK, eps_255=16.0))
    assert table["label"].equals(unbroken[1]["label"])
    assert not purifier.keys and not list(copied.rglob("*.foreign"))


# ---------------------------------------------------------------- purified images, kept


def test_purified_images_are_kept_and_taken_up_again(tmp_path):
    images, purifier, settings = some_images(), Noisy(), {"config": {}, "seed": SEED}
    defense = LGAP(words, purifier, net)
    purify_rows(defense, images[2:5], tmp_path, batch_size=2, **settings)
    purifier.keys.clear()
    table = purify_rows(defense, images, tmp_path, batch_size=3, **settings)
    assert {key[1] for key in purifier.keys} == {10, 13, 25, 28, 31}
    assert same(purify_rows(defense, images, tmp_path / "whole", **settings), table)
    purified = Noisy()(images.x, None, Keys(images.indices, SEED))
    assert torch.equal(purified_pixels(table, SHAPE), (purified.clamp(0, 1) * 255).round().to(torch.uint8))
    assert table["prediction"].tolist() == net(purified).argmax(1).tolist()
    assert table["undefended"].tolist() == images.labels.tolist()


def test_purified_images_of_other_images_or_settings_are_refused(tmp_path):
    images, other, label = some_images(), LGAP(words, Noisy(0.3), net), int(some_images().labels[0])
    refused = [
        (
            "image 10 is not the one at hand",
            {"images": dataclasses.replace(images, pixels=255 - images.pixels)},
        ),
        (
            f"label {label}, and has {9 - label} now",
            {"images": dataclasses.replace(images, labels=9 - images.labels)},
        ),
        ("seed: there 5, here 6", {"seed": 6}),
        ("defence.purifier.is.strength: there 0.1, here 0.3", {"defense": other}),
        (r"x: got shape \[2, 3, 4, 4\] for", {"config": {"attack": {"eps": 1}}, "x": images.x[:2]}),
        ("x: rows do not tell how these were made; say it, as in attack=", {"x": images.x}),
    ]
    settings = {"defense": LGAP(words, Noisy(), net), "images": images, "config": {}, "seed": SEED}
    purify_rows(folder=tmp_path, **settings)
    for says, changed in refused:
        with pytest.raises(ValueError, match=says):
            purify_rows(folder=tmp_path, **settings | changed)


def test_purified_images_of_two_at_once_or_of_overlapping_shards_are_each_there_once(tmp_path):
    images, purifier, settings = some_images(), Noisy(), {"config": {}, "seed": SEED}
    purify = partial(purify_rows, LGAP(words, purifier, net))
    whole = purify(images, tmp_path / "whole", **settings)
    purifier.keys.clear()
    parts = [(images[:5], tmp_path / "rows"), (images[3:], tmp_path / "rows")]
    threads = [threading.Thread(target=purify, args=p, kwargs=settings | {"batch_size": 2}) for p in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key[1] for key in purifier.keys) == images.indices.tolist()  # none was purified twice
    purify(images[:3], tmp_path / "other", batch_size=3, **settings)
    shutil.copytree(tmp_path / "other", tmp_path / "rows", dirs_exist_ok=True)
    assert same(purify(images, tmp_path / "rows", **settings), whole)
