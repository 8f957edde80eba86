"""Randomness that belongs to an image: every draw is keyed by what it is for, never by when it happens.

A key is (seed, image index, stage, step, draw). So batch size, order, sharding, workers and resuming cannot change
a result, and an attacker either knows a draw of the defender (the same key) or does not (another stage).
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(*key):
    """A whole number in [0, 2^63) that depends on `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key):
    """A CPU generator seeded by `key` alone; equal keys, equal streams."""
    return torch.Generator().manual_seed(seed_of(*key))


class Keys:
    """One key per image of a batch. `Keys(indices, seed, stage, step, draw)`; indexing and `+` act on the batch."""

    def __init__(self, indices, seed=0, stage="defence", step=0, draw=0):
        indices = indices.tolist() if hasattr(indices, "tolist") else indices
        self.rows = [(seed, i if isinstance(i, str) else int(i), stage, step, draw) for i in indices]

    @classmethod
    def of_content(cls, x, seed=0):
        """Keys for images that have no index: each is keyed by its own pixels, wherever in a batch it stands."""
        pixels = x.detach().float().cpu().contiguous().numpy()
        return cls([hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() for image in pixels], seed)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        """The keys of a slice, or of a list of places."""
        out = Keys([])
        out.rows = self.rows[part] if isinstance(part, slice) else [self.rows[i] for i in part]
        return out

    @property
    def indices(self):
        """The image index of each key."""
        return [row[1] for row in self.rows]

    def at(self, steps, n_draws=1, stage=None):
        """n_draws keys for each image, image after image, at its own step: what one step of an attack draws."""
        out = Keys([])
        out.rows = [
            (seed, index, stage or old, step, draw)
            for (seed, index, old, _, _), step in zip(self.rows, steps)
            for draw in range(n_draws)
        ]
        return out

    def __add__(self, other):
        out = Keys([])
        out.rows = self.rows + other.rows
        return out

    def normal(self, shape, what):
        """Standard normal [len(self), *shape], float32 on the CPU; row i depends on (key i, `what`) alone."""
        return torch.stack([torch.randn(shape, generator=generator(*row, what)) for row in self.rows])

    def uniform(self, shape, what):
        """Uniform on [0, 1), as `normal`."""
        return torch.stack([torch.rand(shape, generator=generator(*row, what)) for row in self.rows])
