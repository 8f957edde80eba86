"""RobustBench: its networks and its weights, which are checked before torch opens them."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import CheckpointError, downloads, temporary_path
from .hub import check_reachable, explain, offline, verify_file
from .loading import Source, read_tensors


def import_robustbench() -> tuple[Any, Any]:
    """(robustbench, its WideResNet). After this, `robustbench.benchmark` works with pyautoattack.

    robustbench 1.1.1 imports `autoattack` but depends on pyautoattack, whose arguments have other names.
    """
    import pyautoattack
    import pyautoattack.state

    sys.modules.setdefault("autoattack", pyautoattack)
    sys.modules.setdefault("autoattack.state", pyautoattack.state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources and timm announce their own deprecations
        import robustbench.eval
        import robustbench.utils
        from robustbench.model_zoo.architectures.wide_resnet import WideResNet
    # an installed torchattacks replaces robustbench.eval by one without AutoAttack
    if getattr(robustbench.eval, "AutoAttack", None) is pyautoattack.AutoAttack:
        robustbench.eval.AutoAttack = _with_benchmarks_arguments(pyautoattack.AutoAttack)
    return robustbench, WideResNet


def before_unpickling() -> Callable[[], Any]:
    """What another process must call before it can read the networks that this one holds."""
    return import_robustbench if "robustbench" in sys.modules else int


def _with_benchmarks_arguments(base: Any) -> type:
    """AutoAttack with the arguments of `robustbench.benchmark`. A `log_path` is refused."""

    class AutoAttack(base):
        def __init__(self, model, *, log_path=None, **settings):
            if log_path is not None:
                logger = "pyautoattack writes no log file; its logger is logging's 'auto-attack'"
                raise ValueError(f"log_path={str(log_path)!r}: {logger}")
            super().__init__(model, **settings)

        def run_standard_evaluation(self, x, y, *, bs=250, **settings):
            return super().run_standard_evaluation(x, y, batch_size=bs, **settings)[0]

    return AutoAttack


def new_wide_resnet(depth: int, widen_factor: int, num_classes: int) -> nn.Module:
    """RobustBench's WideResNet with random weights: images in [0, 1] -> logits [n, num_classes]."""
    return import_robustbench()[1](depth=depth, widen_factor=widen_factor, num_classes=num_classes)


# The entry whose weights are torchvision's: RobustBench has no file of its own for it.
TORCHVISIONS = ("imagenet", "Linf", "Standard_R50")


def _entries(dataset: str, threat: str) -> dict[str, dict]:
    """{name: entry} of a data set and a threat model; empty where RobustBench has none."""
    robustbench, _ = import_robustbench()
    for known, threats in robustbench.model_zoo.model_dicts.items():
        if known.value == dataset:
            return {key.value: entries for key, entries in threats.items()}.get(threat, {})
    return {}


def robustbench_entry(name: str) -> tuple[str, str, str]:
    """("cifar10", "Linf", "Standard") of "robustbench:cifar10/Linf/Standard", if known. Raises ValueError."""
    dataset, threat, model = (name.removeprefix("robustbench:").split("/") + ["", ""])[:3]
    models = _entries(dataset, threat)
    if model not in models:
        choices = f"choose from {sorted(models)}" if models else "expected a name like cifar10/Linf/Standard"
        raise ValueError(f"RobustBench has no {model!r} for {dataset!r} and {threat!r}; {choices}")
    return dataset, threat, model


def robustbench_network(dataset: str, threat: str, model: str) -> nn.Module:
    """The network of an entry, with random weights."""
    if (dataset, threat, model) == TORCHVISIONS:
        model = "Salman2020Do_R50"  # the same network; that of the entry itself would fetch its weights
    return _entries(dataset, threat)[model]["model"]()


def robustbench_file(dataset: str, threat: str, model: str) -> Path:
    """Where the weights of an entry lie: in RobustBench's layout, or torchvision's in torch's cache."""
    if (dataset, threat, model) == TORCHVISIONS:
        return Path(torch.hub.get_dir()) / "checkpoints" / "resnet50-0676ba61.pth"
    return downloads() / "robustbench" / dataset / threat / f"{model}.pt"


def robustbench_page(dataset: str, threat: str, model: str) -> str:
    """The page from which a browser gets the weights of an entry."""
    if (dataset, threat, model) == TORCHVISIONS:
        return "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    return f"https://drive.google.com/uc?id={_entries(dataset, threat)[model]['gdrive_id']}"


def load_robustbench(dataset: str, threat: str, model: str, source: Source) -> nn.Module:
    """`robustbench.utils.load_model`, from a checked file and with weights_only. Raises CheckpointError."""
    file = robustbench_file(dataset, threat, model)
    page = robustbench_page(dataset, threat, model)
    entry, by_hand = f"{dataset}/{threat}/{model}.pt", f"put it there by hand ({page})"
    kept = file.is_file() or offline()
    again = f"fetch it again, or {by_hand}" if kept else f"try again, or {by_hand}, as {file}"
    source.again = f"delete {file}, then {again}" if kept else again
    with contextlib.nullcontext(file) if kept else _fetched(file, page) as path:
        source.digests["robustbench"] = {entry: verify_file(path, "robustbench", entry, again, kept=kept)}
        saved = read_tensors(path, source.again)
        net = robustbench_network(dataset, threat, model)
        inner: Any = net.model if dataset == "imagenet" and hasattr(net, "normalize") else net
        _load_weights(inner, saved.get("state_dict", saved))
    return net


def _load_weights(net: nn.Module, saved: dict[str, Any]) -> None:
    """Load weights saved under DataParallel, or with a normalisation, which the network has of its own."""
    ours, weights = net.state_dict(), {}
    for name, value in saved.items():
        name = name.removeprefix("module.").removeprefix("model.")
        if name in ours or name.split(".")[0] not in ("normalize", "mu", "sigma", "normalizer"):
            weights[name] = value
    net.load_state_dict(weights)


@contextlib.contextmanager
def _fetched(file: Path, page: str) -> Iterator[Path]:
    """`file` under a temporary path, which becomes its own if the block ends well. Raises CheckpointError."""
    import gdown

    folder = temporary_path(file)
    path = folder / file.name
    try:
        try:
            folder.mkdir(parents=True)
            check_reachable(page)
            gdown.download(url=page, output=str(path), quiet=False)
        except Exception as error:  # of the system, the hub's client, gdown and requests
            cause, remedy = explain(error)
            remedy = f"{remedy}, or get it with a browser and put it at {file}"
            raise CheckpointError(
                f"{file.name} could not be fetched from {page}: {cause}; {remedy}"
            ) from None
        yield path
        os.replace(path, file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
