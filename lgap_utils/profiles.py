"""What a run is made of: model ids, paths, sizes and the method's settings. A profile is data; nothing asks for its name."""
from __future__ import annotations

import dataclasses
import math
import os
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
    return os.environ.get("LGAP_CACHE") or None


@dataclass(frozen=True)
class Profile:
    name: str
    about: str                          # one line for --help

    # which models and images: a folder below the checkout, or a hub id
    dataset: str                        # "toy", "cifar10", "cifar100" or "imagenet"
    captioner: str                      # BlipForConditionalGeneration and BlipProcessor
    diffusion: str                      # unet, vae, text_encoder, tokenizer, scheduler
    classifier: str                     # folder of a saved WideResNet, or "robustbench:DATASET/THREAT/NAME"
    captioner_revision: str | None = None
    diffusion_revision: str | None = None

    # the defence (paper sections 3.1, 3.2 and 4.1)
    strength: float = 0.5               # t in the paper: 0.5 for CIFAR, 0.1 for ImageNet
    num_inference_steps: int = 50       # paper silent: CompVis img2img default
    guidance_scale: float = 5.0         # paper silent: CompVis img2img default
    time_grid: str = "compvis"          # paper silent: "compvis" noises one grid point above its first step; "diffusers" does not
    size: int = 384                     # paper silent: working size in pixels; the authors' code has 384
    vae_sample: bool = True             # paper silent: CompVis samples the VAE's posterior; False takes its mode
    negative_prompt: str = ""           # paper silent: CompVis img2img default
    prompt: str = "a picture of"        # paper silent: BLIP's demo
    num_beams: int = 3                  # paper silent: BLIP's demo
    max_length: int = 20                # paper silent: BLIP's demo, in tokens, prompt included
    min_length: int = 5                 # paper silent: BLIP's demo

    # the attack the first notebooks look at: preprocessor-blind PGD
    eps_255: float = 8                  # L-inf radius in 1/255
    step_size_255: float = 2            # paper silent: Yoon et al.'s step
    n_steps: int = 40                   # paper silent for Table 1: Yoon et al.'s number

    # fine-tuning the classifier on purified training images (paper section 4.1)
    finetune_lr: float = 1e-3
    finetune_epochs: int = 15
    finetune_batch: int = 128           # paper silent
    n_finetune: int = 50_000            # training images that are purified; paper silent: taken to be all of them

    # the tables
    tables: dict = field(default_factory=dict)   # {number of the paper's table: fields that are different there}
    same_models: bool = False           # whether these are the paper's models and data, so that numbers can be compared
    rivals: tuple = ()                  # (the paper's name, classifier) of undefended robust models that are run beside LGAP

    # sizes
    n_images: int = 512                 # test images 0 .. n_images - 1
    n_adaptive: int = 512               # of these, for attacks that ask the defence once a step, and for AutoAttack
    n_eot_images: int = 512             # for attacks that ask it many times a step
    n_full: int = 512                   # for the full gradient, and for the checks of an evaluation
    n_draws: int = 10                   # paper silent: noise draws of the defence that each image is judged by
    n_validation: int = 1000            # purified validation images for the learning curve
    batch_size: int = 64                # images per call; no result depends on it
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
        whole = {"num_inference_steps": 1, "size": 8, "num_beams": 1, "max_length": 2, "min_length": 0, "n_steps": 1,
                 "finetune_epochs": 1, "finetune_batch": 1, "n_finetune": 1, "n_images": 1, "n_validation": 1,
                 "n_adaptive": 1, "n_eot_images": 1, "n_full": 1, "n_draws": 1, "batch_size": 1, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}={value!r}: expected a whole number")
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        real = {"strength": (0, 1), "guidance_scale": (0, 100), "eps_255": (0, 255), "step_size_255": (0, 255),
                "finetune_lr": (0, 1)}
        for name, (low, high) in real.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r}: expected a number, e.g. {name}={getattr(type(self), name, high)}")
            if not low <= value <= high:
                raise ValueError(f"{name}={value}: expected {low} to {high}")
        for name, choices in {"dataset": ("cifar10", "cifar100", "imagenet", "toy"), "time_grid": ("compvis", "diffusers"), "vae_sample": (False, True), "same_models": (False, True)}.items():
            if getattr(self, name) not in choices or type(getattr(self, name)) is not type(choices[0]):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {list(choices)}")
        for name in ("captioner", "diffusion", "classifier", "prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected text")


TOY = Profile(
    name="toy", about="drawn scenes and bundled small models: no network, no GPU, minutes on two cores",
    dataset="toy", captioner="checkpoints/toy/captioner", diffusion="checkpoints/toy/diffusion",
    classifier="checkpoints/toy/classifier",
    size=32, num_inference_steps=10, n_images=128, n_finetune=1024, n_validation=128,
    n_adaptive=32, n_eot_images=4, n_full=4, n_draws=3,
    tables={4: {"eps_255": 4, "strength": 0.1}},
)
SMALL = Profile(
    name="small", about="real CIFAR-10 images and small models trained on its train split: CPU or GPU",
    dataset="cifar10", captioner="checkpoints/small/captioner", diffusion="checkpoints/small/diffusion",
    classifier="checkpoints/small/classifier",
    vae_sample=False,                   # most channels of its latent hold nothing, and their posterior is the prior
    size=32, num_inference_steps=10, n_images=512, n_finetune=3072, n_validation=256,
    n_adaptive=64, n_eot_images=64, n_full=16, n_draws=3,
    tables={2: {"n_images": 128}, 4: {"eps_255": 4, "strength": 0.1}},
)
PAPER = Profile(
    name="paper", about="BLIP, Stable Diffusion v1.5 and RobustBench's WRN-28-10 on CIFAR-10: a GPU and the model hub",
    dataset="cifar10", captioner="Salesforce/blip-image-captioning-base",
    captioner_revision="82a37760796d32b1411fe092ab5d4e227313294b",
    diffusion="stable-diffusion-v1-5/stable-diffusion-v1-5",
    diffusion_revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    classifier="robustbench:cifar10/Linf/Standard",
    n_images=10_000, n_adaptive=10_000, batch_size=256, same_models=True,
    tables={2: {"dataset": "cifar100", "classifier": "checkpoints/paper/cifar100"},
            3: {"rivals": (("Carmon et al.", "robustbench:cifar10/Linf/Carmon2019Unlabeled"),)},
            4: {"dataset": "imagenet", "classifier": "robustbench:imagenet/Linf/Standard_R50", "eps_255": 4, "strength": 0.1,
                "n_images": 2048, "n_adaptive": 2048,
                "rivals": (("Salman et al.", "robustbench:imagenet/Linf/Salman2020Do_R50"),
                           # RobustBench crops 288 pixels for this one; here it sees the 224 of all others
                           ("Wong et al.", "robustbench:imagenet/Linf/Wong2020Fast"))}},
)
PROFILES = {p.name: p for p in (TOY, SMALL, PAPER)}


def get_profile(name, table=None, **overrides):
    """The named profile with some fields replaced; an override of None keeps the profile's value.

    table: 1 to 4, the profile as it is for that table of the paper, which may have its own data set, classifier or strength.

    Raises ValueError, with the choices, for an unknown profile or field, and for a value of the wrong kind or range.
    """
    if name not in PROFILES:
        raise ValueError(f"no profile {name!r}; choose from {sorted(PROFILES)}")
    fields = {f.name for f in dataclasses.fields(Profile)}
    if unknown := sorted(set(overrides) - fields):
        raise ValueError(f"a profile has no field {', '.join(unknown)}; choose from {sorted(fields)}")
    given = {k: v for k, v in overrides.items() if v is not None}
    return dataclasses.replace(PROFILES[name], **PROFILES[name].tables.get(table, {}) | given)
