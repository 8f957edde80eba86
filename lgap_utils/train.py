"""Training: the classifier's fine-tuning (paper section 3.2) and what makes the bundled checkpoints.

Everything runs through one loop, `fit`: a fixed number of steps, each drawing its batch and its noise from
(seed, step) alone, so that a killed run goes on exactly where its last checkpoint was.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .checks import check_labels
from .files import write_whole
from .identity import state_digest
from .noise import generator, seed_of


def one_cycle(step, n_steps, warmup=0.1):
    """Learning-rate factor in [0, 1]: linear up over the first `warmup` of the steps, then a cosine down to 0."""
    rise = max(1, int(warmup * n_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, n_steps - rise)))


def steps(step, n_steps, warmup=None):
    """Learning-rate factor 1, times 0.2 after 30, 60 and 80 % of the steps: at epochs 60, 120 and 160 of 200."""
    return 0.2 ** sum(10 * step >= tenths * n_steps for tenths in (3, 6, 8))


def constant(step, n_steps, warmup):
    """Learning-rate factor 1 throughout."""
    return 1.0


SCHEDULES = {f.__name__: f for f in (one_cycle, steps, constant)}


def save_atomically(obj, path):
    """`torch.save` that leaves either the old file or the new one, never half of one."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_whole(Path(path), buffer.getbuffer())


def fit(
    model,
    loss_of,
    *,
    n_steps,
    lr,
    folder,
    seed=0,
    optimizer="adamw",
    nesterov=True,
    weight_decay=0.0,
    warmup=0.1,
    schedule=one_cycle,
    bf16=False,
    clip=None,
    ema=None,
    save_every=250,
    log_every=50,
    measure=None,
    title=None,
    data=None,
):
    """Train `model` in place for `n_steps` optimiser steps; resume from `folder/state.pt` if it is there.

    loss_of(step, rng) -> scalar loss, or (loss, {name: number}) to log; `rng` is a CPU torch.Generator that depends
    on (seed, step) alone, and so does the global generator, which dropout draws from. optimizer: "adamw", "adam" or "sgd"
    (momentum 0.9, Nesterov's unless switched off). bf16: autocast the forward pass to it. ema: decay of an exponential
    moving average of the parameters, which replaces them at the end. measure() -> {name: number} is called in evaluation
    mode at each logged step. Writes `folder/log.csv` (step, lr, loss, ...), which is also what is returned.
    data: what else the result depends on. Raises ValueError if the folder holds a run of another length, seed or data, or one
    whose loss is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    params = [p for p in model.parameters() if p.requires_grad]
    make = {
        "adamw": lambda: torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay),
        "adam": lambda: torch.optim.Adam(params, lr=lr, weight_decay=weight_decay),
        "sgd": lambda: torch.optim.SGD(
            params, lr=lr, weight_decay=weight_decay, momentum=0.9, nesterov=nesterov
        ),
    }
    if optimizer not in make:
        raise ValueError(f"no optimizer {optimizer!r}; choose from {sorted(make)}")
    opt = make[optimizer]()
    average = [p.detach().clone() for p in params] if ema else []
    rows, start, state_file = [], 0, folder / "state.pt"
    config = {
        "n_steps": n_steps,
        "lr": lr,
        "seed": seed,
        "optimizer": optimizer,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "schedule": schedule.__name__,
        "bf16": bf16,
        "clip": clip,
        "ema": ema,
        "data": data,
        "parameters": sum(p.numel() for p in params),
    }
    if state_file.exists():
        try:
            state = torch.load(state_file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds; all mean the same to the user
            raise ValueError(
                f"{state_file} cannot be read ({type(error).__name__}); move it away to start anew"
            ) from error
        if state["config"] != config:
            changed = {
                k: (state["config"].get(k), v) for k, v in config.items() if state["config"].get(k) != v
            }
            raise ValueError(
                f"{state_file} belongs to another run, (there, here): {changed}; move it away to start anew"
            )
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        start, rows = state["step"], state["rows"]
        for a, saved in zip(average, state["average"]):
            a.copy_(saved)

    def save(step):
        save_atomically(
            {
                "model": model.state_dict(),
                "opt": opt.state_dict(),
                "step": step,
                "rows": rows,
                "average": average,
                "config": config,
            },
            state_file,
        )
        if rows:
            table = io.StringIO(newline="")
            writer = csv.DictWriter(table, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            write_whole(folder / "log.csv", table.getvalue().encode())

    model.train()
    bar = tqdm(range(start, n_steps), initial=start, total=n_steps, desc=title or folder.name, mininterval=5)
    for step in bar:
        for group in opt.param_groups:
            group["lr"] = lr * schedule(step, n_steps, warmup)
        torch.manual_seed(seed_of(seed, step, "layers"))
        with torch.autocast(params[0].device.type, torch.bfloat16, enabled=bf16):
            out = loss_of(step, generator(seed, step, "train"))
        loss, extra = out if isinstance(out, tuple) else (out, {})
        opt.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        opt.step()
        if ema:
            decay = min(ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)
        if step % log_every == 0 or step == n_steps - 1:
            if not math.isfinite(loss.item()):
                raise ValueError(f"{folder.name}: loss {loss.item()} at step {step}; lower the learning rate")
            if measure:
                model.eval()
                extra = {**extra, **measure()}
                model.train()
            rows.append(
                {
                    "step": step,
                    "lr": opt.param_groups[0]["lr"],
                    "loss": loss.item(),
                    **{k: float(torch.as_tensor(v).detach()) for k, v in extra.items()},
                }
            )
            bar.set_postfix(
                {k: f"{v:.4g}" for k, v in rows[-1].items() if k not in ("step", "lr")}, refresh=False
            )
        if (step + 1) % save_every == 0 or step == n_steps - 1:
            save(step + 1)
    if ema:
        with torch.no_grad():
            for p, a in zip(params, average):
                p.copy_(a)
    model.eval()
    return rows


class Batches:
    """Indices of the batch of each step: whole batches of images, none twice an epoch, in an order that depends on (seed, epoch) alone."""

    def __init__(self, n, batch_size, seed=0):
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self.per_epoch = n // self.batch_size
        self._epoch, self._order = None, None

    def __call__(self, step):
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.n, generator=generator(self.seed, epoch, "order"))
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def crop_and_flip(x, rng, pad=4, padding="reflect"):
    """CIFAR's usual augmentation, per image: pad by `pad`, crop at a random place, mirror half of them.

    padding: "reflect", or "constant" for black. x may lie on any device; which crop it gets depends on `rng` alone.
    """
    n, _, h, w = x.shape
    x = F.pad(x, (pad,) * 4, mode=padding)
    top = torch.randint(2 * pad + 1, (n, 1, 1), generator=rng) + torch.arange(h).view(1, h, 1)
    left = torch.randint(2 * pad + 1, (n, 1, 1), generator=rng) + torch.arange(w).view(1, 1, w)
    left = torch.where(torch.rand(n, 1, 1, generator=rng) < 0.5, left.flip(2), left)
    image, top, left = (i.to(x.device) for i in (torch.arange(n).view(n, 1, 1), top, left))
    return x[image, :, top, left].permute(0, 3, 1, 2).contiguous()


def hits(model, x, y, batch_size=250):
    """Whether `model` labels each image as y: bool [n]."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1).cpu() for part in x.split(batch_size)]) == y


def accuracy(model, x, y, batch_size=250):
    """Share of images that `model` labels as y."""
    return hits(model, x, y, batch_size).float().mean().item()


def finetune(
    net,
    x,
    y,
    folder,
    *,
    epochs=15,
    lr=1e-3,
    batch_size=128,
    schedule="constant",
    augment=False,
    x_val,
    y_val,
    seed=0,
):
    """Fine-tune `net` in place on purified training images (paper sections 3.2 and 4.1): Adam, cross-entropy.

    x, x_val: purified images, uint8 [n, 3, h, w]; y, y_val: labels [n]. schedule: one of SCHEDULES, of the learning rate.
    augment: crop at random, mirror half. Returns a row an epoch: epoch, loss, accuracy on the images at hand and on
    (x_val, y_val), which must be no test images. Nothing is selected: the last weights count. Raises TypeError or ValueError
    where images and labels do not belong together.
    """
    for what, images, labels in (("x", x, y), ("x_val", x_val, y_val)):
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise TypeError(
                f"{what}: expected images as uint8 [n, 3, h, w], got {images.dtype} {list(images.shape)}"
            )
        check_labels(labels, len(images))
    device = next(net.parameters()).device
    batches, begins_with = Batches(len(x), batch_size, seed), state_digest(net)
    net.requires_grad_(True)

    def loss_of(step, rng):
        # paper silent: all layers and the batch statistics train
        rows = batches(step)
        images = (x[rows].float() / 255).to(device)
        if augment:
            images = crop_and_flip(images, rng)
        out = net(images.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(out, y[rows].to(device)), {}

    def measure():
        return {
            "train": accuracy(net, x[: len(x_val)].float().to(device) / 255, y[: len(x_val)]),
            "validation": accuracy(net, x_val.float().to(device) / 255, y_val),
        }

    rows = fit(
        net,
        loss_of,
        n_steps=round(epochs * batches.per_epoch),
        lr=lr,
        folder=folder,
        optimizer="adam",
        schedule=SCHEDULES[schedule],
        log_every=batches.per_epoch,
        save_every=batches.per_epoch,
        measure=measure,
        seed=seed,
        title="fine-tune",
        data=[
            hashlib.blake2b(x.numpy().tobytes() + y.numpy().tobytes(), digest_size=8).hexdigest(),
            begins_with,
            batch_size,
            augment,
        ],
    )
    net.requires_grad_(False)
    return [{"epoch": row["step"] / batches.per_epoch, **row} for row in rows]
