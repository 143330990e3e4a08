"""Opening a dataset of any kind, and checking a prepared one before it is read."""

from __future__ import annotations

import fcntl
import shlex
import shutil
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import is_remote, named, open_store, read_regular, replace_file
from data.imagefolder import ImageFolder, missing_split, open_folders
from data.shards import MANIFEST, MAX_JSON, Manifest, Resolution, ShardSource, parse
from data.source import Source, Subset

_Pair = tuple[ShardSource, ShardSource]  # train and val
SizeOf = Callable[[str], "int | None"]  # returns a shard's size in bytes by its full name, None if it is missing


class Damaged(DataError):
    """A prepared dataset is damaged; `problems` has all, the message only the first."""

    def __init__(self, path: str, lines: Sequence[str]) -> None:
        more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
        super().__init__(f"{lines[0]}{more}; to list all damage: python -m data.verify {shlex.quote(path)}")
        self.problems = list(lines)


def open_split_pair(path: str, cache_folder: str) -> tuple[Source, Source]:
    """Open the training and the validation images, with one numbering of the classes; raises DataError.

    `path` is a folder with `train/CLASS/IMAGE` and `val/CLASS/IMAGE`, or a dataset written by `python -m data.prepare`,
    in a folder or at `s3://bucket/prefix`. Data from a bucket is cached in `cache_folder` on this machine.
    """
    if is_remote(path):
        return open_cached(path, cache_folder)[1]
    if not _is_prepared(path):
        return open_folders(Path(path))
    path, name = path.rstrip("/") or "/", f"{Path(path)}/{MANIFEST}"
    with named(name):
        manifest = parse(Manifest, read_regular(name, MAX_JSON), name)
    return _open_splits(path, Path(path), manifest, _file_size)


def open_evaluation(path: str, cache_folder: str, classes: Sequence[str]) -> Source:
    """Open images for evaluating a trained network; training images are not needed.

    `path` is a folder with `val/CLASS/IMAGE`, or with `CLASS/IMAGE`; or a prepared dataset. `classes` are the network's
    class folder names in label order; none if unknown, which keeps the dataset's own numbering (that of `train` if
    there is one). Raises DataError, also if there is a class that the network does not know.
    """
    folder = Path(path)
    if is_remote(path) or _is_prepared(path):
        val = open_split_pair(path, cache_folder)[1]
        return _renumbered(val, classes) if classes and list(classes) != val.classes else val
    if not folder.is_dir():
        raise DataError(f"{path}: no such folder; expected CLASS/IMAGE or val/CLASS/IMAGE in it")
    if not classes and (folder / "train").is_dir():
        return open_folders(folder)[1]
    inside = folder / "val"
    if not inside.is_dir() and (folder / "train").is_dir() and "train" not in classes:
        raise missing_split(folder, "val")
    return ImageFolder(inside if inside.is_dir() else folder, classes or None)


def _is_prepared(path: str) -> bool:
    with named(path):  # the name may be too long
        return (Path(path) / MANIFEST).is_file()


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
    return Subset(source, np.arange(len(source)), own[labels], list(classes))


def open_cached(path: str, cache_folder: str) -> tuple[Path, _Pair]:
    """Download everything of a dataset in a bucket except images, unless it is in the cache already, and open it.

    Returns the dataset's folder in the cache, and its splits. Raises DataError if the bucket cannot be read or lacks a
    complete prepared dataset, or the cache cannot be written.
    """
    path = path.rstrip("/")
    store, root = open_store(path)
    with named(f"{path}/{MANIFEST}"):
        data = store.cat_file(f"{root}/{MANIFEST}", start=0, end=MAX_JSON)
    manifest = parse(Manifest, data, f"{path}/{MANIFEST}")
    folder = Path(cache_folder) / root.strip("/").replace("/", "--")
    files = [f"{split}/labels.npy" for split in manifest.splits]
    for split, what in manifest.splits.items():
        files += [f"{split}/{one}/{file}" for one in what.resolutions for file in ("index.json", "images.npy")]
    with named(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".metadata-lock").open("w") as lock:  # ranks on the same machine share the cache
            fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(Damaged, OSError):  # nothing is there, or damaged by a power failure
                if (folder / MANIFEST).read_bytes() == data:
                    return folder, _open_splits(path, folder, manifest, None)
            (folder / MANIFEST).unlink(missing_ok=True)
            for split in manifest.splits:
                shutil.rmtree(folder / split, ignore_errors=True)
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                with named(f"{path}/{file}"):
                    store.get_file(f"{root}/{file}", str(folder / file))
            sources = _open_splits(path, folder, manifest, _object_sizes(path))
            replace_file(folder / MANIFEST, [data])
            return folder, sources


def _open_splits(path: str, folder: Path, manifest: Manifest, size_of: SizeOf | None) -> _Pair:
    """Both splits, after checking all metadata and, unless `size_of` is None, the size of each shard."""
    sources: list[ShardSource] = []
    problems: list[str] = []
    for split in ("train", "val"):
        if split not in manifest.splits:
            raise DataError(f"{path}: holds no {split} images; prepare a dataset that has train and val")
        entry = manifest.splits[split]
        raw = {name: resolution.raw for name, resolution in entry.resolutions.items()}
        source = ShardSource(folder / split, f"{path}/{split}", manifest.classes, raw)
        sources.append(source)
        problems += _problems(partial(source.check, entry.images))
        for name, resolution in source.resolutions.items():
            found = _problems(partial(resolution.check, entry.images, entry.resolutions[name]))
            problems += found or ([] if size_of is None else _wrong_sizes(resolution, size_of))
    if problems:
        raise Damaged(path, problems)
    return sources[0], sources[1]


def _problems(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except DataError as error:
        return [str(error)]
    return []


def _wrong_sizes(resolution: Resolution, size_of: SizeOf) -> list[str]:
    pairs = [(name, size_of(name), shard.size) for _, name, shard in resolution.files()]
    return [
        f"{name}: not found" if size is None else f"{name}: has {size} bytes, index.json says {expected}"
        for name, size, expected in pairs
        if size != expected
    ]


def _file_size(name: str) -> int | None:
    """Size of a regular file, also behind links; None for anything else, which could block forever when opened."""
    with suppress(OSError):
        status = Path(name).stat()
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None


def _object_sizes(path: str) -> SizeOf | None:
    """Size of an object of a dataset by its full name, from one listing; None if it can be read but not listed."""
    store, root = open_store(path)
    with named(path):
        try:
            found = store.find(root, detail=True)
        except PermissionError:
            return None
    sizes = {f"s3://{name}": entry["size"] for name, entry in found.items()}
    return sizes.get if f"{path}/{MANIFEST}" in sizes else None
