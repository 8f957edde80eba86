"""Makes the models of a profile from nothing: python checkpoints/make.py toy|small|paper [--only PART ...]

`toy` and `small` are the bundled trios, in four parts and this order: classifier, captioner, vae, diffusion; then `measure`
writes measured.md. `paper` is one model, the CIFAR-100 classifier of Table 2, which exists nowhere to download. Each part
resumes where it was killed (its state lies in checkpoints/work/PROFILE/PART), uses a GPU where there is one, and is saved by
the class that will load it, next to its learning curve.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from checkpoints import pretrain  # noqa: E402
from checkpoints.pretrain import pixel_caption  # noqa: E402
from lgap_utils import defense, files, models, tables, train, zoo  # noqa: E402
from lgap_utils.data import load_images  # noqa: E402
from lgap_utils.profiles import get_profile  # noqa: E402
from tools.request import settings_of  # noqa: E402

# Sizes and lengths, the only things that differ between the trios. `cycles` are runs on top of each other, with the learning rate
# up and down again in each: more can be added to a trained model.
RECIPES = {
    "toy": {
        "n": 24_000,
        "flip": False,
        "classifier": {
            "depth": 10,
            "widen_factor": 2,
            "lr": 3e-3,
            "optimizer": "adamw",
            "weight_decay": 1e-2,
            "epochs": 2,
            "batch_size": 64,
            "augment": False,
        },
        "captioner": {"width": 96, "layers": 4, "text_layers": 2, "epochs": 6},
        "vae": {"channels": (16, 32, 64), "latent_channels": 144, "epochs": 2, "kl": 1e-8},
        "diffusion": {"channels": (64, 96), "text_width": 64, "epochs": 4},
    },
    "small": {
        "n": None,
        "flip": True,
        "classifier": {
            "depth": 16,
            "widen_factor": 3,
            "optimizer": "sgd",
            "weight_decay": 5e-4,
            "lr": 0.3,
            "epochs": 50,
            "batch_size": 256,
            "bf16": True,
        },
        "captioner": {
            "width": 256,
            "layers": 6,
            "text_layers": 2,
            "batch_size": 512,
            "bf16": True,
            "cycles": ({"epochs": 8}, {"epochs": 47}),
        },
        # 0.7 is the noise of time 251, sqrt(1 / alpha_bar - 1)
        "vae": {
            "channels": (16, 32, 64),
            "latent_channels": 144,
            "epochs": 24,
            "batch_size": 256,
            "bf16": True,
            "noise": 0.7,
            "calm": 0.2,
        },
        "diffusion": {
            "channels": (96, 192),
            "text_width": 64,
            "batch_size": 512,
            "bf16": True,
            "mistakes": 0.1,
            "cycles": (
                {"epochs": 6, "times": ((5, 0, 700), (1, 0, 1000))},
                {"epochs": 9, "times": ((5, 0, 700), (1, 0, 1000))},
                {
                    "epochs": 8,
                    "times": ((10, 401, 551), (3, 0, 100), (6, 0, 700), (1, 0, 1000)),
                    "batch_size": 128,
                    "lr": 5e-4,
                },
            ),
        },
    },
    # Yoon et al.'s (meliketoy/wide-resnet.pytorch): the crop is padded with zeros, the momentum is not Nesterov's
    "paper": {
        "network": {
            "depth": 28,
            "widen_factor": 10,
            "dropRate": 0.3,
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
        },
        "training": {
            "epochs": 200,
            "lr": 0.1,
            "schedule": "steps",
            "optimizer": "sgd",
            "nesterov": False,
            "weight_decay": 5e-4,
            "batch_size": 128,
            "pad": 4,
            "padding": "constant",
            "bf16": True,
        },
    },
}


def captions_of(images):
    """The captions that the models are trained with: those that come with the images, else the class and the colours that are there."""
    return images.captions or [
        pixel_caption(p, images.classes[y], i)
        for p, y, i in zip(images.pixels, images.labels.tolist(), images.indices.tolist())
    ]


def words_of(captions, prompt):
    """Every word of the prompt and the captions, the most frequent first."""
    return [w for w, _ in Counter(" ".join([prompt, *captions]).split()).most_common()]


def new_captioner(captions, profile, device, *, width, layers, text_layers, patch=4):
    """BLIP at a small size, with a WordPiece vocabulary of the captions' words and, for all others, single letters."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[DEC]",
        *".,'-",
        *letters,
        *(f"##{c}" for c in letters),
    ]
    vocabulary += [w for w in words_of(captions, profile.prompt) if w not in vocabulary]
    tokenizer = BertTokenizer(
        vocab={w: i for i, w in enumerate(vocabulary)}, additional_special_tokens=["[DEC]"]
    )
    mean, std = (
        [0.48145466, 0.4578275, 0.40821073],
        [0.26862954, 0.26130258, 0.27577711],
    )  # CLIP's, as BLIP has
    shape = {"height": profile.size, "width": profile.size}
    processor = BlipProcessor(BlipImageProcessor(size=shape, image_mean=mean, image_std=std), tokenizer)
    config = BlipConfig(
        vision_config={
            "image_size": profile.size,
            "patch_size": patch,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "projection_dim": width,
            "initializer_range": 0.02,
        },
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": width,
            "encoder_hidden_size": width,
            "intermediate_size": 2 * width,
            "projection_dim": width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": vocabulary.index("[DEC]"),
            "eos_token_id": vocabulary.index("[SEP]"),
            "sep_token_id": vocabulary.index("[SEP]"),
            "pad_token_id": 0,
        },
        projection_dim=width,
        image_text_hidden_size=width,
    )
    model = BlipForConditionalGeneration(config)
    return models.Captioner(
        model,
        processor,
        prompt=profile.prompt,
        num_beams=profile.num_beams,
        max_length=profile.max_length,
        min_length=profile.min_length,
    ).to(device)


def new_text_tokenizer(captions, prompt, length):
    """CLIP's byte-level BPE with merges learned on the captions' words; any other text falls apart into bytes."""
    import json

    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers import models as bpe
    from transformers import CLIPTokenizer

    learner = Tokenizer(bpe.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner.train_from_iterator(
        [words_of(captions, prompt)],
        trainers.BpeTrainer(vocab_size=5000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split())
        for m in json.loads(learner.to_str())["model"]["merges"]
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [
        *alphabet,
        *(c + "</w>" for c in alphabet),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    pieces = list(dict.fromkeys(pieces))
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=length)


def new_vae(profile, *, channels, latent_channels):
    """Stable Diffusion's autoencoder at a small size. One norm group: groups of a few channels each hide the amplitudes of the
    colours from the next layer, and learning them back takes long.

    The latent has as much room as Stable Diffusion's has for the same image at the authors' working size: 8 x 8 x 144 numbers
    against 48 x 48 x 4. BatchSize is what survives noise: at t = 501 each number of unit variance keeps 0.23 bits.
    """
    from diffusers import AutoencoderKL

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
        ] = -3  # log variance of the posterior: begin with latents one can read
    return vae


def new_diffusion(vae, captions, profile, device, *, channels, text_width, tokens=32):
    """Stable Diffusion's parts at a small size around a trained VAE, as a purifier."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = new_text_tokenizer(captions, profile.prompt, tokens)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=2 * text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokens,
            projection_dim=text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
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
    # it predicts z_0 and not the noise: a network narrower than the latent cannot pass the noise of every channel through
    scheduler = models.ddim(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "sample",
        }
    )
    settings = {name: getattr(profile, name) for name in defense.LatentPurifier.SETTINGS}
    purifier = defense.LatentPurifier(vae, unet, text_encoder, tokenizer, scheduler, **settings)
    return purifier.to(device, memory_format=torch.channels_last)


def folder_of(work, cycle):
    """Where the state of a cycle lies."""
    return work / f"cycle{cycle}" if cycle else work


def compiled(*networks, device):
    """The first of these networks; all are compiled in place where there is a GPU, and their weights keep their names."""
    for network in networks if torch.device(device).type == "cuda" else ():
        network.compile()
    return networks[0]


def make_classifier(profile, images, captions, work, out, device, depth, widen_factor, **how):
    net = compiled(zoo.new_wide_resnet(depth, widen_factor, len(images.classes)), device=device)
    pretrain.train_classifier(net, images, work, device=device, **how)
    models.save_classifier(
        net, out / "classifier", depth=depth, widen_factor=widen_factor, num_classes=len(images.classes)
    )


def make_captioner(
    profile, images, captions, work, out, device, width, layers, text_layers, flip=False, cycles=({},), **how
):
    captioner = new_captioner(captions, profile, device, width=width, layers=layers, text_layers=text_layers)
    teacher = models.load_classifier(str(out / "classifier"), device=device)
    compiled(captioner.model.vision_model, teacher.block1, teacher.block2, teacher.block3, device=device)
    for cycle, own in enumerate(cycles):
        pretrain.train_captioner(
            captioner,
            images,
            captions,
            folder_of(work, cycle),
            teacher=teacher,
            flip=flip,
            seed=cycle,
            **how | own,
        )
    captioner.model.half().save_pretrained(out / "captioner")
    captioner.processor.save_pretrained(out / "captioner")


def make_vae(profile, images, captions, work, out, device, channels, latent_channels, **how):
    vae = new_vae(profile, channels=channels, latent_channels=latent_channels).to(
        device, memory_format=torch.channels_last
    )
    compiled(vae.encoder, vae.decoder, device=device)
    pretrain.train_vae(vae, images, work, **how)
    vae.half().save_pretrained(out / "diffusion" / "vae")


def make_diffusion(
    profile, images, captions, work, out, device, channels, text_width, mistakes=0.0, cycles=({},), **how
):
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor

    vae = AutoencoderKL.from_pretrained(
        out / "diffusion" / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False, local_files_only=True
    )
    purifier = new_diffusion(vae, captions, profile, device, channels=channels, text_width=text_width)
    compiled(purifier.unet, vae.encoder, device=device)
    if (
        how.get("bf16") and purifier.device.type == "cpu"
    ):  # the fused attention's backward pass in bf16 is slow there
        purifier.unet.set_attn_processor(AttnProcessor())
    n = len(images.classes)
    mistaken = (
        [
            pixel_caption(p, images.classes[(y + 1 + i // 4 % (n - 1)) % n], i)
            for p, y, i in zip(images.pixels, images.labels.tolist(), images.indices.tolist())
        ]
        if mistakes
        else None
    )
    for cycle, own in enumerate(cycles):
        pretrain.train_diffusion(
            purifier,
            images,
            captions,
            folder_of(work, cycle),
            mistaken=mistaken,
            mistakes=mistakes,
            seed=cycle,
            **how | own,
        )
    for name in ("unet", "text_encoder"):
        getattr(purifier, name).half().save_pretrained(out / "diffusion" / name)
    purifier.tokenizer.save_pretrained(out / "diffusion" / "tokenizer")
    purifier.scheduler.save_pretrained(out / "diffusion" / "scheduler")


def measured(profile, device, split="test"):
    """What the profile's models are worth on the first images of a split, as Markdown; with no fine-tuning of its own."""
    import pandas as pd

    from lgap_utils import attacks, protocols
    from lgap_utils.noise import Keys
    from lgap_utils.words import names_class

    defense, test = (
        models.load_defense(profile, device=device),
        load_images(profile.dataset, split, profile.n_images),
    )
    y, keys = test.labels, Keys(test.indices, profile.seed, "attack")
    x_adv = protocols.in_batches(
        lambda x, y, keys: attacks.pgd(
            attacks.blind(defense),
            x.to(device),
            y,
            eps=profile.eps,
            step_size=profile.step_size,
            n_steps=profile.n_steps,
            keys=keys,
        ),
        test.x,
        y,
        keys,
    ).cpu()
    rows, psnr, true = {}, None, captions_of(test)
    for case, x in (("clean", test.x), ("attacked", x_adv)):
        found = {
            "classifier right, undefended": [],
            "classifier right, VAE round trip only": [],
            "classifier right, LGAP": [],
            "classifier right, LGAP told the true class": [],
            "caption names the class": [],
        }
        for part in torch.arange(len(x)).split(profile.batch_size):
            batch, label = x[part].to(device), y[part].to(device)
            with torch.no_grad():
                posterior = Keys(test.indices[part], profile.seed)
                trip = defense.purifier.decode(defense.purifier.encode(batch, posterior))
                captions = defense.caption(batch)
                seen = (
                    batch,
                    trip,
                    defense.purify(batch, captions, posterior),
                    defense.purify(batch, [true[i] for i in part.tolist()], posterior),
                )
                for name, images in zip(found, seen):
                    found[name] += (defense.classify(images).argmax(1) == label).tolist()
            found["caption names the class"] += [
                names_class(c, test.classes[k]) for c, k in zip(captions, label.tolist())
            ]
            psnr = (
                (psnr or []) + (-10 * torch.log10((trip - batch).square().mean((1, 2, 3)))).tolist()
                if case == "clean"
                else psnr
            )
        rows |= {(name, case): tables.proportion(flags) for name, flags in found.items()}
    table = pd.DataFrame(rows).T.rename_axis(["measured", "images"])
    attack = f"preprocessor-blind PGD-{profile.n_steps}, eps {profile.eps_255:g}/255, step {profile.step_size_255:g}/255, random start"
    return (
        f"{test.source}; {split} images, the first {len(test)}; attacked: {attack}; intervals: 95 %, Wilson.\n\n"
        f"{table.reset_index().to_markdown(index=False)}\n\n"
        f"PSNR of the VAE's round trip on clean images: {torch.tensor(psnr).mean():.1f} dB "
        f"(standard deviation {torch.tensor(psnr).std():.1f} over {len(psnr)} images).\n"
    )


PARTS = {
    "classifier": make_classifier,
    "captioner": make_captioner,
    "vae": make_vae,
    "diffusion": make_diffusion,
}


def make_trio(name, parts, device):
    """The parts of a bundled profile, into checkpoints/NAME."""
    profile, recipe, out = get_profile(name), RECIPES[name], HERE / name
    if parts == ["measure"]:
        return (out / "measured.md").write_text(measured(profile, device))
    images = load_images(profile.dataset, "train", recipe["n"])
    captions = captions_of(images)
    for part in [part for part in PARTS if part in parts]:
        torch.manual_seed(0)  # the initial weights
        flip = {} if part == "classifier" else {"flip": recipe["flip"]}
        work = HERE / "work" / name / part
        PARTS[part](profile, images, captions, work, out, device, **flip, **recipe[part])
        for log in work.rglob("log.csv"):
            shutil.copy(
                log, out / f"{log.parent.relative_to(work.parent).as_posix().replace('/', '_')}_curve.csv"
            )
        files.write_checksums(out)
    if "measure" in parts:
        (out / "measured.md").write_text(measured(profile, device))


def make_paper(device, out=None, n=None, epochs=None, **sizes):
    """The WideResNet that Table 2 needs, into `out`, from the first n training images (None: all).

    epochs and sizes (depth, widen_factor) replace those of the recipe. The state lies in checkpoints/work/paper, that of a trial with
    an `out` of its own beside that.
    """
    profile, recipe = get_profile("paper", table=2), RECIPES["paper"]
    work = Path(f"{out}.work") if out else HERE / "work" / "paper"
    out = Path(out or HERE.parent / profile.classifier)
    images, validation = load_images(profile.dataset, "train", n), load_images(profile.dataset, "validation")
    config = recipe["network"] | {"num_classes": len(images.classes)} | sizes
    training = recipe["training"] | ({"epochs": epochs} if epochs else {})
    torch.manual_seed(0)  # the initial weights
    net = models.new_classifier(**config)
    pretrain.train_classifier(net, images, work, validation=validation, device=device, **training)
    models.save_classifier(net, out, **config)
    shutil.copy(work / "log.csv", out / "curve.csv")
    files.write_checksums(out)
    right = tables.proportion(train.hits(net, validation.x.to(device), validation.labels))
    print(
        f"{right['%']} % of {right['n']} validation images right (95 % interval {right['95 % interval']}); saved in {out}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("profile", choices=sorted(RECIPES))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument(
        "--only", nargs="+", choices=[*PARTS, "measure"], help="parts of `toy` and `small` (default: all)"
    )
    parser.add_argument(
        "--try",
        nargs="*",
        dest="settings",
        metavar="NAME=VALUE",
        help="make nothing: print what `toy` or `small` is "
        "worth on validation images with these fields of the profile, e.g. strength=0.6 diffusion=/a/folder",
    )
    sizes = parser.add_argument_group("for `paper`", "the same training at another size or length")
    sizes.add_argument("--depth", type=int, help="6 k + 4")
    sizes.add_argument("--widen-factor", type=int)
    sizes.add_argument("--epochs", type=int, help="the learning rate falls after 30, 60 and 80 %% of them")
    sizes.add_argument("--n", type=int, help="the first so many training images")
    sizes.add_argument("--out", help="folder of the result (default: checkpoints/paper/cifar100)")
    args = parser.parse_args()
    given = {
        name: value
        for name in ("depth", "widen_factor", "epochs", "n", "out")
        if (value := getattr(args, name)) is not None
    }
    if (
        args.profile == "paper"
        and (args.only or args.settings is not None)
        or args.profile != "paper"
        and given
    ):
        parser.error(f"{args.profile} takes no {', '.join(given) or ('--only' if args.only else '--try')}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.settings is not None:
        try:
            profile = get_profile(args.profile, **settings_of(args.profile, args.settings))
        except ValueError as error:
            parser.error(str(error))
        return print(measured(profile, models.device_of(), "validation"))
    if args.profile == "paper":
        return make_paper(models.device_of(), **given)
    make_trio(args.profile, args.only or [*PARTS, "measure"], models.device_of())


if __name__ == "__main__":
    main()
