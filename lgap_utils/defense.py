"""Language Guided Adversarial Purification: caption, encode, noise, denoise by the caption, decode, classify.

Paper section 3. `LGAP` is the defence, `LatentPurifier` its diffusion step (section 3.2). Only captions are
taken without a gradient; for the rest, the caller decides.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import checks
from .batches import Kept
from .identity import changed_by_hand, config_digest, digest, tokenizer_digest
from .images import read_image, resize, vae_pixels
from .noise import Keys
from .picture import Purified
from .profiles import check_whole, denoising_steps

# Raise it with any change of a result (tests/test_golden.py): rows of the old method are then refused.
METHOD = 3
Part = Any  # any callable; a module is one
Captions = Iterable[str] | None

# ---------------------------------------------------------------- the defence (paper section 3)


class LGAP(nn.Module):
    """The defence: forward(x) is classify(purify(x)), for images x [n, 3, h, w] in [0, 1].

    captioner(x) -> n strings; purifier(x, captions, keys) -> images; classifier(x) -> logits [n, classes].
    All may be any callables. input_size: pixels the classifier was made for, to which images are resized.
    Captions that are handed in are frozen. Keys say which noise is drawn; without them it is keyed by the
    pixels, so that an image has the same result in any batch. Bad input and bad answers raise TypeError or
    ValueError.
    """

    def __init__(
        self,
        captioner: Part,
        purifier: Part,
        classifier: Part,
        classes: Iterable[str] | None = None,
        input_size: int | None = None,
    ):
        super().__init__()
        self.captioner, self.purifier, self.classifier = captioner, purifier, classifier
        self.classes = None if classes is None else tuple(classes)
        if input_size is not None:
            check_whole("input_size", input_size)
        self.input_size = input_size
        for part in (captioner, purifier, classifier):
            if isinstance(part, nn.Module):
                part.eval()
        self.training = False  # attack libraries read it

    def forward(self, x: Tensor, captions: Captions = None, keys: Keys | None = None) -> Tensor:
        return self.classify(self.purify(x, captions, keys), keys)

    def caption(self, x: Tensor, keys: Keys | None = None) -> list[str]:
        """captioner(x), paper section 3.1 (BLIP): one string per image, without a gradient.

        keys: one for each image. A captioner with an attribute `takes_keys` is called as captioner(x, keys).
        """
        checks.check_images(x)
        told = getattr(self.captioner, "takes_keys", False)
        extra = (Keys.of_content(x) if keys is None else keys,) if told else ()
        checks.check_part(self.captioner, "captioner", "x", *("keys" for _ in extra))
        with torch.no_grad():
            captions = self.captioner(x.detach().clone(), *extra)
        return checks.checked_captions(captions, len(x))

    def purify(
        self, x: Tensor, captions: Captions = None, keys: Keys | None = None, trace: Trace | None = None
    ) -> Tensor:
        """The purified images: [n, 3, h, w] in [0, 1], differentiable with respect to x (paper section 3.2).

        With d * n keys each image is purified d times under one caption: row i * d + k is draw k of image i.
        """
        checks.check_images(x)
        extra = {} if trace is None else {"trace": trace}
        checks.check_part(self.purifier, "purifier", "x", "captions", "keys", *extra)
        keys = Keys.of_content(x) if keys is None else keys
        checks.check_keys(keys, len(x), many=True)
        n_draws = len(keys) // len(x)
        if captions is None:
            captions = self.caption(x, keys[::n_draws])
        captions = checks.checked_captions(captions, len(x))
        images = x.clone()  # a part may work in place, and others still need x
        if n_draws > 1 and not getattr(self.purifier, "takes_draws", False):
            images = images.repeat_interleave(n_draws, 0)
            captions = [captions[i // n_draws] for i in range(len(keys))]
        purified = self.purifier(images, captions, keys, *extra.values())
        checks.check_purified(purified, (len(keys), *x.shape[1:]), keys)
        return purified

    def classify(self, x: Tensor, keys: Keys | None = None) -> Tensor:
        """Logits [n, classes] without purification, at `input_size`. keys: name an image in errors."""
        checks.check_classified(x, keys)
        checks.check_part(self.classifier, "classifier", "x")
        images = x.clone()
        if self.input_size is not None:
            images = resize(images, (self.input_size, self.input_size))
        weight = next(self.classifier.parameters(), None) if isinstance(self.classifier, nn.Module) else None
        if weight is not None:
            images = images.to(weight.device, weight.dtype)
        answer = self.classifier(images)
        logits = getattr(answer, "logits", answer)  # transformers' classifiers answer with more than logits
        checks.check_answer(logits, len(x), None if self.classes is None else len(self.classes), keys)
        return logits.to(x.device)

    @torch.no_grad()
    def purify_one(self, source: Any, seed: int = 0, with_trace: bool = False) -> Purified:
        """Classify, purify and classify again one image, from anywhere (see `images.read_image`)."""
        x = read_image(source)[None]
        trace = Trace() if with_trace else None
        captions = self.caption(x)
        image = self.purify(x, captions, Keys.of_content(x, seed), trace)
        logits, before = self.classify(image)[0], self.classify(x)[0]
        return Purified(image[0], captions[0], logits, trace, x[0], before, self.classes)


@dataclass
class Trace:
    """What a purification went through: pass one in to have it filled. All is detached."""

    times: list[int] = field(default_factory=list)  # of the noise, then of each step
    latents: list[Tensor] = field(default_factory=list)  # z_t after the noise, then after each step
    denoised: list[Tensor] = field(default_factory=list)  # the image [n, 3, h, w] that each step expects

    def add(self, time: int, z: Tensor, *denoised: Tensor) -> None:
        """Note a step: its time, its latent and, unless it is the noise's, the image that it expects."""
        self.times.append(time)
        self.latents.append(z.detach())
        self.denoised += denoised


# ---------------------------------------------------------------- the diffusion step (paper section 3.2)


def noise_schedule(
    scheduler: Any, strength: float, num_inference_steps: int, time_grid: str = "compvis"
) -> tuple[int, list[int]]:
    """(time of the added noise, times of the denoising steps) of image-to-image DDIM, highest time first.

    time_grid: "compvis" adds the noise of grid point int(strength * steps) and starts one point below it (501
    and 481 at strength 0.5 of 50); "diffusers" does both at 481. Raises ValueError if no step would be left.
    """
    checks.check_choice("time_grid", time_grid, ("compvis", "diffusers"))
    n = denoising_steps(strength, num_inference_steps, time_grid)
    scheduler.set_timesteps(num_inference_steps)
    times = [int(t) for t in scheduler.timesteps][::-1]
    return times[n if time_grid == "compvis" else n - 1], times[:n][::-1]


class LatentPurifier(nn.Module):
    """Noise-and-denoise in the latent space of a text-guided diffusion model, all weights frozen.

    purifier(x, captions, keys): images [n, 3, h, w] in [0, 1], any h and w, and n strings -> images like x.
    With d * n keys each image is purified d times (row i * d + k: draw k of image i), encoded and its caption
    embedded once. With `checkpointing`, each step is recomputed in the backward pass: memory does not grow
    with the steps; None: where memory is short. Raises ValueError for settings or networks that cannot work.
    """

    # the settings and their defaults; profiles.py says what each does
    size: int
    strength: float
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    time_grid: str = "compvis"
    vae_sample: bool = True
    negative_prompt: str = ""
    antialias: bool = True
    vae_input: str = "unit"
    checkpointing: bool | None = None

    SETTINGS = (  # those that define the purification
        *("size", "strength", "num_inference_steps", "guidance_scale", "time_grid"),
        *("vae_sample", "negative_prompt", "antialias", "vae_input"),
    )
    takes_draws = True

    def __init__(
        self, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any, scheduler: Any, **settings: Any
    ):
        super().__init__()
        self.vae, self.unet, self.text_encoder = vae.eval(), unet.eval(), text_encoder.eval()
        self.requires_grad_(False)
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self._kept, self.truncated = Kept(), 0  # captions that were longer than the text encoder reads
        checks.check_networks(vae.config, unet.config, text_encoder.config, tokenizer, scheduler.config)
        self._set(settings)

    def _set(self, settings: dict[str, Any]) -> None:
        if unknown := sorted(set(settings) - {*(names := (*self.SETTINGS, "checkpointing"))}):
            raise ValueError(f"a purifier has no setting {', '.join(unknown)}; choose from {sorted(names)}")
        for name, value in settings.items():
            setattr(self, name, value)
        self.schedule()

    def schedule(self) -> tuple[int, list[int]]:
        """The `noise_schedule` of the settings, which are checked."""
        checks.check_settings(self)
        return noise_schedule(self.scheduler, self.strength, self.num_inference_steps, self.time_grid)

    def forward(
        self, x: Tensor, captions: Iterable[str], keys: Keys | None = None, trace: Trace | None = None
    ) -> Tensor:
        keys = Keys.of_content(x) if keys is None else keys
        t_noise, times = self.schedule()
        text = self.embed(captions).repeat_interleave(len(keys) // len(x), 0)
        if self.guidance_scale != 1:
            text = torch.cat([self.embed([self.negative_prompt]).expand_as(text), text])

        z = self.noised(self.recomputed(self.encode, self.at_working_size(x), keys), keys, t_noise)
        if trace is not None:
            trace.add(t_noise, z)
        for t in times:
            z, expected = self.recomputed(self.step, z, t, text)
            if trace is not None:
                with torch.no_grad():
                    trace.add(t, z, self.decode(expected.detach()))
        return self.like(x, self.recomputed(self.decode, z))

    def round_trip(self, x: Tensor, keys: Keys) -> Tensor:
        """The autoencoder alone: x encoded and decoded, once for each key; nothing is added or denoised."""
        return self.like(x, self.decode(self.encode(self.at_working_size(x), keys)))

    def like(self, x: Tensor, images: Tensor) -> Tensor:
        """Images of the working size at the size of x, on its device and of its type."""
        return resize(images, x.shape[-2:], self.antialias).to(x)

    def embed(self, captions: Iterable[str]) -> Tensor:
        """C = tau(caption): the text encoder's last hidden states [n, tokens, width]."""
        captions, length = list(captions), self.tokenizer.model_max_length
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        full = self.tokenizer(captions, truncation=False, verbose=False).input_ids
        cut = sum(len(ids) > length for ids in full)
        self.truncated += cut
        if cut:
            warnings.warn(f"{cut} of {len(full)} captions were cut to the text encoder's {length} tokens")
        with torch.no_grad():
            return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    def at_working_size(self, x: Tensor) -> Tensor:
        """Images of `size` pixels, on the networks' device, in single precision as roundings add up."""
        x = x.to(self.device, torch.promote_types(self.dtype, torch.float32))
        return resize(x, (self.size, self.size), self.antialias)

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        """z_0 = E(x) of images at the working size: a sample of the posterior for each key, or its mode."""
        n_draws = len(keys) // len(x)
        pixels = vae_pixels(x, keys.indices[::n_draws], self.vae_input)
        posterior = self.vae.encode(pixels.to(self.dtype)).latent_dist
        z = posterior.mean.to(x).repeat_interleave(n_draws, 0)
        if self.vae_sample:
            std = posterior.std.to(x).repeat_interleave(n_draws, 0)
            z = z + std * keys.normal(z.shape[1:], "posterior").to(z)
        return z * self.vae.config.scaling_factor

    def noised(self, z: Tensor, keys: Keys, t: int) -> Tensor:
        """z_t of z_0, with each key's own noise."""
        noise = keys.normal(z.shape[1:], "noise").to(z)
        return self.scheduler.add_noise(z, noise, torch.full((len(z),), t, device=z.device))

    def step(self, z: Tensor, t: int, text: Tensor) -> tuple[Tensor, Tensor]:
        """One DDIM step z_t -> z_{t'}: (z_{t'}, the z_0 it expects).

        text: the states of [negative; caption], or of [caption] at guidance scale 1.
        """
        if self.guidance_scale == 1:
            noise_pred = self.unet(z.to(self.dtype), t, text).sample.to(z)
        else:
            both = self.unet(torch.cat([z, z]).to(self.dtype), t, text).sample.to(z)
            without, with_caption = both.chunk(2)
            noise_pred = without + self.guidance_scale * (with_caption - without)
        out = self.scheduler.step(noise_pred, t, z)
        return out.prev_sample, out.pred_original_sample

    def decode(self, z: Tensor) -> Tensor:
        """x = D(z_0), back in [0, 1]."""
        x = self.vae.decode((z / self.vae.config.scaling_factor).to(self.dtype)).sample.to(z)
        return (x / 2 + 0.5).clamp(0, 1)

    def recomputed(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), which the backward pass computes again where what it needs is not kept."""
        keep = self.checkpointing is False or not torch.is_grad_enabled()
        if keep or (self.checkpointing is None and self._kept.fits(function, args, [*self.parameters()])):
            return function(*args)
        settings = {name: getattr(self, name) for name in self.SETTINGS}

        def as_it_was(*args):  # by the time of the backward pass, the settings may be others
            with self.using(**settings):
                return function(*args)

        return checkpoint(as_it_was, *args, use_reentrant=False)

    @contextlib.contextmanager
    def using(self, **settings: Any) -> Iterator[LatentPurifier]:
        """These settings inside a `with`, the old ones after it: `with purifier.using(strength=0.1): ...`"""
        old = {name: getattr(self, name) for name in (*self.SETTINGS, "checkpointing")}
        try:
            self._set(settings)
            yield self
        finally:
            self._set(old)

    # of the networks' weights
    dtype = property(lambda self: next(self.unet.parameters()).dtype)
    device = property(lambda self: next(self.unet.parameters()).device)

    @property
    def denoiser_calls(self) -> int:
        """Evaluations of the UNet for one image."""
        return len(self.schedule()[1]) * (2 if self.guidance_scale != 1 else 1)

    def settings(self) -> dict[str, Any]:
        """What defines the purification, by name; its networks by digests of their configurations."""
        parts = (self.vae, self.unet, self.text_encoder, self.scheduler)
        configs = [[type(part).__name__, config_digest(part.config)] for part in parts]
        return {
            **{name: getattr(self, name) for name in self.SETTINGS},
            "name": "latent diffusion",
            "dtype": str(self.dtype).removeprefix("torch."),
            "networks and scheduler": digest(configs),
            "tokenizer": tokenizer_digest(self.tokenizer),
            **changed_by_hand(self.scheduler, self.unet),
        }
