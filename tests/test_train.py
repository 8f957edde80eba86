"""A killed run ends where an unbroken one does, and training changes what it should."""

import contextlib
import copy
import csv
import dataclasses
import math
import shutil

import pytest
import torch
from torch import nn

from checkpoints import pretrain
from lgap_utils import identity, models, train
from lgap_utils.data import CIFAR100_CLASSES
from lgap_utils.images import Images
from lgap_utils.noise import generator
from lgap_utils.profiles import get_profile


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

    return train.fit(
        net, loss_of, folder=folder, **{"n_steps": 20, "lr": 0.01, "save_every": 5, "log_every": 4} | how
    )


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
        train.fit(
            net, lambda step, rng: net[0].weight.sum() * float("nan"), n_steps=3, lr=0.1, folder=tmp_path
        )
    assert not (tmp_path / "state.pt").exists()
    with pytest.raises(ValueError, match=r"no optimizer 'lion'; choose from \['adam', 'adamw', 'sgd'\]"):
        run(linear(), tmp_path, optimizer="lion")


class Unsaveable:
    def __reduce__(self):
        raise RuntimeError("not to be saved")


def test_saving_never_leaves_half_a_file(tmp_path):
    file = tmp_path / "state.pt"
    train.save_atomically({"step": 1}, file)
    with pytest.raises(RuntimeError, match="not to be saved"):
        train.save_atomically({"step": 2, "broken": Unsaveable()}, file)
    assert torch.load(file) == {"step": 1}


@pytest.mark.parametrize("optimizer, decay", [("adam", 0.0), ("adamw", 0.3)])
def test_steps_are_those_of_the_formula(tmp_path, optimizer, decay):
    """Adam with a constant gradient moves by lr a step; AdamW also shrinks the weight by lr * decay."""
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1)
    train.fit(
        net,
        lambda step, rng: 3 * net.weight.sum(),
        n_steps=4,
        lr=0.1,
        folder=tmp_path,
        optimizer=optimizer,
        weight_decay=decay,
        schedule=train.constant,
    )
    expected = 1.0
    for _ in range(4):
        expected = expected * (1 - 0.1 * decay) - 0.1
    assert math.isclose(net.weight.item(), expected, abs_tol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_the_formula(tmp_path, nesterov):
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1)
    train.fit(
        net,
        lambda step, rng: 3 * net.weight.sum(),
        n_steps=5,
        lr=0.1,
        folder=tmp_path,
        optimizer="sgd",
        nesterov=nesterov,
        schedule=train.constant,
    )
    weight, momentum = 1.0, 0.0
    for _ in range(5):
        momentum = 0.9 * momentum + 3
        weight -= 0.1 * (3 + 0.9 * momentum if nesterov else momentum)
    assert math.isclose(net.weight.item(), weight, abs_tol=1e-5)


def test_what_dropout_draws_depends_on_the_seed_and_the_step_alone(tmp_path):
    def drawn(folder, seed):
        net, found = nn.Linear(1, 1), []

        def loss_of(step, rng):
            found.append(torch.rand(1).item())
            return net.weight.sum()

        train.fit(net, loss_of, n_steps=4, lr=0.1, folder=folder, seed=seed)
        return found

    first = drawn(tmp_path / "first", 0)
    torch.rand(5)
    assert (
        drawn(tmp_path / "again", 0) == first
        and len(set(first)) == 4
        and not set(drawn(tmp_path / "other", 1)) & set(first)
    )


def test_the_average_is_that_of_the_formula(tmp_path):
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1)
    train.fit(
        net,
        lambda step, rng: net.weight.sum(),
        n_steps=30,
        lr=0.1,
        folder=tmp_path,
        optimizer="adam",
        schedule=train.constant,
        ema=0.6,
    )
    average = weight = 1.0
    for step in range(30):
        weight -= 0.1
        decay = min(0.6, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * weight
    assert math.isclose(net.weight.item(), average, abs_tol=1e-5) and average - weight > 0.1


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
    """Except for what is left over where the batch size does not divide n, which differs from epoch to epoch."""
    batches, epochs = train.Batches(n, batch_size, seed=1), []
    for epoch in range(20):
        rows = torch.cat([batches(epoch * batches.per_epoch + i) for i in range(batches.per_epoch)]).tolist()
        assert len(set(rows)) == len(rows) == n - n % min(batch_size, n)
        epochs.append(rows)
    assert len({tuple(rows) for rows in epochs}) > 2 and set(sum(epochs, [])) == set(range(n))
    assert train.Batches(n, batch_size, seed=1)(7).tolist() == batches(7).tolist()
    assert any(train.Batches(n, batch_size, seed=2)(i).tolist() != batches(i).tolist() for i in range(5))


# ---------------------------------------------------------------- augmentation


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


# ---------------------------------------------------------------- the models


@pytest.fixture
def net(defense):
    return copy.deepcopy(defense.classifier)


def test_accuracy_counts(net, images):
    y = torch.cat([net(images.x[:5]).argmax(1), (net(images.x[5:]).argmax(1) + 1) % 10])
    assert train.accuracy(net, images.x, y, batch_size=3) == 5 / 8


def test_a_classifier_learns_four_scenes_by_heart(net, images, tmp_path):
    some, how = images[:4], {"batch_size": 4, "optimizer": "adam", "weight_decay": 0, "augment": False}
    expected = nn.functional.cross_entropy(copy.deepcopy(net).train()(some.x), some.labels)
    net.requires_grad_(True)
    (first,) = pretrain.train_classifier(copy.deepcopy(net), some, tmp_path / "one step", epochs=1, **how)
    assert math.isclose(first["loss"], expected, rel_tol=1e-4)
    rows = pretrain.train_classifier(net, some, tmp_path / "all", epochs=40, lr=0.01, **how)
    assert train.accuracy(net, some.x, some.labels) == rows[-1]["accuracy"] == 1


def test_half_precision_is_for_the_forward_pass_alone(net, images, tmp_path):
    """Convolutions run in bf16, the loss and the weights stay in single precision, and the first loss is nearly that of it."""
    seen, losses = [], []
    for bf16 in (False, True):
        copied = copy.deepcopy(net).requires_grad_(True)
        copied.block1.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
        (row,) = pretrain.train_classifier(
            copied, images, tmp_path / str(bf16), epochs=1, batch_size=8, bf16=bf16
        )
        losses.append(row["loss"])
        assert all(p.dtype == torch.float32 for p in copied.parameters())
    assert (
        seen == [torch.float32, torch.bfloat16]
        and losses[0] != losses[1]
        and math.isclose(*losses, rel_tol=0.02)
    )


def test_a_cycle_goes_on_from_the_one_before(make, profile, images, tmp_path):
    """The same as one run after the other by hand; each leaves its learning curve."""
    cycles, sizes = ({"epochs": 1}, {"epochs": 2, "lr": 0.01}), {"width": 32, "layers": 1, "text_layers": 1}
    shutil.copytree(profile.classifier, tmp_path / "classifier")
    torch.manual_seed(0)
    make.make_captioner(
        profile,
        images,
        images.captions,
        tmp_path / "work",
        tmp_path,
        "cpu",
        batch_size=4,
        cycles=cycles,
        **sizes,
    )
    assert [len((tmp_path / "work" / f).read_text().split()) - 1 for f in ("log.csv", "cycle1/log.csv")] == [
        2,
        2,
    ]
    torch.manual_seed(0)
    captioner = make.new_captioner(images.captions, profile, "cpu", **sizes)
    teacher = models.load_classifier(profile.classifier, device="cpu")
    for k, own in enumerate(cycles):
        pretrain.train_captioner(
            captioner,
            images,
            images.captions,
            tmp_path / f"by hand {k}",
            teacher=teacher,
            batch_size=4,
            seed=k,
            **own,
        )
    kept = models.load_captioner(str(tmp_path / "captioner"), device="cpu").model.state_dict()
    assert all(
        torch.equal(kept[name], value.half().float()) for name, value in captioner.model.named_parameters()
    )


@pytest.fixture
def cifar100(make, monkeypatch):
    """Noise in place of CIFAR-100."""

    def load(dataset, split, n=None):
        n = n or 24
        rng = generator("cifar100", split)
        return Images(
            torch.randint(256, (n, 3, 32, 32), generator=rng, dtype=torch.uint8),
            torch.randint(100, (n,), generator=rng),
            torch.arange(n),
            CIFAR100_CLASSES,
            None,
            f"noise, {split}",
        )

    monkeypatch.setattr(make, "load_images", load)
    return load


def test_the_cifar100_classifier_resumes_and_loads(make, cifar100, monkeypatch, tmp_path, capsys):
    """Killed in its second epoch, with dropout and in bf16: the same weights; and it takes images in [0, 1]."""
    monkeypatch.setitem(make.RECIPES["paper"]["training"], "batch_size", 8)
    how = {"depth": 10, "widen_factor": 1, "epochs": 3}
    make.make_paper("cpu", tmp_path / "whole", **how)
    assert "% of 24 validation images right (95 % interval " in capsys.readouterr().out
    crop, calls = train.crop_and_flip, []

    def killed(*args):
        calls.append(args[2:])
        if len(calls) == 5:
            raise Killed
        return crop(*args)

    monkeypatch.setattr(pretrain, "crop_and_flip", killed)
    for _ in range(2):
        with contextlib.suppress(Killed):
            make.make_paper("cpu", tmp_path / "broken", **how)
    assert len(calls) == 5 + 6 and set(calls) == {(4, "constant")}
    net, again = (models.load_classifier(str(tmp_path / name), device="cpu") for name in ("whole", "broken"))
    assert identity.state_digest(net) == identity.state_digest(again)
    for name in ("curve.csv", "SHA256SUMS", "config.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text()
    x = cifar100("cifar100", "validation").x
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    )
    assert isinstance(net, models.Normalized) and torch.allclose(net(x), net.net((x - mean) / std), atol=1e-5)
    assert net(x).shape == (24, 100) and {m.droprate for m in net.modules() if hasattr(m, "droprate")} == {
        0.3
    }


def test_the_curve_of_the_cifar100_classifier_has_a_row_an_epoch(make, cifar100, monkeypatch, tmp_path):
    monkeypatch.setitem(make.RECIPES["paper"]["training"], "batch_size", 8)
    make.make_paper("cpu", tmp_path / "out", depth=10, widen_factor=1, epochs=10, n=16)
    with open(tmp_path / "out" / "curve.csv", newline="") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    assert [row["step"] for row in rows] == [*range(0, 20, 2), 19] and all(
        0 <= row["validation"] <= 1 for row in rows
    )
    assert [row["lr"] for row in rows] == pytest.approx([0.1] * 3 + [0.02] * 3 + [0.004] * 2 + [0.0008] * 3)


@pytest.mark.parametrize(
    "line, says",
    [
        ("toy --epochs 2", "toy takes no epochs"),
        ("paper --only vae", "paper takes no --only"),
        ("huge", "invalid choice: 'huge'"),
        ("paper --try", "paper takes no --try"),
        ("toy --try strength=2", "strength=2: expected 0 to 1"),
    ],
)
def test_the_command_line_refuses_what_a_profile_has_not(make, monkeypatch, capsys, line, says):
    monkeypatch.setattr("sys.argv", ["make.py", *line.split()])
    with pytest.raises(SystemExit):
        make.main()
    assert says in capsys.readouterr().err


def test_what_models_are_worth_is_counted_on_the_images_asked_for(make, profile):
    text = make.measured(
        dataclasses.replace(profile, n_images=4, n_steps=1, num_inference_steps=10), "cpu", "validation"
    )
    assert (
        "validation images, the first 4;" in text
        and len([line for line in text.splitlines() if line.endswith("|   4 |")]) == 10
    )


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


def test_what_a_model_was_trained_for_is_part_of_its_run(make, profile, tmp_path):
    images, new = (
        make.load_images("toy", "train", 8),
        lambda: make.new_vae(profile, channels=(8, 16), latent_channels=4),
    )
    pretrain.train_vae(new(), images, tmp_path, epochs=1, batch_size=8)
    with pytest.raises(ValueError, match="belongs to another run.*data"):
        pretrain.train_vae(new(), images, tmp_path, epochs=1, batch_size=8, kl=1e-6)


def test_a_captioner_learns_two_sentences_by_heart(make, profile, defense, images, tmp_path):
    """Training and generation agree on where a caption begins and ends."""
    torch.manual_seed(0)
    some, sentences, fed = images[:2], ["a large red ring", "a small blue moon at the left"], []
    captioner = make.new_captioner(sentences, profile, "cpu", width=32, layers=1, text_layers=1)
    captioner.model.register_forward_pre_hook(lambda _, args, words: fed.append(words), with_kwargs=True)
    pretrain.train_captioner(
        captioner, some, sentences, tmp_path, teacher=defense.classifier, epochs=120, batch_size=2, lr=5e-3
    )
    assert captioner(some.x) == sentences
    begin, end = captioner.processor.tokenizer.convert_tokens_to_ids(["[DEC]", "[SEP]"])
    for ids, mask, labels in zip(*(fed[0][name] for name in ("input_ids", "attention_mask", "labels"))):
        assert ids[0] == begin and ids[mask.sum() - 1] == end
        assert torch.equal(labels[mask == 1], ids[mask == 1]) and (labels[mask == 0] == -100).all()


def test_the_vae_scales_its_latents_to_unit_variance(make, profile, tmp_path):
    images = make.load_images("toy", "train", 8)
    vae = make.new_vae(profile, channels=(8, 16), latent_channels=4)
    pretrain.train_vae(vae, images, tmp_path, epochs=1, batch_size=8)
    with torch.no_grad():
        z = vae.encode(2 * images.x - 1).latent_dist.mean * vae.config.scaling_factor
    assert math.isclose(z.std(), 1, rel_tol=1e-3) and vae.config.scaling_factor != 0.18215


def test_the_vae_learns_to_survive_noise_and_to_stay_calm(make, profile, tmp_path):
    images, training = (
        make.load_images("toy", "train", 8),
        {"epochs": 40, "batch_size": 8, "lr": 0.01, "noise": 1.6},
    )
    moved = []
    for calm in (0.0, 50.0):
        torch.manual_seed(0)
        vae = make.new_vae(profile, channels=(8, 16), latent_channels=4)
        names = set(vae.state_dict())
        rows = pretrain.train_vae(vae, images, tmp_path / str(calm), calm=calm, **training)
        assert all(rows[-1][name] > rows[0][name] + 2 for name in ("psnr", "psnr after noise"))
        assert set(vae.state_dict()) == names and ("moved" in rows[0]) == (
            calm > 0
        )  # what cleaned the latents is gone
        with torch.no_grad():
            modes = [
                vae.encode(x).latent_dist.mean * vae.config.scaling_factor
                for x in (
                    2 * images.x - 1,
                    2 * images.x - 1 + 16 / 255 * torch.randn(images.x.shape, generator=generator("push")),
                )
            ]
        assert math.isclose(modes[0].std(), 1, rel_tol=1e-3)
        moved.append((modes[1] - modes[0]).square().mean().item())
    assert moved[1] < 0.9 * moved[0] and math.isclose(rows[-1]["moved"], moved[1], rel_tol=0.5)


@pytest.mark.parametrize(
    "drop, mistakes, shares",
    [(0, 0, (1, 0, 0)), (0, 0.5, (0.5, 0.5, 0)), (0.5, 0.5, (0.25, 0.25, 0.5)), (1, 0.5, (0, 0, 1))],
)
def test_some_captions_are_dropped_and_some_mistaken(
    purifier, images, tmp_path, monkeypatch, drop, mistakes, shares
):
    """Whose caption is neither is the image's own; the mistaken one belongs to the same image."""
    p, seen = copy.deepcopy(purifier), []
    right, wrong = [f"a red {c}" for c in "abcdefgh"], [f"a blue {c}" for c in "abcdefgh"]
    p.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    asked = []
    batch = train.Batches.__call__
    monkeypatch.setattr(
        train.Batches, "__call__", lambda self, step: asked.append(batch(self, step)) or asked[-1]
    )
    pretrain.train_diffusion(
        p, images, right, tmp_path, epochs=30, batch_size=8, drop=drop, mistaken=wrong, mistakes=mistakes
    )
    kinds = [
        p.tokenizer(
            k, padding="max_length", max_length=seen[0].shape[1], truncation=True, return_tensors="pt"
        ).input_ids
        for k in (right, wrong, [""] * 8)
    ]
    counts = [sum(int((ids == kind[rows]).all(1).sum()) for ids, rows in zip(seen, asked)) for kind in kinds]
    assert sum(counts) == 240 and all(abs(count / 240 - share) < 0.13 for count, share in zip(counts, shares))
    assert all((count > 0) == (share > 0) for count, share in zip(counts, shares))


def test_mistaken_captions_are_one_for_each_image(purifier, images, tmp_path):
    with pytest.raises(ValueError, match="mistaken: got 3 captions for 8 images, expected one each"):
        pretrain.train_diffusion(
            copy.deepcopy(purifier),
            images,
            images.captions,
            tmp_path,
            epochs=1,
            mistaken=["a ring"] * 3,
            mistakes=0.1,
        )


def test_diffusion_times_are_drawn_from_the_intervals_asked_for(purifier, images, tmp_path, monkeypatch):
    """In their shares and evenly in each; one has no weight, one holds a single time."""
    p, seen = copy.deepcopy(purifier), []
    add = p.scheduler.add_noise
    monkeypatch.setattr(
        p.scheduler, "add_noise", lambda z, noise, t: seen.extend(t.tolist()) or add(z, noise, t)
    )
    times = ((10, 401, 551), (0, 700, 800), (5, 0, 100), (1, 999, 1000))
    pretrain.train_diffusion(p, images, images.captions, tmp_path, epochs=60, batch_size=8, times=times)
    found = {(low, below): [t for t in seen if low <= t < below] for _, low, below in times}
    assert len(seen) == 480 == sum(len(inside) for inside in found.values())
    for weight, low, below in times:
        inside = torch.tensor(found[low, below], dtype=torch.float32)
        assert abs(len(inside) / 480 - weight / 16) < 0.08, (low, below)
        if len(inside) > 99:
            assert (
                abs(inside.mean() - (low + below - 1) / 2) < 0.1 * (below - low)
                and inside.max() > below - 8
                and inside.min() < low + 8
            )


@pytest.mark.parametrize(
    "times",
    [(), ((0, 0, 600),), ((-1, 0, 600), (2, 0, 600)), ((1, 600, 600),), ((1, 0, 1001),), ((1, -1, 600),)],
)
def test_times_that_are_none_are_refused(purifier, images, tmp_path, times):
    with pytest.raises(
        ValueError, match="expected .weight, from, below. of intervals in 0 to 1000, some weight above 0"
    ):
        pretrain.train_diffusion(
            copy.deepcopy(purifier), images, images.captions, tmp_path, epochs=1, times=times
        )


@pytest.mark.parametrize("name", ["toy", "small", "paper"])
def test_a_diffusion_model_is_made_with_the_settings_of_its_profile(make, name):
    """Of all that bear on purification: a strength of 1 fits two coarse steps and not fifty."""
    p = get_profile(name)
    vae = make.new_vae(p, channels=(8, 16), latent_channels=4)
    purifier = make.new_diffusion(vae, ["a ring"], p, "cpu", channels=(16, 32), text_width=16)
    assert all(purifier.settings()[setting] == getattr(p, setting) for setting in purifier.SETTINGS)


def test_noise_depends_on_the_generator_alone():
    assert torch.equal(
        pretrain.normal((3, 4), generator(1), "cpu"), torch.randn(3, 4, generator=generator(1))
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_the_diffusion_model_learns_to_see_noise(purifier, images, tmp_path, prediction_type):
    """Its error falls, and below 1, which is what predicting nothing costs; only the UNet and the text encoder move."""
    p, noise, t = (
        copy.deepcopy(purifier),
        torch.randn(8, 4, 8, 8, generator=generator("noise")),
        torch.arange(50, 450, 50),
    )

    @torch.no_grad()
    def error():
        latent = p.vae.encode(2 * images.x - 1).latent_dist.mean * p.vae.config.scaling_factor
        target = noise if prediction_type == "epsilon" else latent
        return (
            (p.unet(p.scheduler.add_noise(latent, noise, t), t, p.embed(images.captions)).sample - target)
            .square()
            .mean()
        )

    p.scheduler.register_to_config(prediction_type=prediction_type)
    before = error()
    pretrain.train_diffusion(p, images, images.captions, tmp_path, epochs=30, batch_size=8, lr=0.01)
    assert error() < 0.92 * min(1, before)
    moved = [
        name
        for name in ("vae", "unet", "text_encoder")
        if identity.state_digest(getattr(p, name)) != identity.state_digest(getattr(purifier, name))
    ]
    assert moved == ["unet", "text_encoder"]
    assert not any(q.requires_grad for q in p.parameters()) and not p.unet.training


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
