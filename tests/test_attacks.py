"""Attacks are what they are called: equal to other libraries and to closed forms, and the same in any batch and order."""

import dataclasses
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgap_utils import attacks, protocols
from lgap_utils.attacks import VIEWS, Record, View, bpda, full, gradient, pgd
from lgap_utils.autoattack import Query, autoattack, blocks
from lgap_utils.batches import BatchSize, call_in_batches
from lgap_utils.defense import LGAP
from lgap_utils.noise import Keys, generator, seed_of
from lgap_utils.protocols import ATTACKS, Attack, get_attack

N, SHAPE = 8, (3, 4, 4)
WEIGHTS = torch.randn(10, *SHAPE, generator=generator("weights"))
X = torch.rand(N, *SHAPE, generator=generator("images"))
KEYS = Keys(range(20, 20 + N), seed=1, stage="attack")


def net(x):
    """Ten logits, each a sum over one image: bit for bit the same in any batch."""
    return ((x + x * x)[:, None] * WEIGHTS.to(x)).flatten(2).sum(2)


def words(x):
    """A caption that is another one after any step of an attack."""
    return [f"a picture of {seed_of(*image.flatten().tolist()) % 1000}" for image in x]


def noisy(x, captions, keys):
    """A purifier whose image depends on its caption and on its key."""
    said = torch.tensor([seed_of(caption) / 2**63 for caption in captions]).view(-1, 1, 1, 1)
    return 0.8 * x + 0.1 * said.to(x) + 0.1 * keys.normal(x.shape[1:], "noise").to(x)


Y = net(X).argmax(1)
DEFENSE = LGAP(words, noisy, net)
SMALL = {"eps": 0.05, "step_size": 0.02, "n_steps": 4}


class Counted:
    """A callable that keeps what it was called with."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args):
        self.calls.append(args)
        return self.function(*args)

    @property
    def sizes(self):
        return [len(call[0]) for call in self.calls]


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
    """The diffusion in float64 before a small classifier; images larger than its working size; their labels and captions."""
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
    """The start and every iterate of an attack on the bare net, one attack each, and the first that is wrong (or None)."""
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


# ---------------------------------------------------------------- AutoAttack


def dynamic(x):
    """A model that takes gradients of its own."""
    with torch.enable_grad():
        x = x.detach().requires_grad_() if not x.requires_grad else x
        return net(x + 1e-3 * torch.autograd.grad(net(x).sum(), x)[0])


def test_autoattack_flags_each_model_for_its_own_faults_and_leaves_the_process_as_it_was(quick):
    """One process, one model after another: the library counts over all of them, and takes over the trace function."""
    from pyautoattack import checks

    checks.funcs["grad"] += 1  # as if somebody else had used the library before
    models = {
        "randomized": full(DEFENSE),
        "zero gradient": lambda x: net((8 * x).round() / 8),
        "dynamic": dynamic,
        "probability": lambda x: net(x).softmax(1),
        "": net,
    }
    torch.manual_seed(1)
    state, before, mine, flags = torch.get_rng_state(), sys.gettrace(), lambda *_: None, {}
    sys.settrace(mine)
    try:
        for fault, model in models.items():
            record = Record()
            autoattack(model, X[:1], Y[:1], keys=KEYS[:1], record=record, **quick | {"eps": 1e-3})
            (flags[fault],) = record.flags
            assert record.bad_gradients == [fault == "zero gradient"]
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is mine and torch.equal(torch.get_rng_state(), state)
    assert flags.pop("") == "" and all(fault in flag and ";" not in flag for fault, flag in flags.items()), (
        flags
    )


class Stubborn(View):
    """A random defence that answers right on every draw, however high its loss has become."""

    def __call__(self, x, keys):
        own = net(0.8 * x.repeat_interleave(len(keys) // len(x), 0) + 0.2 * keys.normal(SHAPE, "noise"))
        return torch.tanh(own / 9) + 1.01 * F.one_hot(torch.full((len(keys),), 3), 10)


def test_autoattack_leaves_a_random_defence_with_a_higher_loss_though_every_draw_is_right(quick):
    """The library's own evaluation asks once more in the end, and hands back the clean image where that draw is right."""
    adv, y = (
        autoattack(
            Stubborn(DEFENSE), X[:1], torch.tensor([3]), keys=KEYS[:1], version="rand", n_eot=3, **quick
        ),
        torch.tensor([3]),
    )
    clean, attacked = (
        F.cross_entropy(Stubborn(DEFENSE)(x, KEYS[:1].at([0], 500)), y.expand(500)) for x in (X[:1], adv)
    )
    assert attacked > clean + 0.01
    assert (adv - X[:1]).abs().max() <= 0.05 + 1e-6 and adv.min() >= 0 and adv.max() <= 1


@pytest.mark.parametrize("strong_is_first", [True, False])
def test_of_the_points_that_autoattack_ends_at_the_one_with_the_highest_loss_is_taken(
    quick, monkeypatch, strong_is_first
):
    from pyautoattack.autopgd_base import APGDAttack

    y = torch.tensor([3])
    strong = pgd(Stubborn(DEFENSE), X[:1], y, keys=KEYS[:1], **SMALL)
    ends = iter([strong, X[:1]] if strong_is_first else [X[:1], strong])
    monkeypatch.setattr(APGDAttack, "perturb", lambda self, x, y, best_loss: next(ends))
    assert torch.equal(
        autoattack(Stubborn(DEFENSE), X[:1], y, keys=KEYS[:1], version="rand", n_eot=3, **quick), strong
    )
    assert next(ends, None) is None


@pytest.mark.parametrize(
    "model, settings",
    [
        (net, {}),
        (full(DEFENSE), {"version": "rand", "n_eot": 3}),
        (bpda(DEFENSE), {"version": "rand", "n_eot": 3}),
        (full(DEFENSE), {"version": "custom", "attacks": ("square",)}),
        (net, {"version": "custom", "attacks": ["square"]}),
    ],
    ids=["standard", "rand", "rand, bpda", "square", "square, blind"],
)
def test_autoattack_gives_an_image_the_same_result_whoever_comes_before(quick, model, settings):
    def run(order):
        with torch.random.fork_rng():
            torch.manual_seed(len(order) + order[0])
            return autoattack(model, X[order], Y[order], keys=KEYS[order], **quick | settings)

    together = run([0, 1, 2])
    assert torch.equal(torch.cat([run([i]) for i in (2, 0, 1)]), together[[2, 0, 1]])
    assert (together - X[:3]).abs().max() > 0.01


def test_autoattack_is_seeded_by_the_key_of_each_image(quick):
    twice = [0, 0]
    adv = autoattack(net, X[twice], Y[twice], keys=KEYS[:2], version="custom", attacks=("square",), **quick)
    assert not torch.equal(adv[0], adv[1])


def test_apgd_is_as_the_library_makes_it_for_the_number_of_steps(quick, monkeypatch):
    """The library plans its step sizes when it is built, and for 100 steps."""
    from pyautoattack.autopgd_base import APGDAttack

    used, names = [], ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr")
    monkeypatch.setattr(
        APGDAttack, "perturb", lambda self, x, y, **_: used.append((self, self.eot_iter)) or x.clone()
    )
    attack = Attack("rand", optimiser="autoattack", view="full", version="rand", n_steps=40, n_eot=3)
    attack(DEFENSE, X[:1], Y[:1], KEYS[:1])
    numbers = lambda apgd: [getattr(apgd, name) for name in names]
    assert [numbers(apgd) for apgd, _ in used] == [numbers(APGDAttack(None, n_iter=40, eps=1))] * 2 and [
        n for _, n in used
    ] == [3, 3]


@pytest.mark.parametrize("n_eot", [1, 3])
def test_square_asks_for_the_mean_logits_of_fresh_draws(quick, n_eot):
    purifier = Counted(noisy)
    Attack("square", optimiser="square", view="full", n_steps=4, n_eot=n_eot)(
        LGAP(words, purifier, net), X[:1], Y[:1], KEYS[:1]
    )
    drawn = [row for _, _, keys in purifier.calls for row in keys.rows]
    assert len(set(drawn)) == len(drawn) and {len(keys) for _, _, keys in purifier.calls} == {n_eot}
    query = Query(full(DEFENSE), KEYS[:1], n_eot)
    for call in range(2):
        assert torch.allclose(
            query(X[:1]),
            full(DEFENSE)(X[:1], KEYS[:1].at([call], n_eot)).mean(0, keepdim=True),
            rtol=0,
            atol=1e-5,
        )


def test_a_query_about_some_of_its_images_is_refused():
    with pytest.raises(ValueError, match="got 1 images for 2 keys.*one image at a time"):
        Query(full(DEFENSE), KEYS[:2])(X[:1])


def test_autoattack_meets_a_defence_that_passes_no_gradient_without_an_error(quick):
    record, defense = Record(), LGAP(words, lambda x, captions, keys: noisy(x.detach(), captions, keys), net)
    autoattack(full(defense), X[:1], Y[:1], keys=KEYS[:1], version="rand", n_eot=2, record=record, **quick)
    assert record.bad_gradients == [1] and "zero gradient" in record.flags[0]


# ---------------------------------------------------------------- the authors' mask, memory, blocks


def test_a_masked_image_stops_where_the_bare_classifier_is_fooled():
    """Step by step, from plain PGD of one step at a time: an image moves exactly while the classifier is right about it."""
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


class Small:
    """A device that holds so many draws in a call, and fails as torch does."""

    def __init__(self, most, function=noisy, error=None):
        error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.most, self.function, self.error, self.failures = most, function, error, 0

    def __call__(self, x, captions, keys):
        if len(keys) > self.most:
            self.failures += 1
            raise self.error
        return self.function(x, captions, keys)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["GPU", "CPU", "cuBLAS"])
@pytest.mark.parametrize("settings", [{}, {"n_eot": 5}, {"n_eot": 2, "any_step": True}])
def test_running_out_of_memory_halves_the_batch_and_changes_nothing(settings, error, capsys):
    run = lambda purifier, room: pgd(
        bpda(LGAP(words, purifier, net)), X, Y, keys=KEYS, batch_size=room, **SMALL | settings
    )
    small, room = Small(3, error=error), BatchSize(64)
    assert torch.equal(run(small, room), run(noisy, 64))
    assert small.failures and room.size <= 3 and f"going on with {room.size}" in capsys.readouterr().out
    failures = small.failures
    run(small, room)
    assert small.failures == failures  # what was learned is kept


def test_one_image_that_does_not_fit_is_said_in_a_sentence():
    with pytest.raises(MemoryError, match="one image alone does not fit into memory .*lower `size`"):
        pgd(bpda(LGAP(words, Small(0), net)), X, Y, keys=KEYS, **SMALL)
    with pytest.raises(RuntimeError, match="^another fault$"):
        pgd(bpda(LGAP(words, Small(0, error=RuntimeError("another fault")), net)), X, Y, keys=KEYS, **SMALL)


def test_a_block_of_autoattack_that_does_not_fit_is_said_in_a_sentence():
    def big(x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return net(x)

    with pytest.raises(
        MemoryError, match="^AutoAttack's 4 images of a block do not fit .*lower `autoattack_block`"
    ):
        autoattack(big, X, Y, eps=0.05, keys=Keys(range(N)), n_steps=2, block=4)


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


def test_the_batch_grows_while_most_of_a_gpu_is_empty(monkeypatch):
    class Device:
        total_memory = 100

    used = [10]
    monkeypatch.setattr(
        torch.cuda, "max_memory_reserved", lambda device: used[0] if str(device) == "cuda:1" else 0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Device)
    room = BatchSize(2, "cuda:1", most=16)
    sizes = call_in_batches(lambda part: part.stop - part.start, 30, room)
    assert sizes == [2, 4, 8, 16] and room.size == 16
    used[0], room = 50, BatchSize(2, "cuda:1")
    assert call_in_batches(lambda part: part.stop - part.start, 6, room) == [2, 2, 2]
    for device in (None, "cpu"):  # whatever a GPU beside it holds
        assert call_in_batches(lambda part: part.stop - part.start, 6, BatchSize(2, device)) == [2, 2, 2]


def test_autoattack_in_blocks_depends_on_the_block_alone(quick):
    attack = get_attack("AutoAttack", n_steps=3, block=4)
    keys = Keys([0, 1, 2, 3, 4, 9, 10, 11], 1, "attack")
    whole = attack(DEFENSE, X, Y, keys)
    assert blocks(keys.indices, 4) == [[0, 1, 2, 3], [4], [5, 6, 7]]
    for rows in ([0, 1, 2, 3], [4], [5, 6, 7]):
        assert torch.equal(attack(DEFENSE, X[rows], Y[rows], keys[rows]), whole[rows])
    for wrong in (
        {"attack": "BPDA-40", "block": 4},
        {"attack": "AutoAttack rand", "block": 2},
        {"attack": "AutoAttack", "block": 0},
    ):
        with pytest.raises(ValueError, match="block="):
            get_attack(wrong["attack"], block=wrong["block"])


# ---------------------------------------------------------------- the grid


@pytest.mark.parametrize("name", ATTACKS)
def test_each_named_attack_stays_inside_its_threat_model_and_says_what_it_is(quick, name):
    attack = get_attack(name, n_steps=3, n_eot=min(2, ATTACKS[name].n_eot))
    record, done, before = Record(), [], X.clone()
    adv = attack(DEFENSE, X[:2], Y[:2], KEYS[:2], record=record, progress=done.append)
    assert (adv - X[:2]).abs().max() <= attack.eps_255 / 255 + 1e-6 and adv.min() >= 0 and adv.max() <= 1
    assert torch.equal(X, before) and not adv.requires_grad
    assert [len(v) for v in dataclasses.astuple(record)] == [2, 2, 2]
    assert "\n" not in attack.describe() and (
        attack.optimiser == "none" or f"eps {attack.eps_255:g}/255" in attack.describe()
    )


def test_every_number_of_an_attack_reaches_the_optimiser(monkeypatch):
    seen, rest = (
        {},
        {
            "n_steps": 7,
            "n_eot": 3,
            "average": "vote",
            "random_start": False,
            "known_noise": True,
            "any_step": True,
            "n_restarts": 2,
        },
    )
    monkeypatch.setattr(protocols, "pgd", lambda model, x, y, **settings: seen.update(settings) or x)
    Attack("all", view="full", eps_255=4, step_size_255=1, **rest)(DEFENSE, X, Y, KEYS, batch_size=5)
    assert seen == rest | {
        "eps": 4 / 255,
        "step_size": 1 / 255,
        "keys": KEYS,
        "batch_size": 5,
        "record": None,
        "progress": None,
        "masked_by": None,
    }


@pytest.mark.parametrize(
    "settings", [{}, {"n_eot": 3}, {"any_step": True}, {"n_restarts": 2, "n_eot": 2}, {"view": "bpda"}]
)
def test_the_cost_of_an_attack_is_known_before_it_runs(settings):
    purifier = Counted(noisy)
    attack = Attack("costly", **{"view": "full", "n_steps": 3} | settings)
    attack(
        LGAP(words, purifier, lambda x: 9.0 * F.one_hot(torch.full((len(x),), 3), 10)),
        X,
        torch.full((N,), 3),
        KEYS,
    )  # unbreakable
    assert sum(len(keys) for _, _, keys in purifier.calls) == N * sum(attack.purifications())
    assert (attack.purifications()[0] == 0) == (attack.view == "full")


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
        ({"keys": None}, "keys: .*view.*one key per image"),
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
    "wrong, says",
    [
        ({"eps": 8}, "eps=8: expected"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_eot": 0}, "n_eot=0"),
        ({"n_queries": 0.5}, "n_queries=0.5"),
        ({"version": "plus"}, "version='plus': choose from.*rand"),
        ({"version": "custom"}, "attacks=None.*custom"),
        ({"attacks": ("square",)}, r"attacks=\('square',\).*standard"),
        ({"keys": None}, "keys: got 0 for 8"),
        ({"keys": KEYS[:3]}, "keys: got 3 for 8 images"),
        ({"y": Y[:7]}, "labels: got shape"),
        ({"x": X - 1}, "images: values span"),
        ({"version": "custom", "attacks": ["fab"]}, "attacks on a random defence='fab': choose from"),
        ({"version": "custom", "attacks": ["pgd"]}, "attacks='pgd': choose from.*'square'"),
        ({"version": "custom", "attacks": "square"}, "attacks='s': choose from"),
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": "8/255"}, "eps='8/255'"),
        ({"eps": True}, "eps=True"),
        ({"n_steps": 2.0}, "n_steps=2.0"),
        ({"n_eot": True}, "n_eot=True"),
        ({"block": 2}, "block=2: a view of a random defence"),
    ],
)
def test_a_wrong_argument_of_autoattack_is_refused(wrong, says):
    settings = {"x": X, "y": Y, "keys": KEYS, "eps": 0.05} | wrong
    with pytest.raises(ValueError, match=says):
        autoattack(full(DEFENSE), settings.pop("x"), settings.pop("y"), **settings)


OPTIMISERS = {
    "pgd": lambda model, y: pgd(model, X, y, keys=KEYS, batch_size=2, **SMALL),
    "standard": lambda model, y: autoattack(model, X, y, eps=0.05, keys=KEYS),
    "square": lambda model, y: autoattack(
        model, X, y, eps=0.05, keys=KEYS, version="custom", attacks=["square"], n_queries=2
    ),
    "rand": lambda model, y: autoattack(model, X, y, eps=0.05, keys=KEYS, version="rand", n_eot=1),
}


@pytest.mark.parametrize("view", [lambda d: net, VIEWS["blind"], full], ids=["net", "blind", "full"])
@pytest.mark.parametrize("label", [10, 99, -1, -100])
@pytest.mark.parametrize("run", OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_label_that_is_no_class_of_the_model_is_refused_before_anything_moves(run, label, view):
    """cross_entropy leaves out -100 without a word, and AutoAttack takes any such image for misclassified, and hands it back."""
    y = Y.clone()
    y[[5, 7]] = label
    with pytest.raises(
        ValueError, match=f"^labels: image 5 of 8 has label {label}, and the model's classes are 0 to 9$"
    ):
        run(view(DEFENSE), y)


@pytest.mark.parametrize("run, needs", [("pgd", 2), ("square", 2), ("rand", 3), ("standard", 4)])
def test_an_attack_says_how_many_classes_it_needs_and_works_with_them(quick, run, needs):
    def few(n):
        return lambda x: (net(x) - net(X).mean(0))[:, :n]

    y = lambda n: few(n)(X).argmax(1)
    adv = OPTIMISERS[run](few(needs), y(needs))
    assert (few(needs)(adv).argmax(1) != y(needs)).any() or run == "square"
    with pytest.raises(
        ValueError, match=f"model: its logits are of {needs - 1} classes, and .* needs at least {needs}"
    ):
        OPTIMISERS[run](few(needs - 1), y(needs - 1))


def test_the_targeted_parts_of_autoattack_take_all_other_classes_and_nine_at_most(quick, monkeypatch):
    from pyautoattack.autopgd_base import APGDAttack_targeted

    targets = []
    monkeypatch.setattr(
        APGDAttack_targeted, "perturb", lambda self, x, y: targets.append(self.n_target_classes) or x.clone()
    )
    for n in (4, 7, 10, 12):
        model = lambda x: (
            torch.cat([net(x), 0.9 * net(x)], 1)[:, :n] * (1 + 1e3 * F.one_hot(torch.tensor(1), n))
        )
        autoattack(model, X[:1], model(X[:1]).argmax(1), keys=KEYS[:1], **quick | {"eps": 1e-6})
    assert targets == [3, 6, 9, 9]


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


def test_an_attack_in_batches_that_works_in_place_leaves_the_images_and_labels_as_they_are():
    x, y = X.clone(), Y.clone()
    out = protocols.in_batches(
        lambda x, y, keys: x.add_(y.mul_(0).float().view(-1, 1, 1, 1) + 0.5), x, y, batch_size=3
    )
    assert torch.equal(out, X + 0.5) and torch.equal(x, X) and torch.equal(y, Y)
    Attack("none", optimiser="none")(DEFENSE, x, y, KEYS).zero_()
    assert torch.equal(x, X)


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


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"optimiser": "fgsm"}, "optimiser='fgsm': choose from.*pgd"),
        ({"view": "white"}, "view='white'.*bpda"),
        ({"average": "sum"}, "average='sum'.*vote"),
        ({"captions": "old"}, "captions='old'.*anew"),
        ({"version": "custom"}, "version='custom'.*rand"),
        ({"eps_255": "8/255"}, "eps_255='8/255'"),
        ({"eps_255": -1}, r"eps_255=-1: expected a number in \[0, 255\]"),
        ({"eps_255": 256}, "eps_255=256"),
        ({"eps_255": 8 / 255}, "eps_255=0.031.*8 and not 8/255"),
        ({"step_size_255": 0}, "step_size_255=0: no image would move"),
        ({"eps_255": float("nan")}, "eps_255=nan"),
        ({"n_steps": 2.0}, "n_steps=2.0"),
        ({"n_eot": True}, "n_eot=True"),
        ({"known_noise": "False"}, "known_noise='False': expected True or False"),
        ({"any_step": 1}, "any_step=1"),
        ({"random_start": "no"}, "random_start='no'"),
        ({"masked": "yes"}, "masked='yes'"),
        ({"masked": None}, "masked=None"),
        ({"step_size_255": float("nan")}, "step_size_255=nan"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_eot": "3"}, "n_eot='3'"),
        ({"n_restarts": 0}, "n_restarts=0"),
        ({"optimiser": "square", "known_noise": True}, "known_noise=True: only.*'pgd'.*'square'"),
        ({"optimiser": "autoattack", "n_restarts": 2}, "n_restarts=2: only"),
        ({"optimiser": "square", "average": "vote"}, "average='vote': only"),
        ({"optimiser": "autoattack", "any_step": True}, "any_step=True: only"),
        ({"steps": 3, "eot": 2}, "no field eot, steps; choose from.*n_steps"),
    ],
)
def test_a_wrong_field_of_an_attack_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        get_attack("BPDA-40", **wrong)


def test_an_unknown_attack_is_answered_with_the_choices_and_a_known_one_may_be_renamed():
    with pytest.raises(ValueError, match="no attack 'BPDA'; choose from.*BPDA-40"):
        get_attack("BPDA")
    changed = {"name": "BPDA-40 at 4/255", "eps_255": 4}
    assert get_attack("BPDA-40", **changed) == dataclasses.replace(ATTACKS["BPDA-40"], **changed)
    assert get_attack("blind PGD-40", n_steps=10) == Attack(
        "blind PGD-10", n_steps=10
    )  # a name says no other number of steps
    assert (
        get_attack("BPDA-40", n_steps=10, name="mine").name == "mine"
        and get_attack("Square", n_steps=7).name == "Square"
    )


def test_softmax_in_place_of_logits_is_announced():
    with pytest.warns(UserWarning, match="softmax"):
        pgd(full(LGAP(words, noisy, lambda x: net(x).softmax(1))), X, Y, keys=KEYS, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(full(DEFENSE), X, Y, keys=KEYS, **SMALL)
