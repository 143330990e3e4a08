"""Opening a dataset of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import is_remote
from data.imagefolder import ImageFolder, missing_split, open_folders
from data.shards import MANIFEST, open_prepared
from data.source import Source, Subset


def open_split_pair(path: str, cache_folder: str) -> tuple[Source, Source]:
    """Open the training and the validation images, with one numbering of the classes; raises DataError.

    `path` is a folder with `train/CLASS/IMAGE` and `val/CLASS/IMAGE`, or a dataset written by `python -m data.prepare`,
    in a folder or at `s3://bucket/prefix`. Data from a bucket is cached in `cache_folder` on this machine.
    """
    if is_remote(path) or (Path(path) / MANIFEST).is_file():
        return open_prepared(path, cache_folder)
    return open_folders(Path(path))


def open_evaluation(path: str, cache_folder: str, classes: Sequence[str]) -> Source:
    """Open images for evaluating a trained network; training images are not needed.

    `path` is a folder with `val/CLASS/IMAGE`, or with `CLASS/IMAGE`; or a prepared dataset. `classes` are the network's
    class folder names in label order; none if unknown, which keeps the dataset's own numbering (that of `train` if
    there is one). Raises DataError, also if there is a class that the network does not know.
    """
    folder = Path(path)
    if is_remote(path) or (folder / MANIFEST).is_file():
        val = open_prepared(path, cache_folder)[1]
        return _renumbered(val, classes) if classes and list(classes) != val.classes else val
    if not folder.is_dir():
        raise DataError(f"{path}: no such folder; expected CLASS/IMAGE or val/CLASS/IMAGE in it")
    if not classes and (folder / "train").is_dir():
        return open_folders(folder)[1]
    inside = folder / "val"
    if not inside.is_dir() and (folder / "train").is_dir() and "train" not in classes:
        raise missing_split(folder, "val")
    return ImageFolder(inside if inside.is_dir() else folder, classes or None)


def _renumbered(source: Source, classes: Sequence[str]) -> Subset:
    """All images of a source, labelled by another list of classes, which must contain each class that has images."""
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.asarray(source.labels)
    unknown = [source.classes[label] for label in np.unique(labels) if source.classes[label] not in label_of]
    if unknown:
        raise DataError(
            f"{source.name(0)} and others: {len(unknown)} of their classes are not among the {len(classes)} classes "
            f"known: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
        )
    own = np.array([label_of.get(name, -1) for name in source.classes], dtype=np.int64)
    view = Subset(source, np.arange(len(source)), own[labels])
    view.classes = list(classes)
    return view
