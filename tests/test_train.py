"""A killed run ends where an unbroken one does, and fine-tuning changes what it should."""

import copy
import csv
import math

import pytest
import torch
from torch import nn

from lgap_utils import train
from lgap_utils.noise import generator


def linear():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    for i, p in enumerate(net.parameters()):
        p.data = torch.randn(p.shape, generator=generator("weights", i))
    return net


class Killed(Exception):
    pass


def run(net, folder, kill_at=None, **how):
    """Twenty steps on noise, saved every five."""

    def loss_of(step, rng):
        if step == kill_at:
            raise Killed
        x = torch.randn(8, 4, generator=rng)
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"twice": 2 * loss}

    settings = train.Settings(**{"n_steps": 20, "lr": 0.01} | how)
    return train.fit(net, loss_of, settings, folder, save_every=5, log_every=4)


@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd", "clip": 0.5},
        {"optimizer": "adam", "ema": 0.9},
        {"optimizer": "sgd", "nesterov": False, "bf16": True},
    ],
    ids=["adamw", "sgd", "adam and average", "bf16"],
)
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, how):
    whole, broken = linear(), linear()
    rows = run(whole, tmp_path / "whole", **how)
    for kill_at in (3, 7, 13):  # before the first save, between saves, and again
        broken = linear()
        with pytest.raises(Killed):
            run(broken, tmp_path / "broken", kill_at, **how)
    broken = linear()
    assert run(broken, tmp_path / "broken", **how) == rows
    for net in (broken, whole):
        assert not net.training
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in broken.state_dict().items())
    assert (tmp_path / "broken/log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()


def test_a_finished_run_is_only_read(tmp_path):
    first, again = linear(), linear()
    rows = run(first, tmp_path, ema=0.9)
    assert run(again, tmp_path, kill_at=0, ema=0.9) == rows
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), first.parameters()))


def test_the_log_holds_what_was_returned(tmp_path):
    rows = run(linear(), tmp_path)
    with open(tmp_path / "log.csv", newline="") as f:
        logged = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    assert logged == rows and [row["step"] for row in rows] == [0, 4, 8, 12, 16, 19]
    assert (
        all(math.isclose(row["twice"], 2 * row["loss"]) for row in rows)
        and rows[-1]["loss"] < rows[0]["loss"]
    )


@pytest.mark.parametrize(
    "how, says",
    [
        ({"lr": 0.02}, r"'lr': \(0.01, 0.02\)"),
        ({"seed": 1}, r"'seed': \(0, 1\)"),
        ({"n_steps": 30}, r"\(20, 30\)"),
        ({"optimizer": "sgd"}, "'adamw', 'sgd'"),
        ({"ema": 0.9}, "ema"),
        ({"clip": 1.0}, "clip"),
        ({"warmup": 0.5}, "warmup"),
        ({"nesterov": False}, "nesterov"),
        ({"bf16": True}, "bf16"),
    ],
)
def test_a_folder_of_another_run_is_refused_with_the_difference(tmp_path, how, says):
    with pytest.raises(Killed):
        run(linear(), tmp_path, kill_at=12)
    with pytest.raises(ValueError, match=f"state.pt belongs to another run.*{says}"):
        run(linear(), tmp_path, **how)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    net = linear()
    with pytest.raises(ValueError, match="loss nan at step 0; lower the learning rate"):
        train.fit(net, lambda step, rng: net[0].weight.sum() * math.nan, train.Settings(3, 0.1), tmp_path)
    assert not (tmp_path / "state.pt").exists()
    with pytest.raises(ValueError, match=r"no optimizer 'lion'; choose from \['adam', 'adamw', 'sgd'\]"):
        run(linear(), tmp_path, optimizer="lion")


def weight_after(folder, n_steps, slope, **how):
    """What a weight of 1 becomes under a constant gradient, at lr 0.1."""
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1)
    settings = train.Settings(n_steps, 0.1, schedule="constant", **how)
    train.fit(net, lambda step, rng: slope * net.weight.sum(), settings, folder)
    return net.weight.item()


@pytest.mark.parametrize("optimizer, decay", [("adam", 0.0), ("adamw", 0.3)])
def test_steps_are_those_of_the_formula(tmp_path, optimizer, decay):
    """Adam with a constant gradient moves by lr a step; AdamW also shrinks the weight by lr * decay."""
    expected = 1.0
    for _ in range(4):
        expected = expected * (1 - 0.1 * decay) - 0.1
    weight = weight_after(tmp_path, 4, 3, optimizer=optimizer, weight_decay=decay)
    assert math.isclose(weight, expected, abs_tol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_the_formula(tmp_path, nesterov):
    expected, momentum = 1.0, 0.0
    for _ in range(5):
        momentum = 0.9 * momentum + 3
        expected -= 0.1 * (3 + 0.9 * momentum if nesterov else momentum)
    weight = weight_after(tmp_path, 5, 3, optimizer="sgd", nesterov=nesterov)
    assert math.isclose(weight, expected, abs_tol=1e-5)


def test_the_average_is_that_of_the_formula(tmp_path):
    average = expected = 1.0
    for step in range(30):
        expected -= 0.1
        decay = min(0.6, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * expected
    weight = weight_after(tmp_path, 30, 1, optimizer="adam", ema=0.6)
    assert math.isclose(weight, average, abs_tol=1e-5) and average - expected > 0.1


def test_what_dropout_draws_depends_on_the_seed_and_the_step_alone(tmp_path):
    def drawn(folder, seed):
        net, numbers = nn.Linear(1, 1), []

        def loss_of(step, rng):
            numbers.append(torch.rand(1).item())
            return net.weight.sum()

        train.fit(net, loss_of, train.Settings(4, 0.1, seed), folder)
        return numbers

    first = drawn(tmp_path / "first", 0)
    torch.rand(5)
    assert drawn(tmp_path / "again", 0) == first and len(set(first)) == 4
    assert not set(drawn(tmp_path / "other", 1)) & set(first)


def test_a_state_file_has_the_keys_of_older_ones(tmp_path):
    """A run that began before an update goes on after it."""
    run(linear(), tmp_path, data=["images", 3])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state) == {"model", "opt", "step", "rows", "average", "config"}
    assert state["config"] == {
        "n_steps": 20,
        "lr": 0.01,
        "seed": 0,
        "optimizer": "adamw",
        "nesterov": True,
        "weight_decay": 0.0,
        "warmup": 0.1,
        "schedule": "one_cycle",
        "bf16": False,
        "clip": None,
        "ema": None,
        "data": ["images", 3],
        "parameters": 25,
    }


def test_the_learning_rate_rises_to_one_and_ends_at_zero():
    rates = [train.one_cycle(step, 100) for step in range(101)]
    top = rates.index(max(rates))
    assert (
        rates[top] == 1
        and rates[: top + 1] == sorted(rates[: top + 1])
        and rates[top:] == sorted(rates[top:], reverse=True)
    )
    assert 9 <= top <= 10 and rates[0] > 0 and rates[99] < 1e-3 and abs(rates[100]) < 1e-12
    assert all(0 < train.one_cycle(step, n) <= 1 for n in (1, 2, 3, 7) for step in range(n))


@pytest.mark.parametrize("epochs, milestones", [(200, (60, 120, 160)), (10, (3, 6, 8)), (60, (18, 36, 48))])
def test_the_learning_rate_falls_where_that_of_torch_does(epochs, milestones):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)
    expected = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    for epoch in range(epochs):
        for step in (7 * epoch, 7 * epoch + 6):  # an epoch has seven steps
            assert math.isclose(train.steps(step, 7 * epochs), expected.get_last_lr()[0], rel_tol=1e-9)
        optimizer.step()
        expected.step()


@pytest.mark.parametrize("n, batch_size", [(12, 4), (10, 4), (3, 8)])
def test_batches_visit_every_image_once_an_epoch(n, batch_size):
    """Where the batch size does not divide n, other images are left out in each epoch."""
    batches, epochs = train.Batches(n, batch_size, seed=1), []
    for epoch in range(20):
        rows = torch.cat([batches(epoch * batches.per_epoch + i) for i in range(batches.per_epoch)]).tolist()
        assert len(set(rows)) == len(rows) == n - n % min(batch_size, n)
        epochs.append(rows)
    assert len({tuple(rows) for rows in epochs}) > 2 and set(sum(epochs, [])) == set(range(n))
    assert train.Batches(n, batch_size, seed=1)(7).tolist() == batches(7).tolist()
    assert any(train.Batches(n, batch_size, seed=2)(i).tolist() != batches(i).tolist() for i in range(5))


def test_augmentation_moves_and_mirrors(images):
    x, rng = images.x[:4].repeat(16, 1, 1, 1), generator("augmentation")
    assert torch.equal(train.crop_and_flip(torch.full((2, 3, 8, 8), 0.3), rng), torch.full((2, 3, 8, 8), 0.3))
    still = train.crop_and_flip(x, rng, pad=0)
    same, mirrored = ((still == other).flatten(1).all(1) for other in (x, x.flip(3)))
    assert (same ^ mirrored).all() and 10 <= same.sum() <= 54
    moved = train.crop_and_flip(x, rng, pad=3)
    assert moved.shape == x.shape and torch.isin(moved, x).all()
    assert torch.equal(train.crop_and_flip(x, generator(1)), train.crop_and_flip(x, generator(1)))


@pytest.mark.parametrize("padding", ["reflect", "constant"])
def test_a_crop_is_a_window_of_the_padded_image(padding):
    x = torch.arange(3 * 8 * 8.0).view(1, 3, 8, 8).repeat(40, 1, 1, 1) + 1
    padded = nn.functional.pad(x[:1], (2,) * 4, mode=padding)[0]
    windows = [padded[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    windows += [w.flip(2) for w in windows]
    found = {
        next(k for k, w in enumerate(windows) if torch.equal(w, image))
        for image in train.crop_and_flip(x, generator(2), pad=2, padding=padding)
    }
    assert len(found) > 15


@pytest.fixture
def net(defense):
    return copy.deepcopy(defense.classifier)


def test_accuracy_counts(net, images):
    y = torch.cat([net(images.x[:5]).argmax(1), (net(images.x[5:]).argmax(1) + 1) % 10])
    assert train.accuracy(net, images.x, y, batch_size=3) == 5 / 8


def test_fine_tuning_learns_and_reports_each_epoch(net, images, tmp_path):
    before = copy.deepcopy(net.state_dict())
    rows = train.finetune(
        net,
        images.pixels,
        images.labels,
        tmp_path,
        epochs=12,
        lr=0.01,
        batch_size=4,
        x_val=images.pixels[:4],
        y_val=images.labels[:4],
    )
    assert all(
        not torch.equal(net.state_dict()[name], before[name])
        for name in ("conv1.weight", "fc.bias", "bn1.running_mean")
    )
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert (
        rows[-1]["train"] == train.accuracy(net, images.x[:4], images.labels[:4])
        and rows[-1]["loss"] < rows[0]["loss"]
    )
    assert {0, 1, 2, 11} <= {int(row["epoch"]) for row in rows}


@pytest.mark.parametrize("augment", [False, True])
def test_fine_tuning_sees_crops_and_mirrored_images_where_asked(net, images, tmp_path, augment):
    """What the network is shown is what crop_and_flip makes of the images, or the images."""
    one, seen = images[:1], []
    hook = net.register_forward_pre_hook(
        lambda module, args: seen.append(args[0]) if module.training else None
    )
    train.finetune(
        net,
        one.pixels,
        one.labels,
        tmp_path,
        epochs=6,
        batch_size=1,
        augment=augment,
        x_val=one.pixels,
        y_val=one.labels,
    )
    hook.remove()
    expected = [
        train.crop_and_flip(one.x, generator(0, step, "train")) if augment else one.x for step in range(6)
    ]
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen, expected))
    how = {"epochs": 6, "batch_size": 1, "augment": not augment}
    with pytest.raises(ValueError, match="another run"):
        train.finetune(net, one.pixels, one.labels, tmp_path, x_val=one.pixels, y_val=one.labels, **how)


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_fine_tuning_follows_the_schedule_of_its_name(net, images, tmp_path, schedule):
    rows = train.finetune(
        net,
        images.pixels,
        images.labels,
        tmp_path,
        epochs=10,
        lr=0.01,
        batch_size=8,
        schedule=schedule,
        x_val=images.pixels,
        y_val=images.labels,
    )
    assert [row["lr"] for row in rows] == [
        0.01 * train.SCHEDULES[schedule](step, 10, 0.1) for step in range(10)
    ]


def test_fine_tuning_in_other_batches_does_not_take_the_old_result(net, images, tmp_path):
    how = {"x_val": images.pixels[:2], "y_val": images.labels[:2]}
    train.finetune(copy.deepcopy(net), images.pixels, images.labels, tmp_path, epochs=1, batch_size=4, **how)
    with pytest.raises(ValueError, match="another run"):  # as many steps
        train.finetune(net, images.pixels, images.labels, tmp_path, epochs=2, batch_size=8, **how)


def test_a_state_that_is_torn_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="state.pt cannot be read .*; move it away to start anew"):
        run(linear(), tmp_path)


def test_fine_tuning_on_other_images_does_not_take_the_old_result(net, images, tmp_path):
    how = {"epochs": 1, "batch_size": 4, "x_val": images.pixels[:2], "y_val": images.labels[:2]}
    train.finetune(net, images.pixels, images.labels, tmp_path, **how)
    with pytest.raises(ValueError, match="another run"):
        train.finetune(net, 255 - images.pixels, images.labels, tmp_path, **how)
    with pytest.raises(ValueError, match="another run"):  # nor does fine-tuning from where that ended
        train.finetune(net, images.pixels, images.labels, tmp_path, **how)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda x, y: (x, torch.cat([y, y[:4]])), r"labels: got shape \[12\] for 8 images"),
        (lambda x, y: (x, y.float()), "labels: expected a torch.long tensor, got torch.float32"),
        (lambda x, y: (x.float() / 255, y), r"x: expected images as uint8 \[n, 3, h, w\], got torch.float32"),
        (lambda x, y: (x[:0], y[:0]), r"x: expected images as uint8 .*got torch.uint8 \[0, 3"),
    ],
)
def test_images_and_labels_that_do_not_belong_together_are_refused(images, defense, tmp_path, spoil, says):
    x, y = spoil(images.pixels, images.labels)
    with pytest.raises((TypeError, ValueError), match=says):
        train.finetune(
            copy.deepcopy(defense.classifier), x, y, tmp_path, x_val=images.pixels, y_val=images.labels
        )
    assert not (tmp_path / "state.pt").exists()
