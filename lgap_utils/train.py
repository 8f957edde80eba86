"""Training: the classifier's fine-tuning (paper section 3.2), and the loop that makes the bundled models too.

Each step of `fit` draws its batch and its noise from (seed, step) alone, so a killed run resumes exactly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_labels
from .files import write_whole
from .identity import state_digest
from .noise import generator, seed_of
from .progress import tqdm


def one_cycle(step: int, n_steps: int, warmup: float = 0.1) -> float:
    """Learning-rate factor: linear up to 1 over the share `warmup` of the steps, then a cosine down to 0."""
    rise = max(1, int(warmup * n_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, n_steps - rise)))


def steps(step: int, n_steps: int, warmup: float | None = None) -> float:
    """Learning-rate factor 1, times 0.2 after 30, 60 and 80 % of the steps."""
    return 0.2 ** sum(10 * step >= tenths * n_steps for tenths in (3, 6, 8))


def constant(step: int, n_steps: int, warmup: float) -> float:
    """Learning-rate factor 1."""
    return 1.0


SCHEDULES = {f.__name__: f for f in (one_cycle, steps, constant)}

OPTIMIZERS = {
    "adam": lambda params, s: torch.optim.Adam(params, s.lr, weight_decay=s.weight_decay),
    "adamw": lambda params, s: torch.optim.AdamW(params, s.lr, weight_decay=s.weight_decay),
    "sgd": lambda params, s: torch.optim.SGD(params, s.lr, 0.9, 0, s.weight_decay, s.nesterov),
}


@dataclass(frozen=True)
class Settings:
    """What the result of `fit` depends on, besides the model and its loss."""

    n_steps: int  # of the optimiser
    lr: float  # the highest learning rate
    seed: int = 0
    optimizer: str = "adamw"  # or "adam", or "sgd" with momentum 0.9
    nesterov: bool = True  # for sgd
    weight_decay: float = 0.0
    warmup: float = 0.1  # share of the steps over which `one_cycle` rises
    schedule: str = "one_cycle"  # of SCHEDULES
    bf16: bool = False  # autocast the forward pass
    clip: float | None = None  # the largest norm of the gradient
    ema: float | None = None  # decay of a moving average of the parameters, which replaces them at the end
    data: Any = None  # what else the result depends on, as plain data


class _Run:
    """The model in training, with all that a state file holds of it."""

    def __init__(self, model: nn.Module, settings: Settings, folder: Path):
        self.model, self.settings, self.folder = model, settings, folder
        self.params = [p for p in model.parameters() if p.requires_grad]
        if settings.optimizer not in OPTIMIZERS:
            raise ValueError(f"no optimizer {settings.optimizer!r}; choose from {sorted(OPTIMIZERS)}")
        self.optimizer = OPTIMIZERS[settings.optimizer](self.params, settings)
        self.average = [p.detach().clone() for p in self.params] if settings.ema else []
        self.n_done, self.rows = 0, []
        n_parameters = sum(p.numel() for p in self.params)
        self.config = dataclasses.asdict(settings) | {"parameters": n_parameters}

    def resume(self) -> None:
        """Continue from the state file, if there is one. Raises ValueError for that of another run."""
        file = self.folder / "state.pt"
        if not file.exists():
            return
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            problem = f"{file} cannot be read ({type(error).__name__})"
            raise ValueError(f"{problem}; move it away to start anew") from error
        saved = state["config"]
        if saved != self.config:
            changed = {k: (saved.get(k), v) for k, v in self.config.items() if saved.get(k) != v}
            problem = f"{file} belongs to another run, (there, here): {changed}"
            raise ValueError(f"{problem}; move it away to start anew")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["opt"])
        self.n_done, self.rows = state["step"], state["rows"]
        for average, value in zip(self.average, state["average"]):
            average.copy_(value)

    def save(self) -> None:
        """Write the state file and log.csv."""
        state = {"model": self.model.state_dict(), "opt": self.optimizer.state_dict(), "step": self.n_done}
        state |= {"rows": self.rows, "average": self.average, "config": self.config}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.folder / "state.pt", buffer.getbuffer())
        write_whole(self.folder / "log.csv", pd.DataFrame(self.rows).to_csv(index=False).encode())

    def step(self, loss_of: Callable) -> tuple[Tensor, dict]:
        """One step of the optimiser; returns what `loss_of` does, as (loss, numbers to log)."""
        step, s = self.n_done, self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * SCHEDULES[s.schedule](step, s.n_steps, s.warmup)
        torch.manual_seed(seed_of(s.seed, step, "layers"))  # dropout draws from it
        with torch.autocast(self.params[0].device.type, torch.bfloat16, enabled=s.bf16):
            out = loss_of(step, generator(s.seed, step, "train"))
        loss, numbers = out if isinstance(out, tuple) else (out, {})
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if s.clip:
            nn.utils.clip_grad_norm_(self.params, s.clip)
        self.optimizer.step()
        if s.ema:
            decay = min(s.ema, (step + 1) / (step + 10))
            current = [p.detach() for p in self.params]
            torch._foreach_lerp_(self.average, current, 1 - decay)  # pyright: ignore  # has no public name
        self.n_done += 1
        return loss, numbers

    def log(self, loss: Tensor, numbers: dict, measure: Callable | None) -> None:
        """Add a row about the last step. Raises ValueError for a loss that is not finite."""
        step = self.n_done - 1
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"{self.folder.name}: loss {loss.item()} at step {step}; lower the learning rate"
            )
        if measure:
            self.model.eval()
            numbers = numbers | measure()
            self.model.train()
        numbers = {name: float(torch.as_tensor(value).detach()) for name, value in numbers.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        self.rows.append({"step": step, "lr": lr, "loss": loss.item(), **numbers})


def fit(
    model: nn.Module,
    loss_of: Callable,
    settings: Settings,
    folder: str | Path,
    *,
    save_every: int = 250,
    log_every: int = 50,
    measure: Callable[[], dict] | None = None,
) -> list[dict]:
    """Train `model` in place, from `folder/state.pt` on if it is there; returns the rows of `folder/log.csv`.

    loss_of(step, rng): the scalar loss, or (loss, {name: number to log}); `rng` is a CPU generator.
    measure() -> {name: number}: called in evaluation mode at each logged step. A row has step, lr, loss and
    these numbers. Raises ValueError for a state file of other settings, and for a loss that is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, settings, folder)
    run.resume()
    model.train()
    n = settings.n_steps
    bar = tqdm(range(run.n_done, n), initial=run.n_done, total=n, desc=folder.name, mininterval=5)
    for step in bar:
        loss, numbers = run.step(loss_of)
        if step % log_every == 0 or step == n - 1:
            run.log(loss, numbers, measure)
            bar.set_postfix({k: f"{v:.4g}" for k, v in list(run.rows[-1].items())[2:]}, refresh=False)
        if (step + 1) % save_every == 0 or step == n - 1:
            run.save()
    with torch.no_grad():
        for p, average in zip(run.params, run.average):
            p.copy_(average)
    model.eval()
    return run.rows


class Batches:
    """Indices of each step's batch; an epoch has whole batches only, in an order of (seed, epoch) alone."""

    def __init__(self, n: int, batch_size: int, seed: int = 0):
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self.per_epoch = n // self.batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Indices [batch_size] of one step."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.n, generator=generator(self.seed, epoch, "order"))
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def crop_and_flip(x: Tensor, rng: torch.Generator, pad: int = 4, padding: str = "reflect") -> Tensor:
    """CIFAR's usual augmentation of images [n, 3, h, w]: a random window of the padded image, half mirrored.

    padding: "reflect", or "constant" for black. x may lie on any device; the windows depend on `rng` alone.
    """
    n, _, h, w = x.shape
    x = F.pad(x, (pad,) * 4, mode=padding)
    top = torch.randint(2 * pad + 1, (n, 1, 1), generator=rng) + torch.arange(h).view(1, h, 1)
    left = torch.randint(2 * pad + 1, (n, 1, 1), generator=rng) + torch.arange(w).view(1, 1, w)
    left = torch.where(torch.rand(n, 1, 1, generator=rng) < 0.5, left.flip(2), left)
    image, top, left = (i.to(x.device) for i in (torch.arange(n).view(n, 1, 1), top, left))
    return x[image, :, top, left].permute(0, 3, 1, 2).contiguous()


def hits(model: Callable, x: Tensor, y: Tensor, batch_size: int = 250) -> Tensor:
    """Whether `model` labels each image as y: bool [n]."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1).cpu() for part in x.split(batch_size)]) == y


def accuracy(model: Callable, x: Tensor, y: Tensor, batch_size: int = 250) -> float:
    """Share of the images that `model` labels as y, in [0, 1]."""
    return hits(model, x, y, batch_size).float().mean().item()


def finetune(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    folder: str | Path,
    *,
    epochs: float = 15,
    lr: float = 1e-3,
    batch_size: int = 128,
    schedule: str = "constant",
    augment: bool = False,
    x_val: Tensor,
    y_val: Tensor,
    seed: int = 0,
) -> list[dict]:
    """Fine-tune `net` in place on purified training images (paper sections 3.2 and 4.1): Adam, cross-entropy.

    x, x_val: purified images, uint8 [n, 3, h, w]; y, y_val: labels [n]. schedule: one of SCHEDULES.
    augment: crop and mirror at random. Returns a row an epoch: epoch, loss, and the accuracy on (x, y) and on
    (x_val, y_val), which must be no test images. The last weights count; none are selected.
    Raises TypeError or ValueError for images and labels that do not fit together.
    """
    for name, images, labels in (("x", x, y), ("x_val", x_val, y_val)):
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            shape = f"{images.dtype} {list(images.shape)}"
            raise TypeError(f"{name}: expected images as uint8 [n, 3, h, w], got {shape}")
        check_labels(labels, len(images))
    device = next(net.parameters()).device
    batches, n_val = Batches(len(x), batch_size, seed), len(x_val)

    def loss_of(step, rng):
        rows = batches(step)
        images = (x[rows].float() / 255).to(device)
        if augment:
            images = crop_and_flip(images, rng)
        out = net(images.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(out, y[rows].to(device))

    def measure():
        images = {"train": (x[:n_val], y[:n_val]), "validation": (x_val, y_val)}
        return {name: accuracy(net, u.float().to(device) / 255, v) for name, (u, v) in images.items()}

    n_steps, every = round(epochs * batches.per_epoch), batches.per_epoch
    pixels = hashlib.blake2b(x.numpy().tobytes() + y.numpy().tobytes(), digest_size=8).hexdigest()
    data = [pixels, state_digest(net), batch_size, augment]
    settings = Settings(n_steps, lr, seed, optimizer="adam", schedule=schedule, data=data)
    net.requires_grad_(True)  # paper silent: all layers and the batch statistics train
    rows = fit(net, loss_of, settings, folder, save_every=every, log_every=every, measure=measure)
    net.requires_grad_(False)
    return [{"epoch": row["step"] / batches.per_epoch, **row} for row in rows]
