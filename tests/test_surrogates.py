"""Views beyond the paper's: equal to autograd and to transformers' loss; the captioner falls."""

import pytest
import torch
import torch.nn.functional as F

from lgap_utils import surrogates
from lgap_utils.attacks import Record, full, gradient
from lgap_utils.baselines import vae_round_trip
from lgap_utils.data import load_images
from lgap_utils.defense import LGAP
from lgap_utils.models import load_defense
from lgap_utils.noise import Keys
from lgap_utils.protocols import Attack, get_attack
from lgap_utils.words import names_class


@pytest.fixture(scope="module")
def toy():
    """The bundled toy models, four scenes and their keys."""
    defense, images = load_defense("toy", device="cpu"), load_images("toy", "validation", 4)
    return defense, images, Keys(images.indices, 0, "attack")


def autograd(function, x, y):
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(F.cross_entropy(function(leaf), y, reduction="sum"), leaf)
    return grad


def test_the_likelihood_of_a_caption_is_transformers_own_loss(toy):
    defense, images, _ = toy
    captioner, texts = defense.captioner, ["a small red ring at the top", "a star"]
    found = captioner.log_likelihood(images.x[:2], texts)
    for k, text in enumerate(texts):
        tokens = captioner.processor.tokenizer(f"{captioner.prompt} {text}", return_tensors="pt")
        ids, n_prompt = tokens.input_ids, len(captioner.processor.tokenizer(captioner.prompt).input_ids) - 1
        ids[:, 0] = captioner.model.config.text_config.bos_token_id
        labels = ids.clone()
        labels[:, :n_prompt] = -100
        loss = captioner.model(
            captioner.pixel_values(images.x[k : k + 1]), ids, tokens.attention_mask, labels=labels
        ).loss
        assert torch.allclose(found[k], -loss, atol=1e-5)
    assert torch.allclose(captioner.log_likelihood(images.x[:1], texts)[0], found[0], atol=1e-5)


def test_the_vae_surrogate_is_the_round_trip_before_the_classifier(toy):
    defense, images, keys = toy
    trip = vae_round_trip(defense.purifier)
    found, _ = gradient(surrogates.vae(defense), images.x, images.labels, keys.at([0] * 4))
    expected = autograd(lambda x: defense.classify(trip(x, None, keys)), images.x, images.labels)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_one_step_surrogate_is_what_one_denoiser_call_expects(toy):
    defense, images, keys = toy
    p, captions = defense.purifier, dict(zip(keys.indices, defense.caption(images.x)))
    t_noise, times = p.schedule()

    def by_hand(x):
        z = p.encode(x, keys)
        noised = p.scheduler.add_noise(z, keys.normal(z.shape[1:], "noise"), torch.full((4,), t_noise))
        out = p.unet(noised, times[0], p.embed(captions.values())).sample
        return defense.classify(p.decode(p.scheduler.step(out, times[0], noised).pred_original_sample))

    found, _ = gradient(surrogates.one_step(defense, captions), images.x, images.labels, keys)
    assert torch.allclose(found, autograd(by_hand, images.x, images.labels), rtol=1e-3, atol=1e-6)
    assert p.guidance_scale != 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a red cat on a mat", "a red dog on a mat"),
        ("a red kitten on a cat", "a red dog on a cat"),
        ("catalogue of an airplane", "catalogue of an dog"),
        ("A Cat on a mat", "A dog on a mat"),
        ("nothing that is known", "a dog"),
    ],
)
def test_the_class_word_of_a_caption_is_replaced(text, expected):
    assert surrogates.with_class(text, ("cat", "dog", "airplane"), ["dog"]) == [expected]


def test_a_class_of_several_words_is_replaced_however_it_is_joined():
    for text in ("a red pickup truck", "a red pickup-truck", "a red Pickup"):
        assert surrogates.with_class(text, ("pickup_truck", "train"), ["train", "bus"]) == [
            "a red train",
            "a red bus",
        ]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"view": "caption", "optimiser": "square"}, "optimiser='square': only the optimiser 'pgd'"),
        ({"view": "joint", "optimiser": "autoattack"}, "only the optimiser 'pgd' has the view 'joint'"),
        ({"view": "caption", "n_eot": 2}, "n_eot=2: the view 'caption' has no use for it"),
        ({"view": "caption", "average": "vote"}, "average='vote': the view 'caption' has no use for it"),
        ({"view": "caption", "any_step": True}, "any_step=True: the view"),
        ({"view": "caption", "n_restarts": 2}, "n_restarts=2: the view"),
        ({"view": "caption", "known_noise": True}, "known_noise=True: the view"),
        ({"view": "joint", "captions": "clean"}, "captions='clean': the view 'joint' has no use for it"),
        ({"view": "vae", "captions": "clean"}, "captions='clean': the view 'vae' has no use for it"),
    ],
)
def test_a_field_that_a_view_would_ignore_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Attack("mine", **settings)


def test_targets_name_a_wrong_class_and_are_kept_by_index(toy):
    defense, images, keys = toy
    view = surrogates.caption(defense).aimed(images.x, images.labels, keys.indices)
    assert list(view.targets) == keys.indices
    for label, text in zip(images.labels.tolist(), view.targets.values()):
        named = [k for k, name in enumerate(images.classes) if names_class(text, name)]
        assert len(named) == 1 and named[0] != label


def test_the_captioner_falls_to_its_own_attack(toy):
    defense, images, keys = toy
    adv = get_attack("PGD-20 on the caption")(defense, images.x, images.labels, keys)
    assert (adv - images.x).abs().max() <= 8 / 255 + 1e-6
    clean, attacked = (
        [names_class(text, images.classes[k]) for text, k in zip(defense.caption(x), images.labels.tolist())]
        for x in (images.x, adv)
    )
    assert sum(clean) >= 3 and not any(attacked)


@pytest.mark.parametrize("name", ["PGD-20, VAE surrogate", "PGD-20, one-step surrogate", "PGD-20, joint"])
def test_a_named_attack_stays_inside_its_ball_and_says_what_it_is(toy, name):
    defense, images, keys = toy
    attack, record = get_attack(name, n_steps=2), Record()
    adv = attack(defense, images.x, images.labels, keys, record=record)
    assert (adv - images.x).abs().max() <= 8 / 255 + 1e-6 and 0 <= adv.min() and adv.max() <= 1
    assert record.bad_gradients == [0] * 4
    assert "eps 8/255" in attack.describe() and attack.view in attack.describe()


def test_joint_without_one_part_is_the_other(toy, monkeypatch):
    defense, images, keys = toy
    view = surrogates.joint(defense).aimed(images.x, images.labels, keys.indices)
    draws = keys.at([0] * 4)
    of_defense = gradient(full(defense), images.x, images.labels, draws)[0]
    of_caption = surrogates.caption.gradient(view, images.x, images.labels, draws, 1)[0]
    both = gradient(view, images.x, images.labels, draws)[0]
    parts = [grad / grad.flatten(1).abs().sum(1).view(4, 1, 1, 1) for grad in (of_caption, of_defense)]
    assert torch.allclose(both, sum(parts), rtol=1e-4, atol=1e-8)
    monkeypatch.setattr(surrogates.caption, "gradient", lambda self, x, *_: (torch.zeros_like(x), [True] * 4))
    alone = gradient(view, images.x, images.labels, draws)[0]
    assert torch.equal(alone.sign(), of_defense.sign())
    monkeypatch.setattr(surrogates, "gradient", lambda *_: (torch.zeros_like(images.x), [True] * 4))
    monkeypatch.setattr(surrogates.caption, "gradient", lambda *_: (of_caption, [True] * 4))
    assert torch.equal(gradient(view, images.x, images.labels, draws)[0].sign(), of_caption.sign())


def test_parts_that_cannot_be_attacked_so_are_told_in_one_sentence(toy):
    defense = toy[0]
    plain = LGAP(lambda x: ["a"] * len(x), lambda x, captions, keys: x, defense.classifier, defense.classes)
    for view in (surrogates.vae, surrogates.one_step):
        with pytest.raises(
            TypeError, match="purifier: a surrogate is a part of a LatentPurifier, got function"
        ):
            view(plain)
    for view in (surrogates.caption, surrogates.joint):
        with pytest.raises(TypeError, match="captioner: expected one with log_likelihood"):
            view(plain)
    with pytest.raises(ValueError, match="classes: the defence does not name them"):
        surrogates.caption(LGAP(defense.captioner, defense.purifier, defense.classifier))
