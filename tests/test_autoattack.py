"""AutoAttack on plain models and on random defences: flags, seeds, blocks and the number of classes."""

import sys

import pytest
import torch
import torch.nn.functional as F
from sums import DEFENSE, KEYS, SHAPE, SMALL, Counted, N, X, Y, net, noisy, words

from lgap_utils.attacks import VIEWS, Record, View, bpda, full, pgd
from lgap_utils.autoattack import Query, autoattack, blocks
from lgap_utils.defense import LGAP
from lgap_utils.noise import Keys
from lgap_utils.protocols import Attack, get_attack


def dynamic(x):
    """A model that takes gradients of its own."""
    with torch.enable_grad():
        x = x.detach().requires_grad_() if not x.requires_grad else x
        return net(x + 1e-3 * torch.autograd.grad(net(x).sum(), x)[0])


def test_autoattack_flags_each_model_for_its_own_faults_and_leaves_the_process_as_it_was(quick):
    """The library counts over all models of a process, and takes over the trace function."""
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
    """The library asks once more in the end, and hands back the clean image where that draw is right."""
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


def test_a_block_of_autoattack_that_does_not_fit_is_said_in_a_sentence():
    def big(x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return net(x)

    with pytest.raises(
        MemoryError, match="^AutoAttack's 4 images of a block do not fit .*lower `autoattack_block`"
    ):
        autoattack(big, X, Y, eps=0.05, keys=Keys(range(N)), n_steps=2, block=4)


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
    """cross_entropy leaves out -100 without a word; AutoAttack takes such an image for misclassified."""
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


def test_with_move_all_what_is_mislabelled_already_moves_to_a_higher_loss_and_the_rest_stays(quick):
    y = net(X[:4]).argmax(1)
    y[1] = (y[1] + 1) % 10  # mislabelled before any attack
    how = {"keys": KEYS[:4], "block": 4} | quick
    plain, moved = (autoattack(net, X[:4], y, move_all=flag, **how) for flag in (False, True))
    still = (plain == X[:4]).flatten(1).all(1)
    assert still[1] and torch.equal(moved[~still], plain[~still])
    assert ((moved - X[:4]).abs().flatten(1).amax(1) > 0).all()
    assert (moved - X[:4]).abs().max() <= quick["eps"] + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    loss = lambda x: F.cross_entropy(net(x), y, reduction="none")
    assert (loss(moved)[still] > loss(plain)[still]).all()
    with pytest.raises(ValueError, match="move_all"):
        Attack("x", view="bpda", move_all=True)
