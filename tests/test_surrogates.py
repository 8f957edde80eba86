"""Views beyond the paper's: equal to autograd and to transformers' loss; the captioner falls."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lgap_utils import surrogates
from lgap_utils.attacks import Record, full, gradient, pgd
from lgap_utils.baselines import vae_round_trip
from lgap_utils.data import load_images
from lgap_utils.defense import LGAP
from lgap_utils.models import Captioner, load_defense
from lgap_utils.noise import Keys, generator
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


def own_loss(captioner, image, text):
    """The loss of transformers' own BLIP for a text after the prompt, which is masked."""
    tokens = captioner.processor.tokenizer(f"{captioner.prompt} {text}", return_tensors="pt")
    ids, n_prompt = tokens.input_ids, len(captioner.processor.tokenizer(captioner.prompt).input_ids) - 1
    ids[:, 0] = captioner.model.config.text_config.bos_token_id
    labels = ids.clone()
    labels[:, :n_prompt] = -100
    return captioner.model(captioner.pixel_values(image), ids, tokens.attention_mask, labels=labels).loss


def test_the_likelihood_of_a_caption_is_transformers_own_loss(toy):
    defense, images, _ = toy
    captioner, texts = defense.captioner, ["a small red ring at the top", "a star"]
    found = captioner.log_likelihood(images.x[:2], texts)
    for k, text in enumerate(texts):
        assert torch.allclose(found[k], -own_loss(captioner, images.x[k : k + 1], text), atol=1e-5)
    assert torch.allclose(captioner.log_likelihood(images.x[:1], texts)[0], found[0], atol=1e-5)


@pytest.mark.parametrize("side", [32, 448])
def test_pixels_at_blips_own_size_are_the_processors_and_pass_a_gradient(toy, side):
    """384 pixels, bicubic; up to one level of the 8 bits that the processor works in."""
    ours = copy.copy(toy[0].captioner.processor.image_processor)
    ours.size = type(ours)(size={"height": 384, "width": 384}).size
    stub = SimpleNamespace(processor=SimpleNamespace(image_processor=ours), model=toy[0].captioner.model)
    x = F.interpolate(toy[1].x[:1], (side, side), mode="nearest").requires_grad_(True)
    found = Captioner.pixel_values(stub, x)
    expected = ours(images=list((255 * x.detach()).round().byte()), return_tensors="pt")["pixel_values"]
    assert found.shape == (1, 3, 384, 384) and torch.allclose(found, expected, atol=0.02)
    weights = torch.randn(found.shape, generator=generator("weights"))
    (slope,) = torch.autograd.grad((found * weights).sum(), x)
    plain = F.interpolate(x, (384, 384), mode="bicubic", antialias=True)
    std = torch.tensor(ours.image_std).view(1, 3, 1, 1)
    (exact,) = torch.autograd.grad((plain.clamp(0, 1) / std * weights).sum(), x)
    assert torch.allclose(slope, exact, rtol=1e-3, atol=1e-3) and slope.abs().max() > 1


class Vague(torch.nn.Module):
    """A captioner whose words never name a class; likelihoods are those of another."""

    def __init__(self, captioner):
        super().__init__()
        self.log_likelihood = captioner.log_likelihood

    def forward(self, x):
        return ["something in the middle"] * len(x)


def test_where_a_caption_names_no_class_the_likelihood_of_the_true_one_is_what_falls(toy, monkeypatch):
    defense, images, keys = toy
    vague = LGAP(Vague(defense.captioner), defense.purifier, defense.classifier, defense.classes)
    view = surrogates.by_class(vague)
    with torch.no_grad():
        logits = view(images.x[:2], keys[:2].at([0, 0], 2))
    names = [f"a {name}" for name in images.classes]
    expected = [[-own_loss(defense.captioner, x[None], name) for name in names] for x in images.x[:2]]
    assert torch.allclose(logits[::2], torch.tensor(expected), atol=1e-5)
    assert torch.equal(logits[::2], logits[1::2])

    few, y, attack = images.x[:2], images.labels[:2], get_attack("PGD-20 on the caption", n_steps=5)
    adv = attack(vague, few, y, keys[:2])
    same = pgd(view, few, y, keys=keys[:2], eps=8 / 255, step_size=2 / 255, n_steps=5)
    assert torch.equal(adv, same)
    assert (logits[::2].argmax(1) == y).any() and not (view(adv, keys[:2]).argmax(1) == y).any()

    slope = gradient(view, few, y, keys[:2])[0]
    monkeypatch.setattr(surrogates, "CLASSES", 3)  # asked for in parts, as of a thousand classes
    assert torch.allclose(gradient(view, few, y, keys[:2])[0], slope, rtol=1e-3, atol=1e-7)


def test_images_with_and_without_a_class_in_their_caption_share_a_batch(toy):
    defense, images, keys = toy
    both = surrogates.joint(defense).aimed(images.x, images.labels, keys.indices)
    texts, free = dict(both.targets), surrogates.by_class(defense)
    both.targets[keys.indices[1]] = ""
    draws = keys.at([0] * 4, 2)
    found = surrogates.caption.gradient(both, images.x, images.labels, draws, 2)[0]
    expected = autograd(lambda x: free(x, keys), images.x, images.labels)
    assert torch.allclose(found[1], expected[1], rtol=1e-3, atol=1e-7)
    both.targets = texts
    aimed = surrogates.caption.gradient(both, images.x, images.labels, draws, 2)[0]
    assert torch.allclose(found[[0, 2, 3]], aimed[[0, 2, 3]], rtol=1e-3, atol=1e-7)
    assert not torch.allclose(found[1], aimed[1], rtol=1e-3)


class Planted(torch.nn.Module):
    """A classifier that a slightly darker image fools: is its mean above a threshold, or not?"""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        above = 100 * (x.mean((1, 2, 3)) - self.threshold)
        return F.pad(torch.stack([above, -above], 1), (0, 8), value=-1e4)


@pytest.mark.parametrize("view", ["full", "bpda", "vae", "one step", "joint"])
def test_an_adversarial_image_that_is_known_to_exist_is_found(toy, view):
    defense, images, keys = toy
    x, y, draws = images.x[:1], torch.zeros(1, dtype=torch.long), keys[:1].at([0], 10, "defence")
    with torch.no_grad():
        clean, darker = (defense.purify(z, keys=draws).mean((1, 2, 3)) for z in (x, (x - 8 / 255).clamp(0)))
    planted = Planted(((clean.min() + darker.max()) / 2).item())
    mine = LGAP(defense.captioner, defense.purifier, planted, defense.classes)
    judged = lambda z: mine(z, keys=draws).argmax(1)
    assert not judged(x).any() and judged((x - 8 / 255).clamp(0)).all()  # it stands, and it can fall
    adv = Attack("planted", view=view, n_steps=10)(mine, x, y, keys[:1])
    assert judged(adv).all() and (adv - x).abs().max() <= 8 / 255 + 1e-6


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
    ],
)
def test_the_class_word_of_a_caption_is_replaced(text, expected):
    assert surrogates.with_class(text, ("cat", "dog", "airplane"), ["dog"]) == [expected]
    assert surrogates.with_class("nothing that is known", ("cat", "dog", "airplane"), ["dog"]) == []


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
