"""Randomness that belongs to an image: every draw is keyed by what it is for, never by when it happens.

A key is (seed, image index, stage, step, draw). So batch size, order, sharding, workers and resuming cannot
change a result, and an attacker either knows a draw of the defender (the same key) or does not (another
stage).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Key = tuple[int, int | str, str, int, int]  # seed, image index, stage, step, draw


def seed_of(*key: object) -> int:
    """A whole number in [0, 2^63) that depends on `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by `key` alone; equal keys, equal streams."""
    return torch.Generator().manual_seed(seed_of(*key))


class Keys:
    """One key per image of a batch, in `rows`; `keys[part]` is `Keys` again.

    indices: one per image, whole numbers (a list, an array or a tensor) or strings.
    """

    def __init__(self, indices, seed: int = 0, stage: str = "defence", step: int = 0, draw: int = 0):
        indices = indices.tolist() if hasattr(indices, "tolist") else indices
        self.rows: list[Key] = [
            (seed, i if isinstance(i, str) else int(i), stage, step, draw) for i in indices
        ]

    @classmethod
    def of_rows(cls, rows: Iterable[Key]) -> Keys:
        """Keys that are known already."""
        keys = cls([])
        keys.rows = list(rows)
        return keys

    @classmethod
    def of_content(cls, x: Tensor, seed: int = 0) -> Keys:
        """Keys for images [n, ...] that have no index: each is keyed by its own pixels."""
        pixels = x.detach().float().cpu().contiguous().numpy()
        return cls([hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() for image in pixels], seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice | Sequence[int]) -> Keys:
        """The keys of a slice, or of a list of places."""
        return Keys.of_rows(self.rows[part] if isinstance(part, slice) else [self.rows[i] for i in part])

    @property
    def indices(self) -> list[int | str]:
        """The image index of each key."""
        return [row[1] for row in self.rows]

    def at(self, steps: Iterable[int], n_draws: int = 1, stage: str | None = None) -> Keys:
        """n_draws keys for each image, at its own step: row i * n_draws + k is draw k of image i."""
        rows: list[Key] = []
        for (seed, index, old_stage, _, _), step in zip(self.rows, steps):
            rows += [(seed, index, stage or old_stage, step, draw) for draw in range(n_draws)]
        return Keys.of_rows(rows)

    def normal(self, shape: Sequence[int], what: str) -> Tensor:
        """Standard normal [len(self), *shape], float32 on the CPU; row i depends on (key i, `what`) alone."""
        return torch.stack([torch.randn(shape, generator=generator(*row, what)) for row in self.rows])

    def uniform(self, shape: Sequence[int], what: str) -> Tensor:
        """Uniform on [0, 1), as `normal`."""
        return torch.stack([torch.rand(shape, generator=generator(*row, what)) for row in self.rows])
