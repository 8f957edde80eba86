"""pretrain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lgap_utils.identity import state_digest
from lgap_utils.train import SCHEDULES, Batches, accuracy, crop_and_flip, fit

PALETTE = {
    "red": (170, 50, 45),
    "orange": (205, 125, 55),
    "yellow": (205, 185, 80),
    "green": (85, 120, 65),
    "blue": (80, 120, 180),
    "purple": (120, 80, 140),
    "brown": (120, 90, 65),
    "white": (225, 225, 225),
    "gray": (135, 135, 135),
    "black": (35, 35, 35),
}


def pixel_caption(pixels, class_name, index):
    """A caption for an image that has none: its class and what its pixels say. pixels uint8 [3, h, w].

    Colour of the middle, colour of the border, brightness and contrast, in one of four wordings that `index` picks;
    so the text says more than the label, and a text-guided model has more than ten sentences to learn from.
    """
    image = pixels.float()
    h, w = image.shape[1:]
    middle = image[:, h // 4 : -(h // 4), w // 4 : -(w // 4)].flatten(1)
    edge = torch.cat(
        [
            image[:, : h // 8].flatten(1),
            image[:, -(h // 8) :].flatten(1),
            image[:, :, : w // 8].flatten(1),
            image[:, :, -(w // 8) :].flatten(1),
        ],
        1,
    )
    names, colours = list(PALETTE), torch.tensor(list(PALETTE.values()), dtype=torch.float)
    name = lambda region: names[int((colours - region.median(1).values).square().sum(1).argmin())]
    light = "dark" if image.mean() < 90 else "bright" if image.mean() > 155 else "plain"
    subject, ground = f"{name(middle)} {class_name}", name(edge)
    return (
        f"a {subject} on a {ground} background",
        f"a {light} image with a {subject} and {ground} around it",
        f"a {subject} in front of {ground} in {light} light",
        f"a {class_name} that is {name(middle)} on {light} {ground}",
    )[index % 4]


def normal(shape, rng, device):
    """Standard normal numbers on `device` that depend on `rng` alone. A GPU draws its own: the CPU's would take longer than the step."""
    if torch.device(device).type != "cpu":
        rng = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng)))
    return torch.randn(shape, generator=rng, device=device)


# ---------------------------------------------------------------- the classifier


def train_classifier(
    net,
    images,
    folder,
    *,
    epochs,
    batch_size=128,
    lr=0.2,
    optimizer="sgd",
    nesterov=True,
    weight_decay=5e-4,
    schedule="one_cycle",
    augment=True,
    pad=3,
    padding="reflect",
    bf16=False,
    validation=None,
    seed=0,
    device="cpu",
):
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

    return fit(
        net,
        loss_of,
        n_steps=round(epochs * batches.per_epoch),
        lr=lr,
        folder=folder,
        optimizer=optimizer,
        nesterov=nesterov,
        weight_decay=weight_decay,
        warmup=0.15,
        schedule=SCHEDULES[schedule],
        bf16=bf16,
        save_every=batches.per_epoch,
        log_every=batches.per_epoch if validation else 50,
        measure=measure if validation else None,
        seed=seed,
        data=[images.source, len(images), batch_size, augment, pad, padding],
    )


# ---------------------------------------------------------------- the captioner


def feature_maps(net, x):
    """A WideResNet's last feature maps [n, channels, h / 4, w / 4], before pooling."""
    return net.relu(net.bn1(net.block3(net.block2(net.block1(net.conv1(x))))))


def train_captioner(
    captioner,
    images,
    captions,
    folder,
    *,
    teacher,
    epochs,
    batch_size=64,
    lr=1e-3,
    flip=False,
    bf16=False,
    seed=0,
):
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
    ids, mask, pixels, labels_of = (
        t.to(device) for t in (text.input_ids, text.attention_mask, images.pixels, images.labels)
    )
    mean, std = (
        torch.tensor(getattr(captioner.processor.image_processor, f"image_{k}"), device=device).view(
            1, 3, 1, 1
        )
        for k in ("mean", "std")
    )
    ids[:, 0] = blip.config.text_config.bos_token_id
    width, n_features = blip.config.vision_config.hidden_size, teacher.fc.in_features
    readout = nn.ModuleDict(
        {"patch": nn.Linear(width, n_features), "image": nn.Linear(width, len(images.classes))}
    ).to(device)
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

    return fit(
        nn.ModuleList([blip, readout]),
        loss_of,
        n_steps=round(epochs * batches.per_epoch),
        lr=lr,
        folder=folder,
        weight_decay=0.05,
        warmup=0.1,
        clip=1.0,
        bf16=bf16,
        seed=seed,
        data=[images.source, batch_size, flip, state_digest(teacher)],
    )


# ---------------------------------------------------------------- the diffusion model


def train_vae(
    vae,
    images,
    folder,
    *,
    epochs,
    batch_size=16,
    lr=3e-3,
    kl=1e-8,
    flip=False,
    noise=0.0,
    calm=0.0,
    bf16=False,
    seed=0,
):
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
    cleaner = (
        nn.Sequential(
            nn.Conv2d(room, 128, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(128, room, 3, padding=1),
        ).to(device, memory_format=torch.channels_last)
        if noise
        else None
    )

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
            z = torch.cat([(noisy / (1 + noise**2) + cleaner(noisy)) * spread, mode[half:]])
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

    rows = fit(
        nn.ModuleList([vae, cleaner]) if noise else vae,
        loss_of,
        n_steps=round(epochs * batches.per_epoch),
        lr=lr,
        folder=folder,
        warmup=0.05,
        clip=1.0,
        ema=0.998,
        bf16=bf16,
        seed=seed,
        data=[images.source, batch_size, kl, flip, noise, calm],
    )
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):  # compiling for another batch size would take longer
        z = torch.cat(
            [vae.encode(part.to(device) * 2 - 1).latent_dist.mean for part in images[:1024].x.split(64)]
        )
    vae.register_to_config(scaling_factor=1 / z.std().item())
    return rows


def train_diffusion(
    purifier,
    images,
    captions,
    folder,
    *,
    epochs,
    batch_size=64,
    lr=1e-3,
    drop=0.1,
    times=((5, 0, 600), (1, 0, 1000)),
    mistaken=None,
    mistakes=0.0,
    flip=False,
    bf16=False,
    seed=0,
):
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
        raise ValueError(
            f"mistaken: got {len(mistaken or ())} captions for {n_images} images, expected one each"
        )
    tokens = purifier.tokenizer(
        [*captions, *(mistaken or ()), ""],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(device)
    steps = purifier.scheduler.config.num_train_timesteps
    if (
        any(weight < 0 or not 0 <= low < below <= steps for weight, low, below in times)
        or sum(weight for weight, *_ in times) <= 0
    ):
        raise ValueError(
            f"times={times}: expected (weight, from, below) of intervals in 0 to {steps}, some weight above 0"
        )
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
        with torch.no_grad():  # the encoder is frozen, and a small part of the cost
            posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        z = posterior.mean.float()
        if purifier.vae_sample:
            z = z + posterior.std * normal(z.shape, rng, device)
        z = z * vae.config.scaling_factor
        noise = normal(z.shape, rng, device)
        interval = torch.multinomial(weights, len(rows), replacement=True, generator=rng)
        t = (
            (lowest[interval] + torch.rand(len(rows), generator=rng) * (below - lowest)[interval])
            .long()
            .to(device)
        )
        words = torch.where(share(1) < drop, tokens[-1:], tokens[rows])
        if mistakes:
            words = torch.where(
                (share(1) < mistakes) & (words != tokens[-1:]).any(1, keepdim=True),
                tokens[n_images + rows],
                words,
            )
        noisy = purifier.scheduler.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        target = {"epsilon": noise, "sample": z}[purifier.scheduler.config.prediction_type]
        return F.mse_loss(
            unet(noisy, t, purifier.text_encoder(words).last_hidden_state).sample.float(), target
        )

    rows = fit(
        nn.ModuleList([unet, purifier.text_encoder]),
        loss_of,
        n_steps=round(epochs * batches.per_epoch),
        lr=lr,
        folder=folder,
        weight_decay=0.01,
        warmup=0.05,
        clip=1.0,
        ema=0.999,
        bf16=bf16,
        seed=seed,
        data=[
            images.source,
            batch_size,
            drop,
            [list(interval) for interval in times],
            mistakes,
            flip,
            purifier.vae_sample,
            state_digest(vae),
        ],
    )
    purifier.requires_grad_(False).eval()
    return rows
