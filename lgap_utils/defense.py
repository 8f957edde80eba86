"""Language Guided Adversarial Purification: caption, encode, noise to t, denoise with the caption, decode, classify.

Paper section 3. `LGAP` is the defence and knows three callables; `LatentPurifier` is its diffusion step (section 3.2).
Nothing in here says `no_grad` about images: whoever calls decides whether a gradient is wanted.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .checks import (
    check_evaluating,
    check_images,
    check_networks,
    check_purified,
    check_range,
    first_bad,
    kind_of,
    look_like_softmax,
)
from .identity import config_digest, digest, tokenizer_digest
from .images import read_image
from .noise import Keys
from .profiles import check_guidance, check_whole, denoising_steps

# Of everything that decides a row: raise it with any change of a result (tests/test_golden.py), and old rows are refused.
METHOD = 3


def noise_schedule(scheduler, strength, num_inference_steps, time_grid="compvis"):
    """(time of the added noise, times of the denoising steps) of image-to-image DDIM, highest time first.

    "compvis": the noise is that of grid point int(strength * steps), the first step runs one grid point below it
    (501 and 481 at strength 0.5 of 50); "diffusers": both are 481. Raises ValueError if no step would be left.
    """
    n = denoising_steps(strength, num_inference_steps, time_grid)
    scheduler.set_timesteps(num_inference_steps)
    times = [int(t) for t in scheduler.timesteps][::-1]
    if time_grid == "compvis":
        return times[n], times[:n][::-1]
    if time_grid == "diffusers":
        return times[n - 1], times[:n][::-1]
    raise ValueError(f"no time_grid {time_grid!r}; choose from ['compvis', 'diffusers']")


@dataclass
class Trace:
    """What a purification went through: pass one in to have it filled; its images are [n, 3, h, w] in [0, 1], detached."""

    times: list = field(default_factory=list)  # of the noise, then the one that each step is told
    latents: list = field(default_factory=list)  # z_t after the noise, then after each step
    denoised: list = field(default_factory=list)  # the image each step expects at the end


class LatentPurifier(nn.Module):
    """Noise-and-denoise in the latent space of a text-guided diffusion model (paper section 3.2).

    purifier(x, captions, keys): x [n, 3, h, w] in [0, 1], any h and w, and n strings -> images of the same size and
    range, differentiable with respect to x. With d * n keys each image is purified d times, [d * n, 3, h, w], image after
    image; it is encoded, and its caption embedded, once. All weights are frozen. With `checkpointing`, the VAE and each
    denoising step are recomputed in the backward pass: the same gradient, and memory that does not grow with the steps.
    """

    takes_draws = True
    SETTINGS = (
        "size",
        "strength",
        "num_inference_steps",
        "guidance_scale",
        "time_grid",
        "vae_sample",
        "negative_prompt",
        "antialias",
        "vae_input",
    )

    def __init__(
        self,
        vae,
        unet,
        text_encoder,
        tokenizer,
        scheduler,
        *,
        size,
        strength,
        num_inference_steps=50,
        guidance_scale=5.0,
        time_grid="compvis",
        vae_sample=True,
        negative_prompt="",
        antialias=True,
        vae_input="unit",
        checkpointing=True,
    ):
        super().__init__()
        self.vae, self.unet, self.text_encoder = vae.eval(), unet.eval(), text_encoder.eval()
        self.requires_grad_(False)
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.size, self.strength, self.num_inference_steps = size, strength, num_inference_steps
        self.guidance_scale, self.time_grid = guidance_scale, time_grid
        self.vae_sample, self.negative_prompt, self.checkpointing = vae_sample, negative_prompt, checkpointing
        self.antialias, self.vae_input = antialias, vae_input
        self.truncated = 0  # captions that were longer than the text encoder reads
        check_networks(vae.config, unet.config, text_encoder.config, tokenizer, scheduler)
        self._check()

    def _check(self):
        """Refuse settings that cannot work, in one sentence."""
        if not isinstance(self.negative_prompt, str):
            raise ValueError(f"negative_prompt={self.negative_prompt!r}: expected text")
        for name in ("vae_sample", "antialias", "checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from [False, True]")
        check_whole("size", self.size)
        check_guidance(self.guidance_scale)
        halvings = len(self.vae.config.block_out_channels) - 1
        if self.size % 2**halvings:
            raise ValueError(
                f"size={self.size}: the VAE halves {halvings} times, expected a multiple of {2**halvings}"
            )
        if self.vae_input not in ("unit", "clip", "authors"):
            raise ValueError(f"no vae_input {self.vae_input!r}; choose from ['unit', 'clip', 'authors']")
        noise_schedule(self.scheduler, self.strength, self.num_inference_steps, self.time_grid)

    @property
    def dtype(self):
        return next(self.unet.parameters()).dtype

    @property
    def device(self):
        return next(self.unet.parameters()).device

    @property
    def denoiser_calls(self):
        """Evaluations of the UNet for one image."""
        times = noise_schedule(self.scheduler, self.strength, self.num_inference_steps, self.time_grid)[1]
        return len(times) * (2 if self.guidance_scale != 1 else 1)

    def settings(self):
        """What defines the purification, by name; networks, scheduler and tokenizer by digests of their configurations."""
        made_of = (self.vae, self.unet, self.text_encoder, self.scheduler)
        return (
            {name: getattr(self, name) for name in self.SETTINGS}
            | {
                "name": "latent diffusion",
                "dtype": str(self.dtype).removeprefix("torch."),
                "networks and scheduler": digest(
                    [[type(part).__name__, config_digest(part.config)] for part in made_of]
                ),
                "tokenizer": tokenizer_digest(self.tokenizer),
            }
            | self._set_by_hand()
        )

    def _set_by_hand(self):
        """What was changed of scheduler and UNet since they were made, which their configurations do not tell."""
        found, made = {}, type(self.scheduler).from_config(self.scheduler.config)
        alphas = [[*s.alphas_cumprod.tolist(), float(s.final_alpha_cumprod)] for s in (self.scheduler, made)]
        if alphas[0] != alphas[1]:
            found["alphas_cumprod"] = digest(alphas[0])
        free_u = [
            [getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")] for block in self.unet.up_blocks
        ]
        if any(value is not None for values in free_u for value in values):
            found["free_u"] = free_u
        return found

    @contextlib.contextmanager
    def using(self, **settings):
        """These settings inside a `with`, the old ones after it: `with purifier.using(strength=0.1): ...`"""
        old = {name: getattr(self, name) for name in (*self.SETTINGS, "checkpointing")}
        if unknown := sorted(set(settings) - set(old)):
            raise ValueError(f"a purifier has no setting {', '.join(unknown)}; choose from {sorted(old)}")
        try:
            for name, value in settings.items():
                setattr(self, name, value)
            self._check()
            yield self
        finally:
            for name, value in old.items():
                setattr(self, name, value)
            self._check()  # the scheduler's steps, too

    def embed(self, captions):
        """C = tau(caption): the text encoder's last hidden states [n, tokens, width]."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        full = self.tokenizer(list(captions), truncation=False, verbose=False).input_ids
        if cut := sum(len(ids) > length for ids in full):
            self.truncated += cut
            warnings.warn(
                f"{cut} of {len(full)} captions are longer than the text encoder's {length} tokens and were cut"
            )
        with torch.no_grad():
            return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    def _recomputed(self, function, *args):
        if not (self.checkpointing and torch.is_grad_enabled()):
            return function(*args)
        settings = {name: getattr(self, name) for name in self.SETTINGS}

        def as_it_was(*args):  # the backward pass recomputes it, by when the settings may be others
            with self.using(**settings):
                return function(*args)

        return checkpoint(as_it_was, *args, use_reentrant=False)

    def resize(self, x, size):
        return resize(x, size, self.antialias)

    def pixels(self, x, indices):
        """What the VAE is shown of images in [0, 1]: [-1, 1], or the authors' slip (see `vae_input` in profiles.py)."""
        if self.vae_input == "unit":
            return 2 * x - 1
        mean, std = (torch.tensor(v).to(x) for v in (CLIP_MEAN, CLIP_STD))
        x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        if self.vae_input == "clip":
            return x
        place = [index % AUTHORS_BATCH if isinstance(index, int) else AUTHORS_BATCH - 1 for index in indices]
        return torch.stack([image * std[k] + mean[k] if k < 3 else image for image, k in zip(x, place)])

    def encode(self, x, keys):
        """z_0 = E(x) for images in [0, 1] at the working size; a sample of the posterior for each key, or its mode."""
        n_draws = len(keys) // len(x)
        posterior = self.vae.encode(self.pixels(x, keys.indices[::n_draws]).to(self.dtype)).latent_dist
        z = posterior.mean.to(x).repeat_interleave(n_draws, 0)
        if self.vae_sample:
            z = z + posterior.std.to(x).repeat_interleave(n_draws, 0) * keys.normal(
                z.shape[1:], "posterior"
            ).to(z)
        return z * self.vae.config.scaling_factor

    def decode(self, z):
        """x = D(z_0), back in [0, 1]."""
        return (
            self.vae.decode((z / self.vae.config.scaling_factor).to(self.dtype)).sample.to(z) / 2 + 0.5
        ).clamp(0, 1)

    def step(self, z, t, text):
        """One DDIM step z_t -> z_{t'}: (z_{t'}, the z_0 it expects). `text`: [negative; caption], or [caption] at guidance scale 1."""
        scale = self.guidance_scale
        noise_pred = self.unet((torch.cat([z, z]) if scale != 1 else z).to(self.dtype), t, text).sample.to(z)
        if scale != 1:
            without, with_caption = noise_pred.chunk(2)
            noise_pred = without + scale * (with_caption - without)
        out = self.scheduler.step(noise_pred, t, z)
        return out.prev_sample, out.pred_original_sample

    def forward(self, x, captions, keys=None, trace=None):
        keys = Keys.of_content(x) if keys is None else keys
        t_noise, times = noise_schedule(
            self.scheduler, self.strength, self.num_inference_steps, self.time_grid
        )
        text = self.embed(list(captions)).repeat_interleave(len(keys) // len(x), 0)
        if self.guidance_scale != 1:
            text = torch.cat([self.embed([self.negative_prompt]).expand_as(text), text])

        # latents and DDIM stay in single precision where the networks have half: 25 roundings would add up
        working = self.resize(
            x.to(self.device, torch.promote_types(self.dtype, torch.float32)), (self.size, self.size)
        )
        z = self._recomputed(self.encode, working, keys)
        noise = keys.normal(z.shape[1:], "noise").to(z)
        z = self.scheduler.add_noise(z, noise, torch.full((len(z),), t_noise, device=z.device))
        if trace is not None:
            trace.times.append(t_noise)
            trace.latents.append(z.detach())
        for t in times:
            z, expected = self._recomputed(self.step, z, t, text)
            if trace is not None:
                trace.times.append(t)
                trace.latents.append(z.detach())
                with torch.no_grad():
                    trace.denoised.append(self.decode(expected.detach()))
        return self.resize(self._recomputed(self.decode, z), x.shape[-2:]).to(x)


CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # what BLIP's pixels are normalised by
AUTHORS_BATCH = 32  # images in a batch of the authors' CIFAR scripts, on which their slip depends; here an image's index says its place


def resize(x, size, antialias=True):
    """Bilinear, clamped to [0, 1]; the identity where the size is right already."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    y = F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)
    return y + (y.clamp(0, 1) - y).detach()  # mends rounding only; a clamp's own gradient is 0 at 0 and at 1


@dataclass(frozen=True)
class Purified:
    """What became of one image; `image` [3, h, w] in [0, 1], `logits` [classes]."""

    image: torch.Tensor
    caption: str
    logits: torch.Tensor
    trace: Trace | None = None

    @property
    def label(self):
        return int(self.logits.argmax())


class LGAP(nn.Module):
    """The defence: forward(x) is classify(purify(x)).

    captioner(x) -> n strings; purifier(x, captions, keys) -> x'; classifier(x') -> logits [n, classes]. Each may be any
    callable; x is [n, 3, h, w] in [0, 1] throughout. Captions can be handed in, which freezes them; otherwise they are
    taken anew from x, without a gradient, as captioning is a choice of words. Keys say whose noise is drawn; without
    them it is keyed by the pixels, so that an image has the same result in any batch.
    """

    def __init__(self, captioner, purifier, classifier, classes=None, input_size=None):
        super().__init__()
        self.captioner, self.purifier, self.classifier = captioner, purifier, classifier
        self.classes = tuple(classes) if classes is not None else None
        if input_size is not None:
            check_whole("input_size", input_size)
        self.input_size = (
            input_size  # pixels the classifier was made for; images of another size are resized to it
        )
        for part in (captioner, purifier, classifier):
            if isinstance(part, nn.Module):
                part.eval()
        self.training = False  # attack libraries ask

    def _part(self, role, *arguments):
        """The part of this name, if it can be asked: a callable of these arguments, in evaluation mode."""
        part = getattr(self, role)
        if not callable(part):
            raise TypeError(f"{role}: expected a callable, got {type(part).__name__}")
        check_evaluating(part, role)
        try:
            called = part.forward if isinstance(part, nn.Module) else part
            signature = inspect.signature(called, follow_wrapped=False)
        except (TypeError, ValueError):  # not every callable has one that Python can tell
            return part
        try:
            signature.bind(*arguments)
        except TypeError:
            raise TypeError(
                f"{role}: expected a callable of ({', '.join(arguments)}), this one takes {signature}"
            ) from None
        return part

    def caption(self, x):
        """BLIP(x), paper section 3.1: one string per image."""
        check_images(x)
        with torch.no_grad():
            captions = self._part("captioner", "x")(x.detach().clone())
        return self._checked_captions(captions, len(x))

    @staticmethod
    def _checked_captions(captions, n):
        """A list of n strings, from whatever hands them out in an order."""
        if isinstance(captions, (str, bytes, Set, Mapping)) or not isinstance(captions, Iterable):
            raise TypeError(
                f"captions: expected a list of strings, one per image, got {type(captions).__name__}"
            )
        captions = list(itertools.islice(captions, n + 1) if isinstance(captions, Iterator) else captions)
        if wrong := [i for i, caption in enumerate(captions) if not isinstance(caption, str)]:
            raise TypeError(
                "captions: expected a list of strings, one per image, "
                f"number {wrong[0]} is {captions[wrong[0]]!r:.80}"
            )
        if len(captions) != n:
            raise ValueError(f"captions: got {len(captions)} for {n} images, expected one each")
        return captions

    def purify(self, x, captions=None, keys=None, trace=None):
        """The purified images: [n, 3, h, w] in [0, 1], differentiable with respect to x.

        With d * n keys each image is purified d times, [d * n, 3, h, w], image after image, under one caption.
        Raises TypeError or ValueError for images, captions or keys that cannot be meant, and for an answer that is no image.
        """
        check_images(x)
        purifier = self._part("purifier", "x", "captions", "keys", *["trace"] * (trace is not None))
        captions = self.caption(x) if captions is None else self._checked_captions(captions, len(x))
        if keys is not None and not isinstance(keys, Keys):
            raise TypeError(f"keys: expected noise.Keys, got {type(keys).__name__}")
        if keys is not None and (len(keys) == 0 or len(keys) % len(x)):
            raise ValueError(
                f"keys: got {len(keys)} for {len(x)} images, expected one each, or the same number of draws for each"
            )
        keys = Keys.of_content(x) if keys is None else keys
        own = x.clone()  # a part may work in place, and others still need x
        if (n_draws := len(keys) // len(x)) > 1 and not getattr(purifier, "takes_draws", False):
            own, captions = own.repeat_interleave(n_draws, 0), [c for c in captions for _ in range(n_draws)]
        purified = purifier(own, captions, keys) if trace is None else purifier(own, captions, keys, trace)
        check_purified(purified, (len(keys), *x.shape[1:]), keys)
        return purified

    def classify(self, x, keys=None):
        """Logits [n, classes] of images as they are, on the images' device; the classifier may be on another.

        keys: of the images, if they have any, to name one whose logits are not finite.
        """
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim != 4:
            raise TypeError(
                "images: expected a float tensor [n, 3, height, width] in [0, 1], got "
                f"{kind_of(x)} {list(getattr(x, 'shape', []))}"
            )
        check_range(x, "images: ", keys)
        classifier, own = self._part("classifier", "x"), x.clone()
        own = own if self.input_size is None else resize(own, (self.input_size, self.input_size))
        weight = next(classifier.parameters(), None) if isinstance(classifier, nn.Module) else None
        answer = classifier(own if weight is None else own.to(weight.device, weight.dtype))
        logits = getattr(answer, "logits", answer)  # transformers' classifiers answer with more than logits
        return self._checked_logits(logits, x, keys)

    def _checked_logits(self, logits, x, keys):
        """Finite logits [n, classes] on the device of x."""
        expected = f"[{len(x)}, {len(self.classes) if self.classes is not None else 'classes'}]"
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            raise TypeError(
                f"classifier: its output is {kind_of(logits)}, expected logits {expected} as a tensor of "
                "floats, or an object that has them as .logits"
            )
        logits = logits.to(x.device)
        if (
            logits.ndim != 2
            or len(logits) != len(x)
            or (self.classes is not None and logits.shape[1] != len(self.classes))
        ):
            raise ValueError(f"classifier: its output has shape {list(logits.shape)}, expected {expected}")
        values = logits.detach().float()
        if (bad := ~torch.isfinite(values).all(1)).any():
            image, key = first_bad(bad, keys)
            raise ValueError(f"classifier: its output for {image} holds NaN or inf{key}")
        if look_like_softmax(values):
            warnings.warn(
                "classifier: its outputs look like softmax probabilities; logits were expected, and gradient "
                "attacks on probabilities are weaker than they should be"
            )
        return logits

    def forward(self, x, captions=None, keys=None):
        return self.classify(self.purify(x, captions, keys), keys)

    @torch.no_grad()
    def purify_one(self, source, seed=0, with_trace=False):
        """Purify and classify one image, from anywhere (see `images.read_image`). Returns `Purified`."""
        x = read_image(source)[None]
        trace = Trace() if with_trace else None
        (caption,) = self.caption(x)
        image = self.purify(x, [caption], Keys.of_content(x, seed), trace)
        return Purified(image[0], caption, self.classify(image)[0], trace)
