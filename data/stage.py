"""Copy a prepared dataset's shards from a bucket to this machine, before or while it is trained on.

    python -m data.stage s3://BUCKET/PREFIX [--cache-folder cache] [--cache-gb 100] [--follow]

Shards are downloaded under a temporary name, checked against their SHA-256 and renamed; an interrupted command
continues. Without room for all, the shards of the last used resolution have priority, and others are removed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from data.errors import DataError, Parser, run_main
from data.files import download, file_sha256, is_remote, named
from data.open import open_cached
from data.shards import USED, Resolution, Shard, ShardSource

log = logging.getLogger(__name__)

_CONNECTIONS = 8
_LOOK_AGAIN = 2.0  # seconds between two checks of which resolution is in use
_KEPT_FREE = 1e9  # bytes to leave free on the cache's disk, which may also hold the run's checkpoints
_PARTIAL = ".part-"
Wanted = tuple[Path, str, Shard]  # as from `Resolution.files`


class CacheFull(DataError):
    """The cache's disk is full; images whose shards are not in it are read from the bucket."""


def stage_dataset(path: str, cache_folder: str, cache_gb: float | None, *, first: bool, leader: bool) -> None:
    """Copy a dataset's shards from its bucket to this machine; does nothing for a dataset in a folder.

    With `first`, return when all are copied, or raise DataError; a full disk is only logged. Otherwise they are copied
    in the background, and missing ones are read from the bucket. `leader` is the run's first process on this machine;
    `cache_gb` is in GB (1e9 bytes).
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
    """Start this command with `--follow`; it ends with this process, and its messages are logged here."""
    words = ["--cache-folder", cache_folder, "--cache-gb", str(limit / 1e9), "--follow"]
    paths = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "data.stage", url, *words],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths},
    )

    def log_lines() -> None:
        for line in process.stderr or ():
            log.warning("data.stage: %s", line.decode("utf-8", "replace").rstrip())

    threading.Thread(target=log_lines, daemon=True).start()
    return process


def stage(url: str, cache_folder: str, limit: float, progress: bool, follow: bool = False) -> None:
    """Copy the shards that fit into `limit` bytes; of several callers, one works and the others wait.

    Raises DataError if the bucket fails, CacheFull if the disk is full, after trying all shards. With `follow`, only
    prints that, and copies again whenever another resolution is in use, without end.
    """
    folder, splits = open_cached(url, cache_folder)
    done: list[Wanted] | None = None
    while True:
        with named(str(folder)), (folder / ".stage-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            shards = _wanted(splits, limit)
            failures = _copy(folder, shards, limit, progress) if shards != done else []
        done = shards
        if failures and not follow:
            raise failures[0]
        if failures:
            print(failures[0], file=sys.stderr, flush=True)
        if not follow:
            return
        time.sleep(_LOOK_AGAIN)


def _wanted(splits: Iterable[ShardSource], limit: float) -> list[Wanted]:
    """The shards that fit: by last use of their resolution, then train before val, then by size."""

    def last_used(resolution: Resolution) -> float:
        used = resolution.folder / USED
        return used.stat().st_mtime if used.exists() else 0.0

    found: list[Wanted] = []
    total = 0
    resolutions = sorted((one for split in splits for one in split.resolutions.values()), key=last_used, reverse=True)
    for wanted in chain.from_iterable(resolution.files() for resolution in resolutions):
        total += wanted[2].size
        if total > limit:
            break
        found.append(wanted)
    return found


def _copy(folder: Path, shards: list[Wanted], limit: float, progress: bool) -> list[DataError]:
    """Remove shards not wanted, then download missing ones; returns the failures, the bucket's before the disk's."""
    keep = {file for file, _, _ in shards}
    for file in folder.rglob("*.mds"):
        if file.name.startswith(_PARTIAL) or (limit != float("inf") and file not in keep):
            with suppress(OSError):
                file.unlink()
    failures: list[DataError] = []

    def fetch(wanted: Wanted) -> None:
        try:
            _fetch(*wanted)
        except OSError as error:
            rest = "images whose shards are not in the cache are read from the bucket each time"
            failures.append(CacheFull(f"{folder}: {error.strerror or error}; {rest}"))
        except DataError as error:
            failures.append(error)

    total = sum(shard.size for _, _, shard in shards)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="staging", disable=not progress) as bar,
        ThreadPoolExecutor(_CONNECTIONS) as pool,
    ):
        for (_, _, shard), _ in zip(shards, pool.map(fetch, shards), strict=True):
            bar.update(shard.size)
    return sorted(failures, key=lambda failure: isinstance(failure, CacheFull))


def _fetch(target: Path, name: str, shard: Shard) -> None:
    """Download unless present, verify, rename; raises OSError for disk errors, DataError for bucket errors."""
    with suppress(OSError):
        if target.stat().st_size == shard.size:
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < shard.size + _KEPT_FREE:
        raise OSError(errno.ENOSPC, f"less than {_KEPT_FREE / 1e9:g} GB would be left free, which checkpoints may need")
    partial = target.with_name(f"{_PARTIAL}{target.name}")
    try:
        download(name, shard.size, partial)
        if file_sha256(partial) != shard.sha256:
            raise DataError(f"{name}: SHA-256 differs from the index; prepare the dataset again")
        partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_AGAIN)
    os._exit(0)  # even while a download is waiting


def main(arguments: list[str] | None = None) -> None:
    """The command line; raises InputError."""
    parser = Parser("python -m data.stage", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("url", metavar="s3://BUCKET/PREFIX", help="a dataset that data.prepare wrote")
    parser.add_argument("--cache-folder", default="cache", help="the cache (default: %(default)s)")
    parser.add_argument("--cache-gb", type=float, default=float("inf"), help="limit in GB, 1e9 bytes (default: none)")
    parser.add_argument("--follow", action="store_true", help="keep running as long as the parent process lives")
    options = parser.parse_args(arguments)
    if not is_remote(options.url):
        parser.error(f"{options.url}: expected s3://BUCKET/PREFIX")
    if options.follow:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    stage(options.url, options.cache_folder, options.cache_gb * 1e9, not options.follow, options.follow)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
