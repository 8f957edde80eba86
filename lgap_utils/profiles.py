"""The settings of a run: models, data, sizes and the method's parameters. profiles.toml holds named ones."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_SECTIONS = tomllib.loads(Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8"))
REVISIONS: dict[str, str] = _SECTIONS.pop(
    "revisions"
)  # of hub ids; any other id needs its revision beside it


def data_root() -> Path:
    """Where data sets lie: $LGAP_DATA, else `data/` in the checkout."""
    return Path(os.environ.get("LGAP_DATA") or ROOT / "data").expanduser().resolve()


def output_root() -> Path:
    """Where results go: $LGAP_OUTPUTS, else `outputs/` in the checkout."""
    return Path(os.environ.get("LGAP_OUTPUTS") or ROOT / "outputs").expanduser().resolve()


def cache_root() -> str | None:
    """Where downloads go: $LGAP_CACHE, else None, and huggingface_hub chooses."""
    return os.path.expanduser(os.environ.get("LGAP_CACHE") or "") or None


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


def check_real(name: str, value: Any, example: Any = 0.5) -> None:
    """Raise ValueError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a number, e.g. {name}={example}")


def check_guidance(scale: Any) -> None:
    """Raise ValueError unless `scale` is a finite number >= 1; 1 is no guidance."""
    check_real("guidance_scale", scale, 5.0)
    if scale < 1:
        raise ValueError(
            f"guidance_scale={scale}: expected at least 1, which is no guidance; at 0 the caption is ignored "
            "and two passes are paid, between 0 and 1 it counts less than without guidance, "
            "below 0 images are led away from it"
        )


def denoising_steps(strength: float, num_inference_steps: int, time_grid: str) -> int:
    """The number of denoising steps of an image-to-image run; "compvis" needs a grid point above the first.

    Raises ValueError where there is no step, or where the grid has too few.
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
    """All settings of a run. Raises ValueError, with the field, for a value of the wrong type or range."""

    name: str
    about: str  # one line for --help

    # models and images; a model is a folder below the checkout or a hub id
    dataset: str
    captioner: str  # BlipForConditionalGeneration and BlipProcessor
    diffusion: str  # unet, vae, text_encoder, tokenizer, scheduler
    classifier: str  # folder of a saved WideResNet, or "robustbench:DATASET/THREAT/NAME"
    captioner_revision: str | None = None  # 40-digit commit of a hub id; those in REVISIONS are known
    diffusion_revision: str | None = None
    variant: str = ""  # "fp16": read the diffusion model's weights as they are stored in half precision
    # paper silent: of captioner, VAE, UNet and text encoder; latents, DDIM and classifier are always float32
    dtype: str = "float32"
    # a pixel-space diffusion model to purify with in LGAP's place, as DiffPure does; "" for none
    rival: str = ""
    rival_revision: str | None = None
    rival_strength: float = 0.1  # DiffPure's t = 0.1
    rival_steps: int = 50  # of which strength * steps are taken
    n_rival_tuning: int = 0  # training images purified by it to fine-tune its classifier on; 0: as it came
    needs_gpu: bool = False  # refuse to start without one; LGAP_DEVICE=cpu overrules it

    # the defense (paper sections 3.1, 3.2 and 4.1)
    strength: float = 0.5  # t in the paper: 0.5 for CIFAR, 0.1 for ImageNet
    num_inference_steps: int = 50  # paper silent: CompVis img2img default
    guidance_scale: float = 5.0  # paper silent: CompVis img2img default
    # paper silent: "compvis" noises one grid point above its first step; "diffusers" does not
    time_grid: str = "compvis"
    size: int = 384  # paper silent: working size in pixels; the authors' code has 384
    vae_sample: bool = True  # paper silent: CompVis samples the VAE's posterior; False takes its mode
    negative_prompt: str = ""  # paper silent: CompVis img2img default
    antialias: bool = True  # paper silent: when resizing; False reads 2.8 % of the pixels from 384 down to 32
    # what the VAE is shown: "unit" is [-1, 1]; "clip" is normalised as for BLIP; "authors" also does their
    # un-normalisation, which by a slip runs over the batch and not the channels
    vae_input: str = "unit"
    prompt: str = "a picture of"  # paper silent: BLIP's demo
    num_beams: int = 3  # paper silent: BLIP's demo
    max_length: int = 20  # paper silent: BLIP's demo, in tokens, prompt included
    min_length: int = 5  # paper silent: BLIP's demo

    # the attack of the first notebooks: preprocessor-blind PGD
    eps_255: float = 8  # L-inf radius in 1/255
    step_size_255: float = 2  # paper silent: Yoon et al.'s step
    n_steps: int = 40  # paper silent for Table 1: Yoon et al.'s number

    # adaptive attacks (paper section 4.1, Table 3)
    n_eot: int = 15  # paper silent: draws of the defense per step; Yoon et al.'s number
    eot_average: str = "gradient"  # paper silent: over the draws; "gradient", "logits" or "vote" (of signs)
    masked_bpda: bool = False  # an image stops moving once the classifier without purification is fooled

    n_steps_full: int = 20  # of PGD through the whole purifier, or a denoising step of it

    # fine-tuning the classifier on purified training images (paper section 4.1)
    finetune_lr: float = 1e-3
    finetune_epochs: int = 15
    finetune_batch: int = 128  # paper silent
    # paper silent: of the learning rate; "one_cycle" goes up and down again, "steps" down
    finetune_schedule: str = "constant"
    # paper silent: random crops, half of them mirrored; the authors' code has none
    finetune_augment: bool = False
    # paper silent: purified training images; taken to be all, less 1,000 for the learning curve
    n_finetune: int = 49_000

    # the tables
    tables: dict = field(
        default_factory=dict
    )  # {number of the paper's table: fields that are different there}
    same_models: bool = False  # whether models and data are the paper's, so that numbers can be compared
    rivals: tuple = ()  # (the paper's name, classifier, crop or None) of robust models to compare LGAP with

    # sizes
    n_images: int = 512  # test images 0 .. n_images - 1
    n_adaptive: int = 512  # for attacks that run the defense once per step, and for AutoAttack in Table 4
    n_eot_images: int = 512  # for attacks that run it many times per step
    n_surrogate: int = 512  # for the gradient of a part of the purifier
    n_full: int = 512  # for the full gradient, alone and with the attack on the caption
    n_curve: int = 64  # for the strongest attack at other eps
    n_language: int = 128  # for what a caption is worth, with other words in its place
    n_controls: int = 64  # for controls, and for the checks of an evaluation
    n_rivals: int = 2048  # for AutoAttack on robust classifiers, where most images survive all of it
    n_draws: int = 10  # paper silent: noise draws of the defense that judge each image
    n_validation: int = 1000  # purified validation images for the learning curve
    batch_size: int = 64  # images per call; no result depends on it
    workers: int = 0  # processes that Ray starts, each with one GPU or core; 0: none but this one
    autoattack_block: int = 1  # images per AutoAttack call, which share its draws; a GPU needs many
    seed: int = 0

    @property
    def eps(self) -> float:
        """L-inf radius, in [0, 1]."""
        return self.eps_255 / 255

    @property
    def step_size(self) -> float:
        """Step of PGD, in [0, 1]."""
        return self.step_size_255 / 255

    @property
    def outputs(self) -> Path:
        """The folder of this profile's results."""
        return output_root() / self.name

    @property
    def finetuned(self) -> Path:
        """Where notebook 03 saves the fine-tuned classifier that later notebooks use."""
        return self.outputs / f"classifier_{self.dataset}"

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            _check_field(each, getattr(self, each.name))
        self._check_together()

    def _check_together(self) -> None:
        """Refuse values that do not work with each other, before a model is loaded for them."""
        denoising_steps(self.strength, self.num_inference_steps, self.time_grid)
        if self.size % 8:
            raise ValueError(
                f"size={self.size}: expected a multiple of 8, as Stable Diffusion's VAE halves three times"
            )
        n_words = len(self.prompt.split())
        least = n_words + 3  # a token per word or more, one that begins, one that ends, one of the caption
        if self.max_length < least:
            raise ValueError(
                f"max_length={self.max_length}: expected at least {least}, so that after the {n_words} words "
                f"of the prompt {self.prompt!r} there is room for a caption"
            )
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length}: expected at most max_length={self.max_length}")


# The choices of a text, the range of a number, the least whole number where that is not 1.
LIMITS = {
    "dataset": ("cifar10", "cifar100", "imagenet", "toy"),
    "variant": ("", "fp16"),
    "dtype": ("float32", "bfloat16", "float16"),
    "time_grid": ("compvis", "diffusers"),
    "vae_input": ("unit", "clip", "authors"),
    "eot_average": ("gradient", "logits", "vote"),
    "finetune_schedule": ("constant", "one_cycle", "steps"),
    "strength": (0, 1),
    "rival_strength": (0, 1),
    "guidance_scale": (1, 100),
    "eps_255": (0, 255),
    "step_size_255": (0, 255),
    "finetune_lr": (0, 1),
    "min_length": (0,),
    "seed": (0,),
    "n_rival_tuning": (0,),
    "workers": (0,),
}


def _check_field(each: dataclasses.Field, value: Any) -> None:
    """Raise ValueError unless `value` has the annotated type of a field and keeps its LIMITS."""
    name, limits = each.name, LIMITS.get(each.name, ())
    if name == "guidance_scale":
        check_guidance(value)
    if each.type == "int":
        check_whole(name, value, *limits)
    elif each.type == "float":
        check_real(name, value, each.default)
        if not limits[0] <= value <= limits[1]:
            raise ValueError(f"{name}={value}: expected {limits[0]} to {limits[1]}")
    elif each.type == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: choose from [False, True]")
    elif each.type == "str" and not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: expected text")
    elif each.type == "str" and limits and value not in limits:
        raise ValueError(f"{name}={value!r}: choose from {list(limits)}")
    elif each.type == "str | None" and value is not None and not re.fullmatch("[0-9a-f]{40}", str(value)):
        raise ValueError(f"{name}={value!r}: expected a commit, 40 hexadecimal digits")


def _read_profiles() -> dict[str, Profile]:
    """The profiles of profiles.toml by name, in the order of the file."""
    profiles = {}
    for name, values in _SECTIONS.items():
        base = profiles.get(values.pop("base", ""))
        tables = dict(base.tables) if base else {}
        for number, changes in values.pop("tables", {}).items():
            if "rivals" in changes:
                rivals = [(r["method"], r["classifier"], r.get("crop")) for r in changes["rivals"]]
                changes["rivals"] = tuple(rivals)
            tables[int(number)] = tables.get(int(number), {}) | changes
        values |= {"name": name, "tables": tables}
        profiles[name] = dataclasses.replace(base, **values) if base else Profile(**values)
    return profiles


PROFILES = _read_profiles()
TOY, SMALL, PAPER, AUTHORS = (PROFILES[name] for name in ("toy", "small", "paper", "authors"))

# With another value of one of these fields, a number is not compared with the paper's.
COMPARED = tuple(
    "dataset captioner diffusion classifier size strength num_inference_steps guidance_scale eps_255 "
    "step_size_255 n_steps n_eot n_finetune finetune_epochs finetune_lr finetune_batch".split()
)


def get_profile(name: str, table: int | None = None, **overrides: Any) -> Profile:
    """The named profile with some fields replaced; an override of None keeps the profile's value.

    table: 1 to 4, for the settings of that table of the paper; None for the profile itself.
    Another value of a field in COMPARED makes `same_models` False, unless `same_models` is given.

    Raises ValueError for an unknown profile, table or field, and for a value of the wrong type or range.
    """
    if not isinstance(name, str) or name not in PROFILES:
        raise ValueError(f"no profile {name!r}; choose from {sorted(PROFILES)}")
    if table is not None and (type(table) is not int or not 1 <= table <= 4):
        raise ValueError(f"no table {table!r}; choose from [1, 2, 3, 4], or None for the profile as it is")
    fields = {each.name for each in dataclasses.fields(Profile)}
    if unknown := sorted(set(overrides) - fields):
        raise ValueError(f"a profile has no field {', '.join(unknown)}; choose from {sorted(fields)}")
    given = {key: value for key, value in overrides.items() if value is not None}
    profile = PROFILES[name]
    profile = dataclasses.replace(profile, **profile.tables.get(table, {}))
    if any(getattr(profile, key) != given[key] for key in COMPARED if key in given):
        given.setdefault("same_models", False)
    return dataclasses.replace(profile, **given)
