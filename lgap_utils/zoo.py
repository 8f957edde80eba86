"""zoo."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

import torch

from .files import CheckpointError, downloads, temporary_path
from .hub import check_reachable, explain, offline, verify_file


def read_tensors(file, again):
    """What a pickle of tensors holds; one that holds anything else is refused, as opening it could run code."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch's own words advise to switch the protection off
        raise CheckpointError(
            f"{file} is refused: it is damaged, or holds more than tensors, which could run code "
            f"as it is opened; {again}"
        ) from None


# ---------------------------------------------------------------- classifier


def import_robustbench():
    """(robustbench, its WideResNet). robustbench 1.1.1 imports `autoattack` but depends on `pyautoattack`, the same code under its
    new name and with other arguments: after this, `robustbench.benchmark` works with it."""
    import warnings

    import pyautoattack
    import pyautoattack.state

    sys.modules.setdefault("autoattack", pyautoattack)
    sys.modules.setdefault("autoattack.state", pyautoattack.state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources and timm announce their own deprecations
        import robustbench.eval
        import robustbench.utils
        from robustbench.model_zoo.architectures.wide_resnet import WideResNet
    if (
        getattr(robustbench.eval, "AutoAttack", None) is pyautoattack.AutoAttack
    ):  # an installed torchattacks leaves none
        robustbench.eval.AutoAttack = _benchmarks_autoattack(pyautoattack.AutoAttack)
    return robustbench, WideResNet


def _benchmarks_autoattack(base):
    """AutoAttack with the arguments that `robustbench.benchmark` hands over; a `log_path` is refused, as no log is written."""

    class AutoAttack(base):
        def __init__(self, model, *, log_path=None, **settings):
            if log_path is not None:
                raise ValueError(
                    f"log_path={str(log_path)!r}: pyautoattack writes no log file; its logger is logging's 'auto-attack'"
                )
            super().__init__(model, **settings)

        def run_standard_evaluation(self, x, y, *, bs=250, **settings):
            return super().run_standard_evaluation(x, y, batch_size=bs, **settings)[0]

    return AutoAttack


def new_wide_resnet(depth, widen_factor, num_classes):
    """RobustBench's WideResNet with random weights; it takes images in [0, 1] as they are."""
    return import_robustbench()[1](depth=depth, widen_factor=widen_factor, num_classes=num_classes)


# ---------------------------------------------------------------- RobustBench's classifiers


def _zoo():
    """{dataset: {threat model: {name: entry}}}, by their plain names."""
    zoo = import_robustbench()[0].model_zoo.model_dicts
    return {d.value: {t.value: entries for t, entries in threats.items()} for d, threats in zoo.items()}


def robustbench_entry(name):
    """("cifar10", "Linf", "Standard") of "robustbench:cifar10/Linf/Standard"; raises ValueError, with the choices, for an unknown one."""
    dataset, threat, model = (name.removeprefix("robustbench:").split("/") + ["", ""])[:3]
    models = _zoo().get(dataset, {}).get(threat, {})
    if model not in models:
        raise ValueError(
            f"RobustBench has no {model!r} for {dataset!r} and {threat!r}; choose from {sorted(models) or sorted(_zoo())}"
        )
    return dataset, threat, model


def robustbench_network(dataset, threat, model):
    """The network of an entry, with random weights."""
    if (dataset, model) == (
        "imagenet",
        "Standard_R50",
    ):  # RobustBench's own would fetch torchvision's weights as it is built;
        model = "Salman2020Do_R50"  # this is the same network, normalisation included
    return _zoo()[dataset][threat][model]["model"]()


def robustbench_file(dataset, threat, model):
    """Where the weights of an entry lie: in RobustBench's own layout, but for torchvision's ResNet-50, which has torch's cache."""
    if (dataset, model) == ("imagenet", "Standard_R50"):
        return Path(torch.hub.get_dir()) / "checkpoints" / "resnet50-0676ba61.pth"
    return downloads() / "robustbench" / dataset / threat / f"{model}.pt"


def load_robustbench(dataset, threat, model, read):
    """As robustbench.utils.load_model, but the file is checked before torch opens it, and opened with weights_only."""
    file, source = robustbench_file(dataset, threat, model), f"{dataset}/{threat}/{model}.pt"
    page = robustbench_page(dataset, threat, model)
    by_hand = f"put it there by hand ({page})"
    kept = file.is_file() or offline()
    with contextlib.nullcontext(file) if kept else _fetched(file, page) as found:
        again = f"fetch it again, or {by_hand}" if kept else f"try again, or {by_hand}, as {file}"
        read.digests["robustbench"] = {source: verify_file(found, "robustbench", source, again, kept=kept)}
        read.again = f"delete {file}, then {again}" if kept else again
        saved = read_tensors(found, read.again)
        net = robustbench_network(dataset, threat, model)
        inner = net.model if dataset == "imagenet" and hasattr(net, "normalize") else net
        _take(inner, saved["state_dict"] if "state_dict" in saved else saved)
    return net


def _take(net, weights):
    """Load weights saved under DataParallel, or beside a normalisation, which is the network's own here; all must fit."""
    weights = {k.removeprefix("module.").removeprefix("model."): v for k, v in dict(weights).items()}
    ours = set(net.state_dict())
    foreign = {
        k for k in weights if k not in ours and k.split(".")[0] in ("normalize", "mu", "sigma", "normalizer")
    }
    net.load_state_dict({k: v for k, v in weights.items() if k not in foreign})


def robustbench_page(dataset, threat, model):
    """The page that a browser gets the file of an entry from."""
    if (dataset, model) == ("imagenet", "Standard_R50"):
        return "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    return f"https://drive.google.com/uc?id={_zoo()[dataset][threat][model]['gdrive_id']}"


@contextlib.contextmanager
def _fetched(file, page):
    """`file` from a page, in a folder of its own: it takes its place only if all that is done with it goes well."""
    import gdown

    part = temporary_path(file)
    try:
        try:
            part.mkdir(parents=True)
            check_reachable(page)
            gdown.download(url=page, output=str(part / file.name), quiet=False)
        except Exception as error:  # of the system, the hub's client, gdown and requests
            cause, remedy = explain(error)
            raise CheckpointError(
                f"{file.name} could not be fetched from {page}: {cause}; {remedy}, or get it with a "
                f"browser and put it at {file}"
            ) from None
        yield part / file.name
        os.replace(part / file.name, file)
    finally:
        shutil.rmtree(part, ignore_errors=True)
