"""A run's images, handed out to workers on this machine or on a Ray cluster: docs/many_machines.md.

A worker is a Ray actor with one GPU, or one core, and a copy of what is run. It writes nothing: this process
hands out work, takes up rows, and starts a worker anew that was lost.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

TRIES = 5  # of work whose worker was lost each time, and of a start of Ray
_idle: list[Any] = []  # workers that wait for more: one takes seconds to start


class Worker:
    """One process of a cluster."""

    name, held = None, None

    def hello(self) -> tuple[str, str]:
        """(this machine, `sources` there)."""
        return socket.gethostname(), sources()

    def run(self, name: str, box: list[Any], work: Callable[..., Any], task: Sequence[Any]) -> Any:
        """work(held, *task); box holds a reference to `held`, which is fetched once for each `name`."""
        if name != self.name:
            import ray

            self.name, self.held = name, None  # makes room first
            self.held = ray.get(box[0]).to(torch.device("cuda" if ray.get_gpu_ids() else "cpu"))
        return work(self.held, *task)


def sources() -> str:
    """Digest of this package and of torch's version: rows of unlike ones must not be mixed."""
    out = hashlib.blake2b(torch.__version__.split("+")[0].encode(), digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        out.update(file.read_bytes())
    return out.hexdigest()


def connected(n: int) -> Any:
    """The module `ray`, connected to $LGAP_RAY_ADDRESS, or else to a cluster of this process alone.

    That one listens on the loopback only and ends with this process. Raises ModuleNotFoundError without Ray,
    ConnectionError for no answer.
    """
    address = os.environ.get("LGAP_RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # a busy machine takes long
    if not address:  # as Ray does on macOS and Windows: the loopback, and no other machine
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        remedy = "install it with: python -m pip install 'ray>=2.50'"
        raise ModuleNotFoundError(f"workers={n}: Ray is not installed; {remedy}") from None
    if ray.is_initialized():
        return ray
    where: dict[str, Any] = {"address": address} if address else {"address": "local"}
    if not address:
        where |= {"num_cpus": max(n, os.cpu_count() or 1), "include_dashboard": False}
    code = ray.job_config.JobConfig(code_search_path=[path for path in sys.path if Path(path).is_dir()])
    for tried in range(TRIES):
        try:
            ray.init(**where, job_config=code, log_to_driver=False, logging_level="ERROR")
            _idle.clear()
            return ray
        except Exception as error:  # a bare Exception says that a busy machine took longer than 30 s
            ray.shutdown()
            if address or tried == TRIES - 1:
                place = f"a Ray cluster at LGAP_RAY_ADDRESS={address}" if address else "Ray on this machine"
                raise ConnectionError(f"workers={n}: {place} did not answer ({error})") from error
            time.sleep(1)


def spread(
    held: Any, device: Any, work: Callable[..., Any], tasks: Iterable[Sequence[Any]], n: int, say: Any
) -> Iterator[Any]:
    """work(held, *task) of each task: here in their order for n = 0, else by n workers, as they end.

    held: anything with to(device), here on `device`; work: a function of a module. say(text): is told how
    many workers there are. An error of `work` is raised as it is, RuntimeError for a task that took a worker
    along TRIES times, and ValueError for a worker with other sources.
    """
    if not n:
        yield from (work(held, *task) for task in tasks)
        return
    ray, tasks = connected(n), list(tasks)
    try:  # by way of main memory, as a worker's GPU is another
        box = [ray.put(held.to(torch.device("cpu")))]
    finally:
        held.to(device)
    on_gpu = ray.cluster_resources().get("GPU") and not os.environ.get("LGAP_DEVICE", "").startswith("cpu")
    new = lambda: ray.remote(Worker).options(num_cpus=1, num_gpus=1 if on_gpu else 0).remote()
    todo, lost, ready = deque(range(len(tasks))), Counter(), 0
    # {what is awaited: (its worker, the place of its task; None: of its start)}
    running: dict[Any, tuple[Any, int | None]] = {}
    for worker in [_idle.pop() if _idle else new() for _ in range(min(n, len(tasks)))]:
        running[worker.hello.remote()] = worker, None
    try:
        while todo or any(place is not None for _, place in running.values()):
            (done,), _ = ray.wait(list(running), num_returns=1)
            worker, place = running.pop(done)
            answer = _answer(ray, done)
            if answer is None:
                lost[place] += 1
                if lost[place] == TRIES:
                    raise RuntimeError(
                        f"a worker was lost {TRIES} times at the same work; its memory is full?"
                    )
                todo.extendleft([] if place is None else [place])
                ready -= place is not None
                worker = new()
                running[worker.hello.remote()] = worker, None
                continue
            if place is None:
                check_sources(*answer)
                ready, lost[None] = ready + 1, 0
            if todo:
                following = todo.popleft()
                call = worker.run.remote(box[0].hex(), box, work, tasks[following])
                running[call] = worker, following
            else:
                _idle.append(worker)
            say(f"{ready} of {n} workers, {lost.total()} lost" if lost.total() else f"{ready} of {n} workers")
            if place is not None:
                yield answer
    finally:
        for worker, _ in running.values():
            ray.kill(worker)


def _answer(ray: Any, done: Any) -> Any:
    """What a worker answered; None where it was lost. Its error is raised as it was."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayActorError:
        return None


def check_sources(machine: str, theirs: str) -> None:
    """Raise ValueError where a worker would compute something else."""
    if theirs != sources():
        problem = f"the worker on {machine} has another lgap_utils or torch than this process"
        raise ValueError(f"{problem}; install the same commit and requirements.txt there")
