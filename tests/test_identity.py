"""What changes a row changes what it is kept under; a part that does not say what it is shares no rows."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgap_utils import baselines, data, experiment, models
from lgap_utils.defense import LGAP
from lgap_utils.evaluate import Evaluation, describe_defense
from lgap_utils.identity import identity, named, own_settings, state_digest, unnamed_in
from lgap_utils.images import Images
from lgap_utils.noise import generator
from lgap_utils.protocols import NATURAL, Attack
from lgap_utils.purified import purify_rows

ROOT = Path(__file__).resolve().parents[1]
PIXELS = (255 * torch.rand(4, 3, 4, 4, generator=generator("images"))).byte()
IMAGES = Images(PIXELS, torch.tensor([2, 8, 8, 3]), torch.arange(4), tuple("0123456789"))


def no_words(x):
    return [""] * len(x)


def constant(*labels):
    """A classifier that finds these labels, whatever it sees."""
    return lambda x: torch.nn.functional.one_hot(torch.tensor(labels)[:1].expand(len(x)), 10).float()


no_words = named(no_words, "no words")


def rows_of(folder, classifier=None, purifier=None, captioner=no_words, attack=NATURAL):
    purifier, classifier = purifier or baselines.undefended(), classifier or named(constant(1), "one")
    defense = LGAP(captioner, purifier, classifier, IMAGES.classes)
    return Evaluation({"LGAP": defense}, IMAGES, folder, config={}).run(attack)["adversarial"].tolist()


class Fixed:
    """A classifier with an attribute, and no word about it."""

    def __init__(self, label):
        self.label = label

    def __call__(self, x):
        return constant(self.label)(x)


class WithSettings(Fixed):
    def settings(self):
        return {"label": self.label}


class Heir(WithSettings):
    def __call__(self, x):
        return constant(9)(x)


def defined(code):
    """What a notebook's cell leaves in `part`."""
    space = {"torch": torch, "constant": constant}
    exec(code, space)
    return space["part"]


OTHERS = {
    "an attribute": lambda label: Fixed(label),
    "a closure": constant,
    "code": lambda label: defined(f"def part(x):\n    return constant({label})(x)"),
    "a class edited and run again": lambda label: defined(
        f"class Mine:\n    def __call__(self, x):\n        return constant({label})(x)\npart = Mine()"
    ),
    "an heir of what has settings": lambda label: WithSettings(2) if label == 2 else Heir(2),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_parts_that_differ_and_do_not_say_so_never_share_rows(tmp_path, make, capsys):
    assert rows_of(tmp_path, make(2)) == [2] * 4 and rows_of(tmp_path, make(9)) == [9] * 4
    printed = capsys.readouterr().out
    assert "has no settings() of its own" in printed and "identity.named(part, 'a name'" in printed


@pytest.mark.parametrize("part", ["purifier", "captioner"])
def test_so_it_is_with_purifiers_and_captioners(tmp_path, part):
    def reads_the_image(x):
        return torch.nn.functional.one_hot((10 * x.amax((1, 2, 3))).long().clamp(max=9), 10).float()

    def purifier(level):
        return lambda x, captions, keys: torch.full_like(x, level if "yes" not in captions[0] else 0.95)

    classifier = named(reads_the_image, "brightest")
    if part == "purifier":
        assert [rows_of(tmp_path, classifier, purifier(level))[0] for level in (0.25, 0.75)] == [2, 7]
    else:
        one = named(purifier(0.25), "level")
        for caption, label in (("no", 2), ("yes", 9)):
            captioner = lambda x, caption=caption: [caption] * len(x)
            assert rows_of(tmp_path, classifier, one, captioner)[0] == label


def test_a_changed_attribute_of_the_same_object_is_seen(tmp_path):
    for part in (Fixed(2), WithSettings(2)):
        defense = LGAP(no_words, baselines.undefended(), part, IMAGES.classes)
        run = Evaluation({"LGAP": defense}, IMAGES, tmp_path / type(part).__name__, config={})
        assert run.run(NATURAL)["adversarial"].tolist() == [2] * 4
        part.label = 9
        if isinstance(part, WithSettings):
            with pytest.raises(ValueError, match="target.classifier.is.label: there 2, here 9"):
                run.run(NATURAL)
        else:
            assert run.run(NATURAL)["adversarial"].tolist() == [9] * 4


def test_a_named_part_is_resumed_by_another_process_and_an_unnamed_one_is_not(tmp_path):
    calls_of_slow = []

    def slow(x):
        calls_of_slow.append(len(x))
        return constant(5)(x)

    for calls in (1, 2):
        assert rows_of(tmp_path, lambda x: slow(x)) == [5] * 4 and len(calls_of_slow) == calls
    for _ in range(2):
        part = named(lambda x: slow(x), "slow", level=5)
        assert rows_of(tmp_path, part) == [5] * 4 and len(calls_of_slow) == 3
    with pytest.raises(ValueError, match="classifier.is.level: there 5, here 6"):
        rows_of(tmp_path, named(constant(6), "slow", level=6))


def test_a_part_that_is_exchanged_between_two_runs_of_one_evaluation_is_run_anew(tmp_path):
    defense = LGAP(no_words, baselines.undefended(), constant(1), IMAGES.classes)
    run = Evaluation({"LGAP": defense}, IMAGES, tmp_path, config={})
    for label in (1, 3):
        defense.classifier = constant(label)
        assert run.run(NATURAL)["adversarial"].tolist() == [label] * 4


def test_what_is_made_of_an_unnamed_part_is_unnamed(defense):
    heir = copy.deepcopy(defense.purifier)
    heir.__class__ = type("Heir", (type(heir),), {})
    of_heir = LGAP(no_words, baselines.without_caption(heir), named(constant(1), "one"))
    assert unnamed_in({"LGAP": describe_defense(of_heir)}) == ["purifier of 'LGAP' (Heir)"]


@pytest.mark.parametrize("settings", [{"sigma": 1}, None, 3])
def test_an_attribute_that_is_called_settings_is_no_word_about_the_part(settings):
    part = Fixed(1)
    part.settings = settings
    assert "unnamed" in identity(part)


def test_settings_that_are_no_dict_are_refused():
    part = Fixed(1)
    part.settings = lambda: "sigma 1"
    says = "settings.. of Fixed: expected numbers, text, and lists or dicts of these .got str"
    with pytest.raises(ValueError, match=says):
        identity(part)


def test_only_settings_of_ones_own_count():
    class Mine(Attack):
        pass

    assert own_settings(NATURAL) == NATURAL.settings() and own_settings(Mine("mine")) is None
    assert (
        own_settings(WithSettings(2)) == {"label": 2}
        and own_settings(Heir(2)) is own_settings(Fixed(2)) is None
    )
    assert own_settings(named(Heir(2), "heir", level=1)) == {"name": "heir", "level": 1}


def test_an_attack_whose_code_may_have_changed_is_run_anew(tmp_path):
    def edited(step):
        class Mine(Attack):
            def __call__(self, defense, x, y, keys, **_):
                return (x + step).clamp(0, 1)

        return Mine("mine")

    darkest = lambda x: torch.nn.functional.one_hot((9 * x.amin((1, 2, 3))).long(), 10).float()
    half, whole = (rows_of(tmp_path, named(darkest, "darkest"), attack=edited(step)) for step in (0.5, 1.0))
    assert half != whole == [9] * 4


def test_purified_images_of_an_unnamed_purifier_are_made_anew(tmp_path):
    for level in (0.25, 0.75):
        purifier = lambda x, captions, keys, level=level: torch.full_like(x, level)
        defense = LGAP(no_words, purifier, named(constant(1), "one"))
        table = purify_rows(defense, IMAGES, tmp_path / "rows", config={})
        assert set(table["purified"].iloc[0]) == {round(255 * level)}


def test_fine_tuning_never_takes_pixels_of_another_purifier(profile, tmp_path, monkeypatch):
    """`models.purified` of two purifiers that do not say what they are, in one folder of outputs."""
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    images = data.load_images("toy", "train", 2)
    for level in (0.25, 0.75):
        part = lambda x, captions, keys, level=level: torch.full_like(x, level)
        own = models.load_defense(profile, captioner=no_words, purifier=part, device="cpu")
        table = experiment.purified_rows(profile, own, images, "03_train_toy")
        assert {value for pixels in table["purified"] for value in pixels} == {round(255 * level)}


class Doubled(LGAP):
    def purify(self, x, *args, **kwargs):
        return super().purify(x, *args, **kwargs) * 0


def test_a_defence_of_ones_own_class_is_another_defence(tmp_path):
    brightest = lambda x: torch.nn.functional.one_hot((9 * x.amax((1, 2, 3))).long(), 10).float()
    labels = []
    for kind in (LGAP, Doubled):
        defense = kind(no_words, baselines.undefended(), named(brightest, "brightest"))
        table = Evaluation({"LGAP": defense}, IMAGES, tmp_path, config={}).run(NATURAL)
        labels.append(set(table["adversarial"]))
    assert 0 not in labels[0] and labels[1] == {0}


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"net": object()}, "settings.. of .*Bad: expected numbers, text, and lists or dicts"),
        ({"level": float("nan")}, "settings.. of .*Bad: expected numbers"),
    ],
)
def test_settings_that_are_no_plain_data_are_refused(tmp_path, settings, says):
    class Bad(Fixed):
        def settings(self):
            return settings

    with pytest.raises(ValueError, match=says):
        rows_of(tmp_path, Bad(1))
    with pytest.raises((TypeError, ValueError)):
        named(constant(1), "one", **settings)


# ---------------------------------------------------------------- the parts that come with the package


def described(defense):
    return json.dumps(describe_defense(defense), sort_keys=True)


def loaded(profile, **folders):
    return models.load_defense(dataclasses.replace(profile, **folders), device="cpu")


def swapped(vocabulary):
    """The same words, the last two under each other's numbers."""
    (one, first), (two, second) = sorted(vocabulary.items(), key=lambda item: item[1])[-2:]
    return vocabulary | {one: second, two: first}


EDITS = {  # {what: (part, file, the key to change, its value)}; no weight is touched
    "pixels' mean": (
        "captioner",
        "processor_config.json",
        ("image_processor", "image_mean"),
        [0.1, 0.2, 0.3],
    ),
    "resize": ("captioner", "processor_config.json", ("image_processor", "resample"), 0),
    "activation": ("captioner", "config.json", ("vision_config", "hidden_act"), "relu"),
    "generation": ("captioner", "generation_config.json", ("repetition_penalty",), 1.5),
    "captioner's words": ("captioner", "tokenizer.json", ("model", "vocab"), swapped),
    "latent scale": ("diffusion", "vae/config.json", ("scaling_factor",), 0.5),
    "betas": ("diffusion", "scheduler/scheduler_config.json", ("beta_end",), 0.02),
    "prediction": ("diffusion", "scheduler/scheduler_config.json", ("prediction_type",), "epsilon"),
    "text encoder's words": ("diffusion", "tokenizer/tokenizer.json", ("model", "vocab"), swapped),
    "text encoder": ("diffusion", "text_encoder/config.json", ("hidden_act",), "gelu"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_file_edited_beside_unchanged_weights_is_another_part(profile, defense, tmp_path, edit):
    part, file, keys, value = edit
    folder = shutil.copytree(getattr(profile, part), tmp_path / part)
    assert described(loaded(profile, **{part: str(folder)})) == described(defense)  # moved, it is the same
    content = json.loads((folder / file).read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    value = value(inner[keys[-1]]) if callable(value) else value
    assert inner.get(keys[-1]) != value
    inner[keys[-1]] = value
    (folder / file).write_text(json.dumps(content))
    assert described(loaded(profile, **{part: str(folder)})) != described(defense)


def test_every_setting_and_weight_counts(profile, defense):
    same, found = described(defense), []
    changes = {
        "strength": 0.1,
        "guidance_scale": 2.0,
        "size": 16,
        "vae_sample": False,
        "negative_prompt": "blur",
    }
    for name, value in changes.items():
        with defense.purifier.using(**{name: value}):
            found.append(described(defense))
    for name, value in {"num_beams": 2, "prompt": "a photo of", "max_length": 12}.items():
        found.append(described(loaded(profile, **{name: value})))
    tuned = copy.deepcopy(defense)
    tuned.classifier.fc.bias.data[0] += 1e-6
    found.append(described(tuned))
    tuned = copy.deepcopy(defense)
    tuned.input_size = 16
    found.append(described(tuned))
    assert described(copy.deepcopy(defense)) == same and len({same, *found}) == len(found) + 1


def test_what_is_set_by_hand_on_scheduler_and_unet_counts(defense):
    same, found = described(defense), []
    for change in (
        lambda p: p.scheduler.alphas_cumprod.mul_(0.5),
        lambda p: p.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6),
    ):
        other = copy.deepcopy(defense)
        change(other.purifier)
        found.append(described(other))
    assert len({same, *found}) == 3 and described(defense) == same


class Headed(LGAP):
    settings = lambda self: {"name": "headed"}

    def __init__(self, bias):
        super().__init__(no_words, baselines.undefended(), named(constant(1), "one"))
        self.head = torch.nn.Linear(10, 10)
        torch.nn.init.constant_(self.head.weight, bias)


def test_weights_of_a_defence_and_of_quantised_and_sparse_layers_count():
    assert describe_defense(Headed(1.0)) != describe_defense(Headed(2.0))
    assert "unnamed" not in describe_defense(Headed(1.0))["defence"]
    nets = [torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2)]
    quantised = [torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}) for net in nets]
    first, second, again = (state_digest(net) for net in (*quantised, quantised[0]))
    assert first != second and first == again
    sparse = torch.nn.Module()
    sparse.register_buffer("mask", torch.eye(3).to_sparse())
    assert len(state_digest(sparse)) == 16


def test_buffers_count_that_are_not_saved_and_kinds_and_shapes():
    nets = [models.Normalized(torch.nn.Flatten(), (mean,) * 3, (1.0, 1.0, 1.0)) for mean in (0.0, 0.5)]
    kinds = [
        torch.nn.Linear(2, 2).half(),
        torch.nn.Linear(2, 2).bfloat16(),
        torch.nn.Linear(4, 1, bias=False),
    ]
    for net in kinds:
        for weight in net.parameters():
            weight.data.zero_()
    found = [state_digest(net) for net in (*nets, *kinds)]
    assert len(set(found)) == len(found)


def test_cheap_purifiers_are_told_apart_by_what_they_are_made_of(defense):
    other = copy.deepcopy(defense.purifier)
    other.vae.decoder.conv_out.bias.data += 1e-3
    for make in (baselines.vae_round_trip, baselines.without_caption):
        one = make(defense.purifier)
        before = identity(one)
        assert identity(make(other)) != before
        with defense.purifier.using(size=16):
            assert identity(one) != before
        assert identity(one) == before
    assert "unnamed" in identity(baselines.Purifier(lambda x, keys: x))


SCRIPT = """
import dataclasses, json, sys
from lgap_utils import models, profiles
from lgap_utils.evaluate import describe_defense
profile = dataclasses.replace(profiles.TOY, **json.loads(sys.argv[1]))
print(json.dumps(describe_defense(models.load_defense(profile, device="cpu")), sort_keys=True))
"""


def test_what_a_part_is_does_not_depend_on_the_process(profile, defense):
    """Hashes of text are other ones in each process, and so would be the order of a set."""
    fields = {name: value for name, value in dataclasses.asdict(profile).items() if name != "tables"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(fields)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == described(defense), done.stderr
