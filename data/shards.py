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
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from data.errors import DataError
from data.names import plain_name, relative_path, shown
from data.remote import download, is_remote, named, open_store, read_ranges

MANIFEST = "dataset.json"
FORMAT = "composer-resnet/1"
ORIGINAL = "original"
"""The resolution at which the encoded images are the source's own bytes."""
SHARD = "shard.00000.mds"
_MAX_JSON = 1 << 26
"""Bytes of `dataset.json` and `index.json`, at most: room for a hundred thousand shards."""
_BEFORE_IMAGE, _LABEL, _LONGEST_NAME = 8, 8, 4096
"""Bytes of a sample before its image (the lengths of image and name) and after it (the label); of a name, at most."""
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
    return start + _BEFORE_IMAGE, int.from_bytes(sample[:4], "little")


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


def _resolution_name(name: str) -> str:
    if name != ORIGINAL and not (name.isascii() and name.isdecimal() and len(name) <= 5):
        raise ValueError(f"the resolution {shown(name)} is neither {ORIGINAL} nor a number of pixels")
    return name


def _class_names(names: list[str]) -> list[str]:
    for name in names:  # as folders are called; one that is not UTF-8 came from a disk that allows it
        plain_name(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    if len(set(names)) < len(names):
        raise ValueError("a class occurs twice")
    return names


def _shard_path(path: str) -> str:
    if not relative_path(path).endswith(".mds"):
        raise ValueError(f"the shard {shown(path)} does not end in .mds")
    return path


_Count = Annotated[int, Field(ge=1, le=2**32)]


class _ResolutionEntry(_Checked):
    bytes: Annotated[int, Field(ge=1, le=2**53)]
    shards: _Count


class _SplitEntry(_Checked):
    images: _Count
    resolutions: Annotated[
        dict[Annotated[str, AfterValidator(_resolution_name)], _ResolutionEntry], Field(min_length=1)
    ]


class Manifest(_Checked):
    """What `dataset.json` says, as far as it is used."""

    classes: Annotated[list[str], Field(min_length=1), AfterValidator(_class_names)]
    splits: dict[Literal["train", "val"], _SplitEntry]


class _Hashes(_Checked):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _File(_Checked):
    basename: Annotated[str, AfterValidator(_shard_path)]
    bytes: Annotated[int, Field(ge=1, le=2**32)]
    hashes: _Hashes


class _ShardEntry(_Checked):
    samples: _Count
    raw_data: _File


class _Index(_Checked):
    shards: Annotated[list[_ShardEntry], Field(min_length=1)]


class Shard(NamedTuple):
    """A shard, as `index.json` describes it."""

    file: str
    """Its path below the resolution's folder."""
    samples: int
    size: int
    """In bytes."""
    sha256: str


_Model = TypeVar("_Model", bound=BaseModel)


def _parse(model: type[_Model], data: bytes, path: str) -> _Model:
    """Read JSON that somebody else may have written; raises DataError with the file's path."""
    try:
        return model.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ").split(" or instance of")[0]
        raise DataError(f"{path}: {shown(where)[1:-1]}: {reason}") from None
    except (ValueError, RecursionError) as error:  # ValueError: of another encoding, too
        raise DataError(f"{path}: not JSON ({type(error).__name__})") from None


def read_manifest(path: str, data: bytes) -> Manifest:
    """Check and return what `dataset.json` says; raises DataError."""
    with suppress(ValueError, RecursionError):
        found = json.loads(data)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise DataError(f"{path}/{MANIFEST}: not of the format {FORMAT}; prepare the dataset again")
    return _parse(Manifest, data, f"{path}/{MANIFEST}")


def read_index(folder: Path, url: str) -> list[Shard]:
    """The shards of a resolution, from its `index.json` on this machine; raises DataError."""
    index = _parse(_Index, _read_json(folder / "index.json", f"{url}/index.json"), f"{url}/index.json")
    files = [entry.raw_data for entry in index.shards]
    if len({file.basename for file in files}) < len(files):
        raise DataError(f"{url}/index.json: a shard occurs twice")
    return [
        Shard(file.basename, entry.samples, file.bytes, file.hashes.sha256)
        for entry, file in zip(index.shards, files, strict=True)
    ]


def _size(file: Path, name: str) -> int:
    """Size of a regular file in bytes; raises DataError where it is none: to open it could block for ever."""
    try:
        with named(name):
            status = file.stat()
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(f"{name}: not found") from None
        raise
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{name}: is no regular file")
    return status.st_size


def _read_json(file: Path, name: str) -> bytes:
    if _size(file, name) > _MAX_JSON:
        raise DataError(f"{name}: is larger than {_MAX_JSON >> 20} MiB")
    with named(name):
        return file.read_bytes()


def _map_array(file: Path, name: str, dtype: type[np.generic], columns: tuple[int, ...]) -> NDArray[Any]:
    """An array in a .npy file, mapped so that processes share it; raises DataError where it is another."""
    _size(file, name)
    try:
        with named(name):
            array: NDArray[Any] = np.lib.format.open_memmap(file, mode="r")  # type: ignore[no-untyped-call]
    except DataError:
        raise
    except Exception as error:  # NumPy reads the header as a Python expression: much may go wrong
        raise DataError(f"{name}: cut off, or no .npy file ({type(error).__name__})") from None
    if array.dtype != dtype or array.shape[1:] != columns or array.ndim != 1 + len(columns):
        raise DataError(f"{name}: holds {array.dtype} of shape {array.shape}; expected {np.dtype(dtype)}")
    plain: NDArray[Any] = array.view(np.ndarray)  # quicker to index than a memmap
    return plain


class Resolution:
    """One split at one resolution: where each image lies, and its bytes from the folder or, while absent, the bucket.

    Args:
        folder: where it lies on this machine, whole or in part.
        url: where it lies whole, a folder or `s3://bucket/prefix`.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url
        self._is_remote = is_remote(url)
        self._process = -1
        self._used = False

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_folder": self._folder,
            "_url": self._url,
            "_is_remote": self._is_remote,
            "_process": -1,
            "_used": False,
        }

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards of `index.json`; raises DataError."""
        return read_index(self._folder, self._url)

    @cached_property
    def images(self) -> NDArray[np.uint32]:
        """Offset and length of each image, uint32 of shape (n, 2), mapped; raises DataError."""
        return _map_array(self._folder / "images.npy", f"{self._url}/images.npy", np.uint32, (2,))

    @cached_property
    def _files(self) -> list[str]:
        return [shard.file for shard in self.shards]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)

    def problems(self, images: int, entry: _ResolutionEntry, sizes: Mapping[str, int] | None) -> Iterator[str]:
        """What is wrong, a line for each file.

        Args:
            images: how many it should have.
            entry: what `dataset.json` says of it.
            sizes: size of each file in the bucket, by its path below the resolution; None: not known.
        """
        try:
            shards, table = self.shards, self.images
        except DataError as error:
            yield str(error)
            return
        counts = {"images.npy": len(table), "index.json": int(self._ends[-1]), f"{MANIFEST} and labels.npy": images}
        if len(set(counts.values())) > 1:
            yield f"{self._url}: disagree on the number of images: {', '.join(f'{k} {v}' for k, v in counts.items())}"
            return
        if (len(shards), sum(shard.size for shard in shards)) != (entry.shards, entry.bytes):
            yield f"{self._url}/index.json: other shards than {MANIFEST} says"
        ends = table.sum(axis=1, dtype=np.int64)
        limits = np.repeat([shard.size for shard in shards], [shard.samples for shard in shards])
        outside = np.flatnonzero((table[:, 0] < _BEFORE_IMAGE) | (ends > limits))
        if len(outside):
            yield f"{self._url}/images.npy: image {outside[0]} lies outside its shard"
        if not self._is_remote or sizes is not None:
            yield from self._wrong_files(sizes)

    def _wrong_files(self, sizes: Mapping[str, int] | None) -> Iterator[str]:
        """The shards that are missing, or of another size than the index says."""
        for shard in self.shards:
            name = f"{self._url}/{shard.file}"
            try:
                size = _size(self._folder / shard.file, name) if sizes is None else sizes.get(shard.file)
            except DataError as error:
                yield str(error)
                continue
            if size is None:
                yield f"{name}: not found"
            elif size != shard.size:
                yield f"{name}: has {size} bytes, index.json says {shard.size}"

    def local_shards(self) -> Iterator[tuple[Path, str, Shard]]:
        """(file, its name, what the index says of it) of each shard; none where the dataset lies in a bucket."""
        for shard in () if self._is_remote else self.shards:
            yield self._folder / shard.file, f"{self._url}/{shard.file}", shard

    def where(self, index: int) -> tuple[str, int, int]:
        """(shard's path below the resolution's folder, offset, length) of an image."""
        offset, length = self.images[index].tolist()
        return self._files[int(np.searchsorted(self._ends, index, side="right"))], offset, length

    def local(self, file: str, offset: int, length: int) -> bytes:
        """Bytes of a shard on this machine, fewer where it ends before; raises OSError."""
        descriptor = os.open(f"{self._folder}/{file}", os.O_RDONLY | os.O_NONBLOCK)  # a third faster than by Path
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def read_many(self, indices: Sequence[int]) -> dict[int, bytes | OSError]:
        """Images of a bucket's dataset: from the cache where they are in it, the others fetched all at once.

        Raises:
            DataError: the bucket stays out of reach.
        """
        self._mark_used()
        found: dict[int, bytes | OSError] = {}
        places = {index: self.where(index) for index in indices}
        for index, place in places.items():
            with suppress(OSError):  # a shard that is not here yet, or a disk that fails
                data = self.local(*place)
                if len(data) == place[2]:
                    found[index] = data
        absent = [index for index in places if index not in found]
        if absent:
            store, root = self._store()
            ranges = [(f"{root}/{file}", at, at + length) for file, at, length in map(places.__getitem__, absent)]
            found.update(zip(absent, read_ranges(store, ranges), strict=True))
        return found

    def read(self, index: int) -> bytes:
        """One image; raises OSError where it cannot be read, and DataError as `read_many`."""
        data = self.read_many([index])[index] if self._is_remote else self.local(*self.where(index))
        if isinstance(data, OSError):
            raise data
        return data

    def name(self, index: int) -> str:
        """The image's path in the dataset that was prepared; where it cannot be read, its number and its shard."""
        file, offset, length = self.where(index)
        with suppress(OSError):
            head = self.local(file, offset - _BEFORE_IMAGE, _BEFORE_IMAGE)
            sizes = np.frombuffer(head, np.uint32).tolist()
            if len(sizes) == 2 and sizes[0] == length and 0 < sizes[1] <= _LONGEST_NAME:
                return self.local(file, offset + length + _LABEL, sizes[1]).decode("utf-8", "replace")
        return f"image {index}, in {file}"

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
            with suppress(OSError):  # a full disk
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
        """Label of each image, int64, mapped; raises DataError."""
        return _map_array(self._folder / "labels.npy", f"{self.path}/labels.npy", np.int64, ())

    def problems(self, entry: _SplitEntry, sizes: Mapping[str, int] | None) -> Iterator[str]:
        """What is wrong with the split, a line for each file; `sizes`: of the files in its bucket, where known."""
        try:
            labels, classes = self.labels, len(self.classes)
        except DataError as error:
            yield str(error)
        else:
            wrong = np.flatnonzero((labels < 0) | (labels >= classes))
            if len(labels) != entry.images:
                yield f"{self.path}/labels.npy: {len(labels)} labels, {MANIFEST} says {entry.images}"
            elif len(wrong):
                first = wrong[0]
                yield f"{self.path}/labels.npy: image {first} has label {labels[first]}; allowed: 0 to {classes - 1}"
        for name, resolution in self.resolutions.items():
            below = None if sizes is None else _below(sizes, name)
            yield from resolution.problems(entry.images, entry.resolutions[name], below)

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
        if not is_remote(self.path):
            return resolution.read
        fetched = resolution.read_many(indices)

        def read(index: int) -> bytes:
            data = fetched.pop(index, None)
            if isinstance(data, OSError):
                raise data
            return resolution.read(index) if data is None else data

        return read

    def name(self, index: int) -> str:
        """The image's path in the dataset that was prepared."""
        return f"{self.path}: {self._largest().name(index)}"


class Damaged(DataError):
    """A prepared dataset is not whole; `lines` has everything that was found, the message only the first."""

    def __init__(self, path: str, lines: Sequence[str]) -> None:
        more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
        super().__init__(f"{lines[0]}{more}; for all that is damaged: python -m data.verify {shlex.quote(path)}")
        self.lines = list(lines)


def open_prepared(path: str, cache_folder: str) -> tuple[ShardSource, ShardSource]:
    """Open both splits of a prepared dataset; of a bucket's only the metadata is fetched.

    Args:
        path: the dataset's folder, or `s3://bucket/prefix`.
        cache_folder: where a bucket's data is kept on this machine.

    Returns:
        (train, val).

    Raises:
        DataError: it is not there, is damaged, or holds what this version cannot read.
    """
    path = path.rstrip("/") or "/"
    if not is_remote(path):
        return _open(path, Path(path), _read_json(Path(path) / MANIFEST, f"{path}/{MANIFEST}"), None)
    folder = cached_metadata(path, cache_folder)
    try:
        return _open(path, folder, (folder / MANIFEST).read_bytes(), None)
    except (Damaged, OSError):  # in the cache: the machine may have lost its power
        with named(str(folder)):
            (folder / MANIFEST).unlink(missing_ok=True)
        return _open(path, cached_metadata(path, cache_folder), (folder / MANIFEST).read_bytes(), None)


def _open(path: str, folder: Path, manifest: bytes, sizes: Mapping[str, int] | None) -> tuple[ShardSource, ShardSource]:
    """Both splits, after a look at every file; `sizes`: of the files in the bucket, where known."""
    try:
        content = read_manifest(path, manifest)
    except DataError as error:
        raise Damaged(path, [str(error)]) from None
    splits: list[ShardSource] = []
    problems: list[str] = []
    for split in ("train", "val"):
        if split not in content.splits:
            raise DataError(f"{path}: holds no {split} images; prepare a folder that has train and val")
        entry = content.splits[split]
        source = ShardSource(folder / split, f"{path}/{split}", content.classes, list(entry.resolutions))
        splits.append(source)
        problems += source.problems(entry, None if sizes is None else _below(sizes, split))
    if problems:
        raise Damaged(path, problems)
    return splits[0], splits[1]


def _below(sizes: Mapping[str, int], folder: str) -> dict[str, int]:
    """The files in a folder, by their paths in it."""
    return {file.removeprefix(f"{folder}/"): size for file, size in sizes.items() if file.startswith(f"{folder}/")}


def cache_of(path: str, cache_folder: str) -> Path:
    """The folder in which a bucket's dataset is kept; `dataset.json`'s digest tells one from its successor."""
    return Path(cache_folder) / path.removeprefix("s3://").strip("/").replace("/", "--")


def cached_metadata(path: str, cache_folder: str) -> Path:
    """Fetch what is not an image: class names, labels and indices; of a dataset that has changed, all anew.

    Returns:
        The dataset's folder in the cache.

    Raises:
        DataError: the bucket cannot be read, or does not hold a whole prepared dataset, or the cache cannot be written.
    """
    import fcntl
    import shutil

    path = path.rstrip("/")
    store, root = open_store(path)
    with named(f"{path}/{MANIFEST}"):
        data = store.cat_file(f"{root}/{MANIFEST}", start=0, end=_MAX_JSON)
    try:
        manifest = read_manifest(path, data)
    except DataError as error:
        raise Damaged(path, [str(error)]) from None
    folder = cache_of(path, cache_folder)
    files = [f"{split}/labels.npy" for split in manifest.splits]
    for split, what in manifest.splits.items():
        files += [f"{split}/{one}/{file}" for one in what.resolutions for file in ("index.json", "images.npy")]
    with named(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".metadata-lock").open("w") as lock:  # the ranks of a machine share the cache
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / MANIFEST).is_file() and (folder / MANIFEST).read_bytes() == data:
                return folder
            for split in manifest.splits:
                shutil.rmtree(folder / split, ignore_errors=True)
            sizes = _list_sizes(store, path)
            for file in files:
                with named(f"{path}/{file}"):
                    size = store.size(f"{root}/{file}") if sizes is None else sizes.get(file)
                if size is None:
                    raise Damaged(path, [f"{path}/{file}: not found"])
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                download(store, f"{root}/{file}", size, folder / file)
            _open(path, folder, data, sizes)
            partial = folder / f".{MANIFEST}.part"
            partial.write_bytes(data)
            partial.replace(folder / MANIFEST)
    return folder


def _list_sizes(store: Any, path: str) -> dict[str, int] | None:
    """Size of each object of a dataset, by its path; None where objects may be read but are not listed."""
    root = path.removeprefix("s3://")
    with named(path):
        try:
            found = store.find(root, detail=True)
        except PermissionError:
            return None
    sizes = _below({name: entry["size"] for name, entry in found.items()}, root)
    return sizes if MANIFEST in sizes else None
