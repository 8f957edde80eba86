"""The counted cost is what the notebooks ask for. The reference runs them with parts that count, for real."""

import contextlib
import io
from collections import Counter
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from lgap_utils import attacks, models, protocols
from lgap_utils.autoattack import Query
from lgap_utils.defense import LatentPurifier
from lgap_utils.files import CheckpointError
from lgap_utils.profiles import PAPER, PROFILES, ROOT
from tools import cost, runner

# but 09: attacks and parts of one's own are counted by what their fields say alone
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0[0-8]*.ipynb"))


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No GPU, no data, results in a folder of the test's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LGAP_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("LGAP_DATA", str(tmp_path))
    monkeypatch.setenv("LGAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LGAP_DEVICE", raising=False)


@pytest.fixture
def counted(monkeypatch):
    """A Counter of what captioner and purifier are asked for: they do nothing else. No attack ends early."""
    counts, purify = Counter(), LatentPurifier.forward

    def caption(self, x):
        counts["captions"] += len(x)
        return ["a circle"] * len(x)

    def forward(self, x, captions, keys=None, trace=None):
        n, kind = (len(keys or x), "gradient" if x.requires_grad and torch.is_grad_enabled() else "forward")
        counts.update({kind: n, "calls": n * self.denoiser_calls})
        return (
            x.repeat_interleave(n // len(x), 0) if trace is None else purify(self, x, captions, keys, trace)
        )

    def autoattack(model, x, y, *, keys, n_queries=0, n_eot=1, record=None, **_):
        for i in range(len(x)) if isinstance(model, attacks.View) else ():
            ask = Query(model, keys[[i]], n_eot)
            for _ in range(n_queries):
                ask(x[i : i + 1])
        record.broke_at, record.bad_gradients, record.flags = [-1] * len(x), [0] * len(x), [""] * len(x)
        return x

    monkeypatch.setattr(models.Captioner, "forward", caption)
    monkeypatch.setattr(LatentPurifier, "forward", forward)
    monkeypatch.setattr(protocols, "autoattack", autoattack)
    return counts


@pytest.fixture
def tiny(profile, monkeypatch):
    """A profile whose sizes are all different, so that none can stand for another."""
    sizes = {
        "n_images": 9,
        "n_adaptive": 8,
        "n_eot_images": 2,
        "n_full": 5,
        "n_surrogate": 7,
        "n_curve": 4,
        "n_controls": 3,
        "n_steps_full": 2,
        "n_draws": 3,
        "n_eot": 4,
        "n_finetune": 11,
        "n_validation": 6,
        "batch_size": 8,
        "n_steps": 2,
        "num_inference_steps": 10,
        "finetune_epochs": 1,
        "finetune_batch": 4,
    }
    monkeypatch.setitem(PROFILES, "tiny", replace(profile, tables={4: {"strength": 0.1}}, **sizes))
    return "tiny"


def test_the_cost_is_what_the_notebooks_ask_for(tiny, counted, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    plan = {path: {"PROFILE": tiny} for path in NOTEBOOKS}
    costs = {path.stem: dict(counts) for path, (_, counts) in cost.count(plan).items()}
    assert not counted  # what computes was not asked
    for path in NOTEBOOKS:
        counted.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            cost.run_cells(path, {"PROFILE": tiny})
        plt.close("all")
        expected = {name: n for name, n in costs[path.stem].items() if n and name not in ("images", "passes")}
        assert dict(counted) == expected, path.stem


def test_a_plan_is_printed_and_nothing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("a notebook was started"))
    runner.main(["paper", "--only", "02,06", "--set", "n_full=8", "--plan"])
    lines = capsys.readouterr().out.splitlines()
    counts = [line.split()[:5] for line in lines if line.startswith("0")]
    assert counts[0] == ["02_purification", "7", "22", "0", "1,035"]
    assert [row[0] for row in counts] == ["02_purification", "06_table3_cifar10_adaptive"]
    assert counts[1][3] == "39,168"  # with a gradient, over all parts of the ladder
    assert "computed from FLOPs, for one GPU that reaches 395 or 158 TFLOP/s" in lines[-2]
    assert not (tmp_path / "outputs").exists()


def test_seconds_are_timed_where_the_models_are_here(profile, monkeypatch):
    prices, where = cost.price(profile)
    assert where.startswith("timed just now on cpu") and set(prices) == {"captions", "passes"}
    assert all(0 < best <= worst for best, worst in prices.values())
    assert cost.price(replace(profile, captioner="checkpoints/small/none"))[0] == {}
    monkeypatch.setenv("LGAP_DEVICE", "cuda")
    prices, where = cost.price(profile)
    assert prices == {} and where.startswith("not timed: device 'cuda': torch finds no GPU here")


def test_a_cost_that_cannot_be_counted_is_told_in_one_sentence(monkeypatch, capsys):
    def count(plan):
        raise CheckpointError("checkpoints/toy/captioner is damaged")

    monkeypatch.setattr(cost, "count", count)
    cost.print_costs({})
    says = "what a run costs could not be counted: checkpoints/toy/captioner is damaged"
    assert capsys.readouterr().out.strip() == says


def test_flops_of_a_purification_are_those_that_were_measured():
    """paper/speed.csv: 0.949 TFLOP for caption, purification and WRN-28-10 (0.0105) at 64 pixels."""
    prices, _ = cost.price(replace(PAPER, size=64))
    best = prices["captions"][0] + prices["images"][0] + 50 * prices["passes"][0]
    assert best * cost.RATES[0] == pytest.approx((0.949 - 0.0105) * 1e12, rel=0.01)
    assert prices["passes"][1] / prices["passes"][0] == pytest.approx(2.5)
    assert (
        cost.flops_of(replace(PAPER, size=128))["passes"]
        > 3 * cost.flops_of(replace(PAPER, size=64))["passes"]
    )
