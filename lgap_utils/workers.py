"""A run's images, handed out to workers on this machine or on a Ray cluster: docs/many_machines.md.

A worker is a Ray actor with one GPU or one core. It holds a copy of what is run and writes nothing: this
process hands out work, takes rows, and starts anew a worker that was lost.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

TRIES = 4  # of work whose worker was lost each time, and of a start of Ray
_idle: list[Any] = []  # workers that wait for more: one takes seconds to start


class Worker:
    """One process of a cluster."""

    reference, held = None, None

    def hello(self, theirs: str) -> bool:
        """Raise ValueError where this process would compute something else than one with `sources` theirs."""
        if theirs != sources():
            problem = (
                f"the worker on {socket.gethostname()} has another lgap_utils or torch than this process"
            )
            raise ValueError(f"{problem}; install the same commit and requirements.txt there")
        return True

    def run(self, box: list[Any], work: Callable[..., Any], task: Sequence[Any]) -> Any:
        """work(held, *task); box: what to call before, and the reference to `held`, which is fetched once."""
        if box[1] != self.reference:
            ray: Any = importlib.import_module("ray")
            box[0]()
            self.reference, self.held = box[1], None  # makes room first
            self.held = ray.get(box[1]).to(torch.device("cuda" if ray.get_gpu_ids() else "cpu"))
        return work(self.held, *task)


def sources() -> str:
    """Digest of this package and of torch's version: rows of unlike ones must not be mixed."""
    out = hashlib.blake2b(torch.__version__.split("+")[0].encode(), digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        out.update(file.read_bytes())
    return out.hexdigest()


def connected(n: int) -> Any:
    """The module `ray`, connected to $LGAP_RAY_ADDRESS, or to a cluster that ends with this process.

    That one listens on the loopback only. Raises ModuleNotFoundError or ConnectionError.
    """
    address = os.environ.get("LGAP_RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # a busy machine takes long
    if not address:  # as Ray does on macOS and Windows: the loopback, and no other machine
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        remedy = "install it with: python -m pip install 'ray>=2.50'"
        raise ModuleNotFoundError(f"workers={n}: Ray is not installed; {remedy}") from None
    if ray.is_initialized():
        return ray
    where: dict[str, Any] = {"address": address or "local"}
    if not address:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # where Ray had been imported before
        where |= {"num_cpus": max(n, os.cpu_count() or 1), "include_dashboard": False}
    code = ray.job_config.JobConfig(code_search_path=[path for path in sys.path if Path(path).is_dir()])
    for tries_left in reversed(range(1 if address else TRIES)):
        try:
            ray.init(**where, job_config=code, log_to_driver=False, logging_level="ERROR")
            _idle.clear()
            break
        except Exception as error:  # a bare Exception says that a busy machine took longer than 30 s
            ray.shutdown()
            if not tries_left:
                place = f"the cluster at LGAP_RAY_ADDRESS={address}" if address else "Ray on this machine"
                raise ConnectionError(f"workers={n}: {place} did not answer ({error})") from error
    return ray


def spread(
    held: Any, device: Any, work: Callable[..., Any], tasks: Iterable[Any], n: int, say: Any, first: Any = int
) -> Iterator[Any]:
    """work(held, *task) of each task: here in their order for n = 0, else by n workers, as they end.

    held: anything with to(device), here on `device`; work: a function of a module. say(text): is told how
    many workers there are; first(): is called in a worker before it gets `held`. An error of `work` is raised
    as it is, RuntimeError where TRIES workers were lost at a task, ValueError for one with other `sources`.
    """
    if not n:
        yield from (work(held, *task) for task in tasks)
        return
    ray, tasks = connected(n), list(tasks)
    try:  # by way of main memory, as a worker's GPU is another
        box = [first, ray.put(held.to(torch.device("cpu")))]
    finally:
        held.to(device)
    on_gpu = ray.cluster_resources().get("GPU") and "cpu" not in os.environ.get("LGAP_DEVICE", "")
    new = lambda: ray.remote(Worker).options(num_cpus=1, num_gpus=1 if on_gpu else 0).remote()
    greet = lambda worker: (worker.hello.remote(sources()), (worker, None))
    # {what is awaited: (its worker, the place of its task; None: of its start)}
    running: dict[Any, tuple[Any, int | None]] = dict(
        greet(_idle.pop() if _idle else new()) for _ in range(min(n, len(tasks)))
    )
    todo, lost, ready = deque(range(len(tasks))), [], 0
    try:
        while todo or any(place is not None for _, place in running.values()):
            (done,), _ = ray.wait(list(running), num_returns=1)
            worker, place = running.pop(done)
            if (answer := _answer(ray, done)) is None:
                lost.append(place)
                if lost[-TRIES:].count(None) == TRIES or place is not None and lost.count(place) == TRIES:
                    raise RuntimeError(f"a worker was lost {TRIES} times at the same work")
                if place is not None:
                    todo.appendleft(place)
                    ready -= 1
                running |= [greet(new())]
                continue
            ready += place is None
            if todo:
                following = todo.popleft()
                running[worker.run.remote(box, work, tasks[following])] = worker, following
            else:
                _idle.append(worker)
            say(f"{ready} of {n} workers" + (f", {len(lost)} lost" if lost else ""))
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
