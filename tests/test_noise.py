"""Noise belongs to an image: it depends on the key, and on nothing else."""

import numpy as np
import pytest
import torch

from lgap_utils.noise import Keys, generator

KEY = {"indices": [7], "seed": 1, "stage": "attack", "step": 2, "draw": 3}


def normal(what="noise", **changed):
    return Keys(**KEY | changed).normal((4,), what)


def test_equal_keys_give_equal_noise():
    assert torch.equal(normal(), normal())
    assert torch.equal(torch.rand(5, generator=generator(1, "a")), torch.rand(5, generator=generator(1, "a")))


@pytest.mark.parametrize(
    "changed",
    [
        {"indices": [8]},
        {"seed": 2},
        {"stage": "defence"},
        {"step": 3},
        {"draw": 4},
        {"what": "posterior"},
        {"step": 3, "draw": 2},
    ],
)
def test_every_part_of_a_key_counts(changed):
    assert not torch.isclose(normal(), normal(**changed)).any()


def test_the_stream_of_a_key_never_changes():
    """Results that were published with a seed stay reproducible only while these numbers stay as they are."""
    stored = torch.tensor([-1.9802, 0.8475, 1.2538, 0.9786])
    assert torch.allclose(normal()[0], stored, atol=1e-4)


def test_a_row_depends_on_its_own_key_alone():
    keys = Keys(range(6), seed=5)
    together = keys.normal((3, 2), "noise")
    assert together.shape == (6, 3, 2) and together.dtype == torch.float32
    for i in range(6):
        assert torch.equal(keys[i : i + 1].normal((3, 2), "noise")[0], together[i])
    assert torch.equal(keys[::-1].normal((3, 2), "noise"), together.flip(0))


def test_slices_add_up_to_the_whole():
    keys = Keys(range(5), seed=2, stage="attack", step=1, draw=4)
    assert len(keys[:2]) == 2 and keys[:2].rows + keys[2:].rows == keys.rows


@pytest.mark.parametrize(
    "indices",
    [torch.tensor([7]), np.array([7]), range(7, 8), (7,), [np.int64(7)], [torch.tensor(7)]],
    ids=["tensor", "array", "range", "tuple", "list of numpy", "list of tensors"],
)
def test_an_index_is_the_same_key_however_it_is_given(indices):
    assert torch.equal(normal(indices=indices), normal(indices=[7]))


def test_content_keys_follow_the_pixels():
    x = torch.rand(3, 3, 4, 4, generator=generator("images"))
    keys = Keys.of_content(x, seed=1)
    assert Keys.of_content(x.flip(0), seed=1).rows == keys.rows[::-1]
    assert (
        Keys.of_content(x[1:2].contiguous(memory_format=torch.channels_last), seed=1).rows == keys.rows[1:2]
    )
    assert Keys.of_content(x.double().requires_grad_(), seed=1).rows == keys.rows
    x[2, 0, 0, 0] += 1e-6
    assert [a == b for a, b in zip(Keys.of_content(x, seed=1).rows, keys.rows)] == [True, True, False]
    assert not set(Keys.of_content(x, seed=2).rows) & set(keys.rows)


def test_the_noise_has_the_right_distribution():
    keys = Keys(range(200))
    z, u = keys.normal((500,), "noise"), keys.uniform((500,), "start")
    assert abs(z.mean()) < 0.015 and abs(z.std() - 1) < 0.015  # five standard errors of 100 000 draws
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005
    assert abs(torch.corrcoef(z)[~torch.eye(200, dtype=bool)]).max() < 0.3


def test_the_global_generator_is_left_alone():
    torch.manual_seed(4321)
    before = torch.get_rng_state()
    Keys(range(3)).normal((4,), "noise")
    Keys.of_content(torch.zeros(2, 3, 4, 4)).uniform((4,), "noise")
    assert torch.equal(torch.get_rng_state(), before)
