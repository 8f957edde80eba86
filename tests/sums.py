"""A cheap defence, to the bit the same in any batch: logits are sums over an image."""

import torch

from lgap_utils.defense import LGAP
from lgap_utils.noise import Keys, generator, seed_of

N, SHAPE = 8, (3, 4, 4)


WEIGHTS = torch.randn(10, *SHAPE, generator=generator("weights"))


X = torch.rand(N, *SHAPE, generator=generator("images"))


KEYS = Keys(range(20, 20 + N), seed=1, stage="attack")


def net(x):
    """Ten logits, each a sum over one image: bit for bit the same in any batch."""
    return ((x + x * x)[:, None] * WEIGHTS.to(x)).flatten(2).sum(2)


def words(x):
    """A caption that is another one after any step of an attack."""
    return [f"a picture of {seed_of(*image.flatten().tolist()) % 1000}" for image in x]


def noisy(x, captions, keys):
    """A purifier whose image depends on its caption and on its key."""
    said = torch.tensor([seed_of(caption) / 2**63 for caption in captions]).view(-1, 1, 1, 1)
    return 0.8 * x + 0.1 * said.to(x) + 0.1 * keys.normal(x.shape[1:], "noise").to(x)


Y = net(X).argmax(1)


DEFENSE = LGAP(words, noisy, net)


SMALL = {"eps": 0.05, "step_size": 0.02, "n_steps": 4}


class Counted:
    """A callable that keeps what it was called with."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args):
        self.calls.append(args)
        return self.function(*args)

    @property
    def sizes(self):
        return [len(call[0]) for call in self.calls]


def uniform(*shape):
    return torch.rand(shape, generator=generator("test", *shape))


def pale(x, captions, keys):
    return x * 0.5
