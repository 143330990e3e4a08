"""The folder that an export fills: all of it or nothing, and nobody else's files are touched."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.imagefolder import class_names
from recipes.errors import InputError

FILES = {
    "safetensors": "model.safetensors",
    "pth": "model.pth",
    "torch_export": "model.pt2",
    "onnx": "model.onnx",
}
"""The file of each format."""
PREPROCESSING, CLASSES, CARD = "preprocessing.json", "classes.json", "README.md"
OURS = (*FILES.values(), PREPROCESSING, CLASSES, CARD)


def require_free(folder: Path, force: bool) -> None:
    """Refuse a folder that holds something.

    Args:
        folder: Where the export is to go.
        force: It may hold something; an earlier export in it is replaced.

    Raises:
        InputError: It holds something, is a file, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {folder} is a file; allowed: a folder that is empty or not there yet")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise InputError(f"--output: {folder} is not empty; choose another, or replace an earlier export with --force")
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"--output: {folder} cannot be made in {nearest}")


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to `folder` at the end, if there is no exception.

    A folder that was not there appears whole. In one that was, each file of an earlier export is replaced or removed,
    and other files stay.
    """
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    beside = folder.absolute().parent / f".{folder.absolute().name}.{os.getpid()}"
    try:
        beside.mkdir()
        yield beside
        if not folder.exists():
            beside.replace(folder)
            return
        new = {path.name for path in beside.iterdir()}
        for name in OURS:
            if name not in new:
                (folder / name).unlink(missing_ok=True)
        for name in sorted(new):
            (beside / name).replace(folder / name)
    except OSError as error:
        raise InputError(f"--output: {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def preprocessing(
    size: int, crop_ratio: float, mean: Sequence[float], std: Sequence[float], loss: str
) -> dict[str, Any]:
    """What preprocessing.json says.

    Args:
        size: Side of the input in pixels.
        crop_ratio: Share of the resized short side that is kept.
        mean: Per channel (R, G, B), of images in [0, 1].
        std: Per channel.
        loss: `loss.name` of the run: it decides what makes probabilities of logits.
    """
    return {
        "size": size,
        "crop_ratio": crop_ratio,
        "resize_short_side": max(size, math.floor(size / crop_ratio + 1e-9)),
        "interpolation": "bilinear",
        "antialias": True,
        "crop": "center",
        "color": "RGB",
        "exif_orientation": "applied",
        "range": [0.0, 1.0],
        "mean": list(mean),
        "std": list(std),
        "layout": "NCHW",
        "dtype": "float32",
        "probabilities": "sigmoid" if loss == "binary_cross_entropy" else "softmax",
    }


def classes(folders: Sequence[str]) -> list[dict[str, Any]]:
    """What classes.json says: the class folder and English name of each output, in order."""
    names = class_names(folders)
    return [
        {"index": index, "class": one, "name": name}
        for index, (one, name) in enumerate(zip(folders, names, strict=True))
    ]
