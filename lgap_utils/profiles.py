"""What a run is made of: model ids, paths, sizes and the method's settings. A profile is data; nothing asks for its name."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def data_root():
    """Where data sets lie: $LGAP_DATA, else `data/` in the checkout."""
    return Path(os.environ.get("LGAP_DATA") or ROOT / "data").expanduser().resolve()


def output_root():
    """Where results go: $LGAP_OUTPUTS, else `outputs/` in the checkout."""
    return Path(os.environ.get("LGAP_OUTPUTS") or ROOT / "outputs").expanduser().resolve()


def cache_root():
    """Where downloads go: $LGAP_CACHE, else the hub's own cache (None leaves the choice to huggingface_hub)."""
    return os.path.expanduser(os.environ.get("LGAP_CACHE") or "") or None


# Hub repositories whose commit is known; any other needs its revision beside its id.
REVISIONS = {
    "Salesforce/blip-image-captioning-base": "82a37760796d32b1411fe092ab5d4e227313294b",
    "Salesforce/blip-image-captioning-large": "353689b859fcf0523410b1806dace5fb46ecdf41",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",  # mirror of the removed original
    "CompVis/stable-diffusion-v1-4": "133a221b8aa7292a167afc5127cb63fb5005638b",
}


def check_whole(name, value, least=1):
    """Refuse anything but a whole number of at least `least`, in one sentence."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r}: expected a whole number")
    if value < least:
        raise ValueError(f"{name}={value}: expected at least {least}")


def check_real(name, value, example=0.5):
    """Refuse anything but a finite number, in one sentence."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a number, e.g. {name}={example}")


def check_guidance(scale):
    """Refuse a guidance scale below 1, in one sentence that says what it would do."""
    check_real("guidance_scale", scale, 5.0)
    if scale < 1:
        raise ValueError(
            f"guidance_scale={scale}: expected at least 1, which is no guidance; at 0 the caption is ignored and "
            "two passes are paid all the same, between 0 and 1 it counts less than without guidance, and below 0 "
            "images are led away from it"
        )


def denoising_steps(strength, num_inference_steps, time_grid):
    """How many denoising steps an image-to-image run has; CompVis's grid needs a point above the first.

    Raises ValueError where there is none.
    """
    check_real("strength", strength)
    check_whole("num_inference_steps", num_inference_steps)
    n = int(strength * num_inference_steps)  # truncates as both code bases do: int(100 * 0.29) is 28
    most = num_inference_steps - (time_grid == "compvis")
    if not 1 <= n <= most:
        raise ValueError(
            f"strength={strength} of num_inference_steps={num_inference_steps} gives {n} denoising steps; "
            f"expected 1 to {most}"
        )
    return n


@dataclass(frozen=True)
class Profile:
    name: str
    about: str  # one line for --help

    # which models and images: a folder below the checkout, or a hub id
    dataset: str  # "toy", "cifar10", "cifar100" or "imagenet"
    captioner: str  # BlipForConditionalGeneration and BlipProcessor
    diffusion: str  # unet, vae, text_encoder, tokenizer, scheduler
    classifier: str  # folder of a saved WideResNet, or "robustbench:DATASET/THREAT/NAME"
    captioner_revision: str | None = None  # 40-digit commit of a hub id; those in REVISIONS are known
    diffusion_revision: str | None = None
    variant: str = ""  # "fp16": read the diffusion model's weights as they are stored in half precision
    dtype: str = (
        "float32"  # paper silent: what captioner, VAE, UNet and text encoder compute in; latents, DDIM and
    )
    # the classifier are always single
    needs_gpu: bool = False  # refuse to start without one; LGAP_DEVICE=cpu goes on all the same

    # the defence (paper sections 3.1, 3.2 and 4.1)
    strength: float = 0.5  # t in the paper: 0.5 for CIFAR, 0.1 for ImageNet
    num_inference_steps: int = 50  # paper silent: CompVis img2img default
    guidance_scale: float = 5.0  # paper silent: CompVis img2img default
    time_grid: str = (
        "compvis"  # paper silent: "compvis" noises one grid point above its first step; "diffusers" does not
    )
    size: int = 384  # paper silent: working size in pixels; the authors' code has 384
    vae_sample: bool = True  # paper silent: CompVis samples the VAE's posterior; False takes its mode
    negative_prompt: str = ""  # paper silent: CompVis img2img default
    antialias: bool = True  # paper silent: when resizing; False reads 2.8 % of the pixels from 384 down to 32
    vae_input: str = (
        "unit"  # what the VAE is shown: "unit" is [-1, 1]; "clip" is normalised as for BLIP; "authors" also
    )
    # does their un-normalisation, which by a slip runs over the batch and not the channels
    prompt: str = "a picture of"  # paper silent: BLIP's demo
    num_beams: int = 3  # paper silent: BLIP's demo
    max_length: int = 20  # paper silent: BLIP's demo, in tokens, prompt included
    min_length: int = 5  # paper silent: BLIP's demo

    # the attack the first notebooks look at: preprocessor-blind PGD
    eps_255: float = 8  # L-inf radius in 1/255
    step_size_255: float = 2  # paper silent: Yoon et al.'s step
    n_steps: int = 40  # paper silent for Table 1: Yoon et al.'s number

    # adaptive attacks (paper section 4.1, Table 3)
    n_eot: int = 15  # paper silent: draws of the defence a step; Yoon et al.'s number
    eot_average: str = "gradient"  # paper silent: over the draws; "gradient", "logits" or "vote" (of signs)
    masked_bpda: bool = False  # an image stops moving once the classifier without purification is fooled

    # fine-tuning the classifier on purified training images (paper section 4.1)
    finetune_lr: float = 1e-3
    finetune_epochs: int = 15
    finetune_batch: int = 128  # paper silent
    finetune_schedule: str = (
        "constant"  # paper silent: of the learning rate; "one_cycle" goes up and down again, "steps" down
    )
    finetune_augment: bool = (
        False  # paper silent: random crops, half of them mirrored; the authors' code has none
    )
    n_finetune: int = (
        49_000  # training images that are purified; paper silent: taken to be all, less 1,000 for the curve
    )

    # the tables
    tables: dict = field(
        default_factory=dict
    )  # {number of the paper's table: fields that are different there}
    same_models: bool = (
        False  # whether these are the paper's models and data, so that numbers can be compared
    )
    rivals: tuple = ()  # (the paper's name, classifier, its crop or None) of robust models that stand beside LGAP

    # sizes
    n_images: int = 512  # test images 0 .. n_images - 1
    n_adaptive: int = (
        512  # of these, for attacks that ask the defence once a step, and for AutoAttack in Table 4
    )
    n_eot_images: int = 512  # for attacks that ask it many times a step
    n_full: int = 512  # for the full gradient, and for the checks of an evaluation
    n_rivals: int = 2048  # for AutoAttack on robust classifiers, most of whose images stand through all of it
    n_draws: int = 10  # paper silent: noise draws of the defence that each image is judged by
    n_validation: int = 1000  # purified validation images for the learning curve
    batch_size: int = 64  # images per call; no result depends on it
    autoattack_block: int = (
        1  # images that AutoAttack takes at a time, which then share its draws; a GPU needs many
    )
    seed: int = 0

    @property
    def eps(self):
        return self.eps_255 / 255

    @property
    def step_size(self):
        return self.step_size_255 / 255

    @property
    def outputs(self):
        return output_root() / self.name

    @property
    def finetuned(self):
        """Where notebook 03 leaves the classifier it fine-tuned, for all that follow."""
        return self.outputs / f"classifier_{self.dataset}"

    def __post_init__(self):
        for name, least in WHOLE.items():
            check_whole(name, getattr(self, name), least)
        check_guidance(self.guidance_scale)
        for name, (low, high) in REAL.items():
            value = getattr(self, name)
            check_real(name, value, getattr(type(self), name, high))
            if not low <= value <= high:
                raise ValueError(f"{name}={value}: expected {low} to {high}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices or type(getattr(self, name)) is not type(choices[0]):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {list(choices)}")
        for name in ("captioner", "diffusion", "classifier", "prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected text")
        for name in ("captioner_revision", "diffusion_revision"):
            if getattr(self, name) is not None and not re.fullmatch("[0-9a-f]{40}", str(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a commit, 40 hexadecimal digits")
        self._check_together()

    def _check_together(self):
        """Refuse values that cannot work, or not with each other, before a model is loaded for them."""
        denoising_steps(self.strength, self.num_inference_steps, self.time_grid)
        if self.size % 8:
            raise ValueError(
                f"size={self.size}: expected a multiple of 8, as Stable Diffusion's autoencoder halves three times"
            )
        words = len(
            self.prompt.split()
        )  # each of them a token at least, and two that begin and end the caption
        if self.max_length < words + 3:
            raise ValueError(
                f"max_length={self.max_length}: expected at least {words + 3}, so that after the {words} words of the "
                f"prompt {self.prompt!r} there is room for a caption"
            )
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length}: expected at most max_length={self.max_length}")


# What the fields may be: whole numbers of at least so much, numbers in a range, one of a few values.
WHOLE = {
    "num_inference_steps": 1,
    "size": 8,
    "num_beams": 1,
    "max_length": 2,
    "min_length": 0,
    "n_steps": 1,
    "finetune_epochs": 1,
    "finetune_batch": 1,
    "n_finetune": 1,
    "n_images": 1,
    "n_validation": 1,
    "n_eot": 1,
    "n_adaptive": 1,
    "n_eot_images": 1,
    "n_full": 1,
    "n_rivals": 1,
    "autoattack_block": 1,
    "n_draws": 1,
    "batch_size": 1,
    "seed": 0,
}
REAL = {
    "strength": (0, 1),
    "guidance_scale": (1, 100),
    "eps_255": (0, 255),
    "step_size_255": (0, 255),
    "finetune_lr": (0, 1),
}
CHOICES = {
    "dataset": ("cifar10", "cifar100", "imagenet", "toy"),
    "time_grid": ("compvis", "diffusers"),
    "vae_input": ("unit", "clip", "authors"),
    "eot_average": ("gradient", "logits", "vote"),
    "finetune_schedule": ("constant", "one_cycle", "steps"),
    "dtype": ("float32", "bfloat16", "float16"),
    "variant": ("", "fp16"),
} | dict.fromkeys(
    ("vae_sample", "same_models", "antialias", "needs_gpu", "masked_bpda", "finetune_augment"), (False, True)
)


# A few steps lie hundreds of times apart: CompVis's grid would leave a network that is told the first step's time with the noise of the
# grid point above it. On diffusers' both are the same. `toy` has three steps from time 333, where on validation images it does no worse
# than with five from 401. `small` has two, from time 501, which is the noise of the paper's strength 0.5, and a guidance scale that makes
# the caption count in so few: both chosen on validation images (checkpoints/README.md). At strength 0.1 so few steps would add next to
# no noise; fifty cost little there, and take the default's guidance, untried.
MANY_STEPS = {"num_inference_steps": 50, "time_grid": "compvis"}
TOY = Profile(
    name="toy",
    about="drawn scenes and bundled small models: no network, no GPU, minutes on two cores",
    dataset="toy",
    captioner="checkpoints/toy/captioner",
    diffusion="checkpoints/toy/diffusion",
    classifier="checkpoints/toy/classifier",
    size=32,
    num_inference_steps=6,
    time_grid="diffusers",
    n_images=128,
    n_finetune=768,
    n_validation=128,
    n_adaptive=16,
    n_eot_images=2,
    n_full=1,
    n_draws=3,
    autoattack_block=16,
    tables={
        1: {"n_images": 64},
        2: {"n_images": 32},
        3: {"n_images": 32},
        4: {"eps_255": 4, "strength": 0.1, **MANY_STEPS},
    },
)
SMALL = Profile(
    name="small",
    about="real CIFAR-10 images and small models trained on its train split: CPU or GPU",
    dataset="cifar10",
    captioner="checkpoints/small/captioner",
    diffusion="checkpoints/small/diffusion",
    classifier="checkpoints/small/classifier",
    vae_sample=False,  # its autoencoder was trained on the posterior's mode alone
    size=32,
    num_inference_steps=2,
    strength=1.0,
    guidance_scale=15.0,
    time_grid="diffusers",
    n_images=512,
    n_finetune=16_384,
    finetune_epochs=4,
    finetune_schedule="one_cycle",
    finetune_augment=True,
    n_validation=512,
    n_adaptive=64,
    n_eot_images=64,
    n_full=16,
    n_draws=3,
    autoattack_block=64,
    tables={2: {"n_images": 128}, 4: {"eps_255": 4, "strength": 0.1, "guidance_scale": 5.0, **MANY_STEPS}},
)
PAPER = Profile(
    name="paper",
    about="BLIP, Stable Diffusion v1.5, RobustBench's classifiers; CIFAR-10, CIFAR-100, ImageNet: a GPU and the model hub",
    dataset="cifar10",
    captioner="Salesforce/blip-image-captioning-base",
    diffusion="stable-diffusion-v1-5/stable-diffusion-v1-5",
    variant="fp16",
    dtype="bfloat16",
    needs_gpu=True,
    classifier="robustbench:cifar10/Linf/Standard",
    n_images=10_000,
    n_adaptive=10_000,
    batch_size=64,
    autoattack_block=128,
    same_models=True,
    tables={
        2: {
            "dataset": "cifar100",
            "classifier": "checkpoints/paper/cifar100",
        },  # `python checkpoints/make.py paper` trains it
        3: {"rivals": (("Carmon et al.", "robustbench:cifar10/Linf/Carmon2019Unlabeled", None),)},
        4: {
            "dataset": "imagenet",
            "classifier": "robustbench:imagenet/Linf/Standard_R50",
            "eps_255": 4,
            "strength": 0.1,
            "n_images": 2048,
            "n_adaptive": 2048,
            "rivals": (
                ("Salman et al.", "robustbench:imagenet/Linf/Salman2020Do_R50", None),
                ("Wong et al.", "robustbench:imagenet/Linf/Wong2020Fast", 288),
            ),
        },
    },
)
# What the authors' published code does where it departs from their paper; each line is one departure and can be taken back alone,
# e.g. `--set antialias=True`. Their working size of 384 is `paper`'s too, as the paper names none.
AUTHORS = dataclasses.replace(
    PAPER,
    name="authors",
    about="as paper, with the departures of the authors' code from it, each a field of its own",
    vae_input="authors",  # images 0 to 2 of each batch of 32 un-normalised wrongly, the others not at all
    antialias=False,
    dtype="float16",
    eps_255=8 * 255 / 256,
    step_size_255=2 * 255 / 256,  # blind PGD: 8/256 and a quarter of it
    masked_bpda=True,
    eot_average="vote",
    n_eot=1,  # the vote of signs, of a single draw as shipped
    finetune_lr=1e-4,
    finetune_epochs=5,
    finetune_batch=256,
    seed=42,
    tables=PAPER.tables
    | {
        2: PAPER.tables[2] | {"n_images": 8160},  # 58.71 % is 4790 of the first 8160
        3: PAPER.tables[3] | {"eps_255": 8, "step_size_255": 2},  # BPDA is run at 8/255
        4: PAPER.tables[4] | {"step_size_255": 2},
    },
)
PROFILES = {p.name: p for p in (TOY, SMALL, PAPER, AUTHORS)}


# With another value of one of these, a number is not the paper's measured again, and is not called inside or outside of its interval.
COMPARED = (
    "dataset",
    "captioner",
    "diffusion",
    "classifier",
    "size",
    "strength",
    "num_inference_steps",
    "guidance_scale",
    "eps_255",
    "step_size_255",
    "n_steps",
    "n_eot",
    "n_finetune",
    "finetune_epochs",
    "finetune_lr",
    "finetune_batch",
)


def get_profile(name, table=None, **overrides):
    """The named profile with some fields replaced; an override of None keeps the profile's value.

    table: 1 to 4, the profile as it is for that table of the paper, which may have its own data set, classifier or strength.

    Another value of one of COMPARED makes `same_models` false, unless that is given too.

    Raises ValueError, with the choices, for an unknown profile, table or field, and for a value of the wrong kind or range.
    """
    if not isinstance(name, str) or name not in PROFILES:
        raise ValueError(f"no profile {name!r}; choose from {sorted(PROFILES)}")
    if table is not None and (type(table) is not int or not 1 <= table <= 4):
        raise ValueError(f"no table {table!r}; choose from [1, 2, 3, 4], or None for the profile as it is")
    fields = {f.name for f in dataclasses.fields(Profile)}
    if unknown := sorted(set(overrides) - fields):
        raise ValueError(f"a profile has no field {', '.join(unknown)}; choose from {sorted(fields)}")
    given = {k: v for k, v in overrides.items() if v is not None}
    profile = dataclasses.replace(PROFILES[name], **PROFILES[name].tables.get(table, {}))
    if any(getattr(profile, k) != v for k, v in given.items() if k in COMPARED):
        given = {"same_models": False} | given
    return dataclasses.replace(profile, **given)
