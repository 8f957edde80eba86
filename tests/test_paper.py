"""The profile `paper` from a hub cache under the real names: all notebooks, offline, on a few images."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
import torch
from small_models import in_cache, small_network

from lgap_utils import models, zoo
from lgap_utils.profiles import PAPER, REVISIONS, ROOT, data_root

slow = pytest.mark.skipif(
    not os.environ.get("LGAP_SLOW"), reason="takes several minutes; set LGAP_SLOW=1, as .ci/run does"
)
needs_data = pytest.mark.skipif(
    not all((data_root() / name).is_dir() for name in ("cifar10", "cifar100", "imagenet")),
    reason="needs CIFAR-10, CIFAR-100 and ImageNet below LGAP_DATA",
)

# Runs in each kernel before its notebook.
FOLDERS = [str(ROOT), str(ROOT / "tests")]
STARTUP = f"import sys; sys.path[:0] = {FOLDERS!r}; import small_models; small_models.install()"
SIZES = {
    "n_images": 2,
    "n_adaptive": 1,
    "n_eot_images": 1,
    "n_surrogate": 1,
    "n_full": 1,
    "n_curve": 1,
    "n_controls": 1,
    "n_language": 2,
    "n_rivals": 1,
    "n_draws": 2,
    "n_finetune": 4,
    "n_validation": 2,
    "n_eot": 2,
    "n_steps_full": 2,
    "num_inference_steps": 10,
    "size": 128,
    "same_models": True,
}  # fewer draws, steps and pixels; the numbers are compared all the same


def put(file, weights):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, file)


@pytest.fixture
def cache(make, captions, tmp_path, monkeypatch):
    """A folder for LGAP_CACHE: small random models where the profile `paper` looks for the real ones."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    cache = tmp_path / "cache"
    monkeypatch.setenv("LGAP_CACHE", str(cache))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(0)

    sizes = {"width": 16, "layers": 1, "text_layers": 1, "patch": 32}
    blip, published = make.new_captioner(captions, PAPER, "cpu", **sizes), tmp_path / "blip"
    blip.model.save_pretrained(published)
    blip.processor.save_pretrained(published)
    (published / "model.safetensors").unlink()  # published as a pickle alone
    put(published / "pytorch_model.bin", blip.model.state_dict())
    in_cache(cache, PAPER.captioner, REVISIONS[PAPER.captioner], published)

    shape = {"norm_num_groups": 4, "layers_per_block": 1}
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
        **shape,
    )
    purifier = make.new_diffusion(vae, captions, PAPER, "cpu", channels=(16, 32), text_width=16, tokens=77)
    purifier.unet = UNet2DConditionModel(
        sample_size=48,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8, 16),
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        **shape,
    )
    published = tmp_path / "sd"
    for part in ("vae", "unet", "text_encoder"):
        getattr(purifier, part).half().save_pretrained(published / part, variant="fp16")
    purifier.tokenizer.save_pretrained(published / "tokenizer")
    (published / "scheduler").mkdir()
    schedule = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    schedule |= {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "skip_prk_steps": True}
    schedule |= {"set_alpha_to_one": False, "clip_sample": False}
    (published / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    in_cache(cache, PAPER.diffusion, REVISIONS[PAPER.diffusion], published)

    for dataset, names in {
        "cifar10": ("Standard", "Carmon2019Unlabeled"),
        "imagenet": ("Standard_R50", "Salman2020Do_R50", "Wong2020Fast"),
    }.items():
        for name in names:
            net = small_network(dataset, "Linf", name)
            weights = net.model.state_dict() if dataset == "imagenet" else net.state_dict()
            put(
                zoo.robustbench_file(dataset, "Linf", name),
                {"state_dict": {f"module.{k}": v for k, v in weights.items()}},
            )

    folder = cache / "checkpoints" / "paper" / "cifar100"  # what `checkpoints/make.py paper` trains
    config = {
        "depth": 10,
        "widen_factor": 1,
        "num_classes": 100,
        "mean": [0.5071, 0.4867, 0.4408],
        "std": [0.2675, 0.2565, 0.2761],
    }
    models.save_classifier(models.new_classifier(**config), folder, **config)

    # The committed lock file without digests. Libraries of today save tokenizers in other files.
    other = ("special_tokens", "vocab", "tokenizer/", "preprocessor")
    lock = {
        source: {name: {"sha256": None, "size": None} for name in files if not name.startswith(other)}
        for source, files in json.loads((ROOT / "checkpoints" / "hub.lock.json").read_text()).items()
    }
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    return cache


def run_all(tmp_path, cache, *request, **environment):
    """`./run_all.sh` as it is, in a process of its own that has only this cache and these outputs."""
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "small_models.py").write_text(STARTUP)
    env = (
        os.environ
        | {
            "LGAP_CACHE": str(cache),
            "LGAP_LOCK": str(tmp_path / "lock.json"),
            "LGAP_OUTPUTS": str(tmp_path / "outputs"),
            "LGAP_DATA": str(data_root()),
            "TORCH_HOME": str(tmp_path / "torch"),
            "IPYTHONDIR": str(tmp_path / "ipython"),
            "HF_HUB_OFFLINE": "1",
            "LGAP_DEVICE": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        | environment
    )
    settings = [part for name, value in SIZES.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "tools.runner", *request, *settings]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@slow
@needs_data
def test_every_notebook_of_paper_runs_from_a_hub_cache(cache, tmp_path):
    ran = run_all(tmp_path, cache, "paper")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    out = tmp_path / "outputs" / "paper"
    notebooks = sorted((out / "notebooks").glob("*.ipynb"))
    assert [file.name for file in notebooks] == [
        file.name for file in sorted((ROOT / "notebooks").glob("*.ipynb"))
    ]
    for notebook in notebooks:
        counts = [
            c.execution_count for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"
        ]
        assert counts == list(range(1, len(counts) + 1)), notebook.name
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"table 1", "table 2", "table 3", "table 4"}
    rows = {(row["name"], row["attack"]) for table in results.values() for row in table["rows"]}
    assert {
        ("Carmon et al.", ""),
        ("Salman et al.", "AA"),
        ("Wong et al.", "AA"),
        ("LGAP", "BPDA 40+EOT"),
    } <= rows  # run, not quoted
    datasets = [results[f"table {k}"]["provenance"]["settings"]["dataset"] for k in range(1, 5)]
    assert datasets == ["cifar10", "cifar100", "cifar10", "imagenet"]
    purifier = results["table 1"]["provenance"]["defence"]["purifier"]["is"]
    assert (purifier["size"], purifier["num_inference_steps"], purifier["dtype"]) == (128, 10, "bfloat16")
    assert (
        "inside" in (out / "tables" / "04_table1.md").read_text()
        or "outside" in (out / "tables" / "04_table1.md").read_text()
    )
    # The digest of each file is known now, and a file that changed is refused before anything starts to run.
    lock = json.loads((tmp_path / "lock.json").read_text())
    read = [lock[f"{name}@{REVISIONS[name]}"] for name in (PAPER.captioner, PAPER.diffusion)] + [
        lock["robustbench"]
    ]
    assert (
        all(len(entry["sha256"]) == 64 for files in read for entry in files.values())
        and len(lock["robustbench"]) == 5
    )
    weights = zoo.robustbench_file("cifar10", "Linf", "Standard")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    ran = run_all(tmp_path, cache, "paper", "--only", "02")
    assert ran.returncode == 1 and "Standard.pt is damaged: " in ran.stderr
