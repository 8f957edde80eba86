"""The parts of a bundled model with random weights, in the classes of the real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from checkpoints.captions import words_of
from lgap_utils.defense import LatentPurifier
from lgap_utils.models import Captioner, ddim
from lgap_utils.profiles import Profile

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # as BLIP


def new_captioner(
    captions: Sequence[str],
    profile: Profile,
    device: Any,
    *,
    width: int,
    layers: int,
    text_layers: int,
    patch: int = 4,
) -> Captioner:
    """BLIP at a small size. Its WordPiece vocabulary has the captions' words, and letters for all others."""
    vocabulary = [*SPECIAL, *".,'-", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary += [word for word in words_of(captions, profile.prompt) if word not in vocabulary]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = BertTokenizer(vocab=ids, additional_special_tokens=["[DEC]"])
    shape = {"height": profile.size, "width": profile.size}
    images = BlipImageProcessor(size=shape, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    both = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    both |= {"num_attention_heads": 4}
    vision = {"image_size": profile.size, "patch_size": patch, "num_hidden_layers": layers}
    text = {"vocab_size": len(ids), "encoder_hidden_size": width, "num_hidden_layers": text_layers}
    text |= {"max_position_embeddings": 64, "bos_token_id": ids["[DEC]"], "eos_token_id": ids["[SEP]"]}
    config = BlipConfig(
        vision_config=both | vision | {"initializer_range": 0.02},
        text_config=both | text | {"sep_token_id": ids["[SEP]"], "pad_token_id": 0},
        projection_dim=width,
        image_text_hidden_size=width,
    )
    search = {name: getattr(profile, name) for name in Captioner.SETTINGS}
    model = BlipForConditionalGeneration(config)
    return Captioner(model, BlipProcessor(images, tokenizer), **search).to(device)


def new_text_tokenizer(captions: Sequence[str], prompt: str, length: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned on the captions' words; other text falls apart into bytes."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    learner.pre_tokenizer = pre_tokenizers.Sequence(split)
    sizes = {"vocab_size": 5000, "min_frequency": 1, "end_of_word_suffix": "</w>"}
    learner.train_from_iterator(
        [words_of(captions, prompt)], trainers.BpeTrainer(show_progress=False, **sizes)
    )
    merges = []
    for merge in json.loads(learner.to_str())["model"]["merges"]:
        merges.append(tuple(merge if isinstance(merge, list) else merge.split()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    pieces = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])  # each once, in this order
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def new_vae(profile: Profile, *, channels: Sequence[int], latent_channels: int) -> AutoencoderKL:
    """Stable Diffusion's autoencoder at a small size.

    It has one norm group. Groups of a few channels each would hide the amplitudes of the colours from the
    next layer, and learning them back takes long. The latent is as large as Stable Diffusion's at the
    authors' working size: 8 x 8 x 144 numbers against 48 x 48 x 4. Size is what survives noise: at t = 501
    each number of unit variance keeps 0.23 bits.
    """
    n = len(channels)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=profile.size,
    )
    with torch.no_grad():
        vae.quant_conv.bias[
            latent_channels:
        ] = -3  # log variance of the posterior: begin with readable latents
    return vae


def new_diffusion(
    vae: AutoencoderKL,
    captions: Sequence[str],
    profile: Profile,
    device: Any,
    *,
    channels: Sequence[int],
    text_width: int,
    tokens: int = 32,
) -> LatentPurifier:
    """Stable Diffusion's parts at a small size around a trained VAE, as a purifier."""
    tokenizer = new_text_tokenizer(captions, profile.prompt, tokens)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        projection_dim=text_width,
        **special,
    )
    text_encoder = CLIPTextModel(text_config)
    n = len(channels)
    unet = UNet2DConditionModel(
        sample_size=profile.size // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * n,
        up_block_types=("CrossAttnUpBlock2D",) * n,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    # It predicts z_0: a network narrower than the latent cannot pass the noise of every channel through.
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = ddim(schedule | {"prediction_type": "sample"})
    settings = {name: getattr(profile, name) for name in LatentPurifier.SETTINGS}
    purifier = LatentPurifier(vae, unet, text_encoder, tokenizer, scheduler, **settings)
    return purifier.to(device, memory_format=torch.channels_last)
