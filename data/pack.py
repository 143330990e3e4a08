"""What a worker of data.prepare does with a stretch of images: resize, encode, write a shard, read it back."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.decode import BadImage, Fault, Picture
from data.errors import DataError
from data.names import is_file_name
from data.remote import named, open_store
from data.shards import ORIGINAL, SHARD, image_bytes, short_side
from data.source import Source
from data.text import escape

COLUMNS = {"image": "bytes", "label": "int", "name": "str"}
DONE = "part.npz"
_JPEG_NAMES = (".jpg", ".jpeg", ".jfif")


@dataclass(frozen=True)
class Task:
    """What is to be made of a split.

    Attributes:
        split: `train` or `val`.
        source: its images.
        target: the prepared dataset's place.
        layout: `mds`, or `folder`.
        resolutions: short sides in pixels, or `original`.
        quality: of the JPEGs, 1 to 100.
        part_images: images per part, and so per shard.
    """

    split: str
    source: Source
    target: str
    layout: str
    resolutions: tuple[str, ...]
    quality: int
    part_images: int

    @property
    def parts(self) -> int:
        """How many parts the split has."""
        return -(-len(self.source) // self.part_images)

    def indices(self, part: int) -> range:
        """The images of a part."""
        return range(part * self.part_images, min((part + 1) * self.part_images, len(self.source)))

    def place(self, part: int, resolution: str) -> str:
        """Where a part lies, below the target."""
        if self.layout == "folder":
            return f".parts/{self.split}/{resolution}/{part:05}"
        return f"{self.split}/{resolution}/{part:05}"

    def name(self, index: int) -> str:
        """An image's path below its split's folder, with its class in front, escaped.

        Raises:
            DataError: it would lead out of that folder, or no disk can hold it.
        """
        source = self.source
        path = escape(str(getattr(source, "path", "")))
        name = source.name(index).removeprefix(path).strip("/")
        folder = source.classes[source.labels[index]]
        name = name if name.startswith(f"{folder}/") else f"{folder}/{name}"
        if not all(map(is_file_name, name.split("/"))):
            raise DataError(f"{path}: {name}: not a name that a file can have")
        return name


def encode(data: bytes, picture: Picture, resolution: str, quality: int) -> bytes:
    """An image at a resolution, upright; a JPEG that is small enough already stays as it is, byte for byte.

    The JPEGs have a restart marker after each row of blocks: it costs two bytes, and lets the loader leave out the rows
    that a crop does not need (data/decode.py).

    Args:
        data: the encoded image.
        picture: the same, opened.
        resolution: short side in pixels; a larger picture is shrunk to it with its aspect ratio kept.
        quality: of the JPEG.

    Raises:
        BadImage: the image cannot be decoded.
    """
    short, scale = min(picture.height, picture.width), 1.0
    if short > short_side(resolution):
        scale = short_side(resolution) / short
    elif resolution == ORIGINAL or picture.is_plain_upright_jpeg:
        return data
    image = Image.fromarray(picture.decode(1))
    if scale < 1:
        image = image.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC
        )
    stream = BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True, restart_marker_rows=1)
    return stream.getvalue()


def make_part(task: Task, part: int) -> list[str]:
    """Write one part at every resolution, unless it is there; whoever is killed leaves it whole or not at all.

    Returns:
        The images that were left out, each with the reason.

    Raises:
        DataError: the source or the target cannot be reached.
    """
    store, root = open_store(task.target)
    with named(task.target):
        done = [f"{root}/{task.place(part, resolution)}/{DONE}" for resolution in task.resolutions]
        if all(store.exists(path) for path in done):
            with store.open(done[0], "rb") as file:
                return [str(line) for line in np.load(file)["left_out"]]
    encoded: dict[str, list[dict[str, Any]]] = {resolution: [] for resolution in task.resolutions}
    left_out = []
    to_nowhere = 0
    for index in task.indices(part):
        name = task.name(index)
        try:
            with named(name):
                data = task.source.read(index)
            picture = Picture(data)
            picture.decode(1)  # also what is copied as it is must be whole
            images = {one: encode(data, picture, one, task.quality) for one in task.resolutions}
        except BadImage as error:
            left_out.append(f"{name}: {error}")
            to_nowhere += error.fault == Fault.BROKEN_LINK
            continue
        for one, image in images.items():
            encoded[one].append({"image": image, "label": int(task.source.labels[index]), "name": name})
    if to_nowhere == len(task.indices(part)) > 1:
        raise DataError(f"{left_out[0]}; so are {to_nowhere - 1} others: is the disk that they lead to mounted?")
    write = _write_folder if task.layout == "folder" else _write_shard
    for resolution, samples in encoded.items():
        with named(task.target):
            write(task, part, resolution, samples, left_out)
    return left_out


def _write_shard(task: Task, part: int, resolution: str, samples: list[dict[str, Any]], left_out: list[str]) -> None:
    """One part as one MDS shard, with Streaming's own writer."""
    from streaming.base.format.mds.writer import MDSWriter  # imports torch: a second

    store, root = open_store(task.target)
    target = f"{root}/{task.place(part, resolution)}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "part"
        shards: list[dict[str, Any]] = []
        places: list[tuple[int, int]] = []
        if samples:
            with MDSWriter(out=str(folder), columns=COLUMNS, hashes=["sha256"], size_limit=None) as writer:
                for sample in samples:
                    writer.write(sample)
            shards = json.loads((folder / "index.json").read_text())["shards"]
            data = (folder / SHARD).read_bytes()
            bounds = np.frombuffer(data, np.uint32, len(samples) + 1, 4).tolist()
            places = [image_bytes(data[begin : begin + 4], begin) for begin in bounds[:-1]]
            _put(store, data, f"{target}/{SHARD}")
        stream = BytesIO()
        np.savez(
            stream,
            images=np.array(places, dtype=np.uint32).reshape(-1, 2),
            labels=np.array([sample["label"] for sample in samples], dtype=np.int64),
            left_out=np.array(left_out, dtype=str),
            shards=np.array(json.dumps(shards)),
        )
        _put(store, stream.getvalue(), f"{target}/{DONE}")


def _write_folder(task: Task, part: int, resolution: str, samples: list[dict[str, Any]], left_out: list[str]) -> None:
    """One part as files RESOLUTION/SPLIT/CLASS/NAME."""
    store, root = open_store(task.target)
    digests = []
    for sample in samples:
        converted = sample["image"][:2] == b"\xff\xd8" and not sample["name"].lower().endswith(_JPEG_NAMES)
        name = f"{resolution}/{task.split}/{sample['name']}{'.jpg' if converted else ''}"
        _put(store, sample["image"], f"{root}/{name}")
        digests.append(f"{hashlib.sha256(sample['image']).hexdigest()} {name}")
    stream = BytesIO()
    np.savez(stream, left_out=np.array(left_out, dtype=str), digests=np.array(digests, dtype=str))
    _put(store, stream.getvalue(), f"{root}/{task.place(part, resolution)}/{DONE}")


def _put(store: Any, data: bytes, path: str) -> None:
    """Write an object whole or not at all."""
    if "s3" in store.protocol:
        store.pipe_file(path, data)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(path).with_name(f".{Path(path).name}.part")
    partial.write_bytes(data)
    partial.replace(path)


def check_part(task: Task, part: int) -> list[str]:
    """Read one part back: checksums, counts, and every image decoded; what is wrong is removed, to be made anew.

    Returns:
        What is wrong, one line each.
    """
    store, root = open_store(task.target)
    wrong = []
    for resolution in task.resolutions:
        place = f"{root}/{task.place(part, resolution)}"
        try:
            problems = list(_problems(task, part, store, root, place))
        except Exception as error:  # whatever a damaged file may raise
            problems = [f"{place}: {str(error) or type(error).__name__}"]
        if problems:
            wrong += problems
            with named(place):
                store.rm(f"{place}/{DONE}")
    return wrong


def _problems(task: Task, part: int, store: Any, root: str, place: str) -> Iterator[str]:
    """What is wrong with a part at one resolution."""
    record = np.load(BytesIO(store.cat_file(f"{place}/{DONE}")))
    count = 0
    read_back = _folder_images if task.layout == "folder" else _shard_images
    for name, data, digest in read_back(store, root, place, record):
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            yield f"{name}: SHA-256 is not that of what was written"
        if name.endswith(SHARD):
            continue
        count += 1
        try:
            Picture(data).decode(1)
        except BadImage as error:
            yield f"{name}: {error}"
    expected = len(task.indices(part)) - len(record["left_out"])
    if count != expected:
        yield f"{place}: {count} images, expected {expected}"


def _shard_images(store: Any, root: str, place: str, record: Any) -> Iterator[tuple[str, bytes, str | None]]:
    """(name, bytes, SHA-256 if known) of a shard, and of each image in it."""
    for shard in json.loads(str(record["shards"])):
        data = store.cat_file(f"{place}/{SHARD}")
        yield f"{place}/{SHARD}", data, shard["raw_data"]["hashes"]["sha256"]
        for number, (offset, length) in enumerate(record["images"].tolist()):
            yield f"{place}/{SHARD}, image {number}", data[offset : offset + length], None


def _folder_images(store: Any, root: str, place: str, record: Any) -> Iterator[tuple[str, bytes, str | None]]:
    """(name, bytes, SHA-256) of each image file."""
    for line in record["digests"].tolist():
        digest, _, name = line.partition(" ")
        yield f"{root}/{name}", store.cat_file(f"{root}/{name}"), digest
