"""What a row depends on: a captioner, purifier or classifier as plain data that is equal where, and only where, the part is the same.

A part says what it is in `settings()`; its weights and buffers are counted beside that. A part that says nothing cannot be told
from one with another attribute, closure or code, so its rows are kept for one run alone. `named` lets it speak.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json

import torch


def named(part, name, **settings):
    """`part`, which says from now on that it is `name` with these settings; so rows that it made serve later processes, too.

    Whoever changes what the part does must change the name or a setting: nothing else tells old rows from new ones.
    part: any captioner, purifier or classifier; one that takes no attribute comes back in a `functools.partial`.
    settings: numbers, text, and lists or dicts of these.
    """
    told = {"name": name, **settings}
    digest(told)
    try:
        part.settings = functools.partial(dict, told)
    except AttributeError:
        part = functools.partial(part)
        part.settings = functools.partial(dict, told)
    return part


def identity(part):
    """{"is": what a part says of itself, "weights": a digest of its tensors or None}, as plain data for a configuration.

    A part that does not say what it is has "unnamed" in place of "is" (see `unnamed_in`). Raises ValueError for settings that
    are not plain data.
    """
    told = _told(part)
    weights = state_digest(part) if isinstance(part, torch.nn.Module) else None
    if not told:
        return {"unnamed": _name(part), "weights": weights}
    try:
        if not isinstance(told, dict):
            raise TypeError(f"got {type(told).__name__}")
        digest(told)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"settings() of {_name(part)}: expected numbers, text, and lists or dicts of these ({error})"
        ) from None
    ours = type(part).__module__.split(".")[0] == "lgap_utils"
    return {"is": told if ours else {"class": type(part).__name__} | told, "weights": weights}


def _told(part):
    """What a part says of itself. A subclass that inherits `settings` may do something else than what these describe."""
    own = getattr(part, "__dict__", {})
    if "settings" not in own and "settings" not in vars(type(part)):
        return None
    return (
        part.settings() if callable(part.settings) else None
    )  # an attribute of that name says something else


def _name(part):
    return getattr(part, "__qualname__", type(part).__qualname__)


def unnamed_in(parts):
    """The names of parts that do not say what they are, or are made of one that does not, in {defence: {part: identity}}."""
    return [
        f"{part} of {defence!r} ({name})"
        for defence, described in parts.items()
        for part, told in described.items()
        if (name := _unnamed(told))
    ]


def _unnamed(told):
    """The first name under "unnamed" anywhere in nested dicts, or None."""
    if not isinstance(told, dict):
        return None
    return told.get("unnamed") or next(filter(None, map(_unnamed, told.values())), None)


def digest(value):
    """A short digest of plain data, the same in every process and Python. Raises TypeError or ValueError for other data."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def state_digest(module):
    """A short digest of a module's parameters and buffers, those that are not saved with it too: name, kind, shape and values;
    and of whatever else it saves, as the packed weights of quantised layers."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )
    saved = module.state_dict()
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu()
        values = (values.to_dense() if values.layout is not torch.strided else values).contiguous()
        found.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
        found.update(values.flatten().view(torch.uint8).numpy().tobytes())
    for name in sorted(saved.keys() - tensors.keys()):
        buffer = io.BytesIO()
        torch.save(saved[name], buffer)
        found.update(name.encode() + buffer.getvalue())
    return found.hexdigest()


def config_digest(config):
    """Of a model's, scheduler's or processor's configuration: all but where it lies and which version wrote it."""
    told = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return digest(json.loads(json.dumps(_lasting(told), default=str)))


VOLATILE = ("name_or_path", "transformers_version", "torch_dtype", "dtype")


def _lasting(value):
    if isinstance(value, dict):
        kept = {
            str(k): v
            for k, v in value.items()
            if v is not None and not str(k).startswith("_") and k not in VOLATILE
        }
        return {name: _lasting(v) for name, v in kept.items()}
    return [_lasting(item) for item in value] if isinstance(value, list | tuple) else value


def tokenizer_digest(tokenizer):
    """Of a tokenizer's words, merges, normalisation and special tokens; not of how it was last asked to pad or cut."""
    told = {
        "special": [str(t) for t in tokenizer.all_special_tokens],
        "length": tokenizer.model_max_length,
        "padding": tokenizer.padding_side,
    }
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        rules = json.loads(backend.to_str())
        told["rules"] = {name: part for name, part in rules.items() if name not in ("padding", "truncation")}
    else:
        told["words"] = tokenizer.get_vocab()
    return digest(told)
