"""tools/bench.py: networks of the published sizes, a true-size defence on a CPU, and a table kept whole."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import bench

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def row():
    """A row of made-up numbers."""
    own = {"device": "CPU (model, A)", "strength": 0.5, "what": "purification (WRN-28-10)"}
    return dict.fromkeys(bench.COLUMNS, "1") | own


# BLIP's published file has 247,414,076: it holds the words' 30524 x 768 matrix twice.
@pytest.mark.parametrize(
    "name, count",
    {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "captioner": 247_414_076 - 30_524 * 768,
        "WRN-28-10": 36_479_194,
        "ResNet-50": 25_557_032,
    }.items(),
)
def test_a_network_has_the_published_number_of_parameters(networks, name, count):
    assert sum(p.numel() for p in networks[name].parameters()) == count


@pytest.fixture(scope="module")
def networks():
    with torch.device("meta"):
        return bench.networks() | {name: new() for name, (new, _) in bench.CLASSIFIERS.items()}


def test_the_stand_in_tokenizers_have_the_lengths_and_special_ids_of_the_real_ones():
    words, text = bench.blip_processor().tokenizer, bench.clip_tokenizer()
    assert len(words) == bench.BLIP["text_config"]["vocab_size"]
    assert words("a picture of").input_ids == [101, 1, 2, 3, 102]
    assert (words.convert_tokens_to_ids("[DEC]"), words.sep_token_id, words.pad_token_id) == (30522, 102, 0)
    ids = text("a cat", padding="max_length").input_ids
    assert len(ids) == 77 and ids[0] == 49406
    assert set(ids[-70:]) == {49407} and max(ids) < bench.TEXT["vocab_size"]
    longest = words.decode(range(2000, 2017))  # a caption of max_length 20, the prompt's three less
    assert len(longest.split()) == 17 and len(text(longest).input_ids) <= 77


DEFEND = """
import json, resource, sys
sys.path.insert(0, "tools")
import bench, torch
defense = bench.true_size(64, strength=0.5, dtype=getattr(torch, sys.argv[1]))
x, _, keys = bench.inputs(defense, 1)
with torch.no_grad():
    purified = defense.purify(x, keys=keys)
grad = bench.bpda_step(defense, 1, 1)
print(json.dumps({"low": purified.min().item(), "high": purified.max().item(), "shape": list(purified.shape),
                  "logits": defense.classify(purified).isfinite().all().item(),
                  "gradient": grad.abs().sum().item(),
                  "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}))
"""


@pytest.mark.truesize
@pytest.mark.skipif(
    os.environ.get("LGAP_TRUESIZE") != "1", reason="takes minutes and GiB of memory; LGAP_TRUESIZE=1 runs it"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_true_size_defence_purifies_and_takes_a_bpda_step_on_a_cpu(dtype):
    done = subprocess.run([sys.executable, "-c", DEFEND, dtype], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["shape"] == [1, 3, 32, 32] and 0 <= found["low"] < found["high"] <= 1 and found["logits"]
    assert 0 < found["gradient"] < float("inf") and found["gib"] < 20


def test_a_row_takes_the_place_of_its_equal_and_no_other(row, tmp_path):
    table = tmp_path / "speed.csv"
    for change in ({}, {"batch": 2}, {"batch": 1, "images_per_second": 7}):
        bench.write_row(table, row | change)
    with table.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [tuple(r) for r in rows] == [bench.COLUMNS] * 2
    assert [(r["batch"], r["images_per_second"]) for r in rows] == [("2", "1"), ("1", "7")]
    assert rows[0] == {name: str(value) for name, value in (row | {"batch": 2}).items()}
    assert [p.name for p in tmp_path.iterdir()] == ["speed.csv"]


def test_a_row_that_cannot_be_written_leaves_the_table_as_it_was(row, tmp_path, monkeypatch):
    table = tmp_path / "speed.csv"
    bench.write_row(table, row)
    before = table.read_bytes()

    class Full(csv.DictWriter):
        def writerows(self, rows):
            raise OSError("no space left")

    monkeypatch.setattr(bench.csv, "DictWriter", Full)
    with pytest.raises(OSError):
        bench.write_row(table, row | {"batch": 2})
    assert table.read_bytes() == before


def test_a_measurement_counts_the_operations_of_one_draw_backward_pass_included():
    layer = torch.nn.Linear(8, 4, bias=False).requires_grad_(False)

    def step(batch):
        x = torch.rand(2 * batch, 8, requires_grad=True)
        torch.autograd.grad(layer(x).sum(), x)

    found = {name: float(value) for name, value in bench.measure(step, 3, 2, "cpu", 1e-6, 3).items()}
    assert found["tflop_per_image"] == pytest.approx(
        2 * (2 * 8 * 4) / 1e12
    )  # forward and backward, 2 for multiply and add
    assert found["images_per_second"] * found["seconds_per_image"] == pytest.approx(1, rel=1e-2)
    assert found["share_of_peak"] == pytest.approx(
        found["tflop_per_image"] / found["seconds_per_image"] / 1e-6, rel=1e-2
    )
    assert set(found) < set(bench.COLUMNS) and found["peak_gib"] > 0


@pytest.mark.parametrize("room, largest", [(0, 0), (1, 1), (5, 4), (8, 8)])
def test_the_batch_doubles_until_memory_is_full(room, largest):
    def step(batch):
        if batch > room:
            raise torch.OutOfMemoryError("full")

    assert bench.largest_batch(step) == largest


@pytest.mark.parametrize(
    "request_, words",
    [
        ("--sizes 64 65", "size 65: expected a positive multiple of 8"),
        ("--dtype int8", "'bfloat16'"),
        ("--strength 2", "between 0 and 1"),
        ("--strength 0.01", "0 denoising steps"),
        ("--batch 0", "batch=0"),
        ("--peak-tflops -1", "expected a positive number"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(monkeypatch, capsys, request_, words):
    monkeypatch.setattr(sys, "argv", ["bench.py", *request_.split()])
    with pytest.raises(SystemExit):
        bench.arguments()
    assert words in capsys.readouterr().err.splitlines()[-1]
