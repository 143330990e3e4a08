"""Open whatever a dataset's path names: class folders, a prepared folder, or a prepared dataset in a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data import imagefolder
from data.errors import DataError
from data.remote import is_remote
from data.shards import MANIFEST, open_prepared
from data.source import Renumbered, Source


def open_split_pair(path: str, cache_folder: str) -> tuple[Source, Source]:
    """Open the training and the validation images.

    Args:
        path: a folder with `train/CLASS/IMAGE` and `val/CLASS/IMAGE`; or what `python -m data.prepare` wrote, in a
            folder or at `s3://bucket/prefix`.
        cache_folder: where a bucket's data is kept on this machine.

    Returns:
        (train, val), with one numbering of the classes.

    Raises:
        DataError: they cannot be used as they are.
    """
    if is_remote(path) or (Path(path) / MANIFEST).is_file():
        return open_prepared(path, cache_folder)
    return imagefolder.open_split_pair(Path(path))


def open_evaluation(path: str, cache_folder: str, classes: Sequence[str]) -> Source:
    """Open images to evaluate a trained network on; no training images need be there.

    Args:
        path: a folder with `val/CLASS/IMAGE`, or with `CLASS/IMAGE`; or a prepared dataset, as in `open_split_pair`.
        cache_folder: where a bucket's data is kept on this machine.
        classes: the network's class folder names in label order; empty where they are not known, which leaves the
            dataset's own numbering: that of `train` where there is one.

    Raises:
        DataError: they cannot be used as they are, or have a class that the network does not know.
    """
    folder = Path(path)
    if is_remote(path) or (folder / MANIFEST).is_file():
        val = open_prepared(path, cache_folder)[1]
        return Renumbered(val, classes) if classes and list(classes) != val.classes else val
    if not folder.is_dir():
        raise DataError(f"{path}: no such folder; expected CLASS/IMAGE or val/CLASS/IMAGE in it")
    if not classes and (folder / "train").is_dir():
        return imagefolder.open_split_pair(folder)[1]
    inside = folder / "val"
    if not inside.is_dir() and (folder / "train").is_dir() and "train" not in classes:
        raise imagefolder.missing_split(folder, "val")
    return imagefolder.ImageFolder(inside if inside.is_dir() else folder, classes or None)
