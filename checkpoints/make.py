"""Makes the models of a profile from nothing: python checkpoints/make.py toy|small|paper [--only PART ...]

`toy` and `small` are the bundled trios, made in the order classifier, captioner, vae, diffusion. Then
`measure` writes measured.md. `paper` is one model, the CIFAR-100 classifier of Table 2: nobody publishes it.
A killed part resumes from its state in checkpoints/work/PROFILE/PART. A GPU is used where there is one. Each
part is saved by the class that will load it, next to its learning curve.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from checkpoints import pretrain  # noqa: E402
from checkpoints.captions import captions_of, mistaken_captions  # noqa: E402
from checkpoints.measure import measured  # noqa: E402
from checkpoints.new_models import new_captioner, new_diffusion, new_vae  # noqa: E402
from checkpoints.rival import new_rival, train_rival  # noqa: E402
from lgap_utils import models  # noqa: E402
from lgap_utils.data import load_images  # noqa: E402
from lgap_utils.files import write_checksums  # noqa: E402
from lgap_utils.images import Images  # noqa: E402
from lgap_utils.profiles import Profile, get_profile  # noqa: E402
from lgap_utils.tables import proportion  # noqa: E402
from lgap_utils.train import hits  # noqa: E402
from lgap_utils.zoo import new_wide_resnet  # noqa: E402
from tools.request import settings_of  # noqa: E402

# Sizes and lengths: nothing else differs between the trios. Each of the `cycles` continues where the last one
# ended, with the learning rate up and down again.
RECIPES = {
    "toy": {
        "n": 24_000,
        "flip": False,
        "classifier": {
            "depth": 10,
            "widen_factor": 2,
            "lr": 3e-3,
            "optimizer": "adamw",
            "weight_decay": 1e-2,
            "epochs": 2,
            "batch_size": 64,
            "augment": False,
        },
        "captioner": {"width": 96, "layers": 4, "text_layers": 2, "epochs": 6},
        "vae": {"channels": (16, 32, 64), "latent_channels": 144, "epochs": 2, "kl": 1e-8},
        "diffusion": {"channels": (64, 96), "text_width": 64, "epochs": 4},
    },
    "small": {
        "n": None,
        "flip": True,
        "classifier": {
            "depth": 16,
            "widen_factor": 3,
            "optimizer": "sgd",
            "weight_decay": 5e-4,
            "lr": 0.3,
            "epochs": 50,
            "batch_size": 256,
            "bf16": True,
        },
        "captioner": {
            "width": 256,
            "layers": 6,
            "text_layers": 2,
            "batch_size": 512,
            "bf16": True,
            "cycles": ({"epochs": 8}, {"epochs": 47}),
        },
        # 0.7 is the noise of time 251, sqrt(1 / alpha_bar - 1)
        "vae": {
            "channels": (16, 32, 64),
            "latent_channels": 144,
            "epochs": 24,
            "batch_size": 256,
            "bf16": True,
            "noise": 0.7,
            "calm": 0.2,
        },
        "diffusion": {
            "channels": (96, 192),
            "text_width": 64,
            "batch_size": 512,
            "bf16": True,
            "mistakes": 0.1,
            "cycles": (
                {"epochs": 6, "times": ((5, 0, 700), (1, 0, 1000))},
                {"epochs": 9, "times": ((5, 0, 700), (1, 0, 1000))},
                {
                    "epochs": 8,
                    "times": ((10, 401, 551), (3, 0, 100), (6, 0, 700), (1, 0, 1000)),
                    "batch_size": 128,
                    "lr": 5e-4,
                },
            ),
        },
        # times that purification meets, and half as many again
        "rival": {"channels": (96, 128, 160), "fold": 2, "below": 150, "epochs": 3.3, "bf16": True},
    },
    # Yoon et al.'s (meliketoy/wide-resnet.pytorch): the crop is padded with zeros, the momentum is not
    # Nesterov's
    "paper": {
        "network": {
            "depth": 28,
            "widen_factor": 10,
            "dropRate": 0.3,
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
        },
        "training": {
            "epochs": 200,
            "lr": 0.1,
            "schedule": "steps",
            "optimizer": "sgd",
            "nesterov": False,
            "weight_decay": 5e-4,
            "batch_size": 128,
            "pad": 4,
            "padding": "constant",
            "bf16": True,
        },
    },
}

# ---------------------------------------------------------------- the parts of a trio


def folder_of(work: Path, cycle: int) -> Path:
    """Where the state of a cycle lies."""
    return work / f"cycle{cycle}" if cycle else work


def compile_on_gpu(device: Any, *networks: nn.Module) -> None:
    """Compile networks in place where there is a GPU. Their weights keep their names."""
    if torch.device(device).type == "cuda":
        for network in networks:
            network.compile()


class Job(NamedTuple):
    """One part of a trio to be made."""

    profile: Profile
    images: Images  # to train on
    captions: Sequence[str]  # of the images
    work: Path  # the folder of the state
    out: Path  # the folder of the trio
    device: Any


def make_classifier(job: Job, depth: int, widen_factor: int, **how: Any) -> None:
    """Train and save the WideResNet. how: settings of `pretrain.train_classifier`, here as below."""
    sizes = {"depth": depth, "widen_factor": widen_factor, "num_classes": len(job.images.classes)}
    net = new_wide_resnet(**sizes)
    compile_on_gpu(job.device, net)
    pretrain.train_classifier(net, job.images, job.work, device=job.device, **how)
    models.save_classifier(net, job.out / "classifier", **sizes)


def make_captioner(
    job: Job, width: int, layers: int, text_layers: int, cycles: Sequence[dict] = ({},), **how: Any
) -> None:
    """Train and save BLIP, with the saved classifier as its teacher."""
    sizes = {"width": width, "layers": layers, "text_layers": text_layers}
    captioner = new_captioner(job.captions, job.profile, job.device, **sizes)
    teacher: Any = models.load_classifier(str(job.out / "classifier"), device=job.device)
    compile_on_gpu(job.device, captioner.model.vision_model, teacher.block1, teacher.block2, teacher.block3)
    for cycle, own in enumerate(cycles):
        settings = {"teacher": teacher, "seed": cycle, **how, **own}
        pretrain.train_captioner(captioner, job.images, job.captions, folder_of(job.work, cycle), **settings)
    captioner.model.half().save_pretrained(job.out / "captioner")
    captioner.processor.save_pretrained(job.out / "captioner")


def make_vae(job: Job, channels: Sequence[int], latent_channels: int, **how: Any) -> None:
    """Train and save the autoencoder."""
    vae = new_vae(job.profile, channels=channels, latent_channels=latent_channels)
    vae = vae.to(job.device, memory_format=torch.channels_last)
    compile_on_gpu(job.device, vae.encoder, vae.decoder)
    pretrain.train_vae(vae, job.images, job.work, **how)
    vae.half().save_pretrained(job.out / "diffusion" / "vae")


def make_diffusion(
    job: Job,
    channels: Sequence[int],
    text_width: int,
    mistakes: float = 0.0,
    cycles: Sequence[dict] = ({},),
    **how: Any,
) -> None:
    """Train and save the UNet, its text encoder, tokenizer and scheduler, around the saved autoencoder."""
    local = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False, "local_files_only": True}
    vae = AutoencoderKL.from_pretrained(job.out / "diffusion" / "vae", **local)
    sizes = {"channels": channels, "text_width": text_width}
    purifier = new_diffusion(vae, job.captions, job.profile, job.device, **sizes)
    compile_on_gpu(job.device, purifier.unet, vae.encoder)
    if how.get("bf16") and purifier.device.type == "cpu":
        # the backward pass of the fused attention is slow there in bf16
        purifier.unet.set_attn_processor(AttnProcessor())
    if mistakes:
        how |= {"mistakes": mistakes, "mistaken": mistaken_captions(job.images)}
    for cycle, own in enumerate(cycles):
        settings = {"seed": cycle, **how, **own}
        pretrain.train_diffusion(purifier, job.images, job.captions, folder_of(job.work, cycle), **settings)
    for name in ("unet", "text_encoder"):
        getattr(purifier, name).half().save_pretrained(job.out / "diffusion" / name)
    purifier.tokenizer.save_pretrained(job.out / "diffusion" / "tokenizer")
    purifier.scheduler.save_pretrained(job.out / "diffusion" / "scheduler")


def make_rival(job: Job, channels: Sequence[int], fold: int, **how: Any) -> None:
    """Train and save the pixel-space denoiser of a DiffPure-style purifier."""
    unet, scheduler = new_rival(job.profile.size, channels, fold)
    train_rival(unet, scheduler, job.images, job.work, device=job.device, **how)
    unet.half().save_pretrained(job.out / "rival")
    scheduler.save_pretrained(job.out / "rival")


PARTS = {
    "classifier": make_classifier,
    "captioner": make_captioner,
    "vae": make_vae,
    "diffusion": make_diffusion,
    "rival": make_rival,
}

# ---------------------------------------------------------------- profiles


def make_trio(name: str, parts: Sequence[str], device: Any) -> None:
    """Make the named parts of a bundled profile, into checkpoints/NAME."""
    profile, recipe, out = get_profile(name), RECIPES[name], HERE / name
    trained = [part for part in PARTS if part in parts and part in recipe]
    if trained:
        images = load_images(profile.dataset, "train", recipe["n"])
        captions = captions_of(images)
    for part in trained:
        torch.manual_seed(0)  # the initial weights
        flip = {} if part == "classifier" else {"flip": recipe["flip"]}
        work = HERE / "work" / name / part
        job = Job(profile, images, captions, work, out, device)
        PARTS[part](job, **flip, **recipe[part])
        for log in work.rglob("log.csv"):
            cycle = "_".join(log.parent.relative_to(work.parent).parts)
            shutil.copy(log, out / f"{cycle}_curve.csv")
        write_checksums(out)
    if "measure" in parts:
        (out / "measured.md").write_text(measured(profile, device))


def make_paper(
    device: Any, out: Path | None = None, n: int | None = None, epochs: int | None = None, **sizes: int
) -> None:
    """Make the WideResNet of Table 2 in `out`, from the first n training images (None: all).

    epochs and sizes (depth, widen_factor) replace those of the recipe. The state lies in
    checkpoints/work/paper, or beside `out`, if given.
    """
    profile, recipe = get_profile("paper", table=2), RECIPES["paper"]
    work = Path(f"{out}.work") if out else HERE / "work" / "paper"
    out = Path(out or HERE.parent / profile.classifier)
    images, validation = load_images(profile.dataset, "train", n), load_images(profile.dataset, "validation")
    config = recipe["network"] | {"num_classes": len(images.classes)} | sizes
    training = recipe["training"] | ({"epochs": epochs} if epochs else {})
    torch.manual_seed(0)  # the initial weights
    net = models.new_classifier(**config)
    pretrain.train_classifier(net, images, work, validation=validation, device=device, **training)
    models.save_classifier(net, out, **config)
    shutil.copy(work / "log.csv", out / "curve.csv")
    write_checksums(out)
    right = proportion(hits(net, validation.x.to(device), validation.labels))
    interval = f"95 % interval {right['95 % interval']}"
    print(f"{right['%']} % of {right['n']} validation images right ({interval}); saved in {out}")


# ---------------------------------------------------------------- the command line

PAPER_OPTIONS = ("depth", "widen_factor", "epochs", "n", "out")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("profile", choices=sorted(RECIPES))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    only = {"choices": [*PARTS, "measure"], "help": "parts of `toy` and `small` (default: all)"}
    parser.add_argument("--only", nargs="+", **only)
    about = "make nothing: print what `toy` or `small` is worth on validation images"
    example = "with these fields of the profile, e.g. strength=0.6 diffusion=/a/folder"
    parser.add_argument("--try", nargs="*", dest="settings", metavar="NAME=VALUE", help=f"{about}, {example}")
    sizes = parser.add_argument_group("for `paper`", "the same training at another size or length")
    sizes.add_argument("--depth", type=int, help="6 k + 4")
    sizes.add_argument("--widen-factor", type=int)
    sizes.add_argument("--epochs", type=int, help="the learning rate falls after 30, 60 and 80 %% of them")
    sizes.add_argument("--n", type=int, help="the first so many training images")
    sizes.add_argument("--out", help="folder of the result (default: checkpoints/paper/cifar100)")
    return parser


def main() -> None:
    """Make, or with --try only measure, what the command line names."""
    parser = arguments()
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in PAPER_OPTIONS if getattr(args, name) is not None}
    if args.profile == "paper":
        refused = ["--only"] * (args.only is not None) + ["--try"] * (args.settings is not None)
    else:
        refused = list(sizes)
    if refused:
        parser.error(f"{args.profile} takes no {', '.join(refused)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.settings is not None:
        try:
            profile = get_profile(args.profile, **settings_of(args.profile, args.settings))
        except ValueError as error:
            parser.error(str(error))
        print(measured(profile, models.device_of(), "validation"))
    elif args.profile == "paper":
        make_paper(models.device_of(), **sizes)
    else:
        make_trio(args.profile, args.only or [*PARTS, "measure"], models.device_of())


if __name__ == "__main__":
    main()
