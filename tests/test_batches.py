"""Running out of memory halves a batch, and changes nothing else."""

from types import SimpleNamespace

import pytest
import torch
from sums import KEYS, SMALL, X, Y, net, noisy, words

from lgap_utils import batches
from lgap_utils.attacks import bpda, pgd
from lgap_utils.batches import BatchSize, call_in_batches, has_room
from lgap_utils.defense import LGAP


class Small:
    """A device that holds so many draws in a call, and fails as torch does."""

    def __init__(self, most, function=noisy, error=None):
        error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.most, self.function, self.error, self.failures = most, function, error, 0

    def __call__(self, x, captions, keys):
        if len(keys) > self.most:
            self.failures += 1
            raise self.error
        return self.function(x, captions, keys)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["GPU", "CPU", "cuBLAS"])
@pytest.mark.parametrize("settings", [{}, {"n_eot": 5}, {"n_eot": 2, "any_step": True}])
def test_running_out_of_memory_halves_the_batch_and_changes_nothing(settings, error, capsys):
    run = lambda purifier, room: pgd(
        bpda(LGAP(words, purifier, net)), X, Y, keys=KEYS, batch_size=room, **SMALL | settings
    )
    small, room = Small(3, error=error), BatchSize(64)
    assert torch.equal(run(small, room), run(noisy, 64))
    assert small.failures and room.size <= 3 and f"going on with {room.size}" in capsys.readouterr().out
    failures = small.failures
    run(small, room)
    assert small.failures == failures  # what was learned is kept


def test_one_image_that_does_not_fit_is_said_in_a_sentence():
    with pytest.raises(MemoryError, match="one image alone does not fit into memory .*lower `size`"):
        pgd(bpda(LGAP(words, Small(0), net)), X, Y, keys=KEYS, **SMALL)
    with pytest.raises(RuntimeError, match="^another fault$"):
        pgd(bpda(LGAP(words, Small(0, error=RuntimeError("another fault")), net)), X, Y, keys=KEYS, **SMALL)


def test_the_batch_grows_while_most_of_a_gpu_is_empty(monkeypatch):
    class Device:
        total_memory = 100

    used = [10]
    monkeypatch.setattr(
        torch.cuda, "max_memory_reserved", lambda device: used[0] if str(device) == "cuda:1" else 0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Device)
    room = BatchSize(2, "cuda:1", most=16)
    sizes = call_in_batches(lambda part: part.stop - part.start, 30, room)
    assert sizes == [2, 4, 8, 16] and room.size == 16
    used[0], room = 50, BatchSize(2, "cuda:1")
    assert call_in_batches(lambda part: part.stop - part.start, 6, room) == [2, 2, 2]
    for device in (None, "cpu"):  # whatever a GPU beside it holds
        assert call_in_batches(lambda part: part.stop - part.start, 6, BatchSize(2, device)) == [2, 2, 2]


def test_room_is_a_third_of_memory_or_of_a_containers(monkeypatch, tmp_path):
    machine, (limit, used) = SimpleNamespace(available=80, total=120), (tmp_path / "limit", tmp_path / "used")
    monkeypatch.setattr(batches.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(batches, "CGROUPS", [(tmp_path / "no such file", used), (limit, used)])
    cpu = torch.device("cpu")
    fits = lambda device=cpu: [n for n in (5, 25, 35, 45) if has_room(n, device)]
    assert fits() == [5, 25, 35]
    for text in ("max", str(2**63)):
        limit.write_text(text)
        used.write_text("10")
        assert fits() == [5, 25, 35]
    limit.write_text("60")
    assert fits() == [5, 25]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 120))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert fits(torch.device("cuda")) == [5, 25]
    assert fits(torch.device("meta")) == []
