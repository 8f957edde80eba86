"""Tables from kept rows alone are those of the run; kept images are scored under another defence."""

import re

import pytest
from cheap_defense import ATTACK, Noisy, evaluation, net, some_images, words

from lgap_utils import kept
from lgap_utils.defense import LGAP
from lgap_utils.profiles import ROOT
from lgap_utils.protocols import NATURAL
from lgap_utils.tables import accuracy, ladder, of_images
from tools import cli

DATA = {"dataset": "cifar10"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return folder, evaluation(folder, config=DATA).run(ATTACK)


def test_the_tables_are_those_of_the_run(run, capsys):
    folder, rows = run
    tables = kept.tables_of(folder)
    classes = kept.classes_of("cifar10")
    expected = ladder({ATTACK.name: (ATTACK, rows)}, classes)
    assert tables["every attack"].equals(expected) and tables["on common images"].equals(expected)
    cli.main(["tables", str(folder)])
    assert ATTACK.name in capsys.readouterr().out


def test_kept_images_are_scored_under_another_defence(run):
    folder, rows = run
    same = LGAP(words, Noisy(), net)
    stand = kept.score(folder, same, some_images(), n_draws=3, seed=5)
    assert stand[ATTACK.name] == accuracy(of_images(rows, "LGAP"))
    blurred = LGAP(words, lambda x, captions, keys: x.mean((2, 3), keepdim=True).expand_as(x), net)
    assert kept.score(folder, blurred, some_images())[NATURAL.name]["n"] == 8


def test_the_example_of_the_docs_runs(run, monkeypatch, capsys):
    blocks = re.findall("```python\n(.*?)```", (ROOT / "docs/own.md").read_text(), re.DOTALL)
    (block,) = [each for each in blocks if "kept." in each]
    monkeypatch.setattr("lgap_utils.models.load_defense", lambda name: LGAP(words, Noisy(), net))
    monkeypatch.setattr("lgap_utils.data.load_images", lambda *_: some_images())
    exec(block.replace("outputs/published/small/rows/table1_and_3", str(run[0])), {})
    assert ATTACK.name in capsys.readouterr().out


def test_what_cannot_be_read_is_said(run, tmp_path):
    with pytest.raises(ValueError, match="holds no rows of attacks"):
        kept.tables_of(tmp_path)
    with pytest.raises(ValueError, match="got 4 of the 8 that"):
        kept.score(run[0], LGAP(words, Noisy(), net), some_images(4))
    with pytest.raises(SystemExit):
        cli.main(["tables", str(tmp_path / "nothing")])
