"""Your own photo: what `Purified` shows, and `python -m lgap_utils purify` with any file."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from lgap_utils.defense import LGAP
from lgap_utils.picture import Purified, Stage, draw, png
from tools import cli, purify

CLASSES = ("cat", "dog $x$", "ship")


def result(**changes):
    x, logits = torch.rand(3, 6, 5), torch.tensor([0.0, 3.0, 0.0])
    before = torch.tensor([5.0, 0.0, 0.0])
    known = {"source": x, "before_logits": before, "classes": CLASSES} | changes
    return Purified(x, "a <b>dog</b> $\\frac", logits, **known)


def test_a_result_says_what_it_is_in_a_line_and_shows_a_picture(tmp_path):
    one = result()
    assert repr(one) == "Purified(dog $x$ 91 %, caption 'a <b>dog</b> $\\\\frac', image 3 x 6 x 5)"
    assert one.label == 1 and one.named(one.before_logits) == "cat 99 %"
    one.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 600 and (tmp_path / "a.png").read_bytes() == one._repr_png_()
    assert len(one.figure().axes) == 2 and len(result(before_logits=None).figure().axes) == 1
    assert result(classes=None).named() == "class 1 91 %"
    with pytest.raises(ValueError, match="ends in .png"):
        one.save(tmp_path / "a.gif")


def test_right_and_wrong_differ_in_a_mark_and_not_in_colour_alone():
    image = torch.rand(3, 4, 4)
    for right, mark in ((True, "\N{CHECK MARK} cat"), (False, "\N{BALLOT X} cat"), (None, "cat")):
        texts = [text.get_text() for text in draw([[Stage("t", image, "cat", "", right)]]).axes[0].texts]
        assert mark in texts
    assert png(draw([[Stage("t", image)]])) == png(draw([[Stage("t", image)]]))


@pytest.fixture(scope="module", autouse=True)
def tiny(defense):
    """The tiny defence of the tests in place of a profile's."""
    from lgap_utils import models

    def load(profile, classifier=None):
        return LGAP(defense.captioner, defense.purifier, defense.classifier, defense.classes, 32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_defense", load)
        patch.setattr(models, "device_of", lambda *_: torch.device("cpu"))
        yield


def encoded(image, **how):
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()


def photo(mode="RGB", size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), format="JPEG", exif=exif)


FILES = {
    "alpha.png": lambda: encoded(photo("RGBA"), format="PNG"),
    "cmyk.jpg": lambda: encoded(photo("CMYK"), format="JPEG"),
    "turned.jpg": turned,
    "palette.gif": lambda: encoded(photo("P"), format="GIF"),
    "sixteen.png": lambda: encoded(
        Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), format="PNG"
    ),
    "tiny.bmp": lambda: encoded(photo(size=(1, 1)), format="BMP"),
    "long.webp": lambda: encoded(photo(size=(3000, 2)), format="WEBP"),
}
BAD = {
    "half.png": lambda: encoded(photo(), format="PNG")[:400],
    "text.png": lambda: b"a text",
    "empty.jpg": lambda: b"",
    "noise.jpg": lambda: random.Random(0).randbytes(999),
}


def called(*words):
    cli.main(["purify", "--profile", "toy", *map(str, words)])


@pytest.mark.parametrize("name", FILES)
def test_any_image_file_becomes_a_picture(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(FILES[name]())
    called(name)
    lines = capsys.readouterr().out.splitlines()
    made = f"{name.split('.')[0]}-purified.png"
    assert len(lines) == 2 and lines[0].startswith(f"{name}: photo: ") and lines[1] == f"picture: {made}"
    with Image.open(made) as picture:
        assert picture.width > 600
    called(name)  # its own picture it may write again
    assert (tmp_path / name).read_bytes() == FILES[name]()


@pytest.mark.parametrize("name", [*BAD, "absent.png", "."])
def test_anything_else_ends_in_a_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in BAD:
        (tmp_path / name).write_bytes(BAD[name]())
    with pytest.raises(SystemExit) as end:
        called(name)
    assert str(end.value).startswith(f"purify: {name}: ") and "\n" not in str(end.value)
    assert {file.name for file in tmp_path.iterdir()} == {name} & set(BAD)


def test_an_attack_is_in_the_ball_and_in_the_picture(tmp_path, monkeypatch, capsys, defense):
    seen = []
    monkeypatch.setattr(purify, "stages", lambda *args: seen.append(args) or ORIGINAL(*args))
    (tmp_path / "a.png").write_bytes(FILES["alpha.png"]())
    called(tmp_path / "a.png", "--attack", "--label", defense.classes[2], "--out", tmp_path / "b.png")
    (_, x, attack, wanted, _), line = seen[0], capsys.readouterr().out
    assert "; attacked: " in line and wanted == 2 and x.shape == (1, 3, 32, 32)
    shown, _ = ORIGINAL(defense, x, attack, wanted, 0)
    assert [stage.title for stage in shown] == ["photo", "purified", "attacked, 8/255", "attacked, purified"]
    distance = (shown[2].image - shown[0].image).abs().max()
    assert 1 / 255 < distance <= 8 / 255 + 1e-6
    for stage in shown:
        assert stage.right == stage.label.startswith(defense.classes[2] + " ")


ORIGINAL = purify.stages


def test_the_middle_square_is_what_the_models_see(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    seen = purify.as_seen(tmp_path / "wide.png", 4)
    assert seen.shape == (1, 3, 4, 4) and seen.min() > 0.999


def test_what_lies_there_is_kept(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(FILES["alpha.png"]())
    for out, why in (
        (tmp_path / "a.png", "not a picture of this command"),
        (tmp_path / "b.jpg", "ends in .png"),
        (tmp_path / "none" / "b.png", "there is no folder"),
    ):
        with pytest.raises(SystemExit):
            called(tmp_path / "a.png", "--out", out)
        assert why in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == FILES["alpha.png"]()


def test_a_wrong_label_or_profile_is_refused_with_the_choices(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(FILES["alpha.png"]())
    with pytest.raises(SystemExit, match="--label='cow': choose from"):
        called(tmp_path / "a.png", "--label", "cow", "--out", tmp_path / "b.png")
    with pytest.raises(SystemExit):
        cli.main(["purify", str(tmp_path / "a.png"), "--profile", "large"])
    assert "choose from" in capsys.readouterr().err


def test_the_fine_tuned_classifier_is_taken_where_there_is_one(tmp_path, monkeypatch):
    from lgap_utils.profiles import get_profile

    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(purify, "ROOT", tmp_path)
    p = get_profile("small")
    assert purify.classifier_of(p, False) == (None, "classifier as it came")
    published = tmp_path / "outputs/published/small/classifier_cifar10"
    for folder in (published, p.finetuned):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        assert purify.classifier_of(p, False) == (folder, "classifier fine-tuned")
    assert purify.classifier_of(p, True) == (None, "classifier as it came")
