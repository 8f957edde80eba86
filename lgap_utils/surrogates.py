"""Views beyond the paper's: cheap surrogates of the purifier, the captioner as a target, and both at once.

A surrogate view is differentiated in place of the defence, which is then judged as always. `caption` moves an
image until BLIP says another class; `joint` does so while it follows the full gradient.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attacks import SCALE, View, full, gradient
from .batches import call_in_batches
from .defense import LGAP, LatentPurifier
from .noise import Keys
from .words import class_names

# ---------------------------------------------------------------- surrogates of the purifier


class Surrogate(View):
    """A view through a part of a `LatentPurifier`. Raises TypeError for a defence with another purifier."""

    def __init__(self, defense: LGAP, captions: dict[int | str, str] | None = None):
        super().__init__(defense, captions)
        if not isinstance(defense.purifier, LatentPurifier):
            kind = type(defense.purifier).__name__
            raise TypeError(
                f"purifier: a surrogate is a part of a LatentPurifier, got {kind}; take bpda or full"
            )


class vae(Surrogate):
    """The gradient through the autoencoder alone: encoded and decoded, no noise, no denoising."""

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        return self.defense.classify(self.defense.purifier.round_trip(x, keys), keys)


class one_step(Surrogate):
    """The gradient through one denoiser call without guidance: the image that the first step expects."""

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        p, n_draws = self.defense.purifier, len(keys) // len(x)
        captions = self.captions_of(x, keys)
        t_noise, times = p.schedule()
        z = p.noised(p.encode(p.at_working_size(x), keys), keys, t_noise)
        with p.using(guidance_scale=1.0):
            expected = p.step(z, times[0], p.embed(captions).repeat_interleave(n_draws, 0))[1]
        return self.defense.classify(p.like(x, p.decode(expected)), keys)


# ---------------------------------------------------------------- the captioner as a target

CLASSES = 128  # texts in a call of the captioner


class by_class(View):
    """The captioner as a classifier: logit k is the mean log-likelihood of a token of "a CLASS k".

    A view like any other, of a captioner with `log_likelihood`; classes are asked for CLASSES at a time.
    """

    def __init__(self, defense: LGAP):
        super().__init__(defense)
        if not hasattr(defense.captioner, "log_likelihood"):
            kind = type(defense.captioner).__name__
            raise TypeError(
                f"captioner: expected one with log_likelihood(x, texts), as models.Captioner, got {kind}"
            )
        if defense.classes is None:
            raise ValueError(
                "classes: the defence does not name them, so no wrong class can be put into a caption"
            )

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        texts = [f"a {class_names(name)[0]}" for name in self.defense.classes or ()]
        parts = [texts[k : k + CLASSES] for k in range(0, len(texts), CLASSES)]
        ask = self.defense.captioner.log_likelihood
        if len(parts) > 1:  # of many classes, no part waits in memory for the backward pass
            ask = partial(checkpoint, ask, use_reentrant=False)
        logits = torch.stack([torch.cat([ask(image[None], part) for part in parts]) for image in x])
        return logits.repeat_interleave(len(keys) // len(x), 0)


class caption(by_class):
    """Aims at the captioner alone: ascends the log-likelihood of a caption with a wrong class.

    The target is the clean image's caption with its class word replaced by the wrong class word that the
    captioner finds most likely there; `aimed` chooses it. Where that caption names no class, as free text
    may, there is no target, and the image moves away from its own class as `by_class` sees it.
    """

    targets: dict[int | str, str]  # "": none

    def aimed(self, x: Tensor, y: Tensor, indices: Sequence[int | str]) -> caption:
        """This view with the targets of images x [n, 3, h, w] with labels y [n]."""
        view = copy.copy(self)
        view.targets = {}
        for image, label, index, text in zip(
            x, y.tolist(), indices, self.defense.caption(x.clone(), Keys(indices))
        ):
            view.targets[index] = wrong_caption(self.defense, image, text, label)
        return view

    def gradient(self, x: Tensor, y: Tensor, keys: Keys, n_eot: int, *how: Any) -> tuple[Tensor, list[bool]]:
        """The gradient of the mean token log-likelihood of the targets, or of `by_class`; there is no noise.

        Arguments as those of `attacks.gradient`. The caption that is generated is not looked at, so no image
        counts as broken on the way.
        """
        keys, slope = keys[::n_eot], torch.zeros_like(x)
        texts = [self.targets[index] for index in keys.indices]
        aimed, free = ([k for k, text in enumerate(texts) if bool(text) is has] for has in (True, False))
        if aimed:
            leaf = x[aimed].detach().clone().requires_grad_(True)
            likelihood = self.defense.captioner.log_likelihood(leaf, [texts[k] for k in aimed])
            slope[aimed] = torch.autograd.grad(SCALE * likelihood.sum(), leaf)[0] / SCALE
        if free:
            slope[free] = gradient(by_class(self.defense), x[free], y[free], keys[free])[0]
        return slope, [True] * len(x)


class joint(caption):
    """Both at once: the sum of the full gradient and of `caption`'s, each divided by its L1 norm."""

    def gradient(self, x: Tensor, y: Tensor, keys: Keys, n_eot: int, *how: Any) -> tuple[Tensor, list[bool]]:
        of_caption, _ = super().gradient(x, y, keys, n_eot)
        of_defense, right = gradient(full(self.defense), x, y, keys, n_eot, *how)
        return _unit(of_caption) + _unit(of_defense), right


def _unit(grad: Tensor) -> Tensor:
    """Each image's gradient divided by its L1 norm; zero stays zero."""
    norm = grad.flatten(1).abs().sum(1).view(-1, 1, 1, 1)
    return torch.where(norm > 0, grad / norm, 0)


def wrong_caption(defense: LGAP, image: Tensor, text: str, label: int) -> str:
    """The target of `caption` for one image [3, h, w] whose caption is `text`; "" if that names no class."""
    names = [class_names(name)[0] for k, name in enumerate(defense.classes or ()) if k != label]
    candidates = with_class(text, defense.classes or (), names)
    if not candidates:
        return ""
    likelihood = defense.captioner.log_likelihood
    with torch.no_grad():
        found = call_in_batches(lambda p: likelihood(image[None], candidates[p]), len(candidates), CLASSES)
    return candidates[int(torch.cat(found).argmax())]


def with_class(text: str, classes: Sequence[str], names: Sequence[str]) -> list[str]:
    """`text` with the first class name in it replaced by each of the names; [] where it holds none."""
    known = sorted({name for each in classes for name in class_names(each)}, key=len, reverse=True)
    pattern = "|".join(re.escape(name).replace(r"\ ", "[ _-]") for name in known)
    match = re.search(rf"\b({pattern})\b", text, re.IGNORECASE)
    if not match:
        return []
    return [text[: match.start()] + name + text[match.end() :] for name in names]
