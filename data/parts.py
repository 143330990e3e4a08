"""The parts of a prepared dataset: a few hundred images each, written and read back by the workers of data.prepare."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.decode import BadImage, Encoded, Fault, Picture
from data.errors import DataError
from data.files import is_file_name, named, open_store, read_path, renew_credentials, write_path
from data.jpeg import with_index
from data.shards import BEFORE_IMAGE, ORIGINAL, SHARD, short_side
from data.source import Source
from data.text import escape

_COLUMNS = {"image": "bytes", "label": "int", "name": "str"}
_JPEG_NAMES = (".jpg", ".jpeg", ".jfif")


@dataclass(frozen=True)
class Settings:
    """What to write for each image."""

    layout: str  # `mds` or `folder` of JPEGs; `raw`: as `mds`, but raw pixels
    train_sizes: tuple[str, ...]  # resolutions of the training images: short side in pixels, or `original`
    val_sizes: tuple[str, ...]
    quality: int
    part_images: int = 512  # images per shard: 7 MB at 160 px, 15 MB at 256 px, 57 MB for original photos


@dataclass(frozen=True)
class Task:
    """A split, the settings for it, and the target."""

    split: str
    source: Source
    target: str
    settings: Settings

    @property
    def resolutions(self) -> tuple[str, ...]:
        """The split's resolutions."""
        return self.settings.train_sizes if self.split == "train" else self.settings.val_sizes

    @cached_property
    def parts(self) -> list[range]:
        """The images of each part."""
        size = self.settings.part_images
        return [range(at, min(at + size, len(self.source))) for at in range(0, len(self.source), size)]

    def record(self, part: int) -> str:
        """Path of a part's record."""
        return f"{self.target}/.parts/{self.split}/{part:05}.npz"

    def load(self, part: int) -> Any:
        """The record that `make_part` wrote with a part."""
        return np.load(BytesIO(read_path(self.record(part))))

    def name(self, index: int) -> str:
        """An image's path below its split's folder, class first, escaped; raises DataError if no disk could hold it."""
        source = self.source
        path = escape(str(getattr(source, "path", "")))
        name = source.name(index).removeprefix(path).strip("/")
        folder = source.classes[source.labels[index]]
        name = name if name.startswith(f"{folder}/") else f"{folder}/{name}"
        if not all(map(is_file_name, name.split("/"))):
            raise DataError(f"{path}: {name}: not a name that a file can have")
        return name


def write_and_check(tasks: dict[str, Task], job: tuple[str, int]) -> tuple[list[str], list[str]]:
    """Write one part and read it back; returns the skipped images and the errors."""
    task, part = tasks[job[0]], job[1]
    try:
        return make_part(task, part), check_part(task, part)
    except DataError:  # retry once, because session credentials expire and are renewed
        renew_credentials()
        return make_part(task, part), check_part(task, part)


def make_part(task: Task, part: int) -> list[str]:
    """Write one part at every resolution, and then its record, unless it exists; raises DataError.

    Returns the images that were left out, each with the reason.
    """
    with named(task.target):
        store, path = open_store(task.record(part))
        written = store.exists(path)
    if written:
        return [str(line) for line in task.load(part)["left_out"]]
    samples, left_out = _encode_part(task, task.parts[part])
    labels = [sample["label"] for sample in samples[task.resolutions[0]]]
    record: dict[str, Any] = {"left_out": np.array(left_out, dtype=str), "labels": np.array(labels, dtype=np.int64)}
    files: dict[str, bytes] = {}
    for resolution in task.resolutions:
        if task.settings.layout == "folder":
            files |= _as_files(f"{resolution}/{task.split}", samples[resolution])
            continue
        name, shards = f"{part:05}/{SHARD}", []
        places = np.zeros((len(labels), 2), dtype=np.uint32)
        if labels:
            data, entry = _as_shard(samples[resolution])
            entry["raw_data"]["basename"] = name
            shards.append(entry)
            places[:, 0] = np.frombuffer(data, np.uint32, len(labels), 4) + BEFORE_IMAGE
            places[:, 1] = [len(sample["image"]) for sample in samples[resolution]]
            files[f"{task.split}/{resolution}/{name}"] = data
        record |= {f"images_{resolution}": places, f"shards_{resolution}": np.array(json.dumps(shards))}
    for name, data in files.items():
        write_path(f"{task.target}/{name}", data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    np.savez(stream := BytesIO(), sha256=np.array(json.dumps(digests)), **record)
    write_path(task.record(part), stream.getvalue())
    return left_out


def _encode_part(task: Task, indices: range) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The samples of a part at each resolution, and the images that are left out, each with the reason."""
    encoded: dict[str, list[dict[str, Any]]] = {resolution: [] for resolution in task.resolutions}
    left_out: list[str] = []
    broken_links = 0
    for index in indices:
        name = task.name(index)
        try:
            with named(name):
                data = task.source.read(index)
            picture = Picture(data)
            picture.decode(1)  # images that are copied unchanged must be valid too
            images = {one: encode(data, picture, one, task.settings) for one in task.resolutions}
        except BadImage as error:
            left_out.append(f"{name}: {error}")
            broken_links += error.fault == Fault.BROKEN_LINK
            continue
        for one, image in images.items():
            encoded[one].append({"image": image, "label": int(task.source.labels[index]), "name": name})
    if broken_links == len(indices) > 1:
        raise DataError(f"{left_out[0]} (and {broken_links - 1} more); is the disk with the links' targets mounted?")
    return encoded, left_out


def encode(data: Encoded, picture: Picture, resolution: str, settings: Settings) -> bytes:
    """An image, opened as `picture`, reduced to a short side of `resolution` px and turned upright; raises BadImage.

    A JPEG that is small enough is kept byte for byte. Others get restart markers, of some five bytes each, so that the
    loader can skip what a crop does not need (data/jpeg.py). Raw pixels are a binary PPM.
    """
    short, raw = min(picture.height, picture.width), settings.layout == "raw"
    scale = min(1.0, short_side(resolution) / short)
    if resolution == ORIGINAL or (scale == 1 and picture.is_plain_upright_jpeg and not raw):
        return bytes(data)
    image = Image.fromarray(picture.decode(1))
    if scale < 1:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    stream = BytesIO()
    if raw:
        image.save(stream, "PPM")
        return stream.getvalue()
    blocks = -(-image.width // 16)  # of 16 px, as colours are stored at half the resolution
    interval = max(count for count in range(1, 5) if blocks % count == 0)  # a segment must not cross rows
    options = {"subsampling": "4:2:0", "optimize": True, "restart_marker_blocks": interval}
    image.save(stream, "JPEG", quality=settings.quality, **options)
    return with_index(stream.getvalue())


def _as_shard(samples: Sequence[dict[str, Any]]) -> tuple[bytes, dict[str, Any]]:
    """An MDS shard, by Streaming's writer, and its entry in the index."""
    from streaming.base.format.mds.writer import MDSWriter  # imports torch, which takes a second

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "part"
        with MDSWriter(out=str(place), columns=_COLUMNS, hashes=["sha256"], size_limit=None) as writer:
            for sample in samples:
                writer.write(sample)
        (entry,) = json.loads((place / "index.json").read_text())["shards"]
        return (place / SHARD).read_bytes(), entry


def _as_files(folder: str, samples: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Files FOLDER/CLASS/NAME."""
    files = {}
    for sample in samples:
        converted = sample["image"][:2] == b"\xff\xd8" and not sample["name"].lower().endswith(_JPEG_NAMES)
        files[f"{folder}/{sample['name']}{'.jpg' if converted else ''}"] = sample["image"]
    return files


def check_part(task: Task, part: int) -> list[str]:
    """Verify the SHA-256 of the written files; a bad part counts as not written. Returns one line per error."""
    wrong = []
    try:
        for name, digest in json.loads(str(task.load(part)["sha256"])).items():
            if hashlib.sha256(read_path(f"{task.target}/{name}")).hexdigest() != digest:
                wrong.append(f"{task.target}/{name}: SHA-256 differs from that of the written data")
    except Exception as error:  # a damaged file may raise anything
        wrong.append(f"{task.record(part)}: {str(error) or type(error).__name__}")
    if wrong:
        with named(task.target):
            store, path = open_store(task.record(part))
            store.rm(path)
    return wrong
