"""Decode every image of a dataset once, and report which are broken and why.

    python -m data.verify DIR [--quarantine FOLDER] [--json]

DIR: a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or data.prepare's output in a folder or at s3://. The exit
status is 0 if every image is good, 1 if one is not, 2 if the dataset cannot be opened.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

from tqdm import tqdm

from data.decode import BadImage, Fault, Picture, fault_of, is_damaged
from data.errors import DataError, InputError, Parser, run_main
from data.files import file_sha256, is_remote, named
from data.imagefolder import ImageFolder
from data.open import Damaged, open_split_pair
from data.shards import ShardSource
from data.source import BadSample, Source
from data.text import escape
from data.workers import add_workers_argument, each_part

_BLOCK = 256
_PRELOAD = ("data.open",)


def _broken_shards(source: Source) -> Iterator[str]:
    """The shards in a folder whose SHA-256 is wrong; those in a bucket are checked when downloaded."""
    if isinstance(source, ShardSource) and not is_remote(source.path):
        for file, name, shard in (one for resolution in source.resolutions.values() for one in resolution.files()):
            with named(name):
                if file_sha256(file) != shard.sha256:
                    yield f"{name}: SHA-256 differs from index.json"


def _broken_images(split: str, source: Source, workers: int) -> Iterator[tuple[str, BadSample]]:
    """Decode every image on all workers, with a progress bar; raises WorkerKilledError."""
    blocks = [range(at, min(at + _BLOCK, len(source))) for at in range(0, len(source), _BLOCK)]
    faults: dict[int, Fault] = {}
    with tqdm(total=len(source), unit="img", desc=split, file=sys.stderr) as bar:
        for block, found in each_part(_faults, source, blocks, workers, _PRELOAD):
            bar.update(len(block))
            faults |= found
    for index in sorted(faults):
        yield split, BadSample(index, source.name(index), faults[index].reason)


def _faults(source: Source, block: range) -> dict[int, Fault]:
    """The faults of images, decoded in full at every resolution, by index."""
    reads = [one.read for one in source.resolutions.values()] if isinstance(source, ShardSource) else [source.read]
    faults: dict[int, Fault] = {}
    for index in block:
        try:
            for read in reads:
                Picture(data := read(index)).decode(1)
                if is_damaged(data):
                    raise BadImage(Fault.CORRUPT)
        except (BadImage, OSError) as error:
            faults[index] = fault_of(error)
    return faults


def _quarantine(source: ImageFolder, index: int, folder: Path) -> None:
    """Move an image to FOLDER/CLASS/IMAGE without overwriting; raises OSError."""
    file = Path(os.fsdecode(source.file(index)))
    target = folder / file.relative_to(source.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    while os.path.lexists(target):
        target = target.with_name(f"_{target.name}")
    if file.is_dir() or file.is_file() or file.is_symlink():
        shutil.move(file, target)  # to another disk it is copied, then removed
    else:
        file.rename(target)


def _verify(options: argparse.Namespace) -> int:
    try:
        splits = dict(zip(("train", "val"), open_split_pair(options.path, options.cache_folder), strict=True))
    except Damaged as error:
        raise InputError(*error.problems) from None
    if options.quarantine and not all(isinstance(source, ImageFolder) for source in splits.values()):
        raise DataError(f"{options.path}: images in shards cannot be moved; prepare the dataset again")
    shards = [line for source in splits.values() for line in _broken_shards(source)]
    found = [one for split, source in splits.items() for one in _broken_images(split, source, options.workers)]
    stayed = 0
    for split, one in found if options.quarantine else []:
        try:
            if one.reason != Fault.MISSING.reason:
                _quarantine(cast(ImageFolder, splits[split]), one.index, options.quarantine / split)
        except OSError as error:
            stayed += 1
            reason = error.strerror or error
            print(f"{one.name}: cannot be moved to {escape(options.quarantine)}: {reason}", file=sys.stderr)
    images = sum(map(len, splits.values()))
    if options.json:
        broken = [{"split": split} | asdict(one) | {"name": escape(one.name)} for split, one in found]
        print(json.dumps({"images": images, "broken": broken, "broken_shards": shards}, indent=1))
    else:
        for line in [*shards, *(f"{one.name}: {one.reason}" for _, one in found)]:
            print(escape(line))
        counts = Counter(one.reason for _, one in found).most_common()
        moved = f"; moved to {escape(options.quarantine)}" if found and options.quarantine else ""
        moved += f" except {stayed}" if stayed else ""
        print(f"{images} images, {len(found)} broken{''.join(f'; {n} {reason}' for reason, n in counts)}{moved}")
    return 1 if found or shards else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, or raises InputError."""
    parser = Parser("python -m data.verify", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("path", metavar="DIR", help="the dataset")
    parser.add_argument("--quarantine", type=Path, metavar="FOLDER", help="move broken files of class folders there")
    add_workers_argument(parser)
    parser.add_argument("--cache-folder", default="cache", help="cache for s3:// (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return _verify(parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
