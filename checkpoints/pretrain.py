"""How the parts of the bundled models are trained: classifier, captioner, autoencoder and diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgap_utils.defense import LatentPurifier
from lgap_utils.identity import state_digest
from lgap_utils.images import Images
from lgap_utils.models import Captioner
from lgap_utils.train import Batches, Settings, accuracy, crop_and_flip, fit


def normal(shape: Sequence[int], rng: torch.Generator, device: Any) -> Tensor:
    """Standard normal numbers on `device`, from `rng` alone. A GPU draws its own, which is faster."""
    if torch.device(device).type != "cpu":
        rng = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng)))
    return torch.randn(shape, generator=rng, device=device)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- the classifier


def train_classifier(
    net: nn.Module,
    images: Images,
    folder: Path,
    *,
    epochs: float,
    batch_size: int = 128,
    lr: float = 0.2,
    optimizer: str = "sgd",
    nesterov: bool = True,
    weight_decay: float = 5e-4,
    schedule: str = "one_cycle",
    augment: bool = True,
    pad: int = 3,
    padding: str = "reflect",
    bf16: bool = False,
    validation: Images | None = None,
    seed: int = 0,
    device: Any = "cpu",
) -> list[dict]:
    """Standard training, cross-entropy on clean images: the paper's raw classifier. Returns its curve.

    With `validation` images, the curve has a row an epoch, with the accuracy on them.
    """
    batches = Batches(len(images), batch_size, seed)
    net.to(device, memory_format=torch.channels_last)
    pixels, labels = images.pixels.to(device), images.labels.to(device)

    def loss_of(step, rng):
        rows = batches(step).to(device)
        x, y = pixels[rows].float() / 255, labels[rows]
        if augment:
            x = crop_and_flip(x, rng, pad, padding)
        out = net(_channels_last(x)).float()
        return F.cross_entropy(out, y), {"accuracy": (out.argmax(1) == y).float().mean()}

    every = {"save_every": batches.per_epoch}
    if validation:
        x_val, y_val = validation.x.to(device), validation.labels
        measure = lambda: {"validation": accuracy(net, x_val, y_val)}
        every |= {"log_every": batches.per_epoch, "measure": measure}
    data = [images.source, len(images), batch_size, augment, pad, padding]
    n_steps, decay = round(epochs * batches.per_epoch), weight_decay
    settings = Settings(n_steps, lr, seed, optimizer, nesterov, decay, 0.15, schedule, bf16, data=data)
    return fit(net, loss_of, settings, folder, **every)


# ---------------------------------------------------------------- the captioner


def feature_maps(net: Any, x: Tensor) -> Tensor:
    """A WideResNet's last feature maps [n, channels, h / 4, w / 4], before pooling."""
    return net.relu(net.bn1(net.block3(net.block2(net.block1(net.conv1(x))))))


def _disturbed(x: Tensor, rng: torch.Generator) -> Tensor:
    """A quarter of the images blurred, then half of them with Gaussian noise of up to 0.1. x [n, 3, h, w]."""
    uniform = lambda: torch.rand(len(x), 1, 1, 1, generator=rng)
    blurred = F.avg_pool2d(F.pad(x, (1,) * 4, mode="reflect"), 3, 1)
    x = torch.where(uniform().to(x.device) < 0.25, blurred, x)
    sigma = 0.1 * uniform() * (uniform() < 0.5)
    return (x + sigma.to(x.device) * normal(x.shape, rng, x.device)).clamp(0, 1)


def train_captioner(
    captioner: Captioner,
    images: Images,
    captions: list[str],
    folder: Path,
    *,
    teacher: Any,
    epochs: float,
    batch_size: int = 64,
    lr: float = 1e-3,
    flip: bool = False,
    bf16: bool = False,
    seed: int = 0,
) -> list[dict]:
    """Teach BLIP the captions (cross-entropy on the next word) on clean, noisy and blurred images.

    The disturbed images should make the captioner as hard to upset as the classifier. A small vision
    transformer learns shapes slowly from captions alone. So a linear read-out, which is thrown away, learns
    two more things: from each patch the features of the `teacher` WideResNet for the clean image, and from
    the image token the class. Patches must be 4 pixels wide, as are those of the feature maps.
    """
    blip, tokenizer = captioner.model.requires_grad_(True), captioner.processor.tokenizer
    device = next(blip.parameters()).device
    text = tokenizer([f"{captioner.prompt} {c}" for c in captions], padding=True, return_tensors="pt").to(
        device
    )
    ids, mask = text.input_ids, text.attention_mask
    ids[:, 0] = blip.config.text_config.bos_token_id
    pixels, classes = images.pixels.to(device), images.labels.to(device)
    width, n_features = blip.config.vision_config.hidden_size, teacher.fc.in_features
    readout = {"patch": nn.Linear(width, n_features), "image": nn.Linear(width, len(images.classes))}
    readout = nn.ModuleDict(readout).to(device)
    processor = captioner.processor.image_processor
    mean = torch.tensor(processor.image_mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_std, device=device).view(1, 3, 1, 1)
    batches = Batches(len(images), batch_size, seed)

    def loss_of(step, rng):
        rows = batches(step).to(device)
        x = pixels[rows].float() / 255
        if flip:
            x = crop_and_flip(x, rng, pad=3)
        with torch.no_grad():
            features = feature_maps(teacher, _channels_last(x)).flatten(2).transpose(1, 2)
            features = F.layer_norm(features, (n_features,))
        x = (_disturbed(x, rng) - mean) / std
        labels = ids[rows].masked_fill(mask[rows] == 0, -100)
        out = blip(pixel_values=x, input_ids=ids[rows], attention_mask=mask[rows], labels=labels)
        tokens, y = out.last_hidden_state, classes[rows]
        local = F.mse_loss(readout["patch"](tokens[:, 1:]), features)
        guess = readout["image"](tokens[:, 0])
        loss = out.loss + local + 0.5 * F.cross_entropy(guess, y)
        return loss, {"words": out.loss, "local": local, "class": (guess.argmax(1) == y).float().mean()}

    data = [images.source, batch_size, flip, state_digest(teacher)]
    n_steps = round(epochs * batches.per_epoch)
    settings = Settings(n_steps, lr, seed, weight_decay=0.05, warmup=0.1, clip=1.0, bf16=bf16, data=data)
    return fit(nn.ModuleList([blip, readout]), loss_of, settings, folder)


# ---------------------------------------------------------------- the autoencoder


def _cleaner(channels: int) -> nn.Sequential:
    """Three convolutions that clean a noisy latent [n, channels, h, w]."""
    sizes = ((channels, 128), (128, 128), (128, channels))
    first, middle, last = (nn.Conv2d(n_in, n_out, 3, padding=1) for n_in, n_out in sizes)
    return nn.Sequential(first, nn.SiLU(), middle, nn.SiLU(), last)


def _through_noise(z: Tensor, spread: Tensor, noise: float, draw: Tensor, cleaner: Any) -> Tensor:
    """Latents z of standard deviation `spread` after `noise` times a normal draw, and after the cleaner."""
    noisy = z / spread + noise * draw
    return (noisy / (1 + noise**2) + cleaner(noisy)) * spread


def train_vae(
    vae: Any,
    images: Images,
    folder: Path,
    *,
    epochs: float,
    batch_size: int = 16,
    lr: float = 3e-3,
    kl: float = 1e-8,
    flip: bool = False,
    noise: float = 0.0,
    calm: float = 0.0,
    bf16: bool = False,
    seed: int = 0,
) -> list[dict]:
    """Train an autoencoder on pixels: squared and absolute error, and a KL term that bounds the latents.

    noise: standard deviation of the normal noise that a latent of unit variance must survive. That of a
    diffusion time is sqrt(1 / alpha_bar - 1). Half of each batch is decoded after the noise. Convolutions
    that are thrown away clean it, so the encoder learns how much power each part of an image needs. calm:
    weight of the squared distance by which normal noise of 8/255 in the image, as strong as an attack, moves
    a latent of unit variance. At the end `scaling_factor` is set for unit variance.
    """
    device = next(vae.parameters()).device
    batches, pixels = Batches(len(images), batch_size, seed), images.pixels.to(device)
    vae.requires_grad_(True)
    cleaner: Any = _cleaner(vae.config.latent_channels) if noise else nn.Identity()
    cleaner.to(device, memory_format=torch.channels_last)

    def loss_of(step, rng):
        x = pixels[batches(step).to(device)].float() / 127.5 - 1
        if flip:
            x = crop_and_flip(x, rng, pad=2)
        x = _channels_last(x)
        posterior = vae.encode(x).latent_dist
        mode = posterior.mean.float()
        draw = normal(mode.shape, rng, device)
        half = len(x) // 2 if noise else 0
        if noise:
            spread = mode.std()  # first: the order fixes how gradients add up, to the last bit
            z = torch.cat([_through_noise(mode[:half], spread, noise, draw[:half], cleaner), mode[half:]])
        else:
            z = mode + posterior.std * draw
        error = (vae.decode(z).sample - x).float()
        loss = error.square().mean() + 0.1 * error.abs().mean() + kl * posterior.kl().mean()
        psnr = -10 * torch.log10(error.detach().square().mean((1, 2, 3)) / 4)
        numbers = {"psnr": psnr[half:].mean()}
        if noise:
            numbers["psnr after noise"] = psnr[:half].mean()
        if calm:
            pushed = vae.encode(x + 2 * 8 / 255 * normal(x.shape, rng, device)).latent_dist.mean.float()
            numbers["moved"] = ((pushed - mode) / mode.std()).square().mean()
            loss = loss + calm * numbers["moved"]
        return loss, numbers

    data, n_steps = [images.source, batch_size, kl, flip, noise, calm], round(epochs * batches.per_epoch)
    settings = Settings(n_steps, lr, seed, warmup=0.05, clip=1.0, ema=0.998, bf16=bf16, data=data)
    rows = fit(nn.ModuleList([vae, cleaner]) if noise else vae, loss_of, settings, folder)
    _scale_latents(vae, images[:1024].x, device)
    return rows


@torch.no_grad()
def _scale_latents(vae: Any, x: Tensor, device: Any) -> None:
    """Set `scaling_factor` so that the latents of x have unit variance, as the diffusion model expects."""
    with torch.compiler.set_stance("force_eager"):  # compiling for another batch size would take longer
        z = torch.cat([vae.encode(part.to(device) * 2 - 1).latent_dist.mean for part in x.split(64)])
    vae.register_to_config(scaling_factor=1 / z.std().item())


# ---------------------------------------------------------------- the diffusion model

TIMES = ((5, 0, 600), (1, 0, 1000))


class _Captions:
    """Tokens of the captions, the mistaken captions and the empty one, and how a batch draws from them."""

    def __init__(self, purifier: LatentPurifier, captions: list[str], mistaken: list[str] | None):
        self.n, self.device = len(captions), purifier.device
        texts = [*captions, *(mistaken or ()), ""]
        how = {"padding": "max_length", "truncation": True, "max_length": purifier.tokenizer.model_max_length}
        self.tokens = purifier.tokenizer(texts, return_tensors="pt", **how).input_ids.to(self.device)

    def draw(self, rows: Tensor, drop: float, mistakes: float, rng: torch.Generator) -> Tensor:
        """Tokens [n, length] of a batch: `drop` of them empty, `mistakes` of the others mistaken."""
        uniform = lambda: torch.rand(len(rows), 1, generator=rng).to(self.device)
        empty = self.tokens[-1:]
        words = torch.where(uniform() < drop, empty, self.tokens[rows])
        if mistakes:
            replaced = (uniform() < mistakes) & (words != empty).any(1, keepdim=True)
            words = torch.where(replaced, self.tokens[self.n + rows], words)
        return words


def _check_times(times: Sequence[tuple], n_times: int) -> None:
    inside = all(weight >= 0 and 0 <= low < below <= n_times for weight, low, below in times)
    if not inside or sum(weight for weight, *_ in times) <= 0:
        expected = f"(weight, from, below) of intervals in 0 to {n_times}, some weight above 0"
        raise ValueError(f"times={times}: expected {expected}")


def _draw_times(times: Sequence[tuple], n: int, rng: torch.Generator) -> Tensor:
    """n diffusion times: an interval by its weight, then a time evenly in it."""
    weights, lowest, below = (torch.tensor(column, dtype=torch.float32) for column in zip(*times))
    interval = torch.multinomial(weights, n, replacement=True, generator=rng)
    return (lowest[interval] + torch.rand(n, generator=rng) * (below - lowest)[interval]).long()


@torch.no_grad()
def _latents(purifier: LatentPurifier, x: Tensor, rng: torch.Generator) -> Tensor:
    """The frozen encoder's latents of images [n, 3, h, w] in [-1, 1], at unit variance."""
    vae: Any = purifier.vae
    posterior = vae.encode(_channels_last(x)).latent_dist
    z = posterior.mean.float()
    if purifier.vae_sample:
        z = z + posterior.std * normal(z.shape, rng, x.device)
    return z * vae.config.scaling_factor


def train_diffusion(
    purifier: LatentPurifier,
    images: Images,
    captions: list[str],
    folder: Path,
    *,
    epochs: float,
    batch_size: int = 64,
    lr: float = 1e-3,
    drop: float = 0.1,
    times: Sequence[tuple] = TIMES,
    mistaken: list[str] | None = None,
    mistakes: float = 0.0,
    flip: bool = False,
    bf16: bool = False,
    seed: int = 0,
) -> list[dict]:
    """Teach the UNet and its text encoder to denoise the latents of captioned images.

    The scheduler's `prediction_type` says what they predict: the noise ("epsilon") or the latent ("sample").
    drop: share of empty captions, for guidance. times: (weight, from, below) of the intervals of diffusion
    times; most should lie where purification is. mistakes: share of the other captions that are replaced by
    the image's `mistaken` one, of another class. A captioner errs too, and the model should not trust every
    word.
    """
    device, unet, scheduler = purifier.device, purifier.unet, purifier.scheduler
    if mistakes and len(mistaken or ()) != len(images):
        got = f"got {len(mistaken or ())} captions for {len(images)} images"
        raise ValueError(f"mistaken: {got}, expected one each")
    _check_times(times, scheduler.config.num_train_timesteps)
    texts = _Captions(purifier, captions, mistaken)
    batches, pixels = Batches(len(images), batch_size, seed), images.pixels.to(device)
    networks = nn.ModuleList([unet, purifier.text_encoder]).requires_grad_(True).train()

    def loss_of(step, rng):
        rows = batches(step).to(device)
        x = pixels[rows].float() / 127.5 - 1
        if flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=rng).to(device) < 0.5, x.flip(3), x)
        z = _latents(purifier, x, rng)
        noise = normal(z.shape, rng, device)
        t = _draw_times(times, len(x), rng).to(device)
        words = purifier.text_encoder(texts.draw(rows, drop, mistakes, rng)).last_hidden_state
        out = unet(_channels_last(scheduler.add_noise(z, noise, t)), t, words).sample.float()
        target = {"epsilon": noise, "sample": z}[scheduler.config.prediction_type]
        return F.mse_loss(out, target)

    intervals = [list(interval) for interval in times]
    data = [images.source, batch_size, drop, intervals, mistakes, flip, purifier.vae_sample]
    data.append(state_digest(purifier.vae))
    n_steps, step = round(epochs * batches.per_epoch), {"weight_decay": 0.01, "warmup": 0.05, "clip": 1.0}
    settings = Settings(n_steps, lr, seed, ema=0.999, bf16=bf16, data=data, **step)
    rows = fit(networks, loss_of, settings, folder)
    purifier.requires_grad_(False).eval()
    return rows
