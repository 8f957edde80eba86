"""What is language worth? The defence with other words in the caption's place, each an arm of notebook 08."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from .baselines import Told, undefended, vae_round_trip, with_purifier, without_caption
from .defense import LGAP
from .identity import named
from .ladders import told_the_class
from .tables import paired
from .words import class_names

if TYPE_CHECKING:
    from .images import Images
    from .rows import Frame

AGNOSTIC = "a photo of a."  # the words for every image that caption-free multimodal purifiers of 2025 take
LGAP_NAME, NOTHING = "LGAP", "no caption"


def arms(defense: LGAP, images: Images) -> dict[str, LGAP]:
    """{arm: the defence with other words, or guidance}; every arm has the same noise and the same classifier.

    The caption of another image is that of the next one, the wrong class is the label's successor.
    """
    names, labels = [class_names(name)[0] for name in images.classes], images.labels.tolist()
    indices, said = images.indices.tolist(), []
    for part in images.x.split(64):
        said += defense.caption(part)
    others = dict(zip(indices, said[1:] + said[:1]))
    wrong = {i: f"a {names[(label + 1) % len(names)]}" for i, label in zip(indices, labels)}
    out = {LGAP_NAME: defense, NOTHING: with_purifier(defense, without_caption(defense.purifier))}
    out["the same words for all"] = _with(defense, named(lambda x: [AGNOSTIC] * len(x), AGNOSTIC))
    out["another image's caption"] = _with(defense, Told(others, "the next image's caption"))
    out["a wrong class"] = _with(defense, Told(wrong, "the next class"))
    out["the true class"] = told_the_class(defense, images)
    for scale in (1.0, 5.0, 15.0):
        if scale != defense.purifier.guidance_scale:
            out[f"guidance {scale:g}"] = _with(defense, defense.captioner, guided(defense.purifier, scale))
    out["VAE round trip"] = with_purifier(defense, vae_round_trip(defense.purifier))
    out["undefended"] = with_purifier(defense, undefended())
    return out


def guided(purifier: Any, scale: float) -> Any:
    """The same purifier, weights shared, at another guidance scale."""
    other = copy.copy(purifier)
    other.guidance_scale = scale
    other.schedule()
    return other


def _with(defense: LGAP, captioner: Any, purifier: Any = None) -> LGAP:
    parts = captioner, purifier or defense.purifier, defense.classifier
    return LGAP(*parts, defense.classes, defense.input_size)


def worth(rows: Frame, first: str, second: str, column: str = "adversarial") -> str:
    """How much more often `first` is right than `second`, in words: "+3.1 points (-2.0 to +8.0), n = 64"."""
    gap = paired(rows, first, second, column)
    return f"{gap['points']:+.1f} points ({gap['95 % interval']}), n = {gap['n']}"


def answer(clean_and_blind: Frame, caption: Frame, joint: Frame) -> list[str]:
    """The question of notebook 08 in three sentences, from rows of LGAP and of the arm without a caption."""
    both = (LGAP_NAME, NOTHING)
    return [
        f"A caption is worth {worth(clean_and_blind, *both, 'clean')} on clean images, and "
        f"{worth(clean_and_blind, *both)} under a blind attack.",
        f"Where the attacker aims at the captioner, it is worth {worth(caption, *both)}, and where he aims "
        f"at the purifier as well, {worth(joint, *both)}.",
        f"Under the blind attack the true class in the caption's place is worth "
        f"{worth(clean_and_blind, 'the true class', LGAP_NAME)}, "
        f"a wrong class {worth(clean_and_blind, 'a wrong class', LGAP_NAME)}.",
    ]
