"""Convert a dataset for fast loading: smaller JPEGs or raw pixels at several resolutions, in shards or in folders.

    python -m data.prepare SRC DST [--format mds|raw|folder] [--train-sizes 160 256 384] [--val-sizes original]

SRC: an ImageFolder (ImageNet-Mini, ...) local or s3://, Kaggle's ImageNet tree, or the ILSVRC2012 tar files with their
devkit. DST: a folder or s3://. After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.decode import BadImage, Fault, Picture, with_index
from data.errors import DataError
from data.files import is_file_name, is_remote, named, open_store, renew_credentials, replace_file
from data.origins import open_origin
from data.shards import BEFORE_IMAGE, FORMAT, MANIFEST, ORIGINAL, SHARD, short_side
from data.source import Source
from data.text import escape, guard

_COLUMNS = {"image": "bytes", "label": "int", "name": "str"}
_SETTINGS = "settings.json"
_JPEG_NAMES = (".jpg", ".jpeg", ".jfif")
_PRELOAD = ("data.origins", "streaming.base.format.mds.writer")
_SAMPLED = 64  # images of a split from which the size of the result is estimated


@dataclass(frozen=True)
class Settings:
    """What to write for each image."""

    layout: str  # `mds` or `folder` of JPEGs; `raw`: as `mds`, but raw pixels
    train_sizes: tuple[str, ...]  # resolutions of the training images: short side in pixels, or `original`
    val_sizes: tuple[str, ...]
    quality: int
    part_images: int = 512  # images per shard: 7 MB at 160 px, 15 MB at 256 px, 57 MB for original photos

    @property
    def is_raw(self) -> bool:
        """Whether images are stored as pixels."""
        return self.layout == "raw"


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

    @property
    def parts(self) -> range:
        """The numbers of the split's parts."""
        return range(-(-len(self.source) // self.settings.part_images))

    def indices(self, part: int) -> range:
        """The images of a part."""
        size = self.settings.part_images
        return range(part * size, min((part + 1) * size, len(self.source)))

    def load(self, part: int) -> Any:
        """The record that `make_part` wrote with a part."""
        return np.load(BytesIO(open_store(self.target)[0].cat_file(self.record(part))))

    def record(self, part: int) -> str:
        """Path of a part's record in the target's file system."""
        return f"{open_store(self.target)[1]}/.parts/{self.split}/{part:05}.npz"

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


def prepare(source: str, target: str, settings: Settings, workers: int, report: Callable[[str], None]) -> bool:
    """Prepare the dataset at `source` (see `open_origin`); return whether everything written reads back correctly.

    The target must be empty, or left by an interrupted call with the same arguments. `report` is called with each line
    for the user. Raises DataError if the source cannot be read or the target cannot be written.
    """
    splits = open_origin(source)
    tasks = {name: Task(name, split, target, settings) for name, split in splits.items()}
    report(_require_space(list(tasks.values())))
    _claim(target, settings, splits)
    left_out = dict.fromkeys(tasks, 0)
    wrong: list[str] = []
    jobs = [(name, part) for name, task in tasks.items() for part in task.parts]
    total = sum(map(len, splits.values()))
    with tqdm(total=total, unit="img", desc="writing", smoothing=0.05, file=sys.stderr) as bar:
        for (name, part), (lines, damage) in each_part(_write_and_check, tasks, jobs, workers, _PRELOAD):
            left_out[name] += len(lines)
            for line in lines:
                report(f"left out: {line}")
            wrong += damage
            bar.update(len(tasks[name].indices(part)))
    for line in wrong:
        report(f"wrong: {line}")
    if wrong:
        report("run the same command again to rewrite these parts")
        return False
    renew_credentials()
    finish = _finish_folder if settings.layout == "folder" else _finish_shards
    with named(target):
        report(finish(list(tasks.values()), left_out))
    return True


def _require_space(tasks: Sequence[Task]) -> str:
    """The expected size, as a line; raises DataError if the target's disk has less free than is still to be written."""
    store, root = open_store(tasks[0].target)
    sizes = {f"{task.split} at {one}": size for task in tasks for one, size in expected_bytes(task).items()}
    missing = 0.0
    for task in tasks:
        with named(task.target):
            written = len(store.find(f"{root}/.parts/{task.split}"))
        share = 1 - written / len(task.parts)
        missing += share * sum(sizes[f"{task.split} at {one}"] for one in task.resolutions)
    line = f"about {sum(sizes.values()) / 1e9:.3f} GB"
    line += f" ({', '.join(f'{name}: {size / 1e9:.3f} GB' for name, size in sizes.items())})"
    if not is_remote(tasks[0].target):
        there = next(path for path in (Path(root), *Path(root).parents) if path.exists())
        free = shutil.disk_usage(there).free
        if missing > free:
            raise DataError(
                f"{tasks[0].target}: the images take {line}; {missing / 1e9:.3f} GB are still to be written, but only "
                f"{free / 1e9:.3f} GB are free there; choose another target, or fewer or smaller --train-sizes"
            )
    return f"expected: {line}"


def expected_bytes(task: Task) -> dict[str, float]:
    """Bytes of a split at each resolution, from the mean of some of its images, spread over it."""
    sizes = dict.fromkeys(task.resolutions, 0.0)
    sampled = np.unique(np.linspace(0, len(task.source) - 1, _SAMPLED, dtype=np.int64)).tolist()
    for index in sampled:
        with suppress(BadImage, OSError):
            picture = Picture(data := task.source.read(index))
            for one in sizes:
                sizes[one] += len(encode(data, picture, one, task.settings)) * len(task.source) / len(sampled)
    return sizes


def _claim(target: str, settings: Settings, splits: dict[str, Source]) -> None:
    """Record the settings, or check that they are the same as before the interruption."""
    names = hashlib.sha256()
    for source in splits.values():
        names.update(np.ascontiguousarray(source.labels).tobytes() + repr(source.classes).encode())
        names.update(f"{len(source)} {source.name(0)} {source.name(len(source) - 1)}".encode())
    content = json.dumps(asdict(settings) | {"source_sha256": names.hexdigest()}, indent=1).encode()
    store, root = open_store(target)
    with named(target):
        if store.exists(f"{root}/{_SETTINGS}"):
            if store.cat_file(f"{root}/{_SETTINGS}") != content:
                raise DataError(
                    f"{target}: was started from another source or with other settings (see {_SETTINGS}); choose "
                    f"another target or delete it"
                )
            return
        if store.exists(root) and store.ls(root):
            raise DataError(f"{target}: holds something else; expected a new or empty target")
        _put(store, f"{root}/{_SETTINGS}", content)


def _write_and_check(tasks: dict[str, Task], job: tuple[str, int]) -> tuple[list[str], list[str]]:
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
    store, root = open_store(task.target)
    with named(task.target):
        if store.exists(task.record(part)):
            return [str(line) for line in task.load(part)["left_out"]]
    encoded: dict[str, list[dict[str, Any]]] = {resolution: [] for resolution in task.resolutions}
    left_out: list[str] = []
    broken_links = 0
    for index in task.indices(part):
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
    if broken_links == len(task.indices(part)) > 1:
        raise DataError(f"{left_out[0]} (and {broken_links - 1} more); is the disk with the links' targets mounted?")
    labels = [sample["label"] for sample in encoded[task.resolutions[0]]]
    record: dict[str, Any] = {"left_out": np.array(left_out, dtype=str), "labels": np.array(labels, dtype=np.int64)}
    sha256: dict[str, str] = {}  # of each file
    for resolution, samples in encoded.items():
        if task.settings.layout == "folder":
            files = _as_files(f"{resolution}/{task.split}", samples)
        else:
            places, shards, files = _as_shard(f"{task.split}/{resolution}", f"{part:05}/{SHARD}", samples)
            record[f"images_{resolution}"] = np.array(places, dtype=np.uint32).reshape(-1, 2)
            record[f"shards_{resolution}"] = np.array(json.dumps(shards))
        for path, data in files.items():
            sha256[path] = hashlib.sha256(data).hexdigest()
            with named(task.target):
                _put(store, f"{root}/{path}", data)
    np.savez(stream := BytesIO(), sha256=np.array(json.dumps(sha256)), **record)
    with named(task.target):
        _put(store, task.record(part), stream.getvalue())
    return left_out


def check_part(task: Task, part: int) -> list[str]:
    """Verify the SHA-256 of the written files; a bad part counts as not written. Returns one line per error."""
    store, root = open_store(task.target)
    wrong = []
    try:
        for name, digest in json.loads(str(task.load(part)["sha256"])).items():
            if hashlib.sha256(store.cat_file(f"{root}/{name}")).hexdigest() != digest:
                wrong.append(f"{root}/{name}: SHA-256 differs from that of the written data")
    except Exception as error:  # a damaged file may raise anything
        wrong.append(f"{task.record(part)}: {str(error) or type(error).__name__}")
    if wrong:
        with named(task.target):
            store.rm(task.record(part))
    return wrong


def encode(data: bytes, picture: Picture, resolution: str, settings: Settings) -> bytes:
    """An image, opened as `picture`, reduced to a short side of `resolution` px and turned upright; raises BadImage.

    A JPEG that is small enough is kept byte for byte. Others get restart markers, of some five bytes each, so that the
    loader can skip what a crop does not need (data/decode.py). Raw pixels are a binary PPM.
    """
    short, scale = min(picture.height, picture.width), 1.0
    if short > short_side(resolution):
        scale = short_side(resolution) / short
    elif resolution == ORIGINAL or (picture.is_plain_upright_jpeg and not settings.is_raw):
        return data
    image = Image.fromarray(picture.decode(1))
    if scale < 1:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    stream = BytesIO()
    if settings.is_raw:
        image.save(stream, "PPM")
        return stream.getvalue()
    blocks = -(-image.width // 16)  # of 16 px, as colours are stored at half the resolution
    interval = max(count for count in range(1, 5) if blocks % count == 0)  # a segment must not cross rows
    options = {"subsampling": "4:2:0", "optimize": True, "restart_marker_blocks": interval}
    image.save(stream, "JPEG", quality=settings.quality, **options)
    return with_index(stream.getvalue())


def _as_shard(
    folder: str, name: str, samples: Sequence[dict[str, Any]]
) -> tuple[list[Any], list[Any], dict[str, bytes]]:
    """An MDS shard, by Streaming's writer: each image's offset and length, index entry, file; of no images, nothing."""
    from streaming.base.format.mds.writer import MDSWriter  # imports torch, which takes a second

    if not samples:
        return [], [], {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "part"
        with MDSWriter(out=str(place), columns=_COLUMNS, hashes=["sha256"], size_limit=None) as writer:
            for sample in samples:
                writer.write(sample)
        (shard,) = json.loads((place / "index.json").read_text())["shards"]
        data = (place / SHARD).read_bytes()
    shard["raw_data"]["basename"] = name
    begins = np.frombuffer(data, np.uint32, len(samples), 4).tolist()
    places = [(at + BEFORE_IMAGE, len(sample["image"])) for at, sample in zip(begins, samples, strict=True)]
    return places, [shard], {f"{folder}/{name}": data}


def _as_files(folder: str, samples: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Files FOLDER/CLASS/NAME."""
    files = {}
    for sample in samples:
        converted = sample["image"][:2] == b"\xff\xd8" and not sample["name"].lower().endswith(_JPEG_NAMES)
        files[f"{folder}/{sample['name']}{'.jpg' if converted else ''}"] = sample["image"]
    return files


def _put(store: Any, path: str, data: bytes) -> None:
    """Write an object atomically."""
    if "s3" in store.protocol:
        store.pipe_file(path, data)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(path), [data], durable=False)


def _finish_shards(tasks: Sequence[Task], left_out: dict[str, int]) -> str:
    """Join the parts: one index per resolution, one table of labels per split, and the manifest last."""
    target = tasks[0].target
    store, root = open_store(target)
    splits: dict[str, Any] = {}
    lines = []
    for task in tasks:
        records = [task.load(part) for part in task.parts]
        resolutions: dict[str, Any] = {}
        for resolution in task.resolutions:
            shards = [shard for record in records for shard in json.loads(str(record[f"shards_{resolution}"]))]
            place = f"{root}/{task.split}/{resolution}"
            _put(store, f"{place}/index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
            _put_array(store, f"{place}/images.npy", [record[f"images_{resolution}"] for record in records])
            size = sum(shard["raw_data"]["bytes"] for shard in shards)
            raw = task.settings.is_raw and resolution != ORIGINAL
            resolutions[resolution] = {"bytes": size, "shards": len(shards), "raw": raw}
            lines.append(f"{task.split} at {resolution}: {size / 1e9:.3f} GB in {len(shards)} shards")
        images = _put_array(store, f"{root}/{task.split}/labels.npy", [record["labels"] for record in records])
        if not images:
            raise DataError(f"{target}: no image of {task.split} can be decoded")
        splits[task.split] = {"images": images, "left_out": left_out[task.split], "resolutions": resolutions}
        lines.append(f"{task.split}: {images} images, {left_out[task.split]} left out")
    quality = tasks[0].settings.quality
    manifest = {"format": FORMAT, "classes": tasks[0].source.classes, "splits": splits, "quality": quality}
    _put(store, f"{root}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
    return "\n".join([*lines, f"prepared: data.path={target}"])


def _put_array(store: Any, path: str, parts: Sequence[Any]) -> int:
    """Write the concatenated arrays as a .npy file; returns the length."""
    np.save(stream := BytesIO(), joined := np.concatenate(parts))
    _put(store, path, stream.getvalue())
    return len(joined)


def _finish_folder(tasks: Sequence[Task], left_out: dict[str, int]) -> str:
    """Report the size of each resolution."""
    store, root = open_store(tasks[0].target)
    sizes = {one: store.du(f"{root}/{one}") / 1e9 for task in tasks for one in task.resolutions}
    lines = [f"{one}: {size:.3f} GB, data.path={tasks[0].target}/{one}" for one, size in sizes.items()]
    return "\n".join(lines + [f"{task.split}: {len(task.source) - left_out[task.split]} images" for task in tasks])


class WorkerKilledError(Exception):
    """A worker process was killed from outside."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was killed, probably because memory ran out; run the same command again, with fewer "
            "--workers to use less memory"
        )


def each_part(
    work: Callable[[Any, Any], Any], held: Any, parts: Sequence[Any], workers: int, preload: Sequence[str]
) -> Iterator[tuple[Any, Any]]:
    """Yield each part with `work(held, part)`, computed in worker processes, when done; raises WorkerKilledError.

    `held` is sent to each worker once. `preload` are modules to import before forking workers; not the one started with
    -m, which has two names.
    """
    # A server with the imports done forks the workers: they start quickly and inherit no thread or connection.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(workers, context, initializer=_hold, initargs=(work, held, dict(os.environ))) as pool:
        futures = {pool.submit(_do, part): part for part in parts}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise WorkerKilledError from None
            raise


_held: tuple[Callable[[Any, Any], Any], Any]


def _hold(work: Callable[[Any, Any], Any], held: Any, environment: dict[str, str]) -> None:
    """Set up a worker: the server's environment is that of an earlier call; Ctrl-C ends it without a traceback."""
    global _held
    os.environ.update(environment)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
    _held = work, held


def _do(part: Any) -> Any:
    work, held = _held
    return work(held, part)


def _size(text: str) -> str:
    """Parse a resolution on the command line."""
    if text == ORIGINAL or (text.isdecimal() and 8 <= int(text) <= 4096):
        return text
    raise argparse.ArgumentTypeError(f"got {text!r}; allowed: 8 to 4096, {ORIGINAL}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if something does not read back correctly, 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", metavar="SRC", help="the dataset: a folder, or s3://BUCKET/PREFIX")
    parser.add_argument("target", metavar="DST", help="the target: a new folder, or s3://BUCKET/PREFIX")
    what = "shards of JPEGs (default), shards of raw pixels, or an ImageFolder of JPEGs per size"
    parser.add_argument("--format", choices=["mds", "raw", "folder"], default="mds", help=what)
    sizes: dict[str, Any] = {"nargs": "+", "type": _size, "metavar": "PX"}
    what = (
        "short sides of the training images; a stage of S px uses the smallest that is at least S / 0.875 (default: "
        "160 256 384, for stages up to 140, 224 and 336 px)"
    )
    parser.add_argument("--train-sizes", default=["160", "256", "384"], help=what, **sizes)
    what = f"short sides of the validation images; {ORIGINAL} (default) copies them, so that results stay comparable"
    parser.add_argument("--val-sizes", default=[ORIGINAL], help=what, **sizes)
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality, 1 to 100 (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    if not 1 <= options.quality <= 100:
        parser.error(f"--quality: got {options.quality}; allowed: 1 to 100")
    train, val = (tuple(sorted(set(sizes), key=short_side)) for sizes in (options.train_sizes, options.val_sizes))
    if options.format == "folder":
        val = train  # each resolution is a whole dataset
    # Raw pixels take ten times the memory and the space: 13 MB a shard at 160 px, 33 MB at 256 px.
    settings = Settings(options.format, train, val, options.quality, 128 if options.format == "raw" else 512)
    try:
        return 0 if prepare(options.source, options.target, settings, max(1, options.workers), print) else 1
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except (WorkerKilledError, KeyboardInterrupt) as error:
        print(str(error) or "interrupted; run the same command again to continue", file=sys.stderr)
        return 1


if __name__ == "__main__":
    guard()
    raise SystemExit(main())
