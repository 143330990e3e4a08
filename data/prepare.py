"""Turn a dataset into what trains fastest: smaller JPEGs at several resolutions, in shards or in folders.

    python -m data.prepare SRC DST [--train-sizes 160 256 384] [--val-sizes original] [--quality 90]

SRC: an ImageFolder (ImageNet-Mini, ...) local or s3://, Kaggle's ImageNet tree, or the ILSVRC2012 tar files with their
devkit. DST: a folder or s3://. Run again after an interruption, it goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.errors import DataError
from data.origins import open_origin
from data.pack import DONE, Task, _put, check_part, make_part
from data.pool import WorkerKilledError, each_part
from data.remote import named, open_store, renew_credentials
from data.shards import FORMAT, MANIFEST, ORIGINAL, SHARD, short_side
from data.source import Source
from data.text import guard

PART_IMAGES = 512
"""Images per shard: 7 MB at 160 px, 15 at 256, 57 of original photos."""
_SETTINGS = "settings.json"
_PRELOAD = ("data.pack", "streaming.base.format.mds.writer")


@dataclass(frozen=True)
class Settings:
    """What is made of each image.

    Attributes:
        layout: `mds` or `folder`.
        train_sizes: resolutions of the training images, short sides in pixels, or `original`.
        val_sizes: of the validation images.
        quality: of the JPEGs, 1 to 100.
        part_images: images per shard.
    """

    layout: str
    train_sizes: tuple[str, ...]
    val_sizes: tuple[str, ...]
    quality: int
    part_images: int = PART_IMAGES


def prepare(source: str, target: str, settings: Settings, workers: int, report: Callable[[str], None]) -> bool:
    """Prepare a dataset.

    Args:
        source: where it is, see `open_origin`.
        target: where to: a folder, or `s3://bucket/prefix`; empty, or left by an interrupted call with the same
            arguments.
        settings: what is made of each image.
        workers: processes.
        report: is given each line for the user.

    Returns:
        Whether everything that was written reads back as it should.

    Raises:
        DataError: the source cannot be read, or the target holds something else or cannot be written.
    """
    splits = open_origin(source)
    _claim(target, settings, splits)
    sizes = {"train": settings.train_sizes, "val": settings.val_sizes}
    tasks = [
        Task(name, split, target, settings.layout, sizes[name], settings.quality, settings.part_images)
        for name, split in splits.items()
    ]
    left_out = {task.split: 0 for task in tasks}
    for task, _, lines in _each(make_part, tasks, workers, "writing"):
        left_out[task.split] += len(lines)
        for line in lines:
            report(f"left out: {line}")
    wrong = [line for _, _, lines in _each(check_part, tasks, workers, "checking") for line in lines]
    if wrong:
        for line in wrong:
            report(f"wrong: {line}")
        report("run the same command again to write that anew")
        return False
    renew_credentials()
    finish = _finish_folder if settings.layout == "folder" else _finish_shards
    with named(target):
        report(finish(tasks, left_out, settings))
    return True


def _claim(target: str, settings: Settings, splits: dict[str, Source]) -> None:
    """Note what is being made, or check that it is the same as before the interruption."""
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
                    f"{target}: was begun from another source or with other settings ({_SETTINGS} tells); choose "
                    f"another place or delete it"
                )
            return
        if store.exists(root) and store.ls(root):
            raise DataError(f"{target}: holds something else; expected a new or empty place")
        _put(store, content, f"{root}/{_SETTINGS}")


def _each(
    work: Callable[[Task, int], list[str]], tasks: Sequence[Task], workers: int, what: str
) -> Iterable[tuple[Task, int, list[str]]]:
    """Do every part of every split, on all workers, with a progress bar over the images."""
    total = sum(len(task.source) for task in tasks)
    with tqdm(total=total, unit="img", desc=what, smoothing=0.05, file=sys.stderr) as bar:
        for task in tasks:
            for part, lines in each_part(partial(_twice, work), task, range(task.parts), workers, _PRELOAD):
                yield task, part, lines
                bar.update(len(task.indices(part)))


def _twice(work: Callable[[Task, int], list[str]], task: Task, part: int) -> list[str]:
    try:
        return work(task, part)
    except DataError:  # once more, for the credentials of a session expire and are renewed meanwhile
        renew_credentials()
        return work(task, part)


def _finish_shards(tasks: Sequence[Task], left_out: dict[str, int], settings: Settings) -> str:
    """Join the parts: one index per resolution, one table of labels per split, and the manifest last."""
    store, root = open_store(tasks[0].target)
    splits: dict[str, Any] = {}
    lines = []
    for task in tasks:
        resolutions: dict[str, Any] = {}
        for resolution in task.resolutions:
            records = [
                np.load(BytesIO(store.cat_file(f"{root}/{task.place(part, resolution)}/{DONE}")))
                for part in range(task.parts)
            ]
            shards = [
                _placed(shard, f"{part:05}")
                for part, record in enumerate(records)
                for shard in json.loads(str(record["shards"]))
            ]
            place = f"{root}/{task.split}/{resolution}"
            _put(store, json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode(), f"{place}/index.json")
            _put(store, _npy(np.concatenate([record["images"] for record in records])), f"{place}/images.npy")
            size = sum(shard["raw_data"]["bytes"] for shard in shards)
            resolutions[resolution] = {"bytes": size, "shards": len(shards)}
            lines.append(f"{task.split} at {resolution}: {size / 1e9:.3f} GB in {len(shards)} shards")
        labels = np.concatenate([record["labels"] for record in records])
        if not len(labels):
            raise DataError(f"{task.target}: no image of {task.split} can be decoded")
        _put(store, _npy(labels), f"{root}/{task.split}/labels.npy")
        splits[task.split] = {
            "images": len(labels),
            "left_out": left_out[task.split],
            "resolutions": resolutions,
        }
        lines.append(f"{task.split}: {len(labels)} images, {left_out[task.split]} left out")
    manifest = {"format": FORMAT, "classes": tasks[0].source.classes, "splits": splits, "quality": settings.quality}
    _put(store, json.dumps(manifest, indent=1).encode(), f"{root}/{MANIFEST}")
    return "\n".join([*lines, f"prepared: data.path={tasks[0].target}"])


def _placed(shard: dict[str, Any], folder: str) -> dict[str, Any]:
    """A shard's entry as seen from one folder up."""
    raw = shard["raw_data"]
    return shard | {"raw_data": raw | {"basename": f"{folder}/{SHARD}"}}


def _npy(array: NDArray[Any]) -> bytes:
    stream = BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _finish_folder(tasks: Sequence[Task], left_out: dict[str, int], settings: Settings) -> str:
    """Say how large each resolution is, and remove the notes of what was done."""
    store, root = open_store(tasks[0].target)
    lines = []
    for resolution in dict.fromkeys(name for task in tasks for name in task.resolutions):
        size = store.du(f"{root}/{resolution}") / 1e9
        lines.append(f"{resolution}: {size:.3f} GB, data.path={tasks[0].target}/{resolution}")
    lines += [f"{task.split}: {len(task.source) - left_out[task.split]} images" for task in tasks]
    return "\n".join(lines)


def _size(text: str) -> str:
    """A resolution on the command line."""
    if text == ORIGINAL or (text.isdecimal() and 8 <= int(text) <= 4096):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: allowed are 8 to 4096 pixels, and {ORIGINAL}")


def _quality(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 100:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: allowed are 1 to 100")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where something was written that does not read back, 2 for input."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", metavar="SRC", help="the dataset: a folder, or s3://BUCKET/PREFIX")
    parser.add_argument("target", metavar="DST", help="where to: a new folder, or s3://BUCKET/PREFIX")
    parser.add_argument("--format", choices=["mds", "folder"], default="mds", help="shards, or an ImageFolder per size")
    parser.add_argument(
        "--train-sizes",
        nargs="+",
        type=_size,
        default=["160", "256", "384"],
        metavar="PX",
        help="short sides of the training images; a stage of S px uses the smallest of S / 0.875 or more "
        "(default: 160 256 384, for stages up to 140, 224 and 336 px)",
    )
    parser.add_argument(
        "--val-sizes",
        nargs="+",
        type=_size,
        default=[ORIGINAL],
        metavar="PX",
        help=f"of the validation images; {ORIGINAL}: as they are, so that figures compare (default)",
    )
    parser.add_argument("--quality", type=_quality, default=90, help="of the JPEGs (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    train, val = (tuple(sorted(set(sizes), key=short_side)) for sizes in (options.train_sizes, options.val_sizes))
    if options.format == "folder":
        val = train  # each resolution is a whole dataset
    settings = Settings(options.format, train, val, options.quality)
    try:
        return 0 if prepare(options.source, options.target, settings, max(1, options.workers), print) else 1
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from here", file=sys.stderr)
        return 1
    except WorkerKilledError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    guard()
    raise SystemExit(main())
