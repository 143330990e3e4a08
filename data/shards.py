"""A prepared dataset: MDS shards (mosaicml-streaming's format) at one or several resolutions, read by index.

`python -m data.prepare` writes it:

    dataset.json                 classes, and for each split its images and resolutions
    SPLIT/labels.npy             label of each image, int64
    SPLIT/RESOLUTION/index.json  the shards, as mosaicml-streaming reads them
    SPLIT/RESOLUTION/images.npy  offset in its shard and length of each encoded image, uint32 of shape (n, 2)
    SPLIT/RESOLUTION/PART/shard.00000.mds

A sample has the columns image (bytes), label (int) and name (str). An index means the same image at every resolution.
Streaming's own reader is not used here: its order belongs to its shards, and ours to (seed, epoch) alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.remote import is_remote, named, open_store, read_ranges

MANIFEST = "dataset.json"
FORMAT = "composer-resnet/1"
ORIGINAL = "original"
"""The resolution at which the encoded images are the source's own bytes."""
SHARD = "shard.00000.mds"
CROP_RATIO = 0.875
"""A resolution suffices for images of `size` px when its short side is size / CROP_RATIO or more: that to which the
usual evaluation resizes, and so the usual meaning of training at a size."""


def short_side(resolution: str) -> float:
    """The short side in pixels at a resolution; infinite for the original images."""
    return float("inf") if resolution == ORIGINAL else int(resolution)


def resolution_for(resolutions: Sequence[str], size: int) -> str:
    """The smallest resolution that suffices for images of `size` px; the largest where none does."""
    ordered = sorted(resolutions, key=short_side)
    return next((one for one in ordered if short_side(one) * CROP_RATIO >= size - 1e-6), ordered[-1])


def image_bytes(sample: bytes, start: int) -> tuple[int, int]:
    """Where the image lies in an encoded MDS sample that begins at `start`: (offset in the shard, length)."""
    return start + 8, int.from_bytes(sample[:4], "little")


class Resolution:
    """One split at one resolution: where each image lies, and its bytes from the folder or, while absent, the bucket.

    Args:
        folder: where it lies on this machine, whole or in part.
        url: where it lies whole, a folder or `s3://bucket/prefix`.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url
        self._process = -1
        self._used = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_url": self._url, "_process": -1, "_used": False}

    @cached_property
    def shards(self) -> list[dict[str, Any]]:
        """The shards of `index.json`."""
        shards: list[dict[str, Any]] = json.loads((self._folder / "index.json").read_text(encoding="utf-8"))["shards"]
        return shards

    @cached_property
    def images(self) -> NDArray[np.uint32]:
        """Offset and length of each image: mapped, so that processes share it."""
        mapped: NDArray[np.uint32] = np.load(self._folder / "images.npy", mmap_mode="r")
        return mapped.view(np.ndarray)  # quicker to index than a memmap

    @cached_property
    def _files(self) -> list[str]:
        return [shard["raw_data"]["basename"] for shard in self.shards]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([shard["samples"] for shard in self.shards])

    def where(self, index: int) -> tuple[str, int, int]:
        """(shard's path below the resolution's folder, offset, length) of an image."""
        offset, length = self.images[index].tolist()
        return self._files[int(np.searchsorted(self._ends, index, side="right"))], offset, length

    def local(self, file: str, offset: int, length: int) -> bytes | None:
        """Bytes of a shard on this machine; None where the shard is not here (yet)."""
        try:
            descriptor = os.open(f"{self._folder}/{file}", os.O_RDONLY)  # a third faster than by Path
        except FileNotFoundError:
            if not is_remote(self._url):
                raise
            return None
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def read_many(self, indices: Sequence[int]) -> dict[int, bytes]:
        """The images that are not on this machine, fetched from the bucket all at once.

        Raises:
            DataError: the bucket stays out of reach, or lacks them.
        """
        if not is_remote(self._url):
            return {}
        self._mark_used()
        places = {index: self.where(index) for index in indices}
        here = {file: os.path.exists(f"{self._folder}/{file}") for file in {place[0] for place in places.values()}}  # noqa: PTH110
        absent = [index for index in indices if not here[places[index][0]]]
        if not absent:
            return {}
        store, root = self._store()
        ranges = [
            (f"{root}/{file}", offset, offset + length) for file, offset, length in (places[index] for index in absent)
        ]
        return dict(zip(absent, read_ranges(store, ranges), strict=True))

    def read(self, index: int) -> bytes:
        """One image; raises OSError where it cannot be read from a folder, and DataError as `read_many`."""
        data = self.local(*self.where(index))
        return self.read_many([index])[index] if data is None else data

    def name(self, index: int) -> str:
        """The image's path in the dataset that was prepared."""
        file, offset, length = self.where(index)
        head = self.local(file, offset - 8, 8)
        if head is None:
            return f"image {index}"
        size = int.from_bytes(head[4:], "little")
        return (self.local(file, offset + length + 8, size) or b"").decode("utf-8", "replace")

    def _store(self) -> tuple[Any, str]:
        """The bucket, opened by this process: a forked worker must not use its parent's connections."""
        if self._process != os.getpid():
            import fsspec.asyn
            import s3fs

            fsspec.asyn.reset_after_fork()
            s3fs.S3FileSystem.clear_instance_cache()
            self._opened = open_store(self._url)
            self._process = os.getpid()
        return self._opened

    def _mark_used(self) -> None:
        """Tell the stager (data/stage.py) which resolution is being read."""
        if not self._used:
            (self._folder / ".used").touch()
            self._used = True


class ShardSource:
    """One split of a prepared dataset.

    Attributes:
        path: where it lies: a folder or `s3://...`.
        classes: class folder names in label order.
        labels: label of each image, int64, mapped from its file.
        resolutions: what can be read, by name, smallest first.
    """

    def __init__(self, folder: Path, url: str, classes: Sequence[str], resolutions: Sequence[str]) -> None:
        """Open a split whose metadata is on this machine.

        Args:
            folder: the split's folder on this machine, a cache where `url` is a bucket's.
            url: the split's place.
            classes: class names in label order.
            resolutions: names of the resolutions.
        """
        self.path = url
        self.classes = list(classes)
        self._folder = folder
        self.resolutions = {
            name: Resolution(folder / name, f"{url}/{name}") for name in sorted(resolutions, key=short_side)
        }

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Label of each image, int64."""
        labels: NDArray[np.int64] = np.load(self._folder / "labels.npy", mmap_mode="r")
        return labels

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "labels"}  # a memmap pickles whole

    def __len__(self) -> int:
        return len(self.labels)

    def _largest(self) -> Resolution:
        return list(self.resolutions.values())[-1]

    def read(self, index: int) -> bytes:
        """The encoded image at the largest resolution."""
        return self._largest().read(index)

    def in_all_resolutions(self, index: int) -> list[bytes]:
        """The encoded image at every resolution."""
        return [resolution.read(index) for resolution in self.resolutions.values()]

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], bytes]:
        """What reads images for pictures of `size` px; those at `indices` are fetched at once where they are remote."""
        resolution = self.resolutions[resolution_for(list(self.resolutions), size)]
        fetched = resolution.read_many(indices)
        return lambda index: fetched.pop(index, None) or resolution.read(index)

    def name(self, index: int) -> str:
        """The image's path in the dataset that was prepared."""
        return f"{self.path}: {self._largest().name(index)}"


def open_prepared(path: str, cache_folder: str) -> tuple[ShardSource, ShardSource]:
    """Open both splits of a prepared dataset; of a bucket's only the metadata is fetched.

    Args:
        path: the dataset's folder, or `s3://bucket/prefix`.
        cache_folder: where a bucket's data is kept on this machine.

    Returns:
        (train, val).

    Raises:
        DataError: it is not there, is not whole, or holds what this version cannot read.
    """
    folder = cached_metadata(path, cache_folder) if is_remote(path) else Path(path)
    manifest = read_manifest(path, (folder / MANIFEST).read_bytes())
    splits = []
    for split in ("train", "val"):
        if split not in manifest["splits"]:
            raise DataError(f"{path}: holds no {split} images; prepare a folder that has train and val")
        resolutions = list(manifest["splits"][split]["resolutions"])
        source = ShardSource(folder / split, f"{path.rstrip('/')}/{split}", manifest["classes"], resolutions)
        with named(f"{path}/{split}"):
            _require_consistent(source)
        splits.append(source)
    return splits[0], splits[1]


def _require_consistent(source: ShardSource) -> None:
    for name, resolution in source.resolutions.items():
        counts = {len(source.labels), len(resolution.images), int(resolution._ends[-1])}
        if len(counts) != 1:
            raise DataError(f"{source.path}/{name}: labels, images and shards disagree on their number: {counts}")


def read_manifest(path: str, data: bytes) -> dict[str, Any]:
    """Check and return what `dataset.json` says."""
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path}/{MANIFEST}: not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}/{MANIFEST}: not of the format {FORMAT}; prepare the dataset again")
    return manifest


def cache_of(path: str, cache_folder: str) -> Path:
    """The folder in which a bucket's dataset is kept; `dataset.json`'s digest tells one from its successor."""
    return Path(cache_folder) / path.removeprefix("s3://").strip("/").replace("/", "--")


def cached_metadata(path: str, cache_folder: str) -> Path:
    """Fetch what is not an image: class names, labels and indices; of a dataset that has changed, all anew.

    Returns:
        The dataset's folder in the cache.

    Raises:
        DataError: the bucket cannot be read, or does not hold a prepared dataset.
    """
    import fcntl
    import shutil

    store, root = open_store(path)
    with named(f"{path}/{MANIFEST}"):
        data = store.cat_file(f"{root}/{MANIFEST}")
    manifest = read_manifest(path, data)
    folder = cache_of(path, cache_folder)
    files = [f"{split}/labels.npy" for split in manifest["splits"]]
    for split, what in manifest["splits"].items():
        files += [f"{split}/{one}/{file}" for one in what["resolutions"] for file in ("index.json", "images.npy")]
    with named(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".metadata-lock").open("w") as lock:  # the ranks of a machine share the cache
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / MANIFEST).is_file() and (folder / MANIFEST).read_bytes() == data:
                return folder
            for split in manifest["splits"]:
                shutil.rmtree(folder / split, ignore_errors=True)
            with named(path):
                for file in files:
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file).write_bytes(store.cat_file(f"{root}/{file}"))
            partial = folder / f".{MANIFEST}.part"
            partial.write_bytes(data)
            partial.replace(folder / MANIFEST)
    return folder
