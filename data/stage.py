"""Bring a prepared dataset's shards from a bucket to this machine, before or while it is trained on.

    python -m data.stage s3://BUCKET/PREFIX [--cache-folder cache] [--cache-gb 100] [--follow]

Shards arrive under another name, are checked against their SHA-256 and then renamed: a killed stager goes on where it
was. Without room for all, those of the resolution that was used last come first, and others make room for them.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.errors import DataError
from data.remote import is_remote, named, open_store
from data.shards import MANIFEST, cached_metadata, short_side
from data.text import guard

_CONNECTIONS = 8
_LOOK_AGAIN = 2.0
"""Seconds between two looks at which resolution is in use."""


class Shard(NamedTuple):
    """A shard to bring."""

    file: str
    """Its path below the dataset."""
    size: int
    """In bytes."""
    sha256: str


def wanted(folder: Path, limit: float) -> list[Shard]:
    """The shards that are to be on this machine, those needed first in front.

    Args:
        folder: the dataset's folder in the cache, with its metadata.
        limit: bytes that they may fill together.

    Returns:
        Those that fit: of the resolutions in use, newest first, then of the others from the smallest on.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    places = [folder / split / one for split, what in manifest["splits"].items() for one in what["resolutions"]]
    places.sort(key=lambda place: (-_last_used(place), place.parent.name, short_side(place.name)))
    found: list[Shard] = []
    total = 0
    for place in places:
        for entry in json.loads((place / "index.json").read_text(encoding="utf-8"))["shards"]:
            raw = entry["raw_data"]
            total += raw["bytes"]
            if total > limit:
                return found
            file = (place / raw["basename"]).relative_to(folder)
            found.append(Shard(str(file), raw["bytes"], raw["hashes"]["sha256"]))
    return found


def _last_used(place: Path) -> float:
    try:
        return (place / ".used").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def stage(url: str, cache_folder: str, limit: float, *, progress: bool) -> None:
    """Bring the shards that fit, and come back when they are here; of several callers one works, the others wait.

    Args:
        url: the dataset, `s3://bucket/prefix`.
        cache_folder: where it is kept on this machine.
        limit: bytes that the images may fill.
        progress: show a bar.

    Raises:
        DataError: the bucket cannot be read, the disk is full, or a shard is not what the index says.
    """
    folder = cached_metadata(url, cache_folder)
    with named(str(folder)), _alone(folder, wait=True):
        _bring(url, folder, wanted(folder, limit), limit, progress)


def follow(url: str, cache_folder: str, limit: float, parent: int) -> None:
    """Stage while the process `parent` lives, and make room when it goes over to another resolution."""
    folder = cached_metadata(url, cache_folder)
    with _alone(folder, wait=False) as first:
        done: list[Shard] | None = None
        while first and os.getppid() == parent:
            shards = wanted(folder, limit)
            if shards != done:
                try:
                    _bring(url, folder, shards, limit, progress=False, until=lambda: os.getppid() != parent)
                    done = shards
                except DataError as error:  # the loader reads from the bucket meanwhile, and tells what is the matter
                    print(f"data.stage: {error}", file=sys.stderr)
            time.sleep(_LOOK_AGAIN)


def bring(path: str, cache_folder: str, cache_gb: float | None, *, first: bool, leader: bool) -> None:
    """Have a dataset's shards come from its bucket to this machine; nothing to do where it lies in a folder.

    Args:
        path: the dataset, as given to `open_split_pair`.
        cache_folder: likewise.
        cache_gb: room for images, in 1e9 bytes; None: as much as they take.
        first: come back when they are here; else they come meanwhile, and what is not here is read from the bucket.
        leader: this process is the first of the run's on this machine.

    Raises:
        DataError: the bucket or the cache failed, where `first`.
    """
    limit = float("inf") if cache_gb is None else cache_gb * 1e9
    if is_remote(path) and first:
        stage(path, cache_folder, limit, progress=leader)
    elif is_remote(path) and leader:
        start_following(path, cache_folder, limit)


def start_following(url: str, cache_folder: str, limit: float) -> subprocess.Popen[bytes]:
    """Start `follow` beside this process, for as long as it lives."""
    command = [sys.executable, "-m", "data.stage", url, "--cache-folder", cache_folder, "--follow"]
    if limit != float("inf"):
        command += ["--cache-gb", str(limit / 1e9)]
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths})


def _bring(
    url: str, folder: Path, shards: list[Shard], limit: float, progress: bool, until: Any = lambda: False
) -> None:
    """Download what is absent, after removing what is not wanted any more."""
    keep = {shard.file for shard in shards}
    here = {str(path.relative_to(folder)) for path in folder.glob("*/*/*/*.mds")}
    if limit != float("inf"):
        for file in here - keep:
            (folder / file).unlink(missing_ok=True)
    for left in folder.glob("*/*/*/.*.part"):
        left.unlink(missing_ok=True)
    absent = [shard for shard in shards if shard.file not in here]
    store, root = open_store(url)
    with (
        tqdm(total=sum(s.size for s in absent), unit="B", unit_scale=True, desc="staging", disable=not progress) as bar,
        ThreadPoolExecutor(_CONNECTIONS) as pool,
    ):
        work = pool.map(lambda shard: None if until() else _fetch(store, root, folder, shard), absent)
        for shard, _ in zip(absent, work, strict=True):
            bar.update(shard.size)


def _fetch(store: Any, root: str, folder: Path, shard: Shard) -> None:
    """Download, check, rename."""
    target = folder / shard.file
    partial = target.with_name(f".{target.name}.part")
    with named(f"s3://{root}/{shard.file}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(f"{root}/{shard.file}", str(partial))
        with partial.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != shard.sha256:
            partial.unlink()
            raise DataError(f"s3://{root}/{shard.file}: SHA-256 is not that of the index; prepare the dataset again")
        partial.replace(target)


@contextmanager
def _alone(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process is the one that stages into a folder; it is told at once, or when its turn has come."""
    with (folder / ".stage-lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.stage", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("url", metavar="s3://BUCKET/PREFIX", help="a dataset that data.prepare wrote")
    parser.add_argument("--cache-folder", default="cache", help="where to (default: %(default)s)")
    parser.add_argument("--cache-gb", type=float, default=float("inf"), help="at most, 1e9 bytes (default: all)")
    parser.add_argument("--follow", action="store_true", help="go on for as long as the parent process lives")
    options = parser.parse_args(arguments)
    if not options.url.startswith("s3://"):
        parser.error(f"{options.url}: expected s3://BUCKET/PREFIX")
    limit = options.cache_gb * 1e9
    try:
        if options.follow:
            follow(options.url, options.cache_folder, limit, os.getppid())
        else:
            stage(options.url, options.cache_folder, limit, progress=True)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    guard()
    raise SystemExit(main())
