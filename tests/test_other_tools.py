"""Other people's attacks take the defence, its views and a query; their pipelines replace its parts."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgap_utils import attacks, autoattack, baselines, experiment, models, protocols, zoo
from lgap_utils.defense import LGAP
from lgap_utils.noise import Keys

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "defence": lambda defense: defense,
    "blind": attacks.blind,
    "query": lambda defense: autoattack.Query(attacks.full(defense), Keys([0]), n_draws=2),
}
EPS, STEP, N_STEPS = 8 / 255, 2 / 255, 3


@pytest.fixture(scope="module", autouse=True)
def brief(purifier):
    """Two steps of denoising, which are as good as twenty-five for all of this."""
    with purifier.using(num_inference_steps=50, strength=0.04):
        yield


@pytest.fixture(scope="module")
def small(defense):
    """The defence with one caption for all, as captioning takes most of its time."""
    return LGAP(
        lambda x: ["a large red ring"] * len(x), defense.purifier, defense.classifier, defense.classes
    )


@pytest.fixture(scope="module")
def one(small, images):
    """One image, and the label that the defence gives it."""
    x = images.x[:1]
    with torch.no_grad():
        return x, small(x).argmax(1)


def expected(new, defense, x, y):
    """What our own PGD does to a new model of that kind: the library's must do the same, draw by draw."""
    adv = attacks.pgd(new(defense), x, y, eps=EPS, step_size=STEP, n_steps=N_STEPS)
    assert (adv - x).abs().max() > STEP
    return adv


def shown(word):
    """The code of docs/own.md that holds this word, as one block of it."""
    (block,) = (
        b
        for b in re.findall("```python\n(.*?)```", (ROOT / "docs" / "own.md").read_text(), re.DOTALL)
        if word in b
    )
    return block


# ---------------------------------------------------------------- a test for each library of attacks


@pytest.fixture
def torchattacks(monkeypatch):
    """From its own folder, and from the end of the path, as it carries an old `robustbench`."""
    folder = Path(sys.prefix) / "torchattacks-3.5.1"
    assert folder.is_dir(), f"{folder} is not there; ./run_tests.sh puts torchattacks into it"
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    import torchattacks

    robustbench, _ = zoo.import_robustbench()
    assert folder in Path(torchattacks.__file__).parents and folder not in Path(robustbench.__file__).parents
    return torchattacks


@pytest.mark.parametrize("new", MODELS.values(), ids=MODELS)
def test_torchattacks(torchattacks, small, one, new):
    x, y = one
    attack = torchattacks.PGD(new(small), eps=EPS, alpha=STEP, steps=N_STEPS, random_start=False)
    attack.set_model_training_mode(new(small) is not small)  # which must not reach the classifier
    assert torch.allclose(attack(x, y), expected(new, small, x, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("new", MODELS.values(), ids=MODELS)
def test_foolbox(small, one, new, recwarn):
    import foolbox

    x, y = one
    model = foolbox.PyTorchModel(new(small), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=N_STEPS, random_start=False)
    found = attack.run(model, x, foolbox.criteria.Misclassification(y), epsilon=EPS)
    assert torch.allclose(found, expected(new, small, x, y), rtol=0, atol=1e-6)
    assert not [warning for warning in recwarn if "training mode" in str(warning.message)]


@pytest.mark.parametrize("new", MODELS.values(), ids=MODELS)
def test_art(small, one, new):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    x, y = one
    classifier = PyTorchClassifier(
        new(small), nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=STEP, max_iter=N_STEPS, num_random_init=0, verbose=False
    )
    found = torch.from_numpy(attack.generate(x.numpy(), F.one_hot(y, 10).numpy()))
    assert torch.allclose(found, expected(new, small, x, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("new", MODELS.values(), ids=MODELS)
def test_autoattack(small, one, new):
    from pyautoattack import AutoAttack

    x, y = one
    library = AutoAttack(new(small), eps=EPS, version="custom", attacks=["apgd-ce", "square"], seed=0)
    library.apgd.n_iter, library.apgd.n_restarts, library.square.n_queries = N_STEPS, 1, 3
    adv, labels = library.run_standard_evaluation(x, y)
    assert (adv - x).abs().max() <= EPS + 1e-6 and labels.shape == y.shape
    model = new(small)
    if new in (MODELS["defence"], MODELS["blind"]):  # which answer an image always the same
        assert torch.equal(model(adv).argmax(1), labels)


@pytest.mark.parametrize("new", MODELS.values(), ids=MODELS)
def test_the_benchmark_of_robustbench(small, images, monkeypatch, new):
    robustbench, _ = zoo.import_robustbench()
    from robustbench.data import BenchmarkDataset, _clean_dataset_loaders

    n = 1 if "Query" in type(new(small)).__name__ else 3
    with torch.no_grad():
        y = new(small)(images.x[:n]).argmax(1)
    y[-1] = (y[-1] + (n > 1)) % 10  # of three images the defence is right about two
    seen = []
    monkeypatch.setitem(_clean_dataset_loaders, BenchmarkDataset.cifar_10, lambda n, *_: (images.x[:n], y))

    def few(library, version):
        seen.append((library.norm, library.epsilon, version))
        library.attacks_to_run = ["apgd-ce"]
        library.apgd.n_iter, library.apgd.n_restarts = N_STEPS, 1

    monkeypatch.setattr(robustbench.eval.AutoAttack, "_set_version", few)
    clean, robust = robustbench.benchmark(
        new(small), n_examples=n, dataset="cifar10", threat_model="Linf", eps=EPS, batch_size=n
    )
    assert seen == [("Linf", EPS, "standard")] and 0 <= robust <= clean
    assert clean == pytest.approx(1 if n == 1 else 2 / 3) or "Query" in type(new(small)).__name__
    with pytest.raises(ValueError, match="log_path='log.txt': pyautoattack writes no log file"):
        robustbench.benchmark(new(small), n_examples=n, eps=EPS, log_path="log.txt")


# ---------------------------------------------------------------- models as libraries want them


@pytest.mark.parametrize("new", [*MODELS.values(), attacks.bpda, attacks.full], ids=[*MODELS, "bpda", "full"])
def test_a_model_is_a_module_in_evaluation_mode_on_the_devices_of_the_defence(defense, new):
    model = new(defense)
    assert isinstance(model, nn.Module) and not any(part.training for part in model.modules())
    assert {p.device for p in model.parameters()} == {torch.device("cpu")} and model.to("cpu") is model
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in defense.parameters())


@pytest.mark.parametrize("new", list(MODELS.values())[1:], ids=list(MODELS)[1:])
def test_a_library_that_switches_to_training_switches_no_part_of_the_defence(small, one, new):
    x, _ = one
    model = nn.Sequential(new(small))
    before = nn.Sequential(new(small))(x)
    model.train()
    assert model[0].train() is model[0] and not any(part.training for part in model[0].modules())
    assert not small.classifier.training and torch.equal(model(x), before)


def test_a_query_takes_a_view_and_keys_and_says_so(defense):
    for plain in (defense, attacks.blind(defense), lambda x: x):
        with pytest.raises(
            TypeError, match="view: expected a `View`, as `full.defense.` is, got .* a plain model already"
        ):
            autoattack.Query(plain, Keys([0]))
    for keys in ([0], torch.arange(2)):
        with pytest.raises(TypeError, match="keys: expected `Keys`"):
            autoattack.Query(attacks.full(defense), keys)
    with pytest.raises(ValueError, match="n_draws=0"):
        autoattack.Query(attacks.full(defense), Keys([0]), n_draws=0)


# ---------------------------------------------------------------- what docs/own.md shows


def test_lgap_as_a_preprocessor_of_art_has_the_gradient_of_autograd(small, images, one):
    x, y = one
    place = {"defense": small, "images": images, "attacks": attacks, "torch": torch}
    exec(shown("preprocessing_defences"), place)
    classifier = place["classifier"]
    assert torch.allclose(torch.from_numpy(classifier.predict(x.numpy())), small(x), rtol=0, atol=1e-5)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(small(leaf), y), leaf)
    found = torch.from_numpy(classifier.loss_gradient(x.numpy(), F.one_hot(y, 10).numpy()))
    assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-7) and gradient.abs().max() > 1e-6


@pytest.fixture
def pipelines(defense):
    """The page's captioner and purifier, around pipelines of the tiny models, at a working size of 16."""
    import diffusers
    import transformers

    own, parts = defense.captioner, ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    text = transformers.pipeline("image-text-to-text", model=own.model, processor=own.processor)
    img2img = diffusers.StableDiffusionImg2ImgPipeline(
        **{part: getattr(defense.purifier, part) for part in parts},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    img2img.set_progress_bar_config(disable=True)
    place = {"pipe": text, "img2img": img2img}
    exec(shown("img2img("), place)
    place["size"] = 16
    return SimpleNamespace(**place)


def test_pipelines_of_transformers_and_diffusers_stand_in_for_captioner_and_purifier(
    pipelines, defense, images
):
    x, keys = images.x[:2, :, 4:28], Keys(range(2))
    theirs = LGAP(pipelines.captioner, pipelines.purifier, defense.classifier, defense.classes, input_size=32)
    captions = theirs.caption(x)
    assert len(set(captions)) > 1 and not any(caption.startswith("a picture") for caption in captions)
    with torch.no_grad():
        purified = theirs.purify(x, captions, keys)
        assert purified.shape == x.shape and purified.min() >= 0 and purified.max() <= 1
        assert torch.equal(theirs.purify(x, captions, keys), purified)  # the noise is that of the keys
        assert not torch.equal(theirs.purify(x, captions, Keys(range(2, 4))), purified)
        alone = torch.cat(
            [theirs.purify(x[i : i + 1], captions[i : i + 1], keys[i : i + 1]) for i in range(2)]
        )
    assert torch.allclose(alone, purified, rtol=0, atol=1e-4)
    adv = attacks.pgd(
        attacks.bpda(theirs), x, torch.tensor([0, 1]), keys=keys, eps=EPS, step_size=STEP, n_steps=1
    )
    assert (adv - x).abs().max() > 0


def shifted(x, captions, keys):
    """A purifier that somebody else wrote."""
    return (x + 0.05 * keys.normal(x.shape[1:], "noise").to(x)).clamp(0, 1)


def test_any_purifier_stands_beside_the_cheap_ones_but_has_no_autoencoder_and_no_guidance(
    profile, images, tmp_path, monkeypatch
):
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    theirs = models.load_defense(profile, device="cpu", purifier=shifted)
    evaluation = experiment.evaluation(profile, "theirs", baselines.with_baselines(theirs, 32), images)
    rows = evaluation.run(protocols.get_attack("blind PGD-40", n_steps=1), images.indices[:2])
    assert list(evaluation.defenses) == [
        "LGAP",
        "resize to 24 and back",
        "Gaussian blur, 1 pixel",
        "JPEG, quality 75",
        "undefended",
    ]
    assert set(rows["defence"]) == set(evaluation.defenses) and rows["index"].nunique() == 2
    for part in (baselines.vae_round_trip, baselines.without_caption):
        with pytest.raises(
            TypeError,
            match="purifier: expected a LatentPurifier, got function; `with_baselines` leaves this row out",
        ):
            part(shifted)
