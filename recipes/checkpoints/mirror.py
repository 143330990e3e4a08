"""The run's logs and curves, copied to the bucket while it lasts, so that a dead machine leaves them behind."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

from data.files import relative_path, shown
from recipes.checkpoints.places import CHECKPOINTS
from recipes.checkpoints.s3 import CancelledError, S3Store
from recipes.checkpoints.store import StoreError

log = logging.getLogger(__name__)

FOLDER = "logs"
"""Below the checkpoints' prefix."""
CONFIG = "config.yaml"
_EVERY = 30.0
_IN_MEMORY = 64 * 2**20
_BETWEEN_COMPLAINTS = 600.0


def log_files(folder: Path, leave_out: Path) -> dict[str, tuple[int, int]]:
    """The files below a run's folder, by relative name, with size and time of change; not checkpoints, not temporary.

    Args:
        folder: The run's.
        leave_out: The folder of its checkpoints.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or leave_out in path.parents or not path.is_file() or path.is_symlink():
            continue
        stat = path.stat()
        found[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


class Mirror:
    """Copies what has changed below the run's folder to the bucket, in the background.

    Args:
        folder: The run's.
        leave_out: The folder of its checkpoints.
        remote: Opens the bucket's folder of logs.
        every: Seconds between two looks.
        may_copy: Whether the bucket's logs are still this process's to write.
    """

    def __init__(
        self,
        folder: Path,
        leave_out: Path,
        remote: Callable[[], S3Store],
        every: float = _EVERY,
        may_copy: Callable[[], bool] = lambda: True,
    ) -> None:
        self._folder = folder
        self._leave_out = leave_out
        self._open = remote
        self._every = every
        self._may_copy = may_copy
        self._store: S3Store | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._there: dict[str, int] = {}
        self._finished = False
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._complained = float("-inf")
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)

    def start(self) -> None:
        """Begin to copy."""
        self._thread.start()

    def close(self, limit: float, *, finished: bool) -> None:
        """Copy a last time, for at most `limit` seconds; a finished run's logs are whole, and replace longer ones."""
        self._finished = finished
        self._stop.set()
        self._thread.join(limit)

    def sync(self) -> None:
        """Copy what has changed now; trouble with the bucket is said now and then, and tried again the next time."""
        with self._busy:
            try:
                if self._store is None:
                    store = self._open()
                    self._there = {entry.name: entry.size for entry in store.tree()}
                    self._store = store
                self._copy(self._store)
            except CancelledError:
                return
            except (StoreError, OSError) as error:
                self._store = None  # the next client reads credentials anew, which may have been renewed
                if time.monotonic() - self._complained >= _BETWEEN_COMPLAINTS:
                    self._complained = time.monotonic()
                    log.warning("the logs cannot be copied to the bucket now: %s", error)

    def _copy(self, store: S3Store) -> None:
        for name, stamp in log_files(self._folder, self._leave_out).items():
            if self._sent.get(name) == stamp:
                continue
            if _grows(name) and stamp[0] < self._there.get(name, 0) and not self._finished:
                continue  # The bucket's reaches further than what this process has repeated so far.
            if not self._may_copy():
                return
            path = self._folder / name
            try:
                # A file that grows meanwhile is copied as it was at one moment.
                store.put(name, path.read_bytes() if stamp[0] <= _IN_MEMORY else path)
            except FileNotFoundError:
                continue  # It was a file of a moment.
            self._sent[name] = stamp

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self.sync()
        self.sync()


def restore_logs(folder: Path, store: S3Store) -> list[str]:
    """Fetch the logs that the disk does not have, or less of, so that curves go on where a dead machine left them.

    What cannot be fetched, and what has a name that no file below `folder` can have, is said in one line, and left.

    Args:
        folder: The run's.
        store: The bucket's folder of logs.

    Returns:
        The names of what was fetched.

    Raises:
        StoreError: The bucket cannot be listed.
    """
    fetched, refused = [], []
    entries = store.tree()
    names = sorted(entry.name for entry in entries)
    for entry in entries:
        inside = f"{entry.name}/"
        if entry.name.endswith("/") or (entry.size == 0 and _any_begins_with(inside, names)):
            continue  # What browsers and mounts of buckets put there for a folder.
        if entry.name == CONFIG:
            continue  # A config is trusted, and the run writes its own.
        try:
            # Whoever can write to the bucket must not reach beyond the run's folder.
            path = folder / relative_path(entry.name)
            if entry.name.startswith((".", f"{CHECKPOINTS}/")) or "/." in entry.name:
                raise ValueError(f"{shown(entry.name)} is not a log")
            here = path.stat().st_size if path.exists() else -1
            if here < 0 or (_grows(entry.name) and here < entry.size):
                store.fetch(entry.name, path)
                fetched.append(entry.name)
        except (ValueError, StoreError, OSError) as error:
            refused.append(str(error))
    if refused:
        log.warning("%d of the run's logs in %s are not fetched: %s", len(refused), store.location, refused[0])
    return fetched


def _any_begins_with(start: str, names: list[str]) -> bool:
    """Whether one of the sorted `names` does."""
    at = bisect_left(names, start)
    return at < len(names) and names[at].startswith(start)


def _grows(name: str) -> bool:
    """Whether a log is only ever appended to, so that the longer one of two reaches further."""
    return name.endswith((".txt", ".jsonl")) or "tfevents" in name
