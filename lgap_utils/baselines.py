"""Cheap purifiers to stand beside LGAP under the same attack: what of its accuracy is owed to diffusion, and what to language?

Each is a callable purifier(x, captions, keys) -> images of the same shape, as `LGAP` takes one, and says in `settings()` what
it is. Those that draw no noise have `random = False`.
"""

from __future__ import annotations

import io

import torch

from .defense import LGAP, LatentPurifier, resize
from .identity import identity, named


def no_caption(x):
    """The captioner of a purifier that reads no caption: an empty one for each image."""
    return [""] * len(x)


no_caption = named(no_caption, "no caption")


class Purifier:
    """A purifier made of a function of images and keys, with its settings; `made_of`: the purifier that the function uses, if any."""

    def __init__(self, function, random=False, made_of=None, **settings):
        self.function, self.random, self.made_of, self._settings = function, random, made_of, settings

    def settings(self):
        """What it is, by name, and what it is made of; empty where its maker did not say."""
        return self._settings | (
            {"made_of": identity(self.made_of)} if self._settings and self.made_of else {}
        )

    def __call__(self, x, captions, keys):
        return self.function(x, keys)


def undefended():
    """The undefended classifier."""
    return Purifier(lambda x, keys: x, purifier="none")


def resized(size):
    """Down to `size` pixels and back, bilinear with antialias: what a change of resolution alone removes."""
    return Purifier(
        lambda x, keys: resize(resize(x, (size, size)), x.shape[-2:]), purifier="resize", size=size
    )


def blur(sigma):
    """Gaussian blur (torchvision); sigma in pixels."""
    from torchvision.transforms.functional import gaussian_blur

    width = 2 * int(3 * sigma + 0.5) + 1

    def function(x, keys):
        y = gaussian_blur(x, [width, width], [sigma, sigma])
        return (
            y + (y.clamp(0, 1) - y).detach()
        )  # mends rounding only, as `resize` does: black and white keep their gradient

    return Purifier(function, purifier="blur", sigma=sigma)


def jpeg(quality):
    """JPEG at `quality` of 100 (PIL), there and back; no gradient passes."""

    def function(x, keys):
        import numpy as np
        from PIL import Image

        out = []
        for image in (x.detach().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            out.append(np.asarray(Image.open(file)))
        return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).to(x) / 255

    return Purifier(function, purifier="JPEG", quality=quality)


def _check_latent(purifier):
    """Refuse a purifier that has no autoencoder and no guidance of its own to be run without."""
    if not isinstance(purifier, LatentPurifier):
        raise TypeError(
            f"purifier: expected a LatentPurifier, got {type(purifier).__name__}; `with_baselines` leaves this row out for others"
        )


def vae_round_trip(purifier):
    """A LatentPurifier's autoencoder alone: encoded and decoded, no noise added, nothing denoised. Raises TypeError for another."""
    _check_latent(purifier)

    def function(x, keys):
        working = purifier.resize(
            x.to(purifier.device, torch.promote_types(purifier.dtype, torch.float32)),
            (purifier.size, purifier.size),
        )
        return purifier.resize(purifier.decode(purifier.encode(working, keys)), x.shape[-2:]).to(x)

    return Purifier(function, random=purifier.vae_sample, made_of=purifier, purifier="VAE round trip")


def without_caption(purifier):
    """A LatentPurifier's diffusion with an empty caption, and so without guidance: the two predictions would be equal. Raises TypeError."""
    _check_latent(purifier)

    def function(x, keys):
        with purifier.using(guidance_scale=1.0):
            return purifier(x, [""] * len(x), keys)

    return Purifier(function, random=True, made_of=purifier, purifier="no caption", guidance_scale=1.0)


def with_baselines(defense, side):
    """{name: LGAP} of the defence and of everything cheap behind the same classifier; side: pixels of an image's side.

    The parts of a LatentPurifier stand there too, where the defence has one and not a purifier of another kind.
    """
    smaller, others = 3 * side // 4, {}
    if isinstance(defense.purifier, LatentPurifier):
        others = {
            "LGAP without a caption": without_caption(defense.purifier),
            "VAE round trip": vae_round_trip(defense.purifier),
        }
    others |= {
        f"resize to {smaller} and back": resized(smaller),
        "Gaussian blur, 1 pixel": blur(1.0),
        "JPEG, quality 75": jpeg(75),
        "undefended": undefended(),
    }
    return {"LGAP": defense} | {name: with_purifier(defense, purifier) for name, purifier in others.items()}


def with_purifier(defense, purifier):
    """The same classifier behind another purifier; nothing is captioned, as none of these reads."""
    return LGAP(no_caption, purifier, defense.classifier, defense.classes, defense.input_size)
