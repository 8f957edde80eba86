"""checks."""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from .noise import Keys


def check_numbers(most, **numbers):
    """Refuse a radius or step that is no number in [0, most]; a step may be 0 only where the radius is."""
    unit = "in units of the image, e.g. 8/255" if most == 1 else "in 1/255, e.g. 8"
    for name, value in numbers.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= most:  # NaN fails, too
            raise ValueError(f"{name}={value!r}: expected a number in [0, {most}], {unit}")
    for name, value in numbers.items():
        if value == 0 and any(numbers.values()) and name.startswith("step"):
            raise ValueError(f"{name}={value!r}: no image would move; expected a number above 0, {unit}")


def check_counts(**counts):
    """Refuse a number of steps, draws or the like that is no whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")


def check_flags(**flags):
    """Refuse a flag that is neither True nor False: "False", as any other text, would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: expected True or False")


def check_keys(keys, n):
    """Refuse what is not one key per image."""
    if keys is not None and not isinstance(keys, Keys):
        raise TypeError(f"keys: expected `Keys`, one for each image, got {type(keys).__name__}")
    if len(keys or ()) != n:
        raise ValueError(f"keys: got {len(keys or ())} for {n} images, expected one each")


def check_logits(logits, n, y, least=2, needed_by="an attack"):
    """Refuse logits that are not [n, classes], or have fewer than `least` classes, and labels y that are none of them."""
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != n:
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model: its output is {found}, expected a tensor of logits [{n}, classes]")
    classes = logits.shape[1]
    if classes < least:
        raise ValueError(
            f"model: its logits are of {classes} classes, and {needed_by} needs at least {least}"
        )
    if (bad := (y < 0) | (y >= classes)).any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"labels: image {first} of {len(y)} has label {int(y[first])}, and the model's classes are 0 to {classes - 1}"
        )


def check_labels(y, n):
    """Refuse labels that are not n whole numbers; broadcasting would hide it and count beyond 100 %."""
    if not isinstance(y, torch.Tensor) or y.dtype != torch.long:
        raise TypeError(f"labels: expected a torch.long tensor, got {getattr(y, 'dtype', type(y).__name__)}")
    if y.shape != (n,):
        raise ValueError(f"labels: got shape {list(y.shape)} for {n} images, expected one each")


PLAIN = "take a plain text-to-image model such as Stable Diffusion 1 or 2"


def check_networks(vae, unet, text, tokenizer, scheduler):
    """Refuse networks that `LatentPurifier` cannot run, by their configurations, in one sentence."""
    if unet.in_channels != vae.latent_channels:
        raise ValueError(
            f"unet: it takes {unet.in_channels} channels and the VAE's latents have {vae.latent_channels}; "
            f"one for inpainting (9 channels) or instructions (8) wants more than a latent, {PLAIN}"
        )
    if unet.out_channels != vae.latent_channels:
        raise ValueError(
            f"unet: it gives {unet.out_channels} channels and the VAE's latents have {vae.latent_channels}; "
            f"one that predicts a variance, too, is not supported, {PLAIN}"
        )
    if unet.class_embed_type is not None or unet.num_class_embeds is not None:
        raise ValueError(f"unet: it wants a class beside the caption, {PLAIN}")
    if unet.addition_embed_type not in (None, "text") or unet.encoder_hid_dim_type not in (None, "text_proj"):
        raise ValueError(
            "unet: it wants more than one text encoder's states, as those of SDXL and Kandinsky do (addition_embed_type="
            f"{unet.addition_embed_type!r}, encoder_hid_dim_type={unet.encoder_hid_dim_type!r}), {PLAIN}"
        )
    width = unet.encoder_hid_dim if unet.encoder_hid_dim_type else unet.cross_attention_dim
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    if widths != {text.hidden_size}:
        raise ValueError(
            f"unet: it reads text of width {', '.join(map(str, sorted(widths)))} and the text encoder's is "
            f"{text.hidden_size}; take both from one model"
        )
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise ValueError(
            f"tokenizer: it gives {tokenizer.model_max_length} tokens and the text encoder reads "
            f"{text.max_position_embeddings}; set its model_max_length"
        )
    if vae.in_channels != 3 or vae.shift_factor is not None or vae.latents_mean is not None:
        raise ValueError(
            "vae: expected one of RGB images whose latents are scaled and not shifted, as in Stable Diffusion 1 and 2"
        )
    if scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"scheduler: no DDIM step for the prediction type {scheduler.config.prediction_type!r}; "
            "choose from ['epsilon', 'sample', 'v_prediction']"
        )


def check_evaluating(part, role):
    """Refuse a part that would answer as in training: differently each time, or for other neighbours in the batch."""
    for name, module in part.named_modules() if isinstance(part, nn.Module) else [("", part)]:
        whose = f"{role}: its `{name}` ({type(module).__name__})" if name else f"{role}: it"
        if getattr(module, "training", False):
            raise ValueError(
                f"{whose} is in training mode, so its answers depend on chance or on the batch; "
                "call .eval() first"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(f"{whose} keeps no running statistics, so its answers depend on the batch")


def check_purified(purified, shape, keys):
    """Refuse what cannot be purified images: floats of this shape, finite, and in [0, 1] but for noise."""
    if not isinstance(purified, torch.Tensor) or not purified.is_floating_point():
        raise TypeError(
            f"purifier: its output is {kind_of(purified)}, expected {list(shape)} as a tensor of floats "
            "in [0, 1]"
        )
    if purified.shape != shape:
        raise ValueError(f"purifier: its output is {list(purified.shape)}, expected {list(shape)}")
    if (bad := ~torch.isfinite(purified.detach()).flatten(1).all(1)).any():
        image, key = first_bad(bad, keys)
        raise ValueError(f"purified {image} holds NaN or inf{key}")
    check_range(purified, "purifier: its output for ", keys)


def check_range(x, whose, keys=None):
    """Refuse images that are not in [0, 1], but for noise: of standard deviation 0.25 it passes, of 0.5 it does not."""
    values = x.detach().float()
    sides = [min(8, side) for side in x.shape[2:]]
    squares = F.avg_pool2d(values, sides, ceil_mode=True).flatten(1)  # in their means noise cancels out
    outside = (
        ((values - 0.5).abs() > 1).flatten(1).float().mean(1)
    )  # the share of values more than 0.5 outside
    bad = (squares.amin(1) < -0.25) | (squares.amax(1) > 1.25) | (outside > 0.05)
    if not bad.any():
        return
    low, high = values.amin().item(), values.amax().item()
    hint = "clamp or rescale it"
    if low < -0.25 and high < 1.25:
        hint = "it looks like an image in [-1, 1], which (x + 1) / 2 brings there"
    elif low >= 0 and high > 100:
        hint = "it looks like an image in [0, 255], divide by 255"
    image, key = first_bad(bad, keys)
    raise ValueError(f"{whose}{image} is not in [0, 1], values span [{low:.3g}, {high:.3g}]{key}; {hint}")


def look_like_softmax(logits):
    """Whether logits [n, classes] look like probabilities, on which gradient attacks are weaker than they should be."""
    return bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-4).all())


def first_bad(bad, keys):
    """("image 1 of 3", " (key ...)") for the first that is marked in `bad` [n]; without keys ""."""
    first = int(bad.nonzero()[0])
    return f"image {first} of {len(bad)}", f" (key {keys.rows[first]})" if keys is not None else ""


def kind_of(answer):
    """What a part answered with, in a word."""
    return str(answer.dtype) if isinstance(answer, torch.Tensor) else type(answer).__name__


def check_images(x):
    """Refuse anything but a non-empty float batch [n, 3, height, width] in [0, 1], in one sentence."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"images: expected a torch.Tensor, got {type(x).__name__}; `purify_one` takes paths, PIL images and arrays"
        )
    if not x.is_floating_point():
        raise TypeError(f"images: expected floats in [0, 1], got {x.dtype}; divide uint8 images by 255")
    if x.ndim != 4 or x.shape[1] != 3:
        hint = (
            "; it looks channels-last, use .permute(0, 3, 1, 2)" if x.ndim == 4 and x.shape[-1] == 3 else ""
        )
        raise ValueError(f"images: expected shape [n, 3, height, width], got {list(x.shape)}{hint}")
    if len(x) == 0:
        raise ValueError("images: the batch is empty; expected at least one image")
    if x.numel() == 0:
        raise ValueError(f"images: they have no pixels, their shape is {list(x.shape)}")
    low, high = x.detach().amin().item(), x.detach().amax().item()
    if math.isnan(low) or math.isinf(low) or math.isinf(high):
        raise ValueError(
            f"images: {int((~torch.isfinite(x.detach()).flatten(1).all(1)).sum())} of {len(x)} hold NaN or inf"
        )
    if low < 0 or high > 1:
        raise ValueError(
            f"images: values span [{low:.9g}, {high:.9g}], expected [0, 1]; rescale or clamp them first"
        )
