"""The rival of `small`: a DiffPure-style denoiser in pixel space, on pixels folded 2 x 2 into channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel

from lgap_utils.images import Images
from lgap_utils.train import Batches, Settings, fit

from .pretrain import normal


def new_rival(size: int, channels: tuple[int, ...], fold: int) -> tuple[Any, Any]:
    """(UNet2DModel, DDIMScheduler) with random weights; the noise schedule is DDPM's, as DiffPure's is.

    size: pixels of an image's side; fold: pixels of a side that become channels.
    """
    n = len(channels)
    down = ["DownBlock2D"] * n
    up = ["UpBlock2D"] * n
    down[1], up[-2] = "AttnDownBlock2D", "AttnUpBlock2D"  # at half of the folded size
    unet = UNet2DModel(
        sample_size=size // fold,
        in_channels=3 * fold**2,
        out_channels=3 * fold**2,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        attention_head_dim=32,
        norm_num_groups=16,
    )
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
    return unet, DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing")


def train_rival(
    unet: Any,
    scheduler: Any,
    images: Images,
    folder: Path,
    *,
    epochs: float,
    below: int,
    batch_size: int = 128,
    lr: float = 6e-4,
    flip: bool = False,
    bf16: bool = False,
    seed: int = 0,
    device: Any = "cpu",
) -> list[dict]:
    """Teach the UNet to predict the noise at times 0 to `below` - 1, those that purification meets."""
    fold = round((unet.config.in_channels / 3) ** 0.5)
    unet.to(device, memory_format=torch.channels_last)
    batches, pixels = Batches(len(images), batch_size, seed), images.pixels.to(device)

    def loss_of(step, rng):
        x = pixels[batches(step).to(device)].float() / 127.5 - 1
        if flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=rng).to(device) < 0.5, x.flip(3), x)
        z = F.pixel_unshuffle(x, fold)
        noise = normal(z.shape, rng, device)
        t = torch.randint(below, (len(x),), generator=rng).to(device)
        noisy = scheduler.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        return F.mse_loss(unet(noisy, t).sample.float(), noise)

    data, n_steps = [images.source, batch_size, flip, below], round(epochs * batches.per_epoch)
    settings = Settings(n_steps, lr, seed, warmup=0.05, clip=1.0, ema=0.999, bf16=bf16, data=data)
    return fit(unet, loss_of, settings, folder, save_every=100, log_every=10)
