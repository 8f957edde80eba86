"""Attacks are what they are called: equal to other libraries and to closed forms, the same in any batch."""

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from sums import DEFENSE, KEYS, SHAPE, SMALL, Counted, N, X, Y, net, noisy, words
from torch import nn

from lgap_utils import attacks
from lgap_utils.attacks import VIEWS, Record, View, bpda, full, gradient, pgd
from lgap_utils.autoattack import autoattack
from lgap_utils.defense import LGAP
from lgap_utils.noise import Keys, generator
from lgap_utils.protocols import Attack

# ---------------------------------------------------------------- against other libraries


@pytest.fixture(scope="module")
def conv():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 49, 10),
        )
    return net.requires_grad_(False).eval()


@pytest.mark.parametrize("n_steps", [1, 10], ids=["within the ball", "beyond the ball"])
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_is_that_of_foolbox_from_the_same_start(conv, images, monkeypatch, random_start, n_steps):
    import eagerpy
    import foolbox

    x, y, eps, step, keys = images.x, conv(images.x).argmax(1), 8 / 255, 2 / 255, Keys(images.indices)
    start = (x + eps * (2 * keys.uniform(x.shape[1:], "start") - 1)).clamp(0, 1)
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=n_steps, random_start=random_start)
    monkeypatch.setattr(theirs, "get_random_start", lambda x, eps: eagerpy.astensor(start))
    expected = theirs.run(
        foolbox.PyTorchModel(conv, bounds=(0, 1)), x, foolbox.criteria.Misclassification(y), epsilon=eps
    )
    found = pgd(conv, x, y, eps=eps, step_size=step, n_steps=n_steps, keys=keys, random_start=random_start)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert (found - (start if random_start else x)).abs().max() > 0.9 * step
    assert n_steps == 1 or ((found - x).abs() > eps - 1e-6).float().mean() > 0.3  # the projection was needed


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("n_eot", [1, 3])
def test_bpda_is_exact_forward_and_backward_has_the_gradient_at_the_purified_point(n_eot):
    keys = KEYS.at([4] * N, n_eot)
    purified = DEFENSE.purify(X, keys=keys).requires_grad_()
    logits = DEFENSE.classify(purified)
    (there,) = torch.autograd.grad(
        F.cross_entropy(logits, Y.repeat_interleave(n_eot), reduction="sum"), purified
    )
    assert torch.equal(bpda(DEFENSE)(X, keys), logits) and torch.equal(full(DEFENSE)(X, keys), logits)
    found, right = gradient(bpda(DEFENSE), X, Y, keys, n_eot)
    assert torch.allclose(found, there.view(N, n_eot, *SHAPE).mean(1), rtol=0, atol=1e-6)
    assert right == (logits.view(N, n_eot, 10).mean(1).argmax(1) == Y).tolist()
    assert (found - gradient(net, X, Y)[0]).abs().max() > 1e-2  # it is not the one at x


@pytest.fixture
def deep(exact):
    """The diffusion in float64 before a small classifier; images, larger than its size; labels; captions."""
    x = 0.2 + 0.6 * torch.rand(2, 3, 24, 24, generator=generator("wide")).double()
    return (
        LGAP(None, exact, lambda x: net(F.avg_pool2d(x, 6))),
        x,
        torch.tensor([3, 5]),
        {20: "a large red star", 21: "a ring"},
    )


@pytest.mark.parametrize("n_eot", [1, 2])
def test_the_full_gradient_is_that_of_plain_autograd_and_of_finite_differences(deep, n_eot):
    defense, x, y, captions = deep
    keys, h = KEYS[:2].at([4, 4], n_eot), 1e-5

    def loss(x):
        return (
            F.cross_entropy(
                defense(x, list(captions.values()), keys), y.repeat_interleave(n_eot), reduction="sum"
            )
            / n_eot
        )

    found, _ = gradient(full(defense, captions), x, y, keys, n_eot)
    leaf = x.clone().requires_grad_()
    with defense.purifier.using(checkpointing=False):
        (plain,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(found, plain, rtol=1e-9, atol=0) and found.flatten(1).abs().amax(1).min() > 0
    direction = torch.randn(x.shape, dtype=x.dtype, generator=generator("direction"))
    with torch.no_grad():
        measured = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    assert torch.isclose((found * direction).sum(), measured, rtol=1e-5)


def test_the_memory_of_the_full_gradient_does_not_grow_with_the_steps(deep):
    defense, x, _, captions = deep

    def kept(n_steps, checkpointing):
        """Bytes that the forward pass keeps for the backward pass."""
        alive = {}
        with (
            defense.purifier.using(
                num_inference_steps=50, strength=n_steps / 50, checkpointing=checkpointing
            ),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: alive.setdefault(t.data_ptr(), t), lambda t: t
            ),
        ):
            full(defense, captions)(x.clone().requires_grad_(), KEYS[:2])
        return sum(t.nbytes for t in alive.values())

    latents = 2 * 4 * 4 * 4 * 8  # bytes of z_t, from which a step is computed again
    assert (
        kept(8, True) - kept(2, True) <= 6 * 2 * latents
    )  # a step's two results: z_t and the z_0 it expects
    assert kept(8, False) - kept(2, False) > 6 * 100 * latents


# ---------------------------------------------------------------- gradients that are not there


def rounded(x, captions, keys):
    return (4 * x).round() / 4


@pytest.mark.parametrize(
    "purifier", [rounded, lambda x, captions, keys: rounded(x.detach(), captions, keys)], ids=["zero", "none"]
)
def test_a_quantised_defence_stands_where_gradients_pass_through_it_and_falls_to_bpda(purifier):
    """Obfuscated gradients are no robustness (Athalye et al. 2018)."""
    defense = LGAP(words, purifier, net)
    y, settings = (
        defense(X).argmax(1),
        {"eps": 0.3, "step_size": 0.05, "n_steps": 10, "keys": KEYS, "random_start": False},
    )
    stands, falls = Record(), Record()
    assert torch.equal(pgd(full(defense), X, y, record=stands, **settings), X)
    assert stands.bad_gradients == [10] * N and stands.broke_at == [-1] * N
    assert not (defense(pgd(bpda(defense), X, y, record=falls, **settings)).argmax(1) == y).any()
    assert falls.bad_gradients == [0] * N


def test_a_gradient_that_is_not_finite_is_counted_and_moves_nothing():
    record = Record()
    adv = pgd(lambda x: net(x) + (0 * (x - X[:1]).sqrt()).sum(), X[:1], Y[:1], record=record, **SMALL)
    assert torch.equal(adv, X[:1]) and record.bad_gradients == [4]


# ---------------------------------------------------------------- nothing depends on who shares a batch


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_eot": 3},
        {"n_eot": 3, "average": "logits"},
        {"n_eot": 3, "average": "vote"},
        {"any_step": True},
        {"any_step": True, "n_restarts": 3, "n_eot": 3},
        {"n_restarts": 2},
        {"known_noise": True, "n_eot": 3},
    ],
)
@pytest.mark.parametrize("view", VIEWS)
def test_batch_size_and_order_change_no_adversarial_image(view, settings):
    def run(order, batch_size):
        record = Record()
        adv = pgd(
            VIEWS[view](DEFENSE),
            X[order],
            Y[order],
            keys=KEYS[order],
            batch_size=batch_size,
            record=record,
            **SMALL | settings,
        )
        back = [order.index(i) for i in range(N)]
        return adv[back], [record.broke_at[k] for k in back]

    adv, broke_at = run(list(range(N)), 64)
    for order, batch_size in (
        ([0, 1, 2, 3, 4, 5, 6, 7], 1),
        ([5, 0, 3, 7, 1, 6, 2, 4], 3),
        ([7, 6, 5, 4, 3, 2, 1, 0], 8),
    ):
        other, broke_too = run(order, batch_size)
        assert torch.allclose(other, adv, rtol=0, atol=1e-6) and broke_too == broke_at
    assert len(set(broke_at)) > 1 and (adv - X).abs().max() <= 0.05 + 1e-6


def draws(known_noise, n_restarts=1):
    """The keys that a purifier is called with in each call of an attack with three draws, in order."""
    purifier = Counted(noisy)
    unbreakable = full(LGAP(words, purifier, lambda x: 9.0 * F.one_hot(Y.repeat_interleave(3), 10)))
    pgd(unbreakable, X, Y, keys=KEYS, n_eot=3, known_noise=known_noise, n_restarts=n_restarts, **SMALL)
    return [keys.rows for _, _, keys in purifier.calls]


def test_who_knows_the_noise_draws_what_the_defender_draws():
    """The defender's keys as evaluate.Evaluation makes them, at each of the steps."""
    assert draws(known_noise=True) == [Keys(range(20, 20 + N), 1).at([0] * N, 3).rows] * 4


def test_who_does_not_know_the_noise_draws_afresh_at_each_step_and_restart():
    seen = [row for rows in draws(known_noise=False, n_restarts=2) for row in rows]
    assert len(set(seen)) == len(seen) == 2 * 5 * 3 * N  # the last iterate is looked at too
    assert {row[2] for row in seen} == {"attack"} and {row[1] for row in seen} == set(range(20, 20 + N))


# ---------------------------------------------------------------- many draws, closed forms


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("view", [bpda, full])
def test_the_averages_over_draws_are_their_closed_forms(view, batch_size):
    view, keys = view(DEFENSE), KEYS.at([2] * N, 3)
    single = torch.stack([gradient(view, X, Y, keys[d::3])[0] for d in range(3)])
    leaf = X.clone().requires_grad_()
    logits = torch.stack([view(leaf, keys[d::3]) for d in range(3)]).mean(0)
    (of_mean,) = torch.autograd.grad(F.cross_entropy(logits, Y, reduction="sum"), leaf)
    for average, expected in (
        ("gradient", single.mean(0)),
        ("logits", of_mean),
        ("vote", single.sign().sum(0)),
    ):
        found, right = gradient(view, X, Y, keys, 3, average, batch_size)
        assert torch.allclose(found, expected, rtol=0, atol=1e-6), average
        assert right == (logits.argmax(1) == Y).tolist()
    assert (single.mean(0) - of_mean).abs().max() > 1e-3 and (single[0] - single[1]).abs().max() > 1e-3


# ---------------------------------------------------------------- who is broken, and when


def iterates(n_steps):
    """Start and iterates of an attack on the bare net, and the first that is wrong, or None."""
    path = torch.stack([X] + [pgd(net, X, Y, **SMALL | {"n_steps": k}) for k in range(1, n_steps + 1)])
    return path, [
        next((k for k, x in enumerate(path[:, i]) if net(x[None]).argmax() != Y[i]), None) for i in range(N)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_image_leaves_at_the_first_iterate_that_is_wrong_and_makes_room(batch_size):
    path, first = iterates(4)
    model, record, done = Counted(net), Record(), []
    adv = pgd(model, X, Y, any_step=True, batch_size=batch_size, record=record, progress=done.append, **SMALL)
    assert None in first and len(set(first)) > 2  # else this would show little
    assert torch.equal(adv, torch.stack([path[-1 if k is None else k, i] for i, k in enumerate(first)]))
    assert record.broke_at == [-1 if k is None else k for k in first]
    assert sum(model.sizes) == sum(5 if k is None else k + 1 for k in first) == sum(done)
    assert model.sizes == sorted(model.sizes, reverse=True)  # no call is smaller before the last images


def test_the_last_iterate_counts_where_any_step_does_not():
    model, record = Counted(net), Record()
    adv = pgd(model, X, Y, record=record, **SMALL)
    path, first = iterates(4)
    assert torch.equal(adv, path[-1]) and model.sizes == [N] * 4  # a last look would change nothing
    assert record.broke_at == [-1 if k in (None, 4) else k for k in first]


def test_only_images_that_stand_begin_anew_and_from_another_start():
    once = pgd(net, X, Y, keys=KEYS, **SMALL)
    stands = net(once).argmax(1) == Y
    assert 0 < stands.sum() < N
    model = Counted(net)
    thrice = pgd(model, X, Y, keys=KEYS, n_restarts=3, batch_size=1, **SMALL)
    assert torch.equal(thrice[~stands], once[~stands])
    for i in range(N):
        seen = torch.cat(
            [x for (x,) in model.calls if (x - X[i]).abs().max() <= 0.05 + 1e-6]
        )  # one image a call, near its origin
        assert len(seen) in ((10, 15) if stands[i] else (5,))
        noise = torch.cat(
            [KEYS[[i]].at([restart]).uniform(SHAPE, "start") for restart in range(len(seen) // 5)]
        )
        assert torch.equal(seen[::5], (X[i] + 0.05 * (2 * noise - 1)).clamp(0, 1))


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize("average", attacks.AVERAGES)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_captions_anew_are_asked_for_once_per_step_and_image(average, batch_size):
    captioner, purifier = Counted(words), Counted(noisy)
    attack = Attack("anew", view="full", n_steps=3, n_eot=4, average=average)
    attack(LGAP(captioner, purifier, net), X, Y, KEYS, batch_size=batch_size)
    assert sum(captioner.sizes) == 3 * N and sum(len(keys) for _, _, keys in purifier.calls) == 4 * 3 * N
    assert all(captions == words(x) for x, captions, _ in purifier.calls)


def test_clean_captions_stay_with_their_image_when_others_leave():
    captioner, purifier = Counted(words), Counted(noisy)
    attack, record = (
        Attack("clean", view="bpda", eps_255=12, n_steps=4, n_eot=2, captions="clean", any_step=True),
        Record(),
    )
    attack(LGAP(captioner, purifier, net), X, Y, KEYS, batch_size=4, record=record)
    own = dict(zip(KEYS.indices, words(X)))
    assert captioner.sizes == [N] and len(set(record.broke_at)) > 2 and len(set(own.values())) == N
    assert all(captions == [own[i] for i in keys.indices] for _, captions, keys in purifier.calls)


# ---------------------------------------------------------------- the authors' mask, memory, blocks


def test_a_masked_image_stops_where_the_bare_classifier_is_fooled():
    """Step by step: an image moves exactly while the classifier is right about it."""
    attack = Attack(
        "masked",
        view="bpda",
        eps_255=255 * SMALL["eps"],
        step_size_255=255 * SMALL["step_size"],
        n_steps=4,
        masked=True,
    )
    plain = dataclasses.replace(attack, masked=False)
    paths = [
        [dataclasses.replace(a, n_steps=n)(DEFENSE, X, Y, KEYS) for n in range(1, 5)] for a in (attack, plain)
    ]
    fooled = torch.zeros(N, dtype=torch.bool)
    for n in range(1, 4):
        fooled |= net(paths[0][n - 1]).argmax(1) != Y
        assert torch.equal(paths[0][n][fooled], paths[0][n - 1][fooled]) and torch.equal(
            paths[0][n][~fooled], paths[1][n][~fooled]
        )
    assert fooled.any() and not fooled.all() and not torch.equal(paths[0][3], paths[1][3])
    assert "masked by the bare classifier" in attack.describe()


def test_a_faint_gradient_survives_half_precision_and_scaling_changes_no_bit():
    def sure(x, dtype):  # the other classes have about 2e-9 of the probability; float16's least is 6e-8
        return (net(x) - net(X).detach()).to(dtype).to(torch.float32) + 20 * F.one_hot(Y, 10)

    def plain(dtype):
        x = X.clone().requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(sure(x, dtype), Y, reduction="sum"), x)[0]

    single, half = (
        gradient(lambda x, dtype=dtype: sure(x, dtype), X, Y)[0] for dtype in (torch.float32, torch.float16)
    )
    assert torch.equal(single, plain(torch.float32)) and not plain(torch.float16).any()
    torch.testing.assert_close(half, single, rtol=0.05, atol=0.05 * single.abs().max().item())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"eps": -0.1}, r"eps=-0.1.*\[0, 1\].*8/255"),
        ({"eps": 8}, "eps=8: expected"),
        ({"eps": "8/255"}, "eps='8/255'"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": True}, "eps=True"),
        ({"step_size": 2}, "step_size=2"),
        ({"step_size": float("inf")}, "step_size=inf"),
        ({"n_steps": 0}, "n_steps=0.*at least 1"),
        ({"n_steps": 2.0}, "n_steps=2.0.*whole"),
        ({"n_eot": True}, "n_eot=True"),
        ({"n_restarts": -1}, "n_restarts=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"average": "mean"}, "average='mean': choose from.*vote"),
        ({"keys": None}, "keys: got 0 for 8 images, expected one each"),
        ({"step_size": 0}, "step_size=0: no image would move"),
        ({"eps": None}, "eps=None"),
        ({"eps": [0.1]}, r"eps=\[0.1\]"),
        ({"known_noise": "False"}, "known_noise='False': expected True or False"),
        ({"any_step": 1}, "any_step=1: expected True"),
        ({"random_start": "no"}, "random_start='no'"),
        ({"random_start": None}, "random_start=None"),
        ({"keys": KEYS[:3]}, "keys: got 3 for 8 images"),
        ({"y": Y[:7]}, r"labels: got shape \[7\] for 8 images"),
        ({"y": Y[:, None]}, r"labels: got shape \[8, 1\]"),
        ({"x": 2 * X}, r"images: values span.*\[0, 1\]"),
        ({"x": X[:0]}, "images: the batch is empty"),
    ],
)
def test_a_wrong_argument_of_pgd_is_refused(wrong, says):
    settings = {"x": X, "y": Y, "keys": KEYS} | SMALL | wrong
    with pytest.raises(ValueError, match=says):
        pgd(
            full(LGAP(pytest.fail, pytest.fail, pytest.fail)),
            settings.pop("x"),
            settings.pop("y"),
            **settings,
        )


@pytest.mark.parametrize(
    "output",
    [lambda x: net(x)[:, 0], lambda x: net(x).T, lambda x: (net(x),)],
    ids=["one", "turned", "tuple"],
)
def test_a_model_without_logits_for_each_image_is_refused(output):
    for run in (lambda: pgd(output, X, Y, **SMALL), lambda: autoattack(output, X, Y, eps=0.05, keys=KEYS)):
        with pytest.raises(
            ValueError, match=r"model: its output is .*, expected a tensor of logits \[[18], classes\]"
        ):
            run()


# what a model, a part or an attack does to what it is given, in place
def spoiling(x):
    x.sub_(0.1)
    return net(x)


def spoiling_purifier(x, captions, keys):
    return noisy(x.mul_(0.9), captions, keys)


def careful_purifier(x, captions, keys):
    return noisy(x * 0.9, captions, keys)


@pytest.mark.parametrize(
    "spoils, careful",
    [
        (spoiling, lambda x: net(x - 0.1)),
        (
            VIEWS["blind"](LGAP(words, noisy, spoiling)),
            VIEWS["blind"](LGAP(words, noisy, lambda x: net(x - 0.1))),
        ),
        (full(LGAP(words, spoiling_purifier, net)), full(LGAP(words, careful_purifier, net))),
        (bpda(LGAP(words, spoiling_purifier, net)), bpda(LGAP(words, careful_purifier, net))),
    ],
    ids=["model", "classifier", "purifier, full", "purifier, bpda"],
)
@pytest.mark.parametrize(
    "settings", [{"n_eot": 1}, {"n_eot": 3}, {"n_eot": 3, "average": "vote"}, {"any_step": True}]
)
def test_who_works_in_place_changes_neither_images_nor_labels_nor_results(quick, spoils, careful, settings):
    x, y = X.clone(), Y.clone()
    expected = pgd(careful, X, Y, keys=KEYS, masked_by=lambda x: net(x - 0.1), **SMALL | settings)
    assert torch.equal(pgd(spoils, x, y, keys=KEYS, masked_by=spoiling, **SMALL | settings), expected)
    found, wanted = (gradient(model, x, y, KEYS.at([0] * N, 3), 3)[0] for model in (spoils, careful))
    assert torch.equal(found, wanted)
    version = "rand" if isinstance(spoils, View) else "standard"
    found, wanted = (
        autoattack(model, x[:1], y[:1], keys=KEYS[:1], version=version, n_eot=2, **quick)
        for model in (spoils, careful)
    )
    assert torch.equal(found, wanted)
    assert torch.equal(x, X) and torch.equal(y, Y)


def test_bpda_has_the_gradient_of_the_classifier_where_a_purifier_hands_back_what_it_was_given():
    view = bpda(LGAP(words, lambda x, captions, keys: x, net))
    assert torch.equal(gradient(view, X, Y, KEYS)[0], gradient(net, X, Y)[0])


def test_images_of_one_index_have_one_caption():
    attack = Attack("clean", view="full", n_steps=1, captions="clean")
    twice = Keys([3] * N)
    with pytest.raises(ValueError, match="keys: two images have the same index and different captions"):
        attack(DEFENSE, X, Y, twice)
    assert len(attack(DEFENSE, X[[0, 0]], Y[[0, 0]], twice[:2])) == 2


@pytest.mark.parametrize("keys", [list(range(N)), torch.arange(N)], ids=["list", "tensor"])
def test_keys_are_keys(keys):
    for attack in (
        lambda: pgd(net, X, Y, keys=keys, **SMALL),
        lambda: autoattack(net, X, Y, eps=0.05, keys=keys),
    ):
        with pytest.raises(TypeError, match="keys: expected `Keys`, one for each image, got"):
            attack()


def test_a_radius_of_zero_may_have_a_step_of_zero():
    assert torch.equal(pgd(net, X, Y, eps=0, step_size=0, n_steps=2), X)
    assert Attack("zero", eps_255=0, step_size_255=0).eps_255 == 0


@pytest.mark.parametrize("y", [Y.float(), Y.int(), Y.tolist()], ids=["float", "int32", "list"])
def test_labels_are_whole_numbers_in_a_tensor(y):
    for attack in (pgd, autoattack):
        with pytest.raises(TypeError, match="labels: expected a torch.long tensor, got"):
            attack(
                net,
                X,
                y,
                keys=KEYS,
                **{"eps": 0.05} | ({"step_size": 0.02, "n_steps": 1} if attack is pgd else {}),
            )


def test_softmax_in_place_of_logits_is_announced():
    with pytest.warns(UserWarning, match="softmax"):
        pgd(full(LGAP(words, noisy, lambda x: net(x).softmax(1))), X, Y, keys=KEYS, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(full(DEFENSE), X, Y, keys=KEYS, **SMALL)


# ---------------------------------------------------------------- other balls, frequencies, aims


def test_l2_pgd_is_foolboxs_and_keeps_to_its_ball():
    import foolbox

    how = {"eps": 0.5, "step_size": 0.1, "n_steps": 5}
    adv = pgd(net, X, Y, norm="l2", **how)
    fmodel = foolbox.PyTorchModel(attacks.blind(DEFENSE), bounds=(0, 1), device="cpu")
    peer = foolbox.attacks.L2ProjectedGradientDescentAttack(abs_stepsize=0.1, steps=5, random_start=False)
    assert torch.allclose(adv, peer.run(fmodel, X, Y, epsilon=0.5), atol=1e-5)
    started = pgd(net, X, Y, norm="l2", keys=KEYS, **how)
    assert (started - X).flatten(1).norm(dim=1).max() <= 0.5 + 1e-5 and not torch.allclose(started, adv)


def test_low_frequencies_alone_move():
    x = 0.4 + 0.2 * X  # far from 0 and 1, where clamping would cut squares apart
    change = pgd(net, x, Y, eps=0.1, step_size=0.03, n_steps=3, low_pass=2, keys=KEYS) - x
    squares = F.avg_pool2d(change, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(change, squares, atol=1e-6) and change.abs().max() > 0.05


def test_an_aimed_attack_descends_the_loss_of_its_class_and_notes_when_it_is_reached():
    how, record = {"eps": 1.0, "step_size": 0.05, "n_steps": 40}, Record()
    y = torch.where(torch.arange(N) == 0, 4, Y)
    aims = torch.where(y == 4, 3, 4)  # the aimed class's own images go to its neighbour
    adv = pgd(net, X, y, target=4, record=record, **how)
    assert (net(adv).argmax(1) == aims).all() and not (net(X).argmax(1) == aims).any()
    assert all(0 <= step <= 40 for step in record.broke_at)
    one = pgd(net, X, y, target=4, **how | {"n_steps": 1})
    leaf = X.clone().requires_grad_(True)
    loss = F.cross_entropy(net(leaf), aims, reduction="sum")
    (slope,) = torch.autograd.grad(loss, leaf)
    assert torch.allclose(one, (X - 0.05 * slope.sign()).clamp(0, 1), atol=1e-6)


def test_a_perturbation_in_whole_steps_stays_in_the_ball_and_another_seed_is_another_attack():
    x, plain = (255 * X).round() / 255, Attack("plain", n_steps=3)
    defense = LGAP(lambda x: [""] * len(x), lambda x, c, k: x, net)
    attacked = {
        name: Attack(name, n_steps=3, **own)(defense, x, Y, KEYS)
        for name, own in {"plain": {}, "rounded": {"rounded": True}, "seed": {"seed": 1}}.items()
    }
    whole = attacked["rounded"] * 255
    assert torch.allclose(whole, whole.round(), atol=1e-3) and (whole / 255 - x).abs().max() <= 8 / 255 + 1e-6
    assert ((attacked["rounded"] - x).abs() <= (attacked["plain"] - x).abs() + 1e-6).all()
    assert not torch.equal(attacked["seed"], attacked["plain"])
    l2 = Attack("l2", norm="l2", eps_255=127.5)
    assert torch.allclose(l2.distance(x, x + 0.01), torch.full((N,), 0.01 * x[0].numel() ** 0.5))
    assert "L2 0.5" in l2.describe() and "attack seed 1" in Attack("s", seed=1).describe()
    assert "whole 1/255; attack seed 2" in Attack("a", "autoattack", rounded=True, seed=2).describe()
    for bad in ({"norm": "l1"}, {"low_pass": 0}, {"target": -1}, {"rounded": 1}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Attack("bad", **bad)
    with pytest.raises(ValueError, match="target=3"):
        Attack("bad", view="joint", target=3)
    assert plain.distance(x, x + 0.01).allclose(torch.tensor(0.01))
