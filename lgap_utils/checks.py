"""Bad input is refused at the door: a check raises TypeError or ValueError, in one sentence."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .noise import Keys
from .profiles import check_guidance, check_whole

# ---------------------------------------------------------------- numbers and choices


def check_numbers(most: float, **numbers: Any) -> None:
    """Refuse a radius or step that is no number in [0, most]; a step may be 0 only where the radius is."""
    unit = "in units of the image, e.g. 8/255" if most == 1 else "in 1/255, e.g. 8"
    for name, value in numbers.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= most:
            raise ValueError(f"{name}={value!r}: expected a number in [0, {most}], {unit}")
    for name, value in numbers.items():
        if value == 0 and any(numbers.values()) and name.startswith("step"):
            raise ValueError(f"{name}={value!r}: no image would move; expected a number above 0, {unit}")


def check_counts(**counts: Any) -> None:
    """Refuse a number of steps, draws or the like that is no whole number of at least 1."""
    for name, value in counts.items():
        check_whole(name, value)


def check_flags(**flags: Any) -> None:
    """Refuse a flag that is neither True nor False: "False", as any other text, would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: expected True or False")


def check_choice(name: str, value: Any, choices: Collection) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose from {list(choices)}")


# ---------------------------------------------------------------- images, labels, keys, logits


def check_images(x: Any) -> None:
    """Refuse anything but a non-empty float batch [n, 3, height, width] in [0, 1]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"images: expected a torch.Tensor, got {kind_of(x)}; `purify_one` takes other kinds")
    if not x.is_floating_point():
        raise TypeError(f"images: expected floats in [0, 1], got {x.dtype}; divide uint8 images by 255")
    if x.ndim != 4 or x.shape[1] != 3:
        hint = "; it looks channels-last, use .permute(0, 3, 1, 2)" if x.shape[3:] == (3,) else ""
        raise ValueError(f"images: expected shape [n, 3, height, width], got {list(x.shape)}{hint}")
    if x.numel() == 0:
        raise ValueError(f"images: the batch is empty, or has no pixels: its shape is {list(x.shape)}")
    check_finite(x, "images: ")
    low, high = x.detach().amin().item(), x.detach().amax().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"images: values span [{low:.9g}, {high:.9g}], expected [0, 1]; rescale or clamp them"
        )


def check_range(x: Tensor, whose: str, keys: Keys | None = None) -> None:
    """Refuse images [n, 3, h, w] outside [0, 1], but for noise: up to a standard deviation of 0.25 or so."""
    values = x.detach().float()
    sides = [min(8, side) for side in x.shape[2:]]
    squares = F.avg_pool2d(values, sides, ceil_mode=True).flatten(1)  # in their means noise cancels out
    far_outside = ((values - 0.5).abs() > 1).flatten(1).float().mean(1)  # the share more than 0.5 outside
    bad = (squares.amin(1) < -0.25) | (squares.amax(1) > 1.25) | (far_outside > 0.05)
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


def check_labels(y: Any, n: int) -> None:
    """Refuse labels that are not n whole numbers; broadcasting would hide it and count beyond 100 %."""
    if not isinstance(y, Tensor) or y.dtype != torch.long:
        raise TypeError(f"labels: expected a torch.long tensor, got {kind_of(y)}")
    if y.shape != (n,):
        raise ValueError(f"labels: got shape {list(y.shape)} for {n} images, expected one each")


def check_keys(keys: Any, n: int, many: bool = False) -> None:
    """Refuse what is not one key per image; or, with `many`, the same number of keys for each."""
    if keys is not None and not isinstance(keys, Keys):
        raise TypeError(f"keys: expected `Keys`, one for each image, got {kind_of(keys)}")
    n_keys = 0 if keys is None else len(keys)
    if n_keys != n and (not many or n_keys == 0 or n_keys % n):
        expected = "the same number for each" if many else "one each"
        raise ValueError(f"keys: got {n_keys} for {n} images, expected {expected}")


def check_logits(logits: Any, n: int, y: Tensor, least: int = 2, needed_by: str = "an attack") -> None:
    """Refuse logits that are not [n, classes], of fewer classes than `least`, or without a class of y."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        got = list(logits.shape) if isinstance(logits, Tensor) else kind_of(logits)
        raise ValueError(f"model: its output is {got}, expected a tensor of logits [{n}, classes]")
    classes = logits.shape[1]
    if classes < least:
        raise ValueError(
            f"model: its logits are of {classes} classes, and {needed_by} needs at least {least}"
        )
    if (bad := (y < 0) | (y >= classes)).any():
        has = f"{first_bad(bad)[0]} has label {int(y[bad][0])}"
        raise ValueError(f"labels: {has}, and the model's classes are 0 to {classes - 1}")


def look_like_softmax(logits: Tensor) -> bool:
    """Whether logits [n, classes] look like probabilities, on which gradient attacks are too weak."""
    return bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-4).all())


def check_finite(x: Tensor, whose: str, keys: Keys | None = None) -> None:
    """Refuse x [n, ...] that holds NaN or inf."""
    bad = ~torch.isfinite(x.detach()).flatten(1).all(1)
    if bad.any():
        image, key = first_bad(bad, keys)
        raise ValueError(f"{whose}{image} holds NaN or inf{key}")


def first_bad(bad: Tensor, keys: Keys | None = None) -> tuple[str, str]:
    """("image 1 of 3", " (key ...)") for the first that is marked in `bad` [n]; without keys ""."""
    first = int(bad.nonzero()[0])
    return f"image {first} of {len(bad)}", f" (key {keys.rows[first]})" if keys is not None else ""


def kind_of(value: Any) -> str:
    """The dtype of a tensor, the type of anything else."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


# ---------------------------------------------------------------- the parts of a defence, and their answers


def check_part(part: Any, role: str, *arguments: str) -> None:
    """Refuse a part that is no callable of these arguments, or that is in training mode."""
    if not callable(part):
        raise TypeError(f"{role}: expected a callable, got {kind_of(part)}")
    for name, module in part.named_modules() if isinstance(part, nn.Module) else [("", part)]:
        whose = f"{role}: its `{name}` ({type(module).__name__})" if name else f"{role}: it"
        if getattr(module, "training", False):
            raise ValueError(f"{whose} is in training mode, where answers are random; call .eval() first")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(f"{whose} keeps no running statistics, so its answers depend on the batch")
    try:
        called = part.forward if isinstance(part, nn.Module) else part
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):  # Python knows no signature of some callables
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        expected = f"expected a callable of ({', '.join(arguments)})"
        raise TypeError(f"{role}: {expected}, this one takes {signature}") from None


def checked_captions(captions: Any, n: int) -> list[str]:
    """n captions as a list, from anything that has an order. Raises TypeError or ValueError otherwise."""
    expected = "captions: expected a list of strings, one per image"
    if isinstance(captions, (str, bytes, Set, Mapping)) or not isinstance(captions, Iterable):
        raise TypeError(f"{expected}, got {kind_of(captions)}")
    if isinstance(captions, Iterator):
        captions = itertools.islice(captions, n + 1)  # it may be endless
    captions = list(captions)
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"{expected}, number {i} is {caption!r:.80}")
    if len(captions) != n:
        raise ValueError(f"captions: got {len(captions)} for {n} images, expected one each")
    return captions


def check_purified(purified: Any, shape: Sequence[int], keys: Keys) -> None:
    """Refuse what cannot be purified images: floats of this shape, finite, and in [0, 1] but for noise."""
    if not isinstance(purified, Tensor) or not purified.is_floating_point():
        got = f"its output is {kind_of(purified)}"
        raise TypeError(f"purifier: {got}, expected {list(shape)} as a tensor of floats in [0, 1]")
    if purified.shape != tuple(shape):
        raise ValueError(f"purifier: its output is {list(purified.shape)}, expected {list(shape)}")
    check_finite(purified, "purified ", keys)
    check_range(purified, "purifier: its output for ", keys)


def check_classified(x: Any, keys: Keys | None) -> None:
    """Refuse what a classifier must not see: it would answer for images of any range, and wrongly."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
        got = f"{kind_of(x)} {list(getattr(x, 'shape', []))}"
        raise TypeError(f"images: expected a float tensor [n, 3, height, width] in [0, 1], got {got}")
    check_range(x, "images: ", keys)


def check_answer(logits: Any, n: int, n_classes: int | None, keys: Keys | None) -> None:
    """Refuse a classifier's answer that is not finite logits [n, n_classes]; warn of probabilities."""
    expected = f"[{n}, {'classes' if n_classes is None else n_classes}]"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = f"its output is {kind_of(logits)}"
        raise TypeError(f"classifier: {got}, expected logits {expected} as a tensor of floats, or as .logits")
    if logits.ndim != 2 or len(logits) != n or n_classes not in (None, logits.shape[1]):
        raise ValueError(f"classifier: its output has shape {list(logits.shape)}, expected {expected}")
    check_finite(logits, "classifier: its output for ", keys)
    if look_like_softmax(logits.detach().float()):
        warnings.warn("classifier: its outputs look like softmax, on which attacks are weak; expected logits")


# ---------------------------------------------------------------- the latent purifier


def check_settings(purifier: Any) -> None:
    """Refuse settings of a `LatentPurifier` that cannot work; its schedule is checked where it is made."""
    flags = {name: getattr(purifier, name) for name in ("vae_sample", "antialias")}
    if purifier.checkpointing is not None:
        flags["checkpointing"] = purifier.checkpointing
    check_flags(**flags)
    check_choice("vae_input", purifier.vae_input, ("unit", "clip", "authors"))
    if not isinstance(purifier.negative_prompt, str):
        raise ValueError(f"negative_prompt={purifier.negative_prompt!r}: expected text")
    check_guidance(purifier.guidance_scale)
    check_whole("size", purifier.size)
    factor = 2 ** (len(purifier.vae.config.block_out_channels) - 1)
    if purifier.size % factor:
        raise ValueError(
            f"size={purifier.size}: expected a multiple of {factor}, by which the VAE shrinks images"
        )


def check_networks(vae: Any, unet: Any, text: Any, tokenizer: Any, scheduler: Any) -> None:
    """Refuse networks that `LatentPurifier` cannot run. vae, unet, text, scheduler: their configurations."""
    plain = "take a plain text-to-image model such as Stable Diffusion 1 or 2"
    channels, latent = (unet.in_channels, unet.out_channels), vae.latent_channels
    if channels != (latent, latent):
        raise ValueError(f"unet: it has {channels} channels and the VAE's latents have {latent}; {plain}")
    for name in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"):
        if (value := getattr(unet, name)) not in (None, "text", "text_proj"):
            raise ValueError(f"unet: it takes more than the text of a caption, {name}={value!r}; {plain}")
    width = unet.encoder_hid_dim if unet.encoder_hid_dim_type else unet.cross_attention_dim
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    if widths != {text.hidden_size}:
        got = f"of width {', '.join(map(str, sorted(widths)))} and the text encoder's is {text.hidden_size}"
        raise ValueError(f"unet: it reads text {got}; take both from one model")
    length, longest = tokenizer.model_max_length, text.max_position_embeddings
    if length > longest:
        raise ValueError(f"tokenizer: model_max_length={length}: the text encoder reads {longest} tokens")
    if vae.in_channels != 3 or vae.shift_factor is not None or vae.latents_mean is not None:
        raise ValueError("vae: expected one of RGB images whose latents are scaled and not shifted")
    check_choice("prediction_type", scheduler.prediction_type, ("epsilon", "sample", "v_prediction"))
