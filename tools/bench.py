"""Speed and memory of the true-size defence with random weights: python tools/bench.py --sizes 64 256 384 512

The networks have their published configurations, so every number but accuracy is real without a download:
Stable Diffusion v1.5, BLIP-base, and RobustBench's WRN-28-10 (CIFAR) or ResNet-50 (ImageNet). Rows land in
paper/speed.csv. A GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import pathlib
import resource
import shlex
import statistics
import string
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lgap_utils import attacks, checks, models, zoo  # noqa: E402
from lgap_utils.batches import ran_out  # noqa: E402
from lgap_utils.defense import LGAP, LatentPurifier  # noqa: E402
from lgap_utils.files import write_whole  # noqa: E402
from lgap_utils.noise import Keys  # noqa: E402
from lgap_utils.profiles import get_profile  # noqa: E402
from tools.doctor import device_name  # noqa: E402

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSIFIERS = {"WRN-28-10": (lambda: zoo.new_wide_resnet(28, 10, 10), 32), "ResNet-50": (resnet50, 224)}
STEPS = 50  # of which int(strength * STEPS) are run, each with guidance
KEY = "device threads dtype size strength what batch n_eot".split()  # what a row is replaced by
MEASURED = "images_per_second seconds_per_image peak_gib tflop_per_image share_of_peak peak_tflops"
SETTINGS = "device threads dtype size strength num_inference_steps what batch n_eot"
COLUMNS = f"{SETTINGS} {MEASURED} peak_is torch command"


def networks() -> dict[str, torch.nn.Module]:
    """Stable Diffusion's three and BLIP, on torch's default device; the rest are the classes' defaults."""
    vae: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    text = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    blip = transformers.BlipConfig(text_config={"num_attention_heads": 12})
    return {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "vae": AutoencoderKL(sample_size=512, **vae),
        "text_encoder": transformers.CLIPTextModel(text),
        "captioner": transformers.BlipForConditionalGeneration(blip),
    }


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """A stand-in for CLIP's tokenizer, its length and special ids right: a word falls apart into bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    special = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return transformers.CLIPTokenizer(vocab=vocabulary | special, merges=[], model_max_length=77)


def blip_processor() -> transformers.BlipProcessor:
    """A stand-in for BLIP's processor, its image size, vocabulary size and special ids right.

    Most words are three letters, which keeps a caption of random words within the 77 tokens that CLIP reads.
    """
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    special |= {"[DEC]": 30522, "[ENC]": 30523}
    letters = itertools.product(string.ascii_lowercase + string.digits, repeat=3)
    words = itertools.chain(["a", "picture", "of"], map("".join, letters))
    vocabulary = special | dict(zip(words, (i for i in range(30524) if i not in special.values())))
    tokenizer = transformers.BertTokenizer(vocab=vocabulary, additional_special_tokens=["[DEC]", "[ENC]"])
    size = {"height": 384, "width": 384}
    return transformers.BlipProcessor(transformers.BlipImageProcessor(size=size), tokenizer)


def true_size(size, strength=0.5, dtype=torch.float32, device="cpu", classifier="WRN-28-10") -> LGAP:
    """The defence with random weights; `dtype`: of captioner and purifier, as the classifier is float32."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights are born in their precision: no second copy is ever in memory
    try:
        with torch.device(device):
            made = networks()
    finally:
        torch.set_default_dtype(before)
    captioner = models.Captioner(made.pop("captioner"), blip_processor())
    settings = {"size": size, "strength": strength, "num_inference_steps": STEPS}
    purifier = LatentPurifier(
        **made, tokenizer=clip_tokenizer(), scheduler=models.ddim(SCHEDULER), **settings
    )
    new, pixels = CLASSIFIERS[classifier]
    net = new().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return LGAP(captioner, purifier.to(memory_format=torch.channels_last), net, input_size=pixels)


def inputs(defense: LGAP, batch: int) -> tuple[torch.Tensor, torch.Tensor, Keys]:
    """Random images [batch, 3, h, w] of the classifier's size, labels and keys."""
    side = defense.input_size or 32
    x = torch.rand(batch, 3, side, side).to(defense.purifier.device)
    return x, torch.zeros(batch, dtype=torch.long, device=x.device), Keys(range(batch))


@torch.no_grad()
def purification(defense: LGAP, batch: int, n_eot: int = 1) -> torch.Tensor:
    """Caption, purify and classify: logits."""
    x, _, keys = inputs(defense, batch)
    return defense(x, keys=keys.at([0] * batch, n_eot))


def bpda_step(defense: LGAP, batch: int, n_eot: int) -> torch.Tensor:
    """The gradient [batch, 3, h, w] that one step of BPDA+EOT takes, all its draws in one call."""
    x, y, keys = inputs(defense, batch)
    draws = keys.at([0] * batch, n_eot)
    return attacks.gradient(attacks.bpda(defense), x, y, draws, n_eot, batch_size=n_eot)[0]


def seconds(run: Callable[[], object]) -> float:
    """How long it takes, on the CPU or the GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def matmul_tflops(dtype: torch.dtype, device: str) -> float:
    """What the device reaches in a product of two n x n matrices, the best of five."""
    n = 8192 if device == "cuda" else 2048
    a = torch.rand(n, n, dtype=dtype, device=device)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5)) / 1e12


def largest_batch(step: Callable[[int], object]) -> int:
    """The largest power of two of images that the GPU's memory holds, found by doubling; 0 if none fits."""
    batch = 1
    try:
        while True:
            step(batch)
            batch *= 2
    except RuntimeError as error:
        if not ran_out(error):
            raise
    torch.cuda.empty_cache()
    return batch // 2


def measure(
    step, batch: int, n_eot: int, device: str, peak_tflops: float, repeats: int = 3
) -> dict[str, str]:
    """The MEASURED columns: FLOPs of a first call, then the median of timed ones. An image is one draw.

    Peak memory is what the GPU allocated in the repetitions, or this process's largest resident size so far.
    """
    counter = FlopCounterMode(display=False)
    # it would tell modules apart, which torch cannot do in the backward pass of one that was handed a leaf
    tracker = {"parents": {"Global"}, "__enter__": lambda: None, "__exit__": lambda *_: None}
    counter.mod_tracker = types.SimpleNamespace(**tracker)  # type: ignore[assignment]  # a stand-in
    with counter:
        step(batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    each = statistics.median(seconds(lambda: step(batch)) for _ in range(repeats)) / (batch * n_eot)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tflop = counter.get_total_flops() / (batch * n_eot) / 1e12
    values = (1 / each, each, peak / 2**30, tflop, tflop / each / peak_tflops, peak_tflops)
    return {name: f"{value:.4g}" for name, value in zip(MEASURED.split(), values)}


def write_row(path: pathlib.Path, row: dict) -> None:
    """Add a row to the table, in place of one with the same KEY. No reader sees half of the file."""
    row = {name: str(row[name]) for name in COLUMNS.split()}
    old = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    text = io.StringIO()
    table = csv.DictWriter(text, list(row), lineterminator="\n")
    table.writeheader()
    table.writerows([r for r in old if any(r[name] != row[name] for name in KEY)] + [row])
    write_whole(path, text.getvalue().encode())


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[64, 256, 384, 512], metavar="PIXELS", help="working sizes")
    add("--strength", type=float, default=0.5, help="0.5 (default) for CIFAR, 0.1 for ImageNet")
    add("--classifier", choices=CLASSIFIERS, default="WRN-28-10", help="images have its size")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of all but that")
    add("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    add("--batch", type=int, help="images per call; default: 1 on a CPU, all that fit on a GPU")
    add("--n-eot", type=int, default=15, help="draws of one BPDA+EOT step; default: 15")
    args = parser.parse_args(argv)
    try:
        checks.check_counts(
            threads=args.threads, batch=1 if args.batch is None else args.batch, n_eot=args.n_eot
        )
        for size in args.sizes:
            get_profile("paper", size=size, strength=args.strength, num_inference_steps=STEPS)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    dtype, device = getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    peak = matmul_tflops(dtype, device)
    defense = true_size(8, args.strength, dtype, device, args.classifier)
    settings = {"threads": args.threads, "dtype": args.dtype, "strength": args.strength}
    settings |= {"num_inference_steps": STEPS, "peak_is": "measured matmul", "torch": torch.__version__}
    settings["command"] = shlex.join(["python", "tools/bench.py", *sys.argv[1:]])
    steps = (("purification", purification, 1), ("BPDA step", bpda_step, args.n_eot))
    for size, (name, step, n_eot) in itertools.product(sorted(set(args.sizes)), steps):
        with defense.purifier.using(size=size):
            run = lambda batch: step(defense, batch, n_eot)
            batch = args.batch or (largest_batch(run) if device == "cuda" else 1)
            if not batch:
                print(f"{size} px, {name}: one image does not fit in memory")
                continue
            measured = measure(run, batch, n_eot, device, peak)
        what = {"size": size, "what": f"{name} ({args.classifier})", "batch": batch, "n_eot": n_eot}
        write_row(ROOT / "paper" / "speed.csv", {"device": device_name(device)} | settings | what | measured)
        print(", ".join(f"{key} {value}" for key, value in (what | measured).items()), flush=True)


if __name__ == "__main__":
    main()
