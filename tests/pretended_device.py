"""A pretended accelerator without float64 and bfloat16. As a script, it purifies an image there.

Its tensors claim to lie on the device "pretended", and the CPU holds them. An operation on tensors of both
is refused, as on a real device. torch takes one such backend in the life of a process, so this is a script.
"""

import sys
import types

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "pretended"


class There(torch.Tensor):
    """A tensor on the pretended device."""

    @staticmethod
    def __new__(cls, held):
        if held.dtype in (torch.float64, torch.bfloat16):
            raise TypeError(f"the pretended device has no {held.dtype}")
        there = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(KIND, 0),
        )
        there.held = held
        return there

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there, name = [t for t in tensors if isinstance(t, There)], func.overloadpacket.__name__
    if (
        there
        and name not in ("copy_", "_to_copy")
        and any(t.ndim for t in tensors if not isinstance(t, There))
    ):
        raise RuntimeError(f"{name}: tensors on the CPU and on the pretended device")
    wanted = kwargs.get("device")
    goes = bool(there) if wanted is None else torch.device(wanted).type == KIND
    if wanted is not None and goes:
        kwargs = {**kwargs, "device": "cpu"}
    out = func(
        *tree_map_only(There, lambda t: t.held, args), **tree_map_only(There, lambda t: t.held, kwargs)
    )
    known = {id(t.held): t for t in there}  # what worked in place hands its own tensor back
    return (
        tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else There(t), out)
        if goes
        else out
    )


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """What torch does not dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        if func in (torch.tensor, torch.as_tensor) and device.type == KIND:
            return func(*args, **{**kwargs, "device": "cpu"}).to(KIND)
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], There):
            return func(args[0].held)
        return func(*args, **kwargs)


def main():
    from lgap_utils import models, profiles
    from lgap_utils.noise import Keys

    module = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
    )
    _setup_privateuseone_for_python_backend(KIND, module)
    settings = {"num_inference_steps": 3, "strength": 0.5, "num_beams": 2, "max_length": 8}
    profile = profiles.get_profile("toy", **settings)
    here = models.load_defense(profile, device="cpu")
    x = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = here.purify_one(x)
    with Calls(), Dispatch():
        try:
            models.load_defense(profiles.get_profile("toy", dtype="bfloat16"))
        except ValueError as error:
            print(error)
        there = models.load_defense(profile)
        assert {p.device.type for p in there.parameters()} == {KIND}
        found = there.purify_one(x.double())  # an image of the CPU, in a precision that the device lacks
        assert found.image.dtype == torch.float64 and found.caption == expected.caption
        assert (found.image - expected.image).abs().max() < 1e-4 and (
            found.logits - expected.logits
        ).abs().max() < 1e-3
        with torch.no_grad():  # and one that is there already
            image = there.purify(x.to(KIND)[None], [expected.caption], Keys.of_content(x[None]))
            logits = there.classify(image)
        assert image.device.type == logits.device.type == KIND
        assert (image.cpu()[0] - expected.image).abs().max() < 1e-4 and (
            logits.cpu()[0] - expected.logits
        ).abs().max() < 1e-3
        try:
            torch.zeros(1, device=KIND).double()
        except TypeError as error:
            print(error)
    print("purified")


if __name__ == "__main__":
    sys.exit(main())
