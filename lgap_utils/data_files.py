"""data_files."""

from __future__ import annotations

import hashlib
import io
import os

import numpy as np
import torch

from .files import CheckpointError
from .hub import explain, hub_file, verify_file
from .profiles import data_root


def data_folder():
    """The folder of data sets. Raises FileNotFoundError where LGAP_DATA names one that is not there."""
    folder = data_root()
    if os.environ.get("LGAP_DATA") and not folder.is_dir():
        raise FileNotFoundError(
            f"LGAP_DATA={os.environ['LGAP_DATA']}: there is no folder {folder}; correct it, "
            "or unset it to read data sets from data/ in the checkout or from the hub"
        )
    return folder


# ---------------------------------------------------------------- files


def take_rows(rows, what, n, start):
    """rows[start : start + n], all of them."""
    if len(rows) < start + (n or 1):
        raise ValueError(
            f"{what}: asked for rows {start} to {start + (n or 1) - 1}, the split ends before that: it has {len(rows)}"
        )
    return rows[start : None if n is None else start + n]


def decode_images(images, size, prepare=lambda image: image):
    """uint8 [n, 3, size, size], and the sha256 of all that was read, of [(name, read)] where read() gives an encoded image."""
    from PIL import Image

    pixels, digest = torch.empty(len(images), 3, size, size, dtype=torch.uint8), hashlib.sha256()
    for row, (name, read) in zip(pixels, images):
        try:
            data = read()
            with Image.open(io.BytesIO(data)) as image:
                mode, image = image.mode, prepare(image.convert("RGB"))
        except Exception as error:  # a decoder raises many kinds; all mean the same to the user
            raise ValueError(
                f"{name}: an image cannot be decoded ({type(error).__name__}); fetch the file again"
            ) from error
        if mode in ("I", "F") or mode.startswith("I;16"):  # PIL would cut them off at 255
            raise ValueError(f"{name}: expected 8 bits a channel, got PIL's mode {mode}; save it with 8 bits")
        if image.size != (size, size):
            raise ValueError(
                f"{name}: expected an image of {size} x {size} pixels, got {image.width} x {image.height}"
            )
        row.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        digest.update(data)
    return pixels, digest.hexdigest()


def hub_files(folder, repository, revision, names, instead=None):
    """The named files below LGAP_DATA/folder where that folder is, else from the hub at a fixed revision."""
    root = data_folder() / folder
    if root.is_dir():
        if missing := [name for name in names if not (root / name).is_file()]:
            raise FileNotFoundError(
                f"{root / missing[0]} is missing; expected the layout of the hub data set {repository}"
                + (f", or {instead}" if instead else "")
            )
        return [root / name for name in names]
    from huggingface_hub import constants

    try:
        paths = [hub_file(repository, name, revision, "dataset") for name in names]
    except Exception as error:  # the hub's client raises many kinds
        cause, remedy = explain(error)
        raise FileNotFoundError(
            f"{repository} is neither in {root} nor could be fetched from the hub at {constants.ENDPOINT}/datasets/"
            f"{repository}: {cause}; {remedy}, or set LGAP_DATA to a folder that holds "
            f"{instead or f'{folder}/{names[0]}'}"
        ) from None
    try:
        for path, name in zip(paths, names):
            verify_file(path, f"{repository}@{revision}", name, "fetch it again")
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    return paths
