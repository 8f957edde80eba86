"""What kept rows depend on: captioner, purifier and classifier as plain data, equal only for equal parts.

A part describes itself in `settings()`; its weights and buffers are digested beside that. Rows of a part
without settings serve one run alone, as its code may be another in the next. `named` gives it settings.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from typing import Any

import torch

# Fields of a configuration that say where a model lies or what wrote it, not what it computes.
VOLATILE = ("name_or_path", "transformers_version", "torch_dtype", "dtype")


def named(part: Any, name: str, **settings: Any) -> Any:
    """`part` with a name and settings, by which later processes know it and resume its rows.

    settings: numbers, text, lists or dicts of these; else TypeError or ValueError. Change one whenever the
    part computes something else. A part that takes no attribute is returned in a `functools.partial`.
    """
    settings = {"name": name, **settings}
    digest(settings)
    try:
        part.settings = functools.partial(dict, settings)
    except AttributeError:
        part = functools.partial(part)
        part.settings = functools.partial(dict, settings)
    return part


def own_settings(part: Any) -> Any:
    """`part.settings()`; None where missing or inherited, as a subclass may compute something else."""
    own = "settings" in getattr(part, "__dict__", {}) or "settings" in vars(type(part))
    return part.settings() if own and callable(part.settings) else None


def identity(part: Any) -> dict[str, Any]:
    """{"is": the part's own settings, or "unnamed": its name, "weights": `state_digest` or None}.

    Raises ValueError for settings that are not plain data.
    """
    settings = own_settings(part)
    name = getattr(part, "__qualname__", type(part).__qualname__)
    weights = state_digest(part) if isinstance(part, torch.nn.Module) else None
    if not settings:
        return {"unnamed": name, "weights": weights}
    try:
        if not isinstance(settings, dict):
            raise TypeError(f"got {type(settings).__name__}")
        digest(settings)
    except (TypeError, ValueError) as error:
        plain = "numbers, text, and lists or dicts of these"
        raise ValueError(f"settings() of {name}: expected {plain} ({error})") from None
    if type(part).__module__.split(".")[0] != "lgap_utils":
        settings = {"class": type(part).__name__} | settings
    return {"is": settings, "weights": weights}


def unnamed_in(defenses: dict[str, dict[str, Any]]) -> list[str]:
    """The parts without settings, or made of one without, in {defence: {part: identity}}, each in words."""
    out = []
    for defence, parts in defenses.items():
        for part, described in parts.items():
            if name := _unnamed(described):
                out.append(f"{part} of {defence!r} ({name})")
    return out


def _unnamed(described: Any) -> str | None:
    """The first name under "unnamed" anywhere in nested dicts."""
    if not isinstance(described, dict):
        return None
    return described.get("unnamed") or next(filter(None, map(_unnamed, described.values())), None)


def digest(value: Any) -> str:
    """16 hex digits of plain data, equal in every process. Raises TypeError or ValueError for other data."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def state_digest(module: torch.nn.Module) -> str:
    """16 hex digits of all parameters, buffers (saved or not) and packed weights of quantised layers."""
    tensors = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    saved = module.state_dict()
    out = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu()
        values = (values.to_dense() if values.layout is not torch.strided else values).contiguous()
        out.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
        out.update(values.flatten().view(torch.uint8).numpy().tobytes())
    for name in sorted(saved.keys() - tensors.keys()):
        buffer = io.BytesIO()
        torch.save(saved[name], buffer)
        out.update(name.encode() + buffer.getvalue())
    return out.hexdigest()


def config_digest(config: Any) -> str:
    """Digest of a model's, scheduler's or processor's configuration, less `VOLATILE`, private and None."""
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return digest(json.loads(json.dumps(_lasting(fields), default=str)))


def _lasting(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_lasting(item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = {str(name): item for name, item in value.items() if item is not None and name not in VOLATILE}
    return {name: _lasting(item) for name, item in fields.items() if not name.startswith("_")}


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's words, rules and special tokens, less how it was last asked to pad or cut."""
    content = {
        "special": [str(token) for token in tokenizer.all_special_tokens],
        "length": tokenizer.model_max_length,
        "padding": tokenizer.padding_side,
    }
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        rules = json.loads(backend.to_str())
        content["rules"] = {k: rule for k, rule in rules.items() if k not in ("padding", "truncation")}
    else:
        content["words"] = tokenizer.get_vocab()
    return digest(content)


def changed_by_hand(scheduler: Any, unet: Any) -> dict[str, Any]:
    """What was changed of a scheduler and a UNet after they were made: their configurations do not say it."""
    changed, made = {}, type(scheduler).from_config(scheduler.config)
    alphas = [[*s.alphas_cumprod.tolist(), float(s.final_alpha_cumprod)] for s in (scheduler, made)]
    if alphas[0] != alphas[1]:
        changed["alphas_cumprod"] = digest(alphas[0])
    free_u = []
    for block in unet.up_blocks:
        free_u.append([getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")])
    if any(values != [None] * 4 for values in free_u):
        changed["free_u"] = free_u
    return changed
