"""Decode every image of a dataset once, and report which are broken and why.

    python -m data.verify DIR [--quarantine FOLDER] [--json]

DIR: a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or data.prepare's output in a folder or at s3://. The exit
status is 0 if every image is good, 1 if one is not, 2 if the dataset cannot be opened.
"""

from __future__ import annotations

import argparse
import errno
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

from data.decode import BadImage, Fault, Picture, is_damaged
from data.errors import DataError
from data.files import file_sha256, is_remote, named
from data.imagefolder import ImageFolder
from data.open import open_split_pair
from data.prepare import WorkerKilledError, each_part
from data.shards import Damaged, ShardSource
from data.source import BadSample, Source
from data.text import escape, guard

_BLOCK = 256
_PRELOAD = ("data.prepare",)


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
    return {index: fault for index in block if (fault := _fault(source, index))}


def _fault(source: Source, index: int) -> Fault:
    """The fault of an image, decoded in full at every resolution; Fault.NONE if it is good."""
    resolutions = source.resolutions.values() if isinstance(source, ShardSource) else ()
    reads = [resolution.read for resolution in resolutions] or [source.read]
    try:
        for read in reads:
            data = read(index)
            Picture(data).decode(1)
            if is_damaged(data):
                return Fault.CORRUPT
    except BadImage as error:
        return error.fault
    except FileNotFoundError:
        return Fault.MISSING
    except OSError:
        return Fault.UNREADABLE
    return Fault.NONE


def _quarantine(source: ImageFolder, index: int, folder: Path) -> None:
    """Move an image to FOLDER/CLASS/IMAGE without overwriting; raises OSError."""
    file = Path(os.fsdecode(source.file(index)))
    target = folder / file.relative_to(source.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    while os.path.lexists(target):
        target = target.with_name(f"_{target.name}")
    try:
        file.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV or not (file.is_file() or file.is_symlink()):
            raise
        shutil.move(file, target)  # to another disk it is copied, then removed


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.verify", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("path", metavar="DIR", help="the dataset")
    parser.add_argument("--quarantine", type=Path, metavar="FOLDER", help="move broken files of class folders there")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--cache-folder", default="cache", help="cache for s3:// (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    try:
        splits = dict(zip(("train", "val"), open_split_pair(options.path, options.cache_folder), strict=True))
        if options.quarantine and not all(isinstance(source, ImageFolder) for source in splits.values()):
            raise DataError(f"{options.path}: images in shards cannot be moved; prepare the dataset again")
        shards = [line for source in splits.values() for line in _broken_shards(source)]
        found = [one for split, source in splits.items() for one in _broken_images(split, source, options.workers)]
    except (DataError, OSError) as error:
        print(*map(escape, error.problems if isinstance(error, Damaged) else [error]), sep="\n", file=sys.stderr)
        return 2
    except (WorkerKilledError, KeyboardInterrupt) as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 1
    stayed = 0
    for split, one in found if options.quarantine else []:
        try:
            if one.reason != Fault.MISSING.reason:
                _quarantine(cast(ImageFolder, splits[split]), one.index, options.quarantine / split)
        except OSError as error:
            stayed += 1
            reason = error.strerror or error
            print(f"{one.name}: cannot be moved to {escape(str(options.quarantine))}: {reason}", file=sys.stderr)
    images = sum(len(source) for source in splits.values())
    if options.json:
        broken = [{"split": split} | asdict(one) | {"name": escape(one.name)} for split, one in found]
        print(json.dumps({"images": images, "broken": broken, "broken_shards": shards}, indent=1))
        return 1 if found or shards else 0
    for line in [*shards, *(f"{one.name}: {one.reason}" for _, one in found)]:
        print(escape(line))
    reasons = "".join(f"; {count} {reason}" for reason, count in Counter(one.reason for _, one in found).most_common())
    moved = f"; moved to {escape(options.quarantine)}" if found and options.quarantine else ""
    moved += f" except {stayed}" if stayed else ""
    print(f"{images} images, {len(found)} broken{reasons}{moved}")
    return 1 if found or shards else 0


if __name__ == "__main__":
    guard()
    raise SystemExit(main())
