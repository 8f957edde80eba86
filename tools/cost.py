"""What a run will cost, from a dry run: the notebooks' own cells, with stand-ins that only count.

Images and rows are made up, and the models are those of `toy`, which are not asked. Rows that one notebook
has, the next does not ask for again. An attack that may end early is counted to its end. Left out: what the
classifier does alone, fine-tuning included.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

import lgap_utils
from lgap_utils import attacks, data, evaluate, figures, models, purified, toy, train
from lgap_utils.defense import LatentPurifier
from lgap_utils.files import CheckpointError
from lgap_utils.images import Images
from lgap_utils.noise import Keys
from lgap_utils.profiles import REVISIONS, TOY, Profile, get_profile
from lgap_utils.protocols import NATURAL
from tools.needs import Item, models_of
from tools.request import Values
from tools.watch import duration

Costs = dict[Path, tuple[Profile, Counter]]  # {notebook: (its profile, counts)}
Prices = dict[str, tuple[float, float]]  # {what is counted: (best, worst) seconds of one}
SHOWN = 8  # made-up rows of a call, however many images it is about
GRADIENT = 3  # a gradient costs about two more passes than a purification, as in Evaluation.plan
STAND_IN = {"captioner": TOY.captioner, "diffusion": TOY.diffusion, "classifier": TOY.classifier}
STAND_IN |= {"dtype": "float32", "variant": "", "needs_gpu": False}
PRICED = "captioner diffusion size strength num_inference_steps num_beams max_length".split()
# FLOP/s that are assumed: 50 % and 20 % of the 790e12 that an H100 or H200 reaches in bfloat16
RATES = (395e12, 158e12)


class Tally:
    """Stand-ins for what computes in lgap_utils, and a Counter of what they were asked for.

    counts: "captions", purifications "forward" and "gradient", "calls" of the denoiser. "images" and "passes"
    are purifications and calls in which one with a gradient counts GRADIENT times.
    """

    def __init__(self):
        self.counts = Counter()
        self.done = defaultdict(set)  # {(folder, attack) or with a defence: indices}

    def caption(self, captioner, x):
        self.counts["captions"] += len(x)
        return ["a picture"] * len(x)

    def add(self, n, purifier, gradient=False):
        """Count n purifications."""
        weight, calls = GRADIENT if gradient else 1, n * purifier.denoiser_calls
        self.counts["gradient" if gradient else "forward"] += n
        self.counts.update(calls=calls, images=n * weight, passes=calls * weight)

    def purify(self, purifier, x, captions, keys=None, trace=None):
        n = len(keys or x)
        self.add(n, purifier, x.requires_grad)
        if trace is not None:
            trace.times, trace.latents, trace.denoised = [1, 0], [x, x], [x]
        return x.repeat_interleave(n // len(x), 0)

    def purify_rows(self, defense, images, folder, **_):
        self.caption(None, images)
        self.add(len(images), defense.purifier)
        few = images[:SHOWN]
        rows = pd.DataFrame({"index": few.indices, "label": few.labels, "undefended": few.labels})
        pixels = [pixels.numpy().tobytes() for pixels in few.pixels]
        return rows.assign(prediction=few.labels, caption="a picture", linf=0.0, purified=pixels, seconds=0.0)

    def new(self, wanted, *what):
        """Those of the images that were not asked for before."""
        found = set(wanted) - self.done[what]
        self.done[what] |= found
        return found

    def times(self, n, before):
        """What was counted since `before`, for one image, for n."""
        for name, of_one in (self.counts - before).items():
            self.counts[name] += (n - 1) * of_one

    def run(self, evaluation, attack, indices=None, defenses=None):
        """In place of Evaluation.run: `plan`'s trial, scoring as one image costs, the attack as it says."""
        images = evaluation.images
        wanted = images.indices.tolist() if indices is None else [int(i) for i in indices]
        names = list(defenses or evaluation.defenses)
        if attack != NATURAL:
            self.run(evaluation, NATURAL, wanted, names)
        for name in names:
            judged = self.new(wanted, evaluation.folder, attack.name, name)
            before = self.counts.copy()
            if judged:
                evaluation.score(evaluation.defenses[name], images.x[:1], images.indices[:1])
            self.times(len(judged), before)
        if new := self.new(wanted, evaluation.folder, attack.name):
            evaluation.plan(attack, len(new))
            before = self.counts.copy()
            self.counts["captions"] += attack.view in ("caption", "joint")  # of the clean image, to aim at
            forward, gradient = attack.purifications()
            if forward + gradient:  # one caption a look, for all of its draws, or one for the whole attack
                looks = (forward + gradient) // attack.n_eot
                if isinstance(evaluation.target.captioner, models.Captioner):
                    self.counts["captions"] += looks if attack.captions == "anew" else 1
                if attack.view == "one step":  # a denoiser call without guidance is a small part of one
                    gradient = 0
                self.add(forward, evaluation.target.purifier)
                self.add(gradient, evaluation.target.purifier, gradient=True)
            self.times(len(new), before)
        rows = []
        for index in wanted[:SHOWN]:
            for name in names:
                n_draws = evaluation.draws_of(evaluation.defenses[name])
                rows += [(index, name, draw) for draw in range(n_draws)]
        table = pd.DataFrame(rows, columns=["index", "defence", "draw"])
        of_attack = {name: getattr(attack, name) for name in ("eps_255", "n_steps", "n_eot", "success")}
        blank: dict[str, Any] = {"label": 0, "clean": 0, "adversarial": 0, "linf": 0.0, "inside": True}
        blank |= {"caption": "a picture", "caption_clean": "a picture", "flags": "", "seconds": 0.0}
        blank |= {"broke_at": -1, "bad_gradients": 0, "random": True, "change": b""}
        return table.assign(attack=attack.name, **of_attack, **blank)


def made_up(dataset: str, split: str, n: int = 1, start: int = 0, crop: int | None = None) -> Images:
    """In place of load_images: n small grey images, of as few classes as `toy` has."""
    pixels, labels = torch.full((n, 3, 8, 8), 128, dtype=torch.uint8), torch.zeros(n, dtype=torch.long)
    return Images(pixels, labels, torch.arange(start, start + n), toy.CLASSES)


@contextlib.contextmanager
def replaced(stand_ins: dict[Callable, Callable]) -> Iterator[None]:
    """Inside of it, every module of lgap_utils that holds one of these functions holds its stand-in."""
    by_id = {id(function): stand_in for function, stand_in in stand_ins.items()}
    names = [f"lgap_utils.{module.name}" for module in pkgutil.iter_modules(lgap_utils.__path__)]
    modules = [importlib.import_module(name) for name in names]  # one that is imported later would keep them
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if id(value) in by_id:
                    stack.enter_context(mock.patch.object(module, name, by_id[id(value)]))
        yield


def run_cells(path: Path, values: Values) -> None:
    """Run the code cells of a notebook in one namespace, its parameters set to `values`."""
    namespace = {"__name__": path.stem}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "bootstrap" not in tags:
            exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
            namespace |= values if "parameters" in tags else {}


def count(plan: dict[Path, Values]) -> Costs:
    """What a run of the plan, {notebook: parameters}, asks for from nothing."""
    tally, costs = Tally(), {}
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(toy.CLASSES)))
    classifier = net.eval().requires_grad_(False)  # of images of any size
    stand_ins = {
        attacks.pgd: lambda model, x, y, **_: x.clone(),  # the notebooks' own: on the classifier alone
        data.classes_of: lambda dataset: toy.CLASSES,
        data.load_images: made_up,
        purified.purify_rows: tally.purify_rows,
        figures.save_figure: lambda figure, *_: plt.close(figure),
        models.load_classifier: lambda *_, **__: classifier,
        train.finetune: lambda *_, **__: [{"epoch": 1, "loss": 0.0, "train": 1.0, "validation": 1.0}],
    }
    same = {
        "encode": lambda _, x, keys: x.repeat_interleave(len(keys) // len(x), 0),
        "decode": lambda _, z: z,
        "at_working_size": lambda _, x: x,
    }
    plt.switch_backend("agg")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, LGAP_OUTPUTS=folder, LGAP_DEVICE="cpu"))
        stack.enter_context(
            mock.patch.object(models.Captioner, "forward", lambda *args: tally.caption(*args))
        )
        forward = lambda *args: tally.purify(*args)
        stack.enter_context(mock.patch.multiple(LatentPurifier, forward=forward, **same))
        stack.enter_context(mock.patch.object(evaluate.Evaluation, "run", lambda *args: tally.run(*args)))
        stack.enter_context(replaced(stand_ins))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for path, values in plan.items():
            before, settings = tally.counts.copy(), values.get("SETTINGS", {})
            run_cells(path, values | {"SETTINGS": settings | STAND_IN})
            table = re.search(r"_table(\d)", path.stem)
            profile = get_profile(values["PROFILE"], table and int(table[1]), **settings)
            costs[path] = profile, tally.counts - before
    return costs


def timed(profile: Profile, n: int = 8) -> Prices:
    """Of the real captioner and purifier: the best and the worst of five calls with n images."""
    defense = models.load_defense(profile, classifier=lambda x: x)
    x, keys = torch.rand(n, 3, 32, 32).to(defense.purifier.device), Keys(range(n))
    captions = defense.caption(x)
    calls = {
        "captions": (n, lambda: defense.caption(x)),
        "passes": (
            n * defense.purifier.denoiser_calls,
            lambda: defense.purify(x, captions, keys).sum().item(),
        ),
    }
    prices = {}
    for name, (each, call) in calls.items():
        took = []
        for _ in range(6):
            began = time.perf_counter()
            with torch.no_grad():
                call()
            took.append((time.perf_counter() - began) / each)
        prices[name] = min(took[1:]), max(took[1:])  # the first one loads and plans kernels
    return prices


@torch.no_grad()
def flops_of(profile: Profile) -> dict[str, int]:
    """FLOPs of a caption, of coding an image (VAE there and back, two texts) and of a denoiser call.

    Counted on networks of the published configurations, without weights. A caption as if no beam ended early.
    """
    from tools.bench import networks

    def count(call: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    n_beams, n_tokens, size = profile.num_beams, profile.max_length, profile.size
    with torch.device("meta"):
        made: dict[str, Any] = networks()
        unet, vae, blip = made["unet"], made["vae"], made["captioner"]
        x, z = torch.empty(1, 3, size, size), torch.empty(1, 4, size // 8, size // 8)
        photo, seen = torch.empty(1, 3, 384, 384), torch.empty(n_beams, 577, 768)
        text, tokens = torch.empty(1, 77, 768), torch.zeros(2, 77, dtype=torch.long)
        words = torch.zeros(n_beams, n_tokens, dtype=torch.long)
        look = count(lambda: blip.vision_model(photo))
        return {
            "captions": look + count(lambda: blip.text_decoder(input_ids=words, encoder_hidden_states=seen)),
            "images": count(lambda: (vae.encode(x), vae.decode(z), made["text_encoder"](tokens))),
            "passes": count(lambda: unet(z, torch.tensor(1), text)),
        }


def price(profile: Profile) -> tuple[Prices, str]:
    """(prices, where they are from); none where the models are neither here nor of known FLOPs."""
    try:
        device = models.device_of()
    except ValueError as error:
        return {}, f"not timed: {error}"
    parts = [part for part in models_of([profile]) if part.what in ("captioner", "diffusion")]
    here = all(isinstance(part, Item) and not part.absent for part in parts)
    if here and not (profile.needs_gpu and device.type == "cpu"):
        return timed(profile), f"timed just now on {device}: the best and the worst of 5 calls with 8 images"
    if not {profile.captioner, profile.diffusion} <= set(REVISIONS):
        return {}, "not timed: the captioner or the diffusion model is not here"
    flops = flops_of(profile)
    rates = " or ".join(f"{rate / 1e12:.0f}" for rate in RATES)
    where = f"computed from FLOPs, for one GPU that reaches {rates} TFLOP/s (an H100's or H200's 50 or 20 %)"
    return {name: (each / RATES[0], each / RATES[1]) for name, each in flops.items()}, where


def times(costs: Costs) -> tuple[dict[Path, tuple[float, float]], list[str]]:
    """({notebook: its best and its worst time in s}, where the prices are from)."""
    prices, took = {}, {}
    for path, (profile, counts) in costs.items():
        same = tuple(getattr(profile, name) for name in PRICED)
        if same not in prices:
            prices[same] = price(profile)
        each = prices[same][0]
        took[path] = tuple(sum(counts[name] * of[k] for name, of in each.items()) for k in (0, 1))
    return took, list(dict.fromkeys(where for _, where in prices.values()))


def expected(plan: dict[Path, Values]) -> dict[Path, float]:
    """Seconds of each notebook of the plan; none where a model cannot be timed."""
    logging.disable_progress_bar()
    took, _ = times(count(plan))
    return (
        {path: (best + worst) / 2 for path, (best, worst) in took.items()}
        if any(map(any, took.values()))
        else {}
    )


def print_costs(plan: dict[Path, Values]) -> None:
    """Print what each notebook of the plan, {notebook: parameters}, asks for, and how long that takes."""
    logging.disable_progress_bar()
    try:
        costs = count(plan)
    except (CheckpointError, ValueError) as error:  # of the models of `toy`, which stand in
        return print(f"\nwhat a run costs could not be counted: {error}")
    columns = ("captions", "forward", "gradient", "calls")
    heads = "".join(f"{head:>16}" for head in ("captions", "purifications", "with gradient", "calls"))
    print(f"\n{'at most':28}{heads}{'time':>20}")
    took, sources = times(costs)
    for path, (_, counts) in costs.items():
        numbers = "".join(f"{counts[name]:16,}" for name in columns)
        print(f"{path.stem:28}{numbers}{time_range(*took[path]):>20}")
    total = [sum(each[k] for each in took.values()) for k in (0, 1)]
    print(f"{'in all':28}{'':64}{time_range(*total):>20}")
    print(*sources, sep="\n")
    print(f"A gradient counts as {GRADIENT} passes; what the classifier does alone comes on top.")


def time_range(best: float, worst: float) -> str:
    return f"{duration(best)} to {duration(worst)}" if worst else "-"
