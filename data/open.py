"""Open whatever a dataset's path names: class folders, a prepared folder, or a prepared dataset in a bucket."""

from __future__ import annotations

from pathlib import Path

from data import imagefolder
from data.remote import is_remote
from data.shards import MANIFEST, open_prepared
from data.source import Source


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
