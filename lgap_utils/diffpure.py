"""The rival that people know: DiffPure (Nie et al. 2022), noise-and-denoise of pixels without a caption."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .defense import LatentPurifier, noise_schedule
from .identity import changed_by_hand, config_digest, digest
from .images import resize
from .loading import load_whole, loading, model_folder
from .noise import Keys
from .profiles import check_real

FILES = ["config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"]


class PixelPurifier(nn.Module):
    """Noise to time t in pixel space, then DDIM steps back; all weights frozen, and the gradient is exact.

    purifier(x, captions, keys): images [n, 3, h, w] in [0, 1] -> images like x; captions are not read. With
    d * n keys each image is purified d times (row i * d + k: draw k of image i). unet: a UNet2DModel that
    predicts noise, of 3 channels or of pixels folded k x k into 3 k^2. scheduler: any, for its betas.
    strength: share of num_inference_steps, 0.1 of 50 is t = 99 and five steps (DiffPure: t = 0.1). eta: 0 is
    DDIM, 1 is DDPM's noise at each step, drawn by keys. Raises ValueError for settings that cannot work.
    """

    strength: float = 0.1
    num_inference_steps: int = 50
    eta: float = 0.0
    checkpointing: bool = True

    SETTINGS = ("strength", "num_inference_steps", "eta")
    takes_draws = True
    # settings and what the backward pass computes again are handled as in latent space
    _set: Any = LatentPurifier._set
    using: Any = LatentPurifier.using
    recomputed: Any = LatentPurifier.recomputed

    def __init__(self, unet: Any, scheduler: Any, **settings: Any):
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        super().__init__()
        self.fold = _fold_of(unet.config, scheduler.config)
        how = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True, "steps_offset": 0}
        kind: Any = DDIMScheduler
        self.scheduler = kind.from_config(scheduler.config, timestep_spacing="trailing", **how)
        self.unet = unet.eval()
        self.requires_grad_(False)
        self._set(settings)

    def schedule(self) -> tuple[int, list[int]]:
        """(time of the noise, times of the steps), see `defense.noise_schedule`. The settings are checked."""
        check_real("eta", self.eta, 1.0)
        checks.check_flags(checkpointing=self.checkpointing)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: expected 0 (DDIM) to 1 (DDPM)")
        return noise_schedule(self.scheduler, self.strength, self.num_inference_steps, "diffusers")

    def forward(self, x: Tensor, captions: Iterable[str], keys: Keys | None = None) -> Tensor:
        keys = Keys.of_content(x) if keys is None else keys
        weight, side = next(self.unet.parameters()), self.unet.config.sample_size * self.fold
        t_noise, times = self.schedule()
        z = resize(x.to(weight.device, torch.promote_types(weight.dtype, torch.float32)), (side, side))
        z = F.pixel_unshuffle(2 * z - 1, self.fold).repeat_interleave(len(keys) // len(x), 0)
        noise = keys.normal(z.shape[1:], "noise").to(z)
        z = self.scheduler.add_noise(z, noise, torch.full((len(z),), t_noise, device=z.device))
        for t in times:
            z = self.recomputed(self.step, z, t, keys)
        pixels = (F.pixel_shuffle(z, self.fold) / 2 + 0.5).clamp(0, 1)
        return resize(pixels, x.shape[-2:]).to(x)

    def step(self, z: Tensor, t: int, keys: Keys) -> Tensor:
        """One step z_t -> z_{t'}; with eta > 0 its noise belongs to the image and the time."""
        noise_pred = self.unet(z.to(next(self.unet.parameters()).dtype), t).sample.to(z)
        noise = keys.normal(z.shape[1:], f"step {t}").to(z) if self.eta else None
        return self.scheduler.step(noise_pred, t, z, eta=self.eta, variance_noise=noise).prev_sample

    @property
    def denoiser_calls(self) -> int:
        """Evaluations of the UNet for one image."""
        return len(self.schedule()[1])

    def settings(self) -> dict[str, Any]:
        """What defines the purification, by name; its networks by digests of their configurations."""
        parts = [[type(part).__name__, config_digest(part.config)] for part in (self.unet, self.scheduler)]
        own = {name: getattr(self, name) for name in self.SETTINGS}
        own |= changed_by_hand(self.scheduler, self.unet)
        return {"name": "pixel diffusion", "network and scheduler": digest(parts), **own}


def _fold_of(unet: Any, scheduler: Any) -> int:
    """Pixels of a side that are channels, by the configurations. Raises ValueError for what cannot purify."""
    channels, predicts = unet.in_channels, scheduler.get("prediction_type", "epsilon")
    fold = round((channels / 3) ** 0.5)
    if channels != 3 * fold**2 or unet.out_channels != channels or predicts != "epsilon":
        got = f"{channels} channels in, {unet.out_channels} out, prediction {predicts!r}"
        raise ValueError(f"unet: {got}; expected 3 k^2 of both, and the prediction 'epsilon'")
    if unet.get("num_class_embeds") or unet.get("class_embed_type"):
        raise ValueError("unet: it wants a class for each image; expected one that denoises without")
    if not isinstance(unet.sample_size, int):
        raise ValueError(f"unet: sample_size={unet.sample_size!r}; expected the side of a square image")
    if "beta_start" not in scheduler:
        raise ValueError("scheduler: its configuration has no beta_start; expected one with betas, as DDPM's")
    return fold


def load_rival(
    name: str, revision: str | None = None, *, device: Any = None, **settings: Any
) -> PixelPurifier:
    """A UNet2DModel with its scheduler, in the layout of google/ddpm-cifar10-32, from a folder or the hub.

    settings: as `PixelPurifier`. Raises CheckpointError.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    with loading("rival", name) as source:
        folder = model_folder(name, revision, FILES, source)
        unet = load_whole(UNet2DModel, folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        kind: Any = DDIMScheduler
        scheduler = kind.from_config(kind.load_config(folder, local_files_only=True))
    purifier: Any = PixelPurifier(unet, scheduler, **settings)
    return purifier.to(device, memory_format=torch.channels_last)
