"""How many images go into one call: as many as fit. Every draw belongs to its image, so it changes a result by rounding at most."""

from __future__ import annotations

import gc

import torch


class BatchSize:
    """The number of draws that one call may take: halved when memory runs out, and doubled while most of the GPU `device` is empty."""

    def __init__(self, size, device=None, most=4096):
        self.size, self.most = size, most
        self.gpu = device if device is not None and torch.device(device).type == "cuda" else None

    @classmethod
    def of(cls, size):
        """A number as a `BatchSize`; a `BatchSize` as it is, so that what one call learned serves the next."""
        return size if isinstance(size, cls) else cls(size)

    def attempt(self, call, tried):
        """(True, call()), or (False, None) where `tried` draws did not fit: then the room is halved and the caller asks for fewer.

        Raises MemoryError, in one sentence, where a single draw is too much.
        """
        try:
            result = call()
        except (
            RuntimeError
        ) as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises the plain kind
            if not ran_out(error):
                raise
            said = str(error).splitlines()[0][:200]
        else:
            if self.gpu is not None and tried >= self.size:
                self._grow()
            return True, result
        # outside of `except`, whose traceback would keep the tensors of the failed call alive
        if tried <= 1:
            raise MemoryError(
                f"one image alone does not fit into memory ({said}); lower `size`, or use a larger device"
            )
        self.size = self.most = max(1, tried // 2)
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
        print(f"out of memory with {tried} draws in a call; going on with {self.size}", flush=True)
        return False, None

    def _grow(self):
        if (
            torch.cuda.max_memory_reserved(self.gpu)
            < 0.4 * torch.cuda.get_device_properties(self.gpu).total_memory
        ):
            self.size = min(self.most, 2 * self.size)


def ran_out(error):
    """Whether an error says that memory ran out; kinds of devices, and CUDA's libraries, have words of their own for it."""
    words = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "ALLOC_FAILED",
        "unable to find an engine",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in words)


def call_in_batches(call, n, batch_size, draws=1):
    """[call(slice), ...] over range(n), in slices of as many items as fit, each of `draws` draws. batch_size: a number or a `BatchSize`."""
    room, done, first = BatchSize.of(batch_size), [], 0
    while first < n:
        part = slice(first, min(n, first + max(1, room.size // draws)))
        fits, result = room.attempt(
            lambda: call(part), (part.stop - part.start) * draws if part.stop - part.start > 1 else 1
        )
        if fits:
            done.append(result)
            first = part.stop
    return done
