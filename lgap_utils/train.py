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

from .attacks import check_labels
from .files import write_whole
from .identity import state_digest
from .keyed import generator, seed_of


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


def fit(model, loss_of, *, n_steps, lr, folder, seed=0, optimizer="adamw", nesterov=True, weight_decay=0.0, warmup=0.1,
        schedule=one_cycle, bf16=False, clip=None, ema=None, save_every=250, log_every=50, measure=None, title=None, data=None):
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
    make = {"adamw": lambda: torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay),
            "adam": lambda: torch.optim.Adam(params, lr=lr, weight_decay=weight_decay),
            "sgd": lambda: torch.optim.SGD(params, lr=lr, weight_decay=weight_decay, momentum=0.9, nesterov=nesterov)}
    if optimizer not in make:
        raise ValueError(f"no optimizer {optimizer!r}; choose from {sorted(make)}")
    opt = make[optimizer]()
    average = [p.detach().clone() for p in params] if ema else []
    rows, start, state_file = [], 0, folder / "state.pt"
    config = {"n_steps": n_steps, "lr": lr, "seed": seed, "optimizer": optimizer, "nesterov": nesterov, "weight_decay": weight_decay,
              "warmup": warmup, "schedule": schedule.__name__, "bf16": bf16, "clip": clip, "ema": ema, "data": data,
              "parameters": sum(p.numel() for p in params)}
    if state_file.exists():
        try:
            state = torch.load(state_file, map_location="cpu", weights_only=True)
        except Exception as error:      # torch raises many kinds; all mean the same to the user
            raise ValueError(f"{state_file} cannot be read ({type(error).__name__}); move it away to start anew") from error
        if state["config"] != config:
            changed = {k: (state["config"].get(k), v) for k, v in config.items() if state["config"].get(k) != v}
            raise ValueError(f"{state_file} belongs to another run, (there, here): {changed}; move it away to start anew")
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        start, rows = state["step"], state["rows"]
        for a, saved in zip(average, state["average"]):
            a.copy_(saved)

    def save(step):
        save_atomically({"model": model.state_dict(), "opt": opt.state_dict(), "step": step, "rows": rows,
                         "average": average, "config": config}, state_file)
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
            rows.append({"step": step, "lr": opt.param_groups[0]["lr"], "loss": loss.item(),
                         **{k: float(torch.as_tensor(v).detach()) for k, v in extra.items()}})
            bar.set_postfix({k: f"{v:.4g}" for k, v in rows[-1].items() if k not in ("step", "lr")}, refresh=False)
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
        return self._order[place * self.batch_size:(place + 1) * self.batch_size]


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


def normal(shape, rng, device):
    """Standard normal numbers on `device` that depend on `rng` alone. A GPU draws its own: the CPU's would take longer than the step."""
    if torch.device(device).type != "cpu":
        rng = torch.Generator(device).manual_seed(int(torch.randint(2 ** 62, (), generator=rng)))
    return torch.randn(shape, generator=rng, device=device)


def hits(model, x, y, batch_size=250):
    """Whether `model` labels each image as y: bool [n]."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1).cpu() for part in x.split(batch_size)]) == y


def accuracy(model, x, y, batch_size=250):
    """Share of images that `model` labels as y."""
    return hits(model, x, y, batch_size).float().mean().item()


# ---------------------------------------------------------------- the classifier

def train_classifier(net, images, folder, *, epochs, batch_size=128, lr=0.2, optimizer="sgd", nesterov=True, weight_decay=5e-4,
                     schedule="one_cycle", augment=True, pad=3, padding="reflect", bf16=False, validation=None,
                     seed=0, device="cpu"):
    """Standard training, cross-entropy on clean images: what the paper calls the raw classifier.

    With images for `validation`, the learning curve has a row an epoch, with the accuracy on them.
    """
    batches = Batches(len(images), batch_size, seed)
    net.to(device, memory_format=torch.channels_last)
    pixels, labels = images.pixels.to(device), images.labels.to(device)

    def loss_of(step, rng):
        rows = batches(step).to(device)
        x, y = pixels[rows].float() / 255, labels[rows]
        if augment:
            x = crop_and_flip(x, rng, pad, padding)
        out = net(x.contiguous(memory_format=torch.channels_last)).float()
        return F.cross_entropy(out, y), {"accuracy": (out.argmax(1) == y).float().mean()}

    def measure():
        return {"validation": accuracy(net, validation.x.to(device), validation.labels)}

    return fit(net, loss_of, n_steps=round(epochs * batches.per_epoch), lr=lr, folder=folder, optimizer=optimizer, nesterov=nesterov,
               weight_decay=weight_decay, warmup=0.15, schedule=SCHEDULES[schedule], bf16=bf16, save_every=batches.per_epoch,
               log_every=batches.per_epoch if validation else 50, measure=measure if validation else None, seed=seed,
               data=[images.source, len(images), batch_size, augment, pad, padding])


def finetune(net, x, y, folder, *, epochs=15, lr=1e-3, batch_size=128, schedule="constant", augment=False, x_val, y_val, seed=0):
    """Fine-tune `net` in place on purified training images (paper sections 3.2 and 4.1): Adam, cross-entropy.

    x, x_val: purified images, uint8 [n, 3, h, w]; y, y_val: labels [n]. schedule: one of SCHEDULES, of the learning rate.
    augment: crop at random, mirror half. Returns a row an epoch: epoch, loss, accuracy on the images at hand and on
    (x_val, y_val), which must be no test images. Nothing is selected: the last weights count. Raises TypeError or ValueError
    where images and labels do not belong together.
    """
    for what, images, labels in (("x", x, y), ("x_val", x_val, y_val)):
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise TypeError(f"{what}: expected images as uint8 [n, 3, h, w], got {images.dtype} {list(images.shape)}")
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
        return {"train": accuracy(net, x[:len(x_val)].float().to(device) / 255, y[:len(x_val)]),
                "validation": accuracy(net, x_val.float().to(device) / 255, y_val)}

    rows = fit(net, loss_of, n_steps=round(epochs * batches.per_epoch), lr=lr, folder=folder, optimizer="adam",
               schedule=SCHEDULES[schedule], log_every=batches.per_epoch, save_every=batches.per_epoch, measure=measure, seed=seed,
               title="fine-tune",
               data=[hashlib.blake2b(x.numpy().tobytes() + y.numpy().tobytes(), digest_size=8).hexdigest(), begins_with, batch_size,
                     augment])
    net.requires_grad_(False)
    return [{"epoch": row["step"] / batches.per_epoch, **row} for row in rows]


# ---------------------------------------------------------------- the captioner

def feature_maps(net, x):
    """A WideResNet's last feature maps [n, channels, h / 4, w / 4], before pooling."""
    return net.relu(net.bn1(net.block3(net.block2(net.block1(net.conv1(x))))))


def train_captioner(captioner, images, captions, folder, *, teacher, epochs, batch_size=64, lr=1e-3, flip=False, bf16=False, seed=0):
    """Teach BLIP the captions (cross-entropy on the next word), on clean, noisy and blurred images alike.

    Half of the images get Gaussian noise of up to 0.1, a quarter a blur: a captioner should be no easier to upset than
    the classifier. A small vision transformer learns shapes slowly by itself, so each of its patches is also asked,
    through a linear read-out that is thrown away, for the `teacher` WideResNet's features at its place in the clean
    image, and the image token for the class. The patch grid must be that of the feature maps: patches of 4 pixels, of
    images of the size that the captioner takes.
    """
    blip, tokenizer = captioner.model.requires_grad_(True), captioner.processor.tokenizer
    device = next(blip.parameters()).device
    text = tokenizer([f"{captioner.prompt} {c}" for c in captions], padding=True, return_tensors="pt")
    ids, mask, pixels, labels_of = (t.to(device) for t in (text.input_ids, text.attention_mask, images.pixels, images.labels))
    mean, std = (torch.tensor(getattr(captioner.processor.image_processor, f"image_{k}"), device=device).view(1, 3, 1, 1)
                 for k in ("mean", "std"))
    ids[:, 0] = blip.config.text_config.bos_token_id
    width, n_features = blip.config.vision_config.hidden_size, teacher.fc.in_features
    readout = nn.ModuleDict({"patch": nn.Linear(width, n_features), "image": nn.Linear(width, len(images.classes))}).to(device)
    batches = Batches(len(images), batch_size, seed)

    def loss_of(step, rng):
        rows = batches(step).to(device)
        x = pixels[rows].float() / 255
        n = len(x)
        if flip:
            x = crop_and_flip(x, rng, pad=3)
        with torch.no_grad():
            features = feature_maps(teacher, x.contiguous(memory_format=torch.channels_last))
            features = F.layer_norm(features.flatten(2).transpose(1, 2), (n_features,))
        blurred = F.avg_pool2d(F.pad(x, (1,) * 4, mode="reflect"), 3, 1)
        x = torch.where(torch.rand(n, 1, 1, 1, generator=rng).to(device) < 0.25, blurred, x)
        sigma = 0.1 * torch.rand(n, 1, 1, 1, generator=rng) * (torch.rand(n, 1, 1, 1, generator=rng) < 0.5)
        x = (x + sigma.to(device) * normal(x.shape, rng, device)).clamp(0, 1)
        words = ids[rows]
        labels = words.masked_fill(mask[rows] == 0, -100)
        out = blip(pixel_values=(x - mean) / std, input_ids=words, attention_mask=mask[rows], labels=labels)
        tokens, y = out.last_hidden_state, labels_of[rows]
        local = F.mse_loss(readout["patch"](tokens[:, 1:]), features)
        guess = readout["image"](tokens[:, 0])
        loss = out.loss + local + 0.5 * F.cross_entropy(guess, y)
        return loss, {"words": out.loss, "local": local, "class": (guess.argmax(1) == y).float().mean()}

    return fit(nn.ModuleList([blip, readout]), loss_of, n_steps=round(epochs * batches.per_epoch), lr=lr, folder=folder,
               weight_decay=0.05, warmup=0.1, clip=1.0, bf16=bf16, seed=seed,
               data=[images.source, batch_size, flip, state_digest(teacher)])


# ---------------------------------------------------------------- the diffusion model

def train_vae(vae, images, folder, *, epochs, batch_size=16, lr=3e-3, kl=1e-8, flip=False, noise=0.0, calm=0.0, bf16=False, seed=0):
    """Autoencoder on pixels: squared and absolute error, and a KL term that only keeps the latents bounded.

    noise: what the latent is made to survive, the standard deviation of a normal noise on the posterior's mode at unit
    variance; sqrt(1 / alpha_bar - 1) is that of a diffusion time. Half of each batch is decoded after it, cleaned by three
    convolutions that are thrown away afterwards: the encoder learns to give each part of an image its share of the power.
    calm: weight of the squared distance, at unit variance, that a latent moves when the image gets a normal noise of 8/255. An
    attack has that much in each pixel, and what it does not move the diffusion's noise need not drown.
    Ends by setting `scaling_factor` so that latents have unit variance, as the diffusion model expects.
    """
    device = next(vae.parameters()).device
    batches, pixels = Batches(len(images), batch_size, seed), images.pixels.to(device)
    vae.requires_grad_(True)
    room = vae.config.latent_channels
    cleaner = nn.Sequential(nn.Conv2d(room, 128, 3, padding=1), nn.SiLU(), nn.Conv2d(128, 128, 3, padding=1), nn.SiLU(),
                            nn.Conv2d(128, room, 3, padding=1)).to(device, memory_format=torch.channels_last) if noise else None

    def loss_of(step, rng):
        x = pixels[batches(step).to(device)].float() / 127.5 - 1
        if flip:
            x = crop_and_flip(x, rng, pad=2)
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        mode, half, seen = posterior.mean.float(), 0, {}
        draw = normal(mode.shape, rng, device)
        if noise:
            spread, half = mode.std(), len(x) // 2
            noisy = mode[:half] / spread + noise * draw[:half]
            z = torch.cat([(noisy / (1 + noise ** 2) + cleaner(noisy)) * spread, mode[half:]])
        else:
            z = mode + posterior.std * draw
        error = (vae.decode(z).sample - x).float()
        loss = error.square().mean() + 0.1 * error.abs().mean() + kl * posterior.kl().mean()
        psnr = -10 * torch.log10(error.detach().square().mean((1, 2, 3)) / 4)
        seen["psnr"] = psnr[half:].mean()
        if noise:
            seen["psnr after noise"] = psnr[:half].mean()
        if calm:
            moved = vae.encode(x + 2 * 8 / 255 * normal(x.shape, rng, device)).latent_dist.mean.float() - mode
            seen["moved"] = (moved / mode.std()).square().mean()
            loss = loss + calm * seen["moved"]
        return loss, seen

    rows = fit(nn.ModuleList([vae, cleaner]) if noise else vae, loss_of, n_steps=round(epochs * batches.per_epoch), lr=lr, folder=folder,
               warmup=0.05, clip=1.0, ema=0.998, bf16=bf16, seed=seed,
               data=[images.source, batch_size, kl, flip, noise, calm])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):       # compiling for another batch size would take longer
        z = torch.cat([vae.encode(part.to(device) * 2 - 1).latent_dist.mean for part in images[:1024].x.split(64)])
    vae.register_to_config(scaling_factor=1 / z.std().item())
    return rows


def train_diffusion(purifier, images, captions, folder, *, epochs, batch_size=64, lr=1e-3, drop=0.1,
                    times=((5, 0, 600), (1, 0, 1000)), mistaken=None, mistakes=0.0, flip=False, bf16=False, seed=0):
    """Teach the UNet and its text encoder to denoise the latents of captioned images: what the scheduler's configuration
    calls `prediction_type`, the noise ("epsilon") or the latent itself ("sample").

    `drop` of the captions are empty, for guidance. times: (weight, from, below) of the intervals that the diffusion times are
    drawn from, evenly in each: most should be where purification is.
    `mistakes` of the rest are the image's `mistaken` caption, that of another class: a captioner errs too, and a model that
    never saw it err could believe every word against what it sees.
    """
    device, unet, vae = purifier.device, purifier.unet, purifier.vae
    length, n_images = purifier.tokenizer.model_max_length, len(images)
    if mistakes and len(mistaken or ()) != n_images:
        raise ValueError(f"mistaken: got {len(mistaken or ())} captions for {n_images} images, expected one each")
    tokens = purifier.tokenizer([*captions, *(mistaken or ()), ""], padding="max_length", max_length=length, truncation=True,
                                return_tensors="pt").input_ids.to(device)
    steps = purifier.scheduler.config.num_train_timesteps
    if any(weight < 0 or not 0 <= low < below <= steps for weight, low, below in times) or sum(weight for weight, *_ in times) <= 0:
        raise ValueError(f"times={times}: expected (weight, from, below) of intervals in 0 to {steps}, some weight above 0")
    weights, lowest, below = (torch.tensor(column, dtype=torch.float32) for column in zip(*times))
    batches, pixels = Batches(n_images, batch_size, seed), images.pixels.to(device)
    for part in (unet, purifier.text_encoder):
        part.requires_grad_(True).train()

    def loss_of(step, rng):
        rows = batches(step).to(device)
        share = lambda *shape: torch.rand(len(rows), *shape, generator=rng).to(device)
        x = pixels[rows].float() / 127.5 - 1
        if flip:
            x = torch.where(share(1, 1, 1) < 0.5, x.flip(3), x)
        with torch.no_grad():                                    # the encoder is frozen, and a small part of the cost
            posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        z = posterior.mean.float()
        if purifier.vae_sample:
            z = z + posterior.std * normal(z.shape, rng, device)
        z = z * vae.config.scaling_factor
        noise = normal(z.shape, rng, device)
        interval = torch.multinomial(weights, len(rows), replacement=True, generator=rng)
        t = (lowest[interval] + torch.rand(len(rows), generator=rng) * (below - lowest)[interval]).long().to(device)
        words = torch.where(share(1) < drop, tokens[-1:], tokens[rows])
        if mistakes:
            words = torch.where((share(1) < mistakes) & (words != tokens[-1:]).any(1, keepdim=True), tokens[n_images + rows], words)
        noisy = purifier.scheduler.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        target = {"epsilon": noise, "sample": z}[purifier.scheduler.config.prediction_type]
        return F.mse_loss(unet(noisy, t, purifier.text_encoder(words).last_hidden_state).sample.float(), target)

    rows = fit(nn.ModuleList([unet, purifier.text_encoder]), loss_of, n_steps=round(epochs * batches.per_epoch), lr=lr, folder=folder,
               weight_decay=0.01, warmup=0.05, clip=1.0, ema=0.999, bf16=bf16, seed=seed,
               data=[images.source, batch_size, drop, [list(interval) for interval in times], mistakes, flip, purifier.vae_sample,
                     state_digest(vae)])
    purifier.requires_grad_(False).eval()
    return rows
