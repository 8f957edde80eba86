"""A defence whose parts are cheap functions of the image, so that a whole evaluation takes a moment."""

import pandas as pd
import torch

from lgap_utils import baselines
from lgap_utils.baselines import with_purifier
from lgap_utils.defense import LGAP
from lgap_utils.evaluate import Evaluation
from lgap_utils.identity import named
from lgap_utils.images import Images
from lgap_utils.noise import generator, seed_of
from lgap_utils.protocols import Attack

SHAPE, N_DRAWS, SEED = (3, 4, 4), 3, 5
WEIGHTS = torch.randn(10, *SHAPE, generator=generator("weights"))
ATTACK = Attack("BPDA-3, 2 draws", view="bpda", eps_255=16, step_size_255=6, n_steps=3, n_eot=2)


def net(x):
    """Ten logits, each a sum over one image: bit for bit the same in any batch."""
    return ((x + x * x)[:, None] * WEIGHTS).flatten(2).sum(2)


def words(x):
    return [f"a picture of {seed_of(*image.flatten().tolist()) % 1000}" for image in x]


net, words = named(net, "sums"), named(words, "numbers")


class Noisy:
    """A cheap random purifier that keeps the keys it was called with."""

    def __init__(self, strength=0.1):
        self.strength, self.keys = strength, []

    def settings(self):
        return {"strength": self.strength}

    def __call__(self, x, captions, keys):
        self.keys += keys.rows
        return x + self.strength * keys.normal(x.shape[1:], "noise")


def some_images(n=8):
    pixels = (255 * torch.rand(n, *SHAPE, generator=generator("images"))).byte()
    return Images(pixels, net(pixels / 255).argmax(1), 3 * torch.arange(n) + 10, tuple("0123456789"))


def evaluation(folder, images=None, purifier=None, batch_size=8, config=None, **settings):
    target = LGAP(words, purifier or Noisy(), net)
    defenses = {"LGAP": target, "undefended": with_purifier(target, baselines.undefended())}
    images = some_images() if images is None else images
    settings = {"n_draws": N_DRAWS, "seed": SEED, "batch_size": batch_size} | settings
    return Evaluation(defenses, images, folder, config=config or {"weights": "1"}, **settings)


def same(table, expected):
    """Every column but the time that it took, bit for bit."""
    table, expected = (rows.drop(columns="seconds") for rows in (table, expected))
    pd.testing.assert_frame_equal(table, expected, check_exact=True)
    return True


def shards(folder, attack="bpda-3-2-draws"):
    return sorted((folder / attack).glob("*.parquet"))


def attacked(purifier):
    """The images that an attack asked about."""
    return {index for _, index, stage, _, _ in purifier.keys if stage == "attack"}
