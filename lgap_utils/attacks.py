"""Attacks: an optimiser (`pgd`) and what the attacker sees of the defence (`blind`, `bpda`, or the defence itself).

An attack knows only a model, a callable from images in [0, 1] to logits; so any model and any view fit any attack.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .defense import check_images


def blind(defense):
    """Preprocessor-blind view (paper section 4.1): the attacker sees the classifier and knows of no purification."""
    return defense.classify


def bpda(defense, captions=None, keys=None):
    """BPDA view (Athalye et al. 2018): exact forward pass; backward as if purification were the identity."""
    def model(x):
        with torch.no_grad():
            purified = defense.purify(x, captions, keys)
        return defense.classify(x + (purified - x).detach())
    return model


def pgd(model, x, y, *, eps, step_size, n_steps, keys=None, n_eot=1):
    """L-inf projected gradient ascent on the cross-entropy (Madry et al. 2018): the last iterate, [n, 3, h, w] in [0, 1].

    x: images in [0, 1]; y: labels [n]; eps and step_size in pixels of [0, 1], so 8/255 and not 8. keys: a random start,
    drawn for each image from its key; None starts at x. n_eot > 1 averages the gradient, not the logits, over calls.
    Raises TypeError or ValueError for images, labels or numbers that cannot be meant.
    """
    check_images(x)
    check_labels(y, len(x))
    for name, value, low in (("eps", eps, 0), ("step_size", step_size, 0)):
        if isinstance(value, (str, bool)) or not math.isfinite(value) or not low <= value <= 1:
            raise ValueError(f"{name}={value!r}: expected a number in [0, 1], in units of the image, e.g. 8/255")
    for name, value in (("n_steps", n_steps), ("n_eot", n_eot)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")

    adv = x.clone()
    if keys is not None:
        adv = (x + eps * (2 * keys.uniform(x.shape[1:], "start").to(x) - 1)).clamp(0, 1)
    for _ in range(n_steps):
        adv.requires_grad_(True)
        grad = torch.zeros_like(x)
        for _ in range(n_eot):
            loss = F.cross_entropy(model(adv), y.to(x.device), reduction="sum")
            grad += torch.autograd.grad(loss, adv)[0]
        adv = adv.detach() + step_size * grad.sign()
        adv = (x + (adv - x).clamp(-eps, eps)).clamp(0, 1)
    return adv.detach()


def check_labels(y, n):
    """Refuse labels that are not n whole numbers; broadcasting would hide it and count beyond 100 %."""
    if not isinstance(y, torch.Tensor) or y.dtype != torch.long:
        raise TypeError(f"labels: expected a torch.long tensor, got {getattr(y, 'dtype', type(y).__name__)}")
    if y.shape != (n,):
        raise ValueError(f"labels: got shape {list(y.shape)} for {n} images, expected one each")


def in_batches(attack, x, y, keys=None, batch_size=128):
    """`attack(x, y, keys)` over slices of a large set; the slices change no result, as keys belong to images."""
    parts = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
    return torch.cat([attack(x[p], y[p], None if keys is None else keys[p]) for p in parts])
