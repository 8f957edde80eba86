"""Files of data sets: found below LGAP_DATA or fetched from the hub, and their images decoded."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .files import CheckpointError
from .hub import explain, hub_file, verify_file
from .profiles import data_root

EncodedImages = Sequence[tuple[Any, Callable[[], bytes]]]  # (name for messages, reader of the encoded image)


def data_folder() -> Path:
    """The folder of data sets. Raises FileNotFoundError where LGAP_DATA names none."""
    folder = data_root()
    if os.environ.get("LGAP_DATA") and not folder.is_dir():
        raise FileNotFoundError(
            f"LGAP_DATA={os.environ['LGAP_DATA']}: there is no folder {folder}; correct it, "
            "or unset it to read data sets from data/ in the checkout or from the hub"
        )
    return folder


def take_rows(rows: Any, split: str, n: int | None, start: int) -> Any:
    """rows[start : start + n]; n None: all from `start`. Raises ValueError beyond the end."""
    end = start + (n or 1)
    if len(rows) < end:
        raise ValueError(
            f"{split}: asked for rows {start} to {end - 1}, the split ends before that: it has {len(rows)}"
        )
    return rows[start : None if n is None else end]


def decode_images(
    images: EncodedImages, size: int, prepare: Callable[[Image.Image], Image.Image] = lambda image: image
) -> tuple[torch.Tensor, str]:
    """(uint8 [n, 3, size, size], sha256 of all bytes read) of n encoded images.

    prepare: crops or resizes an RGB image to size x size.
    Raises ValueError, with the name, for an image that cannot be decoded or has another size or depth.
    """
    pixels, digest = torch.empty(len(images), 3, size, size, dtype=torch.uint8), hashlib.sha256()
    for row, (name, read) in zip(pixels, images):
        try:
            data = read()
            with Image.open(io.BytesIO(data)) as encoded:
                mode, image = encoded.mode, prepare(encoded.convert("RGB"))
        except Exception as error:  # decoders raise errors of many types
            kind = type(error).__name__
            raise ValueError(f"{name}: an image cannot be decoded ({kind}); fetch the file again") from error
        if mode in ("I", "F") or mode.startswith("I;16"):  # PIL would cut these off at 255
            raise ValueError(f"{name}: expected 8 bits a channel, got PIL's mode {mode}; save it with 8 bits")
        if image.size != (size, size):
            raise ValueError(
                f"{name}: expected an image of {size} x {size} pixels, got {image.width} x {image.height}"
            )
        row.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        digest.update(data)
    return pixels, digest.hexdigest()


def hub_files(folder: str, repository: str, revision: str, names: Sequence[str], layouts: str) -> list[Path]:
    """Files of a hub data set: below LGAP_DATA/folder where that folder exists, else from the hub.

    layouts: what LGAP_DATA may hold, for messages.
    Raises FileNotFoundError for a missing file, ValueError for a download whose digest is not the lock's.
    """
    root = data_folder() / folder
    if root.is_dir():
        for name in names:
            if not (root / name).is_file():
                raise FileNotFoundError(
                    f"{root / name} is missing; expected the layout of {repository} on the hub, or {layouts}"
                )
        return [root / name for name in names]
    try:
        paths = [hub_file(repository, name, revision, "dataset") for name in names]
    except Exception as error:  # the hub's client raises errors of many types
        from huggingface_hub import constants

        cause, remedy = explain(error)
        raise FileNotFoundError(
            f"{repository} is neither in {root} nor could be fetched from the hub at {constants.ENDPOINT}/"
            f"datasets/{repository}: {cause}; {remedy}, or set LGAP_DATA to a folder that holds {layouts}"
        ) from None
    try:
        for path, name in zip(paths, names):
            verify_file(path, f"{repository}@{revision}", name, "fetch it again")
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    return paths
