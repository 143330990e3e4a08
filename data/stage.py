"""Copy a prepared dataset's shards from a bucket to this machine, before or while it is trained on.

    python -m data.stage s3://BUCKET/PREFIX [--cache-folder cache] [--cache-gb 100] [--follow]

Shards are downloaded under a temporary name, checked against their SHA-256 and renamed; an interrupted command
continues. Without room for all, the shards of the last used resolution have priority, and others are removed.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.errors import DataError
from data.files import download, is_remote, named, open_store
from data.shards import MANIFEST, USED, Shard, cached_metadata, read_index, read_manifest, short_side
from data.text import guard

log = logging.getLogger(__name__)

_CONNECTIONS = 8
_LOOK_AGAIN = 2.0  # seconds between two checks of which resolution is in use
_KEPT_FREE = 1e9  # bytes to leave free on the cache's disk, which may also hold the run's checkpoints
_PARTIAL = ".part-"
_READ_BY_RANGE = "images whose shards are not in the cache are read from the bucket each time"


class CacheFull(DataError):
    """The cache's disk is full; images whose shards are not in it are read from the bucket."""


def stage_dataset(path: str, cache_folder: str, cache_gb: float | None, *, first: bool, leader: bool) -> None:
    """Copy a dataset's shards from its bucket to this machine; does nothing for a dataset in a folder.

    Args:
        path: the dataset, as given to `open_split_pair`.
        cache_folder: likewise.
        cache_gb: limit of the cached images in GB (1e9 bytes); None: no limit.
        first: return when all are copied; otherwise they are copied in the background, and missing ones are read from
        the bucket.
        leader: whether this is the run's first process on this machine.

    Raises:
        DataError: the bucket failed, with `first`; a full disk is only logged.
    """
    limit = float("inf") if cache_gb is None else cache_gb * 1e9
    if is_remote(path) and first:
        try:
            stage(path, cache_folder, limit, progress=leader)
        except CacheFull as error:
            if leader:
                log.warning("%s", error)
    elif is_remote(path) and leader:
        start_following(path, cache_folder, limit)


def start_following(url: str, cache_folder: str, limit: float) -> subprocess.Popen[bytes]:
    """Start `follow` in a child process that ends with this one; its messages are logged here."""
    words = ["--cache-folder", cache_folder, "--cache-gb", str(limit / 1e9), "--follow"]
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "data.stage", url, *words],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths},
    )
    threading.Thread(target=_log_lines, args=(process.stderr,), daemon=True).start()
    return process


def _log_lines(lines: Iterable[bytes]) -> None:
    for line in lines:
        log.warning("%s", line.decode("utf-8", "replace").rstrip())


def stage(url: str, cache_folder: str, limit: float, *, progress: bool) -> None:
    """Copy the shards that fit into `limit` bytes; of several callers, one works and the others wait.

    Raises:
        CacheFull: the disk is full; the shards that fitted are in the cache.
        DataError: the bucket cannot be read, or shards differ from the index; the others are in the cache.
    """
    folder = cached_metadata(url, cache_folder)
    with named(str(folder)), _locked(folder, wait=True):
        _copy(url, folder, _wanted(folder, limit), limit, progress)


def follow(url: str, cache_folder: str, limit: float) -> None:
    """Stage while the parent process lives, and make room when it changes to another resolution; raises DataError."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    folder = cached_metadata(url, cache_folder)
    done: list[Shard] | None = None
    with named(str(folder)), _locked(folder, wait=False) as first:
        while first:
            shards = _wanted(folder, limit)
            if shards != done:
                try:
                    _copy(url, folder, shards, limit, progress=False)
                except CacheFull:
                    raise
                except DataError as error:  # each shard is tried once; the loader reports images that it cannot read
                    print(f"data.stage: {error}", file=sys.stderr, flush=True)
                done = shards
            time.sleep(_LOOK_AGAIN)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_AGAIN)
    os._exit(0)  # even while a download is waiting


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process may stage into a folder, immediately or (`wait`) after the others have finished."""
    with (folder / ".stage-lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _wanted(folder: Path, limit: float) -> list[Shard]:
    """The shards that fit, with paths below `folder`: by last use of their resolution, then by size."""
    manifest = read_manifest(str(folder), (folder / MANIFEST).read_bytes())
    places = [folder / split / one for split, what in manifest.splits.items() for one in what.resolutions]
    places.sort(key=lambda place: (-_last_used(place), place.parent.name, short_side(place.name)))
    found: list[Shard] = []
    total = 0
    for place in places:
        for shard in read_index(place, str(place)):
            total += shard.size
            if total > limit:
                return found
            found.append(shard.model_copy(update={"file": str((place / shard.file).relative_to(folder))}))
    return found


def _last_used(place: Path) -> float:
    try:
        return (place / USED).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _copy(url: str, folder: Path, shards: list[Shard], limit: float, progress: bool) -> None:
    """Remove shards that are no longer wanted, then download the missing ones; raises as `stage`."""
    keep = {shard.file for shard in shards}
    for file in folder.rglob("*.mds"):
        if file.name.startswith(_PARTIAL) or (limit != float("inf") and str(file.relative_to(folder)) not in keep):
            with suppress(OSError):
                file.unlink()
    store, root = open_store(url)
    failures: list[DataError] = []

    def fetch(shard: Shard) -> int:
        try:
            if not any(isinstance(error, CacheFull) for error in failures):
                _fetch(store, root, folder / shard.file, shard)
        except OSError as error:
            failures.insert(0, CacheFull(f"{folder}: {error.strerror or error}; {_READ_BY_RANGE}"))
        except DataError as error:
            failures.append(error)
        return shard.size

    total = sum(shard.size for shard in shards)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="staging", disable=not progress) as bar,
        ThreadPoolExecutor(_CONNECTIONS) as pool,
    ):
        for size in pool.map(fetch, shards):
            bar.update(size)
    if failures and isinstance(failures[0], CacheFull):
        raise failures[0]
    if failures:
        more = f", and {len(failures) - 1} more shards failed" if len(failures) > 1 else ""
        raise DataError(f"{failures[0]}{more}")


def _fetch(store: Any, root: str, target: Path, shard: Shard) -> None:
    """Download unless present, verify, rename; raises OSError for disk errors, DataError for bucket errors."""
    with suppress(OSError):
        if target.stat().st_size == shard.size:
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < shard.size + _KEPT_FREE:
        raise OSError(errno.ENOSPC, f"less than {_KEPT_FREE / 1e9:g} GB would be left free, which checkpoints may need")
    partial = target.with_name(f"{_PARTIAL}{target.name}")
    try:
        if download(store, f"{root}/{shard.file}", shard.size, partial) != shard.sha256:
            raise DataError(f"s3://{root}/{shard.file}: SHA-256 differs from the index; prepare the dataset again")
        partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.stage", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("url", metavar="s3://BUCKET/PREFIX", help="a dataset that data.prepare wrote")
    parser.add_argument("--cache-folder", default="cache", help="the cache (default: %(default)s)")
    parser.add_argument("--cache-gb", type=float, default=float("inf"), help="limit in GB, 1e9 bytes (default: none)")
    parser.add_argument("--follow", action="store_true", help="keep running as long as the parent process lives")
    options = parser.parse_args(arguments)
    if not is_remote(options.url):
        parser.error(f"{options.url}: expected s3://BUCKET/PREFIX")
    limit = options.cache_gb * 1e9
    try:
        if options.follow:
            follow(options.url, options.cache_folder, limit)
        else:
            stage(options.url, options.cache_folder, limit, progress=True)
    except DataError as error:
        print(f"data.stage: {error}" if options.follow else error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    guard()
    raise SystemExit(main())
