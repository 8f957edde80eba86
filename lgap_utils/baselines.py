"""Cheap purifiers to compare LGAP with under the same attack: what is due to diffusion, and what to language?

A purifier is any callable (x, captions, keys) -> images like x [n, 3, h, w], in [0, 1]. One of your own:

    def darker(amount):
        return Purifier(lambda x, keys: x * amount, purifier="darker", amount=amount)

    defense = with_purifier(defense, darker(0.5))
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .defense import LGAP, LatentPurifier
from .identity import digest, identity, named
from .images import mend_rounding, resize
from .noise import Keys

no_caption = named(lambda x: [""] * len(x), "no caption")  # the captioner of a purifier that reads no caption


class Told:
    """A captioner that says what it was told of each image: nothing in the pixels can mislead it.

    texts: {index of an image: its caption}, and `name` says what they are. Raises ValueError for an image
    that it knows nothing of.
    """

    takes_keys = True

    def __init__(self, texts: Mapping[int | str, str], name: str):
        self.texts, self.name = dict(texts), name

    def settings(self) -> dict[str, Any]:
        """What it is: its name, and a digest of the captions."""
        return {"name": self.name, "captions": digest(sorted(self.texts.items()))}

    def __call__(self, x: Tensor, keys: Keys) -> list[str]:
        if unknown := [index for index in keys.indices if index not in self.texts]:
            raise ValueError(f"{self.name}: no caption for image {unknown[0]!r}; there are {len(self.texts)}")
        return [self.texts[index] for index in keys.indices]


class Purifier:
    """A purifier made of a function (x, keys) -> images, with its settings.

    random: whether it draws noise. made_of: the purifier that the function uses, if any; it then takes
    several keys for each image, as a LatentPurifier does. denoiser_calls: of an image, by that one's UNet.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        random: bool = False,
        made_of: Any = None,
        denoiser_calls: int = 0,
        **settings: Any,
    ):
        self.function, self.random, self.made_of, self._settings = function, random, made_of, settings
        self.denoiser_calls = denoiser_calls
        self.takes_draws = getattr(made_of, "takes_draws", False)

    def settings(self) -> dict[str, Any]:
        """What it is, by name, and what it is made of; empty where its maker did not say."""
        if not self._settings or self.made_of is None:
            return self._settings
        return self._settings | {"made_of": identity(self.made_of)}

    def __call__(self, x: Tensor, captions: Any, keys: Keys) -> Tensor:
        return self.function(x, keys)


def undefended() -> Purifier:
    """The undefended classifier."""
    return Purifier(lambda x, keys: x, purifier="none")


def resized(size: int) -> Purifier:
    """Down to `size` pixels and back, bilinear with antialias: what a change of resolution alone removes."""
    function = lambda x, keys: resize(resize(x, (size, size)), x.shape[-2:])
    return Purifier(function, purifier="resize", size=size)


def blur(sigma: float) -> Purifier:
    """Gaussian blur (torchvision); sigma in pixels."""
    from torchvision.transforms.functional import gaussian_blur

    width = 2 * int(3 * sigma + 0.5) + 1
    function = lambda x, keys: mend_rounding(gaussian_blur(x, [width, width], [sigma, sigma]))
    return Purifier(function, purifier="blur", sigma=sigma)


def jpeg(quality: int) -> Purifier:
    """JPEG at `quality` of 100 (PIL), there and back; no gradient passes."""

    def function(x, keys):
        out = []
        for image in (x.detach().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            out.append(np.asarray(Image.open(file)))
        return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).to(x) / 255

    return Purifier(function, purifier="JPEG", quality=quality)


def vae_round_trip(purifier: LatentPurifier) -> Purifier:
    """A LatentPurifier's autoencoder alone: nothing is added or denoised. Raises TypeError for another."""
    _check_latent(purifier)
    random = purifier.vae_sample
    return Purifier(purifier.round_trip, random=random, made_of=purifier, purifier="VAE round trip")


def without_caption(purifier: LatentPurifier) -> Purifier:
    """A LatentPurifier's diffusion with an empty caption. Raises TypeError for another.

    There is no guidance either: the prediction without a caption would be the same.
    """
    _check_latent(purifier)

    def function(x, keys):
        with purifier.using(guidance_scale=1.0):
            return purifier(x, [""] * len(x), keys)

    calls = len(purifier.schedule()[1])
    settings: dict[str, Any] = {"purifier": "no caption", "guidance_scale": 1.0}
    return Purifier(function, random=True, made_of=purifier, denoiser_calls=calls, **settings)


def _check_latent(purifier: Any) -> None:
    if not isinstance(purifier, LatentPurifier):
        expected = f"expected a LatentPurifier, got {type(purifier).__name__}"
        raise TypeError(f"purifier: {expected}; `with_baselines` leaves this row out for others")


def with_baselines(defense: LGAP, side: int) -> dict[str, LGAP]:
    """{name: LGAP} of the defence and of every cheap purifier before the same classifier.

    side: pixels of an image's side. The parts of a LatentPurifier are there where the defence has one.
    """
    purifiers = {}
    if isinstance(defense.purifier, LatentPurifier):
        purifiers["LGAP without a caption"] = without_caption(defense.purifier)
        purifiers["VAE round trip"] = vae_round_trip(defense.purifier)
    smaller = 3 * side // 4
    purifiers[f"resize to {smaller} and back"] = resized(smaller)
    purifiers["Gaussian blur, 1 pixel"] = blur(1.0)
    purifiers["JPEG, quality 75"] = jpeg(75)
    purifiers["undefended"] = undefended()
    return {"LGAP": defense} | {name: with_purifier(defense, each) for name, each in purifiers.items()}


def with_purifier(defense: LGAP, purifier: Any) -> LGAP:
    """The same classifier behind another purifier; nothing is captioned."""
    return LGAP(no_caption, purifier, defense.classifier, defense.classes, defense.input_size)
