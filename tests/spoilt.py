"""Files as they must not be: half, flipped, web pages, and pickles that run code."""

import io
import pickle
from pathlib import Path

import torch


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def flip(file):
    """Flip the last bit of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def explode(file):
    """Put a pickle that leaves `exploded` beside the file's folder in its place."""
    file.write_bytes(pickle.dumps(Bomb(file.parents[1] / "exploded")))


FAULTS = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "HTML": lambda file: file.write_text("<!doctype html>"),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "a pickle": explode,
    "one flipped bit": flip,
}


def saved(state, **how):
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


OLD = {"_use_new_zipfile_serialization": False}
# name: the content of a file of weights, given a Bomb
PICKLES = {
    "code": pickle.dumps,
    "code beside tensors": lambda bomb: saved({"conv": torch.zeros(3), "x": bomb}),
    "half": lambda bomb: saved({"conv": torch.zeros(3000)})[:5000],
    "noise": lambda bomb: bytes(range(1, 200)),
    "half, as torch once saved": lambda bomb: saved({"conv": torch.zeros(3000)}, **OLD)[:5000],
}
