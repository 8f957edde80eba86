"""checkpoints/make.py: recipes, cycles, the CIFAR-100 classifier, tokenizers and the command line."""

import contextlib
import csv
import dataclasses
import shutil

import pytest
import torch

from checkpoints import new_models, pretrain
from lgap_utils import identity, models, train
from lgap_utils.data import CIFAR100_CLASSES
from lgap_utils.images import Images
from lgap_utils.noise import generator
from lgap_utils.profiles import get_profile


def test_the_text_tokenizer_knows_every_word_and_survives_saving(captions, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = new_models.new_text_tokenizer(captions, "a picture of", 32)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for caption in (*captions[:50], "a caterpillar, 7 Ångström!"):
        ids = tokenizer(caption).input_ids
        assert loaded(caption).input_ids == ids and loaded.model_max_length == 32
        assert ids[0] == loaded.bos_token_id and ids[-1] == loaded.eos_token_id
        assert loaded.unk_token_id not in ids[1:-1]
        assert loaded.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.lower().replace(
            " ", ""
        )
    assert all(len(tokenizer(caption).input_ids) == len(caption.split()) + 2 for caption in captions)


def test_the_captioners_tokenizer_knows_every_word_and_survives_saving(defense, captions, tmp_path):
    from transformers import BlipProcessor

    tokenizer = defense.captioner.processor.tokenizer
    defense.captioner.processor.save_pretrained(tmp_path)
    loaded = BlipProcessor.from_pretrained(tmp_path).tokenizer
    for caption in (*captions[:50], "a caterpillar 7"):
        ids = loaded(caption).input_ids
        assert ids == tokenizer(caption).input_ids and loaded.unk_token_id not in ids
        assert loaded.decode(ids, skip_special_tokens=True) == caption
    assert all(len(tokenizer(caption).input_ids) == len(caption.split()) + 2 for caption in captions)
    assert loaded.decode(defense.captioner.model.config.text_config.bos_token_id) == "[DEC]"
    assert loaded.convert_tokens_to_ids("[DEC]") in loaded.all_special_ids


class Killed(Exception):
    pass


def test_a_cycle_goes_on_from_the_one_before(make, profile, images, tmp_path):
    """The same as one run after the other by hand; each leaves its learning curve."""
    cycles = ({"epochs": 1}, {"epochs": 2, "lr": 0.01})
    sizes = {"width": 32, "layers": 1, "text_layers": 1}
    shutil.copytree(profile.classifier, tmp_path / "classifier")
    torch.manual_seed(0)
    job = make.Job(profile, images, images.captions, tmp_path / "work", tmp_path, "cpu")
    make.make_captioner(job, batch_size=4, cycles=cycles, **sizes)
    for log in ("log.csv", "cycle1/log.csv"):
        assert len((tmp_path / "work" / log).read_text().split()) == 3
    torch.manual_seed(0)
    captioner = make.new_captioner(images.captions, profile, "cpu", **sizes)
    teacher = models.load_classifier(profile.classifier, device="cpu")
    for k, own in enumerate(cycles):
        how = {"teacher": teacher, "batch_size": 4, "seed": k, **own}
        pretrain.train_captioner(captioner, images, images.captions, tmp_path / f"by hand {k}", **how)
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
    """Killed in its second epoch, with dropout and in bf16, it ends the same; it takes images in [0, 1]."""
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


@pytest.mark.parametrize("name", ["toy", "small", "paper"])
def test_a_diffusion_model_is_made_with_the_settings_of_its_profile(make, name):
    """Of all that bear on purification: a strength of 1 fits two coarse steps and not fifty."""
    p = get_profile(name)
    vae = make.new_vae(p, channels=(8, 16), latent_channels=4)
    purifier = make.new_diffusion(vae, ["a ring"], p, "cpu", channels=(16, 32), text_width=16)
    assert all(purifier.settings()[setting] == getattr(p, setting) for setting in purifier.SETTINGS)
