"""Speed and memory of the true-size defence with random weights: python tools/bench.py --sizes 64 256 384 512

The networks are built from their published configurations, so no download is needed and every number but accuracy is real:
Stable Diffusion v1.5, BLIP-base, and RobustBench's WRN-28-10 (CIFAR) or ResNet-50 (ImageNet). Rows land in paper/speed.csv.
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

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lgap_utils import attacks, checks, models, zoo  # noqa: E402
from lgap_utils.batches import ran_out  # noqa: E402
from lgap_utils.defense import LGAP, LatentPurifier, noise_schedule  # noqa: E402
from lgap_utils.files import write_whole  # noqa: E402
from lgap_utils.noise import Keys  # noqa: E402
from tools.doctor import device_name  # noqa: E402

UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu", **WIDE}
BLIP = {
    "vision_config": {"image_size": 384, "patch_size": 16, **WIDE},
    "text_config": {
        "vocab_size": 30524,
        "encoder_hidden_size": 768,
        "max_position_embeddings": 512,
        "bos_token_id": 30522,
        "eos_token_id": 2,
        "sep_token_id": 102,
        "pad_token_id": 0,
        **WIDE,
    },
    "projection_dim": 512,
    "image_text_hidden_size": 256,
}
CLASSIFIERS = {
    "WRN-28-10": (lambda: zoo.new_wide_resnet(28, 10, 10), 32),
    "ResNet-50": (resnet50, 224),
}  # and pixels
STEPS = 50  # of which int(strength * STEPS) are run, each with guidance
KEY = (
    "device",
    "threads",
    "dtype",
    "size",
    "strength",
    "what",
    "batch",
    "n_eot",
)  # what a row is replaced by
COLUMNS = (
    "device",
    "threads",
    "dtype",
    "size",
    "strength",
    "num_inference_steps",
    "what",
    "batch",
    "n_eot",
    "images_per_second",
    "seconds_per_image",
    "peak_gib",
    "tflop_per_image",
    "share_of_peak",
    "peak_tflops",
    "peak_is",
    "torch",
    "command",
)


def networks():
    """Stable Diffusion's three and BLIP, on torch's default device and in its default dtype."""
    return {
        "unet": diffusers.UNet2DConditionModel(**UNET),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
        "captioner": transformers.BlipForConditionalGeneration(transformers.BlipConfig(**BLIP)),
    }


def clip_tokenizer():
    """A stand-in for CLIP's tokenizer, its length and special ids right: every word falls apart into bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    special = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return transformers.CLIPTokenizer(vocab=vocabulary | special, merges=[], model_max_length=77)


def blip_processor():
    """A stand-in for BLIP's processor, its image size, vocabulary size and special ids right: most words are three letters, which
    keeps a caption of random words within the 77 tokens that CLIP reads."""
    special = {
        "[PAD]": 0,
        "[UNK]": 100,
        "[CLS]": 101,
        "[SEP]": 102,
        "[MASK]": 103,
        "[DEC]": 30522,
        "[ENC]": 30523,
    }
    words = itertools.chain(
        ["a", "picture", "of"],
        map("".join, itertools.product(string.ascii_lowercase + string.digits, repeat=3)),
    )
    vocabulary = special | dict(zip(words, (i for i in range(30524) if i not in special.values())))
    tokenizer = transformers.BertTokenizer(vocab=vocabulary, additional_special_tokens=["[DEC]", "[ENC]"])
    return transformers.BlipProcessor(
        transformers.BlipImageProcessor(size={"height": 384, "width": 384}), tokenizer
    )


def true_size(size, strength=0.5, dtype=torch.float32, device="cpu", classifier="WRN-28-10"):
    """The defence at its true size with random weights; `dtype` is that of captioner and purifier, the classifier is float32."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights are born in their precision: no second copy is ever in memory
    try:
        with torch.device(device):
            made = networks()
    finally:
        torch.set_default_dtype(before)
    captioner = models.Captioner(made.pop("captioner"), blip_processor())
    purifier = LatentPurifier(
        **made,
        tokenizer=clip_tokenizer(),
        scheduler=models.ddim(SCHEDULER),
        size=size,
        strength=strength,
        num_inference_steps=STEPS,
    )
    new, pixels = CLASSIFIERS[classifier]
    return LGAP(
        captioner,
        purifier.to(memory_format=torch.channels_last),
        new().requires_grad_(False).to(device, memory_format=torch.channels_last),
        input_size=pixels,
    )


def inputs(defense, batch):
    """Random images [batch, 3, h, w] of the classifier's size, labels and keys."""
    device = defense.purifier.device
    x = torch.rand(
        batch,
        3,
        defense.input_size,
        defense.input_size,
        generator=torch.Generator(device).manual_seed(0),
        device=device,
    )
    return x, torch.zeros(batch, dtype=torch.long, device=device), Keys(range(batch))


@torch.no_grad()
def purification(defense, batch, n_eot=1):
    """Caption, purify and classify: logits."""
    x, _, keys = inputs(defense, batch)
    return defense(x, keys=keys.at([0] * batch, n_eot))


def bpda_step(defense, batch, n_eot):
    """The gradient [batch, 3, h, w] that one step of BPDA+EOT takes, all its draws in one call."""
    x, y, keys = inputs(defense, batch)
    return attacks.gradient(
        attacks.bpda(defense), x, y, keys.at([0] * batch, n_eot), n_eot, batch_size=n_eot
    )[0]


def seconds(run):
    """How long it takes, on whichever device."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def matmul_tflops(dtype, n=2048):
    """What this CPU reaches in a product of two n x n matrices, the best of five."""
    a = torch.rand(n, n, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5)) / 1e12


def largest_batch(step):
    """The largest power of two of images that the GPU's memory holds, found by doubling; 0 if not even one fits."""
    for n in itertools.count():
        try:
            step(2**n)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            break
    torch.cuda.empty_cache()
    return 2**n // 2


def measure(step, batch, n_eot, device, peak_tflops, repeats):
    """The measured columns of a row: a warm-up that counts FLOPs, then the median of timed repetitions. An image is one draw.
    Peak memory is what the GPU allocated during the repetitions, or what was resident of this process since it began."""
    counter = FlopCounterMode(display=False)
    # it would tell modules apart, too, which torch cannot do in the backward pass of one that was handed a leaf
    counter.mod_tracker = types.SimpleNamespace(
        parents={"Global"}, __enter__=lambda: None, __exit__=lambda *_: None
    )
    with counter:
        step(batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    each = statistics.median(seconds(lambda: step(batch)) for _ in range(repeats)) / (batch * n_eot)
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    tflop = counter.get_total_flops() / (batch * n_eot) / 1e12
    found = {
        "images_per_second": 1 / each,
        "seconds_per_image": each,
        "peak_gib": peak / 2**30,
        "tflop_per_image": tflop,
        "share_of_peak": tflop / each / peak_tflops,
        "peak_tflops": peak_tflops,
    }
    return {name: f"{value:.4g}" for name, value in found.items()}


def write_row(path, row):
    """Add a row to the table, in place of one with the same KEY. The file is written whole: no reader sees half of it."""
    row = {name: str(row[name]) for name in COLUMNS}
    old = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows([r for r in old if any(r[name] != row[name] for name in KEY)] + [row])
    write_whole(path, text.getvalue().encode())


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[64, 256, 384, 512],
        metavar="PIXELS",
        help="default: 64 256 384 512",
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=0.5,
        help="t in the paper: 0.5 (default) for CIFAR, 0.1 for ImageNet",
    )
    parser.add_argument(
        "--classifier",
        choices=CLASSIFIERS,
        default="WRN-28-10",
        help="images have its size; default: WRN-28-10",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="bfloat16",
        help="of captioner and purifier; default: bfloat16",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: the GPU if there is one",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="CPU threads (default: torch's own choice)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="images per call; default: 1 on a CPU, the largest power of two that fits on a GPU",
    )
    parser.add_argument("--n-eot", type=int, default=15, help="draws of one BPDA+EOT step; default: 15")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed repetitions, whose median counts; default: 3"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="what the device reaches at best; default: a matrix product timed here on a "
        "CPU, 790 on a GPU (H100 or H200 in bfloat16)",
    )
    args = parser.parse_args()
    if wrong := [size for size in args.sizes if size < 8 or size % 8]:
        parser.error(f"size {wrong[0]}: expected a positive multiple of 8, as the VAE halves three times")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device cuda: torch sees no GPU here")
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        parser.error(f"peak-tflops {args.peak_tflops}: expected a positive number")
    if not 0 < args.strength < 1:
        parser.error(f"strength {args.strength}: expected a number between 0 and 1")
    try:
        checks.check_counts(
            threads=args.threads,
            batch=1 if args.batch is None else args.batch,
            n_eot=args.n_eot,
            repeats=args.repeats,
        )
        noise_schedule(models.ddim(SCHEDULER), args.strength, STEPS)
    except ValueError as error:
        parser.error(str(error))
    return args


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    peak, peak_is = args.peak_tflops, "given"
    if peak is None:
        peak, peak_is = (
            (790, "assumed") if args.device == "cuda" else (matmul_tflops(dtype), "measured matmul")
        )
    defense = true_size(8, args.strength, dtype, args.device, args.classifier)
    for size, (name, step, n_eot) in itertools.product(
        sorted(set(args.sizes)), [("purification", purification, 1), ("BPDA step", bpda_step, args.n_eot)]
    ):  # the peak of a CPU only grows
        with defense.purifier.using(size=size):
            run = lambda batch: step(defense, batch, n_eot)
            batch = args.batch or (largest_batch(run) if args.device == "cuda" else 1)
            if not batch:
                print(f"{size} px, {name}: one image does not fit in memory")
                continue
            found = measure(run, batch, n_eot, args.device, peak, args.repeats)
        row = {
            "device": device_name(args.device),
            "threads": args.threads,
            "dtype": args.dtype,
            "size": size,
            "strength": args.strength,
            "num_inference_steps": STEPS,
            "what": f"{name} ({args.classifier})",
            "batch": batch,
            "n_eot": n_eot,
            **found,
            "peak_is": peak_is,
            "torch": torch.__version__,
            "command": shlex.join(["python", "tools/bench.py", *sys.argv[1:]]),
        }
        write_row(ROOT / "paper" / "speed.csv", row)
        print(
            ", ".join(f"{k} {v}" for k, v in row.items() if k in ("size", "what", "batch", "n_eot", *found)),
            flush=True,
        )


if __name__ == "__main__":
    main()
