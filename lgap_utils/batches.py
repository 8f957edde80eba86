"""How many images go into one call: as many as fit. It changes results by rounding at most."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

T = TypeVar("T")
# what the CPU's allocator, CUDA's libraries and other devices say
OUT_OF_MEMORY = re.compile("(can't allocate|not enough|out of) memory|ALLOC_FAILED|unable to find an engine")

# (limit, use) of a container's memory, in the two versions of Linux' control groups
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class BatchSize:
    """How many draws one call may take, `size`. It is halved when memory runs out.

    device: a GPU; `size` doubles, up to `most`, while most of its memory is free.
    """

    def __init__(self, size: int, device: torch.device | str | None = None, most: int = 4096):
        self.size, self.most = size, most
        self.gpu = device if device is not None and torch.device(device).type == "cuda" else None

    @classmethod
    def of(cls, size: int | BatchSize) -> BatchSize:
        """A number as a `BatchSize`; a `BatchSize` as it is, with what it has learned."""
        return size if isinstance(size, BatchSize) else cls(size)

    def attempt(self, call: Callable[[], Any], n_draws: int) -> tuple[bool, Any]:
        """(True, call()); or (False, None) if its `n_draws` draws did not fit: `size` is then halved.

        Raises MemoryError if a single draw is too much.
        """
        try:
            result = call()
        except RuntimeError as error:  # torch.OutOfMemoryError is one, too
            if not ran_out(error):
                raise
            reason = str(error).splitlines()[0][:200]
        else:
            if n_draws >= self.size:
                self._grow()
            return True, result
        # outside of `except`, whose traceback would keep the tensors of the failed call alive
        if n_draws <= 1:
            raise MemoryError(f"one image alone does not fit into memory ({reason}); lower `size`")
        self.size = self.most = max(1, n_draws // 2)
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
        print(f"out of memory with {n_draws} draws in a call; going on with {self.size}", flush=True)
        return False, None

    def _grow(self) -> None:
        if self.gpu is None:
            return
        total = torch.cuda.get_device_properties(self.gpu).total_memory
        if torch.cuda.max_memory_reserved(self.gpu) < 0.4 * total:
            self.size = min(self.most, 2 * self.size)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def kept_bytes(call: Callable[[], Any], frozen: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of call(), less those of `frozen` weights."""
    kept, known = {}, {weight.untyped_storage().data_ptr() for weight in frozen}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()  # noqa: F841  # its graph holds what is counted
    return sum(size for place, size in kept.items() if place not in known)


def has_room(n_bytes: int, device: torch.device) -> bool:
    """Whether a third of a device's memory stays free beside so many more bytes; False if nobody knows."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "cpu":
        machine = psutil.virtual_memory()
        free, total = machine.available, machine.total
        for limit, used in CGROUPS:  # a container's
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                most = int(Path(limit).read_text())
                free, total = min(free, most - int(Path(used).read_text())), min(total, most)
    else:
        return False
    return free - n_bytes > total / 3


class Kept(dict):
    """{function and shapes: bytes that autograd keeps of it for an image}, each measured on one image."""

    def fits(self, function: Callable[..., Any], args: Sequence[Any], frozen: list[torch.Tensor]) -> bool:
        """Whether there is room for what autograd keeps of function(*args).

        args: the images first; what has a length has as many rows for each of them.
        """
        n = len(args[0])
        one: list[Any] = [arg if isinstance(arg, int) else arg[: len(arg) // n] for arg in args]
        key = (function.__name__, frozen[0].dtype, *(getattr(arg, "shape", None) for arg in one))
        if key not in self:
            one[0] = one[0].detach().requires_grad_()
            self[key] = kept_bytes(lambda: function(*one), frozen)
        return has_room(n * self[key], frozen[0].device)


def call_in_batches(
    call: Callable[[slice], T], n: int, batch_size: int | BatchSize, draws: int = 1
) -> list[T]:
    """[call(slice), ...] over range(n), in slices of as many items as fit, each item of `draws` draws."""
    room, results, first = BatchSize.of(batch_size), [], 0
    while first < n:
        part = slice(first, min(n, first + max(1, room.size // draws)))
        n_items = part.stop - part.start
        fits, result = room.attempt(lambda: call(part), n_items * draws if n_items > 1 else 1)
        if fits:
            results.append(result)
            first = part.stop
    return results
