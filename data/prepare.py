"""Convert a dataset for fast loading: smaller JPEGs or raw pixels at several resolutions, in shards or in folders.

    python -m data.prepare SRC DST [--format mds|raw|folder] [--train-sizes 160 256 384] [--val-sizes original]

SRC: an ImageFolder (ImageNet-Mini, ...) local or s3://, Kaggle's ImageNet tree, or the ILSVRC2012 tar files with their
devkit, which are unpacked into SRC/train and SRC/val first. DST: a folder or s3://. After an interruption, the same
command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.decode import BadImage, Picture
from data.errors import DataError, Parser, run_main
from data.files import is_remote, named, open_store, read_path, renew_credentials, write_path
from data.origins import open_origin, unpack_tars
from data.parts import Settings, Task, encode, write_and_check
from data.shards import FORMAT, MANIFEST, ORIGINAL, short_side
from data.source import Source
from data.workers import add_workers_argument, each_part

_SETTINGS = "settings.json"
_PRELOAD = ("data.origins", "data.parts", "streaming.base.format.mds.writer")
_SAMPLED = 64  # images of a split from which the size of the result is estimated


def prepare(source: str, target: str, settings: Settings, workers: int, report: Callable[[str], None]) -> bool:
    """Prepare the dataset at `source` (see `open_origin`); return whether everything written reads back correctly.

    Tar files are unpacked first (see `unpack_tars`). The target must be empty, or left by an interrupted call with the
    same arguments. `report` is called with each line for the user. Raises DataError if the source cannot be read or the
    target cannot be written.
    """
    begun = _is_begun(target)
    if not is_remote(source):
        unpack_tars(Path(source), report)
    splits = open_origin(source)
    tasks = {name: Task(name, split, target, settings) for name, split in splits.items()}
    content = _record_of(settings, splits)
    if begun and read_path(f"{target}/{_SETTINGS}") != content:
        raise DataError(
            f"{target}: was started from another source or with other settings (see {_SETTINGS}); choose another "
            f"target or delete it"
        )
    report(_require_space(list(tasks.values())))
    if not begun:
        write_path(f"{target}/{_SETTINGS}", content)
    left_out = dict.fromkeys(tasks, 0)
    wrong: list[str] = []
    jobs = [(name, part) for name, task in tasks.items() for part in range(len(task.parts))]
    total = sum(map(len, splits.values()))
    with tqdm(total=total, unit="img", desc="writing", smoothing=0.05, file=sys.stderr) as bar:
        for (name, part), (lines, damage) in each_part(write_and_check, tasks, jobs, workers, _PRELOAD):
            left_out[name] += len(lines)
            for line in lines:
                report(f"left out: {line}")
            wrong += damage
            bar.update(len(tasks[name].parts[part]))
    for line in wrong:
        report(f"wrong: {line}")
    if wrong:
        report("run the same command again to rewrite these parts")
        return False
    renew_credentials()
    finish = _finish_folder if settings.layout == "folder" else _finish_shards
    report(finish(list(tasks.values()), left_out))
    return True


def _is_begun(target: str) -> bool:
    """Whether an interrupted call has left the target; DataError: it holds something else."""
    with named(target):
        store, root = open_store(target)
        begun: bool = store.exists(f"{root}/{_SETTINGS}")
        if not begun and store.exists(root) and store.ls(root):
            raise DataError(f"{target}: holds something else; expected a new or empty target")
    return begun


def _record_of(settings: Settings, splits: dict[str, Source]) -> bytes:
    """What `settings.json` says about the settings and the source, which must be the same after an interruption."""
    names = hashlib.sha256()
    for source in splits.values():
        names.update(np.ascontiguousarray(source.labels).tobytes() + repr(source.classes).encode())
        names.update(f"{len(source)} {source.name(0)} {source.name(len(source) - 1)}".encode())
    return json.dumps(asdict(settings) | {"source_sha256": names.hexdigest()}, indent=1).encode()


def _require_space(tasks: Sequence[Task]) -> str:
    """The expected size, as a line; raises DataError if the target's disk has less free than is still to be written."""
    target = tasks[0].target
    store, root = open_store(target)
    sizes: dict[str, float] = {}
    missing = 0.0
    for task in tasks:
        expected = expected_bytes(task)
        sizes |= {f"{task.split} at {one}": size for one, size in expected.items()}
        with named(target):
            written = len(store.find(f"{root}/.parts/{task.split}"))
        missing += (1 - written / len(task.parts)) * sum(expected.values())
    each = ", ".join(f"{name}: {size / 1e9:.3f} GB" for name, size in sizes.items())
    line = f"about {sum(sizes.values()) / 1e9:.3f} GB ({each})"
    there = next((path for path in (Path(root), *Path(root).parents) if path.exists()), Path("/"))
    if not is_remote(target) and (free := shutil.disk_usage(there).free) < missing:
        raise DataError(
            f"{target}: the images take {line}; {missing / 1e9:.3f} GB are still to be written, but only "
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


def _finish_shards(tasks: Sequence[Task], left_out: dict[str, int]) -> str:
    """Join the parts: one index per resolution, one table of labels per split, and the manifest last."""
    target = tasks[0].target
    splits: dict[str, Any] = {}
    lines = []
    for task in tasks:
        records = [task.load(part) for part in range(len(task.parts))]
        resolutions: dict[str, Any] = {}
        for resolution in task.resolutions:
            shards = [shard for record in records for shard in json.loads(str(record[f"shards_{resolution}"]))]
            place = f"{target}/{task.split}/{resolution}"
            write_path(f"{place}/index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
            _write_array(f"{place}/images.npy", [record[f"images_{resolution}"] for record in records])
            size = sum(shard["raw_data"]["bytes"] for shard in shards)
            raw = task.settings.layout == "raw" and resolution != ORIGINAL
            resolutions[resolution] = {"bytes": size, "shards": len(shards), "raw": raw}
            lines.append(f"{task.split} at {resolution}: {size / 1e9:.3f} GB in {len(shards)} shards")
        images = _write_array(f"{target}/{task.split}/labels.npy", [record["labels"] for record in records])
        if not images:
            raise DataError(f"{target}: no image of {task.split} can be decoded")
        splits[task.split] = {"images": images, "left_out": left_out[task.split], "resolutions": resolutions}
        lines.append(f"{task.split}: {images} images, {left_out[task.split]} left out")
    quality = tasks[0].settings.quality
    manifest = {"format": FORMAT, "classes": tasks[0].source.classes, "splits": splits, "quality": quality}
    write_path(f"{target}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
    return "\n".join([*lines, f"prepared: data.path={target}"])


def _write_array(path: str, parts: Sequence[Any]) -> int:
    """Write the concatenated arrays as a .npy file; returns the length."""
    np.save(stream := BytesIO(), joined := np.concatenate(parts))
    write_path(path, stream.getvalue())
    return len(joined)


def _finish_folder(tasks: Sequence[Task], left_out: dict[str, int]) -> str:
    """Report the size of each resolution."""
    target = tasks[0].target
    with named(target):
        store, root = open_store(target)
        sizes = {one: store.du(f"{root}/{one}") / 1e9 for task in tasks for one in task.resolutions}
    lines = [f"{one}: {size:.3f} GB, data.path={target}/{one}" for one, size in sizes.items()]
    return "\n".join(lines + [f"{task.split}: {len(task.source) - left_out[task.split]} images" for task in tasks])


def _size(text: str) -> str:
    """Parse a resolution on the command line."""
    if text == ORIGINAL or (text.isdecimal() and 8 <= int(text) <= 4096):
        return text
    raise argparse.ArgumentTypeError(f"got {text!r}; allowed: 8 to 4096, {ORIGINAL}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if something does not read back correctly, or raises InputError."""
    parser = Parser("python -m data.prepare", (__doc__ or "").split("\n\n")[0])
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
    add_workers_argument(parser)
    options = parser.parse_args(arguments)
    if not 1 <= options.quality <= 100:
        parser.error(f"--quality: got {options.quality}; allowed: 1 to 100")
    train, val = (tuple(sorted(set(sizes), key=short_side)) for sizes in (options.train_sizes, options.val_sizes))
    if options.format == "folder":
        val = train  # each resolution is a whole dataset
    # Raw pixels take ten times the memory and the space: 13 MB a shard at 160 px, 33 MB at 256 px.
    settings = Settings(options.format, train, val, options.quality, 128 if options.format == "raw" else 512)
    report = partial(print, flush=True)  # into a file, too, hours before the end
    return 0 if prepare(options.source, options.target, settings, options.workers, report) else 1


if __name__ == "__main__":
    raise SystemExit(run_main(main))
