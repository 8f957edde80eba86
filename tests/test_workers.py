"""Workers make the rows that one process makes, whoever is killed meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cheap_defense import ATTACK, SEED, Noisy, evaluation, net, same, some_images, words

from lgap_utils import models, profiles, workers
from lgap_utils.baselines import with_baselines
from lgap_utils.defense import LGAP
from lgap_utils.evaluate import Evaluation
from lgap_utils.images import Images
from lgap_utils.noise import generator
from lgap_utils.protocols import NATURAL
from lgap_utils.purified import purify_rows

if find_spec("ray") is None:
    pytest.skip("Ray is not installed: python -m pip install 'ray>=2.50'", allow_module_level=True)


starts_ray = pytest.mark.skipif(
    not os.environ.get("LGAP_RAY"),
    reason="starts Ray, which gives up on a busy machine; set LGAP_RAY=1 on a quiet one",
)


@pytest.fixture(scope="module", autouse=True)
def own_cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LGAP_RAY_ADDRESS", raising=False)
        yield
    import ray

    ray.shutdown()


class Deadly(Noisy):
    """It kills its process at its first call with a key of one of these images, once each."""

    def __init__(self, folder=None, deadly=()):
        super().__init__()
        self.folder, self.deadly = folder, deadly

    settings = lambda self: {"class": "Noisy", "strength": self.strength}

    def __call__(self, x, captions, keys):
        for index in {*keys.indices} & {*self.deadly}:
            mark = self.folder / f"killed at {index}"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(x, captions, keys)


@starts_ray
def test_three_workers_are_killed_and_the_rows_are_those_of_one_process(unbroken, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("tqdm.std.tqdm.set_postfix_str", lambda bar, text, **_: said.append(text))
    marks = tmp_path / "marks"
    marks.mkdir()
    run = evaluation(tmp_path / "rows", purifier=Deadly(marks, (10, 19, 31)), batch_size=1, workers=2)
    run.plan = lambda attack, n: {"text": "", "cost": 1}  # which would kill this process
    assert same(run.run(ATTACK), unbroken[1])
    assert len(list(marks.iterdir())) == 3
    assert any(text.endswith(" lost") for text in said)
    assert same(evaluation(tmp_path / "rows", batch_size=3).run(ATTACK), unbroken[1])


KILLED = """
import os, signal, sys
from cheap_defense import ATTACK, evaluation
from lgap_utils.rows import Rows
write, written = Rows.write, []
def killing(self, rows):
    write(self, rows)
    written.append(rows)
    if len(written) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
Rows.write = killing
evaluation(sys.argv[1], batch_size=2, workers=2).run(ATTACK)
"""


@starts_ray
def test_the_driver_is_killed_and_goes_on(unbroken, tmp_path):
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "11"],
        env=os.environ | paths,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    purifier = Noisy()
    kept = len(list(tmp_path.rglob("*.parquet")))
    assert kept == 11
    assert same(evaluation(tmp_path, batch_size=2, purifier=purifier, workers=2).run(ATTACK), unbroken[1])
    assert len(list(tmp_path.rglob("*.parquet"))) > kept


@starts_ray
def test_purified_images_are_those_of_one_process(tmp_path):
    images, defense = some_images(), LGAP(words, Noisy(), net)
    settings = {"config": {}, "seed": SEED, "batch_size": 3}
    alone = purify_rows(defense, images, tmp_path / "alone", **settings)
    assert same(purify_rows(defense, images, tmp_path / "workers", workers=2, **settings), alone)
    assert same(purify_rows(defense, images, tmp_path / "workers", **settings), alone)


@starts_ray
def test_the_networks_of_toy_say_the_same_in_a_worker(tmp_path):
    p = profiles.get_profile("toy", num_inference_steps=4, num_beams=2, max_length=8)
    defense = models.load_defense(p, device="cpu")
    pixels = (255 * torch.rand(4, 3, 32, 32, generator=generator("workers"))).byte()
    images = Images(pixels, torch.zeros(4, dtype=torch.long), torch.arange(4), defense.classes)
    defenses = {n: d for n, d in with_baselines(defense, 32).items() if n in ("LGAP", "VAE round trip")}
    tables = []
    for n in (0, 2):
        how = {"config": {}, "n_draws": 2, "batch_size": 2, "workers": n}
        tables.append(Evaluation(defenses, images, tmp_path / str(n), **how).run(NATURAL))
    assert same(*tables)


class Wrong(Noisy):
    def __call__(self, x, captions, keys):
        raise ArithmeticError("not today")


@starts_ray
def test_an_error_of_a_worker_is_raised_as_it_was(tmp_path):
    run = evaluation(tmp_path, purifier=Wrong(), workers=2)
    run.plan = lambda attack, n: {"text": "", "cost": 1}
    with pytest.raises(ArithmeticError, match="^not today$"):
        run.run(ATTACK)
    defense = LGAP(words, Noisy(), net)
    assert len(purify_rows(defense, some_images(), tmp_path / "after", config={}, workers=2)) == 8


@starts_ray
def test_a_task_that_takes_every_worker_along_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "TRIES", 2)
    spread = workers.spread(Moved(), "cpu", die, [()], 1, lambda text: None)
    with pytest.raises(RuntimeError, match="a worker was lost 2 times at the same work"):
        list(spread)


class Moved:
    to = lambda self, device: self


def die(held):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_with_other_sources_is_refused():
    assert workers.Worker().hello(workers.sources())
    with pytest.raises(ValueError, match="the worker on .* has another lgap_utils .*the same commit"):
        workers.Worker().hello("0123")


def test_without_ray_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    says = r"^workers=2: Ray is not installed; install it with: python -m pip install 'ray>=2.50'$"
    with pytest.raises(ModuleNotFoundError, match=says):
        evaluation(tmp_path, workers=2).run(ATTACK)


@pytest.mark.parametrize("n", [-1, 1.5, True, "2"])
def test_a_number_of_workers_that_is_none_is_refused(n, tmp_path):
    for call in (
        lambda: evaluation(tmp_path, workers=n),
        lambda: purify_rows(LGAP(words, Noisy(), net), some_images(), tmp_path, config={}, workers=n),
    ):
        with pytest.raises(ValueError, match="workers=.*: expected a whole number of at least 0"):
            call()


def listening():
    """Addresses, in hexadecimal digits, at which this process and all that it started listen."""
    parents, family, inodes = {}, {os.getpid()}, set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for _ in range(5):
        family |= {child for child, parent in parents.items() if parent in family}
    for pid in family:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                yield fields[1].split(":")[0]


@starts_ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_port_is_open_beyond_the_loopback():
    workers.connected(2)
    found = list(listening())
    assert len(found) > 3 and {address[-8:] for address in found} <= {"0100007F", "01000000"}


@starts_ray
def test_two_machines_of_a_cluster_share_the_images(unbroken, tmp_path, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    said, one = [], {"num_cpus": 1, "include_dashboard": False}
    monkeypatch.setattr("tqdm.std.tqdm.set_postfix_str", lambda bar, text, **_: said.append(text))
    cluster = Cluster(initialize_head=True, head_node_args=one)
    try:
        monkeypatch.setenv("LGAP_RAY_ADDRESS", cluster.address)
        cluster.add_node(num_cpus=1)
        assert same(evaluation(tmp_path, batch_size=1, workers=2).run(ATTACK), unbroken[1])
        assert said[-1].endswith(
            " right so far, 2 of 2 workers"
        )  # each needs a core, and each machine has one
        assert len({node["NodeID"] for node in ray.nodes() if node["Alive"]}) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()


@starts_ray
def test_a_cluster_that_does_not_answer_is_told_in_one_sentence(monkeypatch):
    import ray

    ray.shutdown()
    monkeypatch.setenv("LGAP_RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("refused")))
    says = "workers=2: the cluster at LGAP_RAY_ADDRESS=127.0.0.1:9 did not answer .*refused"
    with pytest.raises(ConnectionError, match=says):
        workers.connected(2)
