"""Bring a prepared dataset's shards from a bucket to this machine, before or while it is trained on.

    python -m data.stage s3://BUCKET/PREFIX [--cache-folder cache] [--cache-gb 100] [--follow]

Shards arrive under another name, are checked against their SHA-256 and then renamed: a killed stager goes on where it
was. Without room for all, those of the resolution that was used last come first, and others make room for them.
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
from data.remote import download, is_remote, named, open_store
from data.shards import MANIFEST, Shard, cached_metadata, read_index, read_manifest, short_side
from data.text import guard

log = logging.getLogger(__name__)

_CONNECTIONS = 8
_LOOK_AGAIN = 2.0
"""Seconds between two looks at which resolution is in use."""
_KEPT_FREE = 1e9
"""Bytes that stay free on the cache's disk: the run's checkpoints may lie on it."""
_PARTIAL = ".part-"
_READ_BY_RANGE = "images whose shards are not in the cache are read from the bucket each time"


class CacheFull(DataError):
    """The cache's disk takes no more; images whose shards are not in it are read from the bucket."""


def wanted(folder: Path, limit: float) -> list[Shard]:
    """The shards that are to be on this machine, those needed first in front.

    Args:
        folder: the dataset's folder in the cache, with its metadata.
        limit: bytes that they may fill together.

    Returns:
        Those that fit, with their paths below `folder`: of the resolutions in use, newest first, then of the others,
        smallest first.
    """
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
            found.append(shard._replace(file=str((place / shard.file).relative_to(folder))))
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
        CacheFull: the disk takes no more; the shards that it took are there.
        DataError: the bucket cannot be read, or shards are not what the index says; the others are there.
    """
    folder = cached_metadata(url, cache_folder)
    with named(str(folder)), _alone(folder, wait=True):
        failures = list(_bring(url, folder, wanted(folder, limit), limit, progress))
    if failures:
        more = f", and {len(failures) - 1} more shards failed" if len(failures) > 1 else ""
        raise type(failures[0])(f"{failures[0]}{more}")


def follow(url: str, cache_folder: str, limit: float, parent: int) -> None:
    """Stage while the process `parent` lives, and make room when it goes over to another resolution."""
    folder = cached_metadata(url, cache_folder)
    with _alone(folder, wait=False) as first:
        if first:
            threading.Thread(target=_keep_staging, args=(url, folder, limit), daemon=True).start()
        while first and os.getppid() == parent:
            time.sleep(_LOOK_AGAIN)


def _keep_staging(url: str, folder: Path, limit: float) -> None:
    """Each time that other shards are wanted, try each of them once, and say the first thing that goes wrong."""
    done: list[Shard] | None = None
    try:
        while True:
            shards = wanted(folder, limit)
            if shards != done:
                for number, error in enumerate(_bring(url, folder, shards, limit, progress=False)):
                    if isinstance(error, CacheFull):
                        raise error
                    if not number:  # the loader names the images that it cannot get
                        print(f"data.stage: {error}", file=sys.stderr, flush=True)
                done = shards
            time.sleep(_LOOK_AGAIN)
    except (DataError, OSError) as error:
        print(f"data.stage: {error}", file=sys.stderr, flush=True)


def bring(path: str, cache_folder: str, cache_gb: float | None, *, first: bool, leader: bool) -> None:
    """Have a dataset's shards come from its bucket to this machine; nothing to do where it lies in a folder.

    Args:
        path: the dataset, as given to `open_split_pair`.
        cache_folder: likewise.
        cache_gb: room for images, in 1e9 bytes; None: as much as they take.
        first: come back when they are here; else they come meanwhile, and what is not here is read from the bucket.
        leader: this process is the first of the run's on this machine.

    Raises:
        DataError: the bucket failed, where `first`; a full disk is only said.
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
    """Start `follow` beside this process, for as long as it lives; what it says is logged here."""
    command = [sys.executable, "-m", "data.stage", url, "--cache-folder", cache_folder, "--follow"]
    if limit != float("inf"):
        command += ["--cache-gb", str(limit / 1e9)]
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    threading.Thread(target=_log_lines, args=(process.stderr,), daemon=True).start()
    return process


def _log_lines(lines: Iterable[bytes]) -> None:
    for line in lines:
        log.warning("%s", line.decode("utf-8", "replace").rstrip())


def _bring(url: str, folder: Path, shards: list[Shard], limit: float, progress: bool) -> Iterator[DataError]:
    """Download what is absent, after removing what is not wanted any more.

    Yields:
        Why a shard did not come, as soon as it is known; after CacheFull no other is tried.
    """
    keep = {shard.file for shard in shards}
    for file in folder.rglob("*.mds"):
        if file.name.startswith(_PARTIAL) or (limit != float("inf") and str(file.relative_to(folder)) not in keep):
            with suppress(OSError):
                file.unlink()
    absent = [shard for shard in shards if _size(folder / shard.file) != shard.size]
    store, root = open_store(url)
    full = threading.Event()

    def fetch(shard: Shard) -> DataError | None:
        try:
            if not full.is_set():
                _fetch(store, root, folder, shard)
        except OSError as error:
            full.set()
            return CacheFull(f"{folder}: {error.strerror or error}; {_READ_BY_RANGE}")
        except DataError as error:
            return error
        return None

    with (
        tqdm(total=sum(s.size for s in absent), unit="B", unit_scale=True, desc="staging", disable=not progress) as bar,
        ThreadPoolExecutor(_CONNECTIONS) as pool,
    ):
        for shard, error in zip(absent, pool.map(fetch, absent), strict=True):
            bar.update(shard.size)
            if error is not None:
                yield error


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _fetch(store: Any, root: str, folder: Path, shard: Shard) -> None:
    """Download, check, rename; raises OSError where the disk is to blame, DataError where the bucket is."""
    target = folder / shard.file
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < shard.size + _KEPT_FREE:
        raise OSError(errno.ENOSPC, f"less than {_KEPT_FREE / 1e9:g} GB would be left free, which checkpoints may need")
    partial = target.with_name(f"{_PARTIAL}{target.name}")
    try:
        if download(store, f"{root}/{shard.file}", shard.size, partial) != shard.sha256:
            raise DataError(f"s3://{root}/{shard.file}: SHA-256 is not that of the index; prepare the dataset again")
        partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


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
            os._exit(0)  # whatever its threads wait for
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
