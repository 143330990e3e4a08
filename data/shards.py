"""A prepared dataset: MDS shards (mosaicml-streaming's format) at one or several resolutions, read by index.

An image is a JPEG, or raw pixels: a binary PPM, used where it lies in the memory-mapped shard. `python -m data.prepare`
writes:

    dataset.json                 classes, and for each split its images and resolutions
    SPLIT/labels.npy             label of each image, int64
    SPLIT/RESOLUTION/index.json  the shards, as mosaicml-streaming reads them
    SPLIT/RESOLUTION/images.npy  offset in its shard, and length, of each encoded image, uint32 of shape (n, 2)
    SPLIT/RESOLUTION/PART/shard.00000.mds

A sample has the columns image (bytes), label (int) and name (str). An index means the same image at every resolution.
Streaming's own reader is not used: its order depends on the shards, ours on (seed, epoch) only.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, AliasPath, BaseModel, ConfigDict, Field, ValidationError

from data.decode import Encoded
from data.errors import DataError
from data.files import is_remote, named, open_store, plain_name, read_ranges, read_regular, relative_path, shown
from data.source import Source

MANIFEST = "dataset.json"
FORMAT = "composer-resnet/1"
ORIGINAL = "original"  # the resolution at which the encoded images are the source's own bytes
SHARD = "shard.00000.mds"
USED = ".used"  # in the folder of a cached resolution; its modification time tells data/stage.py which one is in use
CROP_RATIO = 0.875
"""A resolution suffices for images of `size` px if its short side is at least size / CROP_RATIO: the usual evaluation
resizes to that before it crops."""
MAX_JSON = 1 << 26  # limit in bytes of `dataset.json` and `index.json`: room for a hundred thousand shards
BEFORE_IMAGE, _LABEL, _LONGEST_NAME = 8, 8, 4096
"""Bytes of a sample before its image (the lengths of image and name) and after it (the label); the longest name."""

_Model = TypeVar("_Model", bound=BaseModel)


def short_side(resolution: str) -> float:
    """The short side in pixels at a resolution; infinite for the original images."""
    return float("inf") if resolution == ORIGINAL else int(resolution)


def resolution_for(resolutions: Iterable[str], size: int) -> str:
    """The smallest resolution that suffices for images of `size` px; the largest if none does."""
    ordered = sorted(resolutions, key=short_side)
    return next((one for one in ordered if short_side(one) * CROP_RATIO >= size - 1e-6), ordered[-1])


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name occurs twice")
    return names


_Count = Annotated[int, Field(ge=1, le=2**32)]
_Name = Annotated[str, AfterValidator(plain_name)]
_ResolutionName = Annotated[_Name, Field(pattern=f"^({ORIGINAL}|[0-9]{{1,5}})$")]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class ResolutionEntry(_Checked):
    """A resolution in `dataset.json`."""

    bytes: Annotated[int, Field(ge=1, le=2**53)]
    shards: _Count
    raw: bool = False  # whether its images are raw pixels


class _SplitEntry(_Checked):
    images: _Count
    resolutions: Annotated[dict[_ResolutionName, ResolutionEntry], Field(min_length=1)]


class Manifest(_Checked):
    """The used part of `dataset.json`."""

    format: Annotated[str, Field(pattern=f"^{FORMAT}$")]
    classes: Annotated[list[_Name], Field(min_length=1), AfterValidator(_distinct)]
    splits: dict[Literal["train", "val"], _SplitEntry]


class Shard(_Checked):
    """A shard in `index.json`; `file` is its path below the resolution's folder, `size` is in bytes."""

    samples: _Count
    file: Annotated[
        str, AfterValidator(relative_path), Field(pattern=r"\.mds$", validation_alias=AliasPath("raw_data", "basename"))
    ]
    size: Annotated[int, Field(ge=1, le=2**32, validation_alias=AliasPath("raw_data", "bytes"))]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", validation_alias=AliasPath("raw_data", "hashes", "sha256"))]


class _Index(_Checked):
    shards: Annotated[list[Shard], Field(min_length=1)]


def parse(model: type[_Model], data: bytes, path: str) -> _Model:
    """Read untrusted JSON; raises DataError with the file's path."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{shown(str(part))[1:-1]}: " for part in first["loc"])
        raise DataError(f"{path}: {where}{first['msg']}; prepare the dataset again") from None


def _map_array(file: Path, name: str, dtype: type[np.generic], columns: tuple[int, ...]) -> NDArray[Any]:
    """An array in a .npy file, memory-mapped so that processes share it; raises DataError if it is malformed."""
    if not file.is_file():  # opening a pipe could block forever
        raise DataError(f"{name}: not found, or not a regular file")
    try:
        array: Any = np.lib.format.open_memmap(file, mode="r")  # type: ignore[no-untyped-call]
    except Exception as error:  # NumPy parses the header as a Python expression, so many exceptions are possible
        raise DataError(f"{name}: truncated, or not a .npy file ({type(error).__name__})") from None
    if array.dtype != dtype or array.shape[1:] != columns or array.ndim != 1 + len(columns):
        raise DataError(f"{name}: holds {array.dtype} of shape {array.shape}; expected {np.dtype(dtype)}")
    plain: NDArray[Any] = array.view(np.ndarray)  # faster to index than a memmap
    return plain


class Resolution:
    """One split at one resolution: the location of each image, and its bytes from the folder or, if absent, the bucket.

    `folder` holds it on this machine, possibly in part; `url`, a folder or `s3://bucket/prefix`, holds all of it.
    """

    def __init__(self, folder: Path, url: str, raw: bool) -> None:
        self.folder, self.url, self.raw, self._used = folder, url, raw, False
        self.maps: dict[str, memoryview] = {}
        """Shards of raw pixels that this process has mapped, by name."""

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards of `index.json`; raises DataError."""
        name = f"{self.url}/index.json"
        with named(name):
            shards = parse(_Index, read_regular(self.folder / "index.json", MAX_JSON), name).shards
        if len({shard.file for shard in shards}) < len(shards):
            raise DataError(f"{name}: a shard occurs twice")
        return shards

    @cached_property
    def images(self) -> NDArray[np.uint32]:
        """Offset and length of each image, uint32 of shape (n, 2), memory-mapped; raises DataError."""
        return _map_array(self.folder / "images.npy", f"{self.url}/images.npy", np.uint32, (2,))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.samples for shard in self.shards))

    def check(self, images: int, entry: ResolutionEntry) -> None:
        """Raise DataError if the metadata is damaged or does not fit together."""
        table = self.images
        counts = {"images.npy": len(table), "index.json": self._ends[-1], f"{MANIFEST} and labels.npy": images}
        if len(set(counts.values())) > 1:
            raise DataError(f"{self.url}: different numbers of images: {counts}")
        if (len(self.shards), sum(shard.size for shard in self.shards)) != (entry.shards, entry.bytes):
            raise DataError(f"{self.url}/index.json: its shards differ from those in {MANIFEST}")
        limits = np.repeat([shard.size for shard in self.shards], [shard.samples for shard in self.shards])
        outside = np.flatnonzero((table[:, 0] < BEFORE_IMAGE) | (table.sum(axis=1, dtype=np.int64) > limits))
        if len(outside):
            raise DataError(f"{self.url}/images.npy: image {outside[0]} lies outside its shard")

    def files(self) -> Iterator[tuple[Path, str, Shard]]:
        """(file on this machine, absent if not in the cache; full name; index entry) of each shard."""
        for shard in self.shards:
            yield self.folder / shard.file, f"{self.url}/{shard.file}", shard

    def where(self, index: int) -> tuple[str, int, int]:
        """(path of the shard below the resolution's folder, offset, length) of an image."""
        offset, length = self.images[index].tolist()
        return self.shards[bisect_right(self._ends, index)].file, offset, length

    def _pread(self, file: str, offset: int, length: int) -> bytes:
        """Bytes of a shard on this machine, fewer if it ends before; raises OSError."""
        descriptor = os.open(f"{self.folder}/{file}", os.O_RDONLY | os.O_NONBLOCK)  # a third faster than with Path
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def _read_or_map(self, file: str, offset: int, length: int) -> Encoded:
        """As `_pread`; of raw pixels, a view into the memory-mapped shard."""
        if self.raw and file not in self.maps:
            import torch  # its maps, unlike Python's, keep no file open: there are thousands

            path = self.folder / file
            with suppress(RuntimeError):  # it cannot be mapped
                if size := path.stat().st_size:  # 0: maybe a pipe, which could block forever
                    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
                    self.maps[file] = whole.numpy().data.toreadonly()
        shard = self.maps.get(file)
        return self._pread(file, offset, length) if shard is None else shard[offset : offset + length]

    def read_many(self, indices: Sequence[int]) -> dict[int, Encoded | OSError]:
        """Images of a dataset in a bucket, from the cache or fetched concurrently; raises DataError."""
        if not self._used:
            with suppress(OSError):  # a full disk
                (self.folder / USED).touch()
            self._used = True
        found: dict[int, Encoded | OSError] = {}
        absent: dict[int, tuple[str, int, int]] = {}
        for index in indices:
            file, offset, length = self.where(index)
            with suppress(OSError):  # the shard is not here yet, or the disk fails
                data = self._read_or_map(file, offset, length)
                if len(data) == length:
                    found[index] = data
                    continue
            absent[index] = file, offset, offset + length
        if absent:
            store, root = open_store(self.url)  # opened once per process
            ranges = [(f"{root}/{file}", begin, end) for file, begin, end in absent.values()]
            found.update(zip(absent, read_ranges(store, ranges), strict=True))
        return found

    def read(self, index: int) -> Encoded:
        """One image; raises OSError if it cannot be read, and DataError as `read_many`."""
        return _found(self.read_many([index])[index]) if is_remote(self.url) else self._read_or_map(*self.where(index))

    def name(self, index: int) -> str:
        """The image's path in the original dataset; if it cannot be read, its number and its shard."""
        file, offset, length = self.where(index)
        with suppress(OSError):
            sizes = np.frombuffer(self._pread(file, offset - BEFORE_IMAGE, BEFORE_IMAGE), np.uint32).tolist()
            if len(sizes) == 2 and sizes[0] == length and 0 < sizes[1] <= _LONGEST_NAME:
                return self._pread(file, offset + length + _LABEL, sizes[1]).decode("utf-8", "replace")
        return f"image {index}, in {file}"


def _found(data: Encoded | OSError) -> Encoded:
    if isinstance(data, OSError):
        raise data
    return data


class ShardSource(Source):
    """One split of a prepared dataset at `url`, a folder or `s3://...`; of a bucket's, `folder` is a cache here.

    `resolutions`, as an argument, says by name whether each holds raw pixels; as an attribute, it is smallest first.
    """

    def __init__(self, folder: Path, url: str, classes: Sequence[str], resolutions: Mapping[str, bool]) -> None:
        self._folder, self.path, self.classes = folder, url, list(classes)
        by_size = sorted(resolutions, key=short_side)
        self.resolutions = {name: Resolution(folder / name, f"{url}/{name}", resolutions[name]) for name in by_size}
        self._largest = self.resolutions[by_size[-1]]

    def __reduce__(self) -> tuple[Any, ...]:
        raw = {name: resolution.raw for name, resolution in self.resolutions.items()}
        return ShardSource, (self._folder, self.path, self.classes, raw)  # other processes map the files themselves

    @cached_property
    def labels(self) -> NDArray[np.int64]:  # type: ignore[override]
        """Label of each image, int64, memory-mapped; raises DataError."""
        return _map_array(self._folder / "labels.npy", f"{self.path}/labels.npy", np.int64, ())

    def check(self, images: int) -> None:
        """Raise DataError if the labels are damaged or not those of so many images."""
        labels, highest, name = self.labels, len(self.classes) - 1, f"{self.path}/labels.npy"
        if len(labels) != images:
            raise DataError(f"{name}: {len(labels)} labels, {MANIFEST} says {images}")
        wrong = np.flatnonzero((labels < 0) | (labels > highest))
        if len(wrong):
            raise DataError(f"{name}: image {wrong[0]} has label {labels[wrong[0]]}; allowed: 0 to {highest}")

    def read(self, index: int) -> Encoded:
        """The encoded image at the largest resolution."""
        return self._largest.read(index)

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], Encoded]:
        """A function that reads images for pictures of `size` px; remote ones at `indices` are fetched concurrently."""
        resolution = self.resolutions[resolution_for(self.resolutions, size)]
        for other in self.resolutions.values():
            if other is not resolution:
                other.maps.clear()  # a shard that is removed from the cache takes up its space until it is unmapped
        if not is_remote(self.path):
            return resolution.read
        fetched = resolution.read_many(indices)

        def read(index: int) -> Encoded:
            return resolution.read(index) if (data := fetched.pop(index, None)) is None else _found(data)

        return read

    def name(self, index: int) -> str:
        """The image's path in the original dataset."""
        return f"{self.path}: {self._largest.name(index)}"
