"""Copy checkpoints and logs to the bucket in the background, however long that takes."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from data.files import relative_path, shown
from recipes.checkpoints.claim import Owner
from recipes.checkpoints.manifest import DamagedError, Manifest, load_manifest, prune, publish, survey
from recipes.checkpoints.store import CHECKPOINTS, LOGS, CancelledError, LocalStore, Places, S3Store, StoreError
from recipes.results import CONFIG

log = logging.getLogger(__name__)

RECORD = ".begun"  # file next to a run's checkpoints that records how and when the run began
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_COMPLAIN_EVERY = 300.0  # seconds between two log lines about a failing bucket
_COPY_LOGS_EVERY = 30.0
_IN_MEMORY = 64 * 2**20


class Uploader:
    """Uploads the newest local checkpoint; one that is still waiting when a newer one is submitted is not uploaded.

    So a slow or unreachable bucket costs no training time and little disk: at most one checkpoint is kept for it.
    `before` is called before each upload, to copy the logs that belong to the checkpoint.
    """

    def __init__(
        self,
        places: Places,
        keep: int,
        damaged: Collection[str],
        owner: Owner,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        assert places.remote is not None
        self._local = LocalStore(places.local)
        self.location = places.remote
        self._owner = owner
        self._before = before
        self._keep = keep
        self._damaged = set(damaged)
        self._changed = threading.Condition()  # guards what follows
        self._wanted: Manifest | None = None
        self._current: str | None = None
        self._store: S3Store | None = None
        self._uploaded: set[str] = set()
        self._newest: str | None = None
        self._stopped = False
        self._silent_until = 0.0
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def start(self) -> None:
        """Start working in the background."""
        self._thread.start()

    def submit(self, manifest: Manifest) -> None:
        """Upload this checkpoint, instead of one that is still waiting."""
        with self._changed:
            if self._wanted is not None and self._wanted.stem != self._current:
                log.warning("checkpoint %s was not uploaded: %s is newer", self._wanted.stem, manifest.stem)
            self._wanted = manifest
            self._changed.notify_all()

    def pending(self) -> set[str]:
        """Stems that the disk must keep until they are uploaded."""
        with self._changed:
            return {stem for stem in (self._current, self._wanted and self._wanted.stem) if stem}

    def wait(self, stem: str, limit: float) -> bool:
        """Wait at most `limit` seconds; returns whether this checkpoint is in the bucket."""
        with self._changed:
            self._changed.wait_for(lambda: stem in self._uploaded or self._owner.superseded, limit)
            return stem in self._uploaded

    def upload_now(self, manifest: Manifest, limit: float) -> bool:
        """Upload this checkpoint, cancelling any other; returns whether it took at most `limit` seconds."""
        deadline = time.monotonic() + limit
        with self._changed:
            self._stop()
            self._wanted = None
            if self._store is not None and self._current != manifest.stem:
                self._store.cancel()
            if manifest.stem in self._uploaded:
                return True
        # Wait only briefly for the current upload: a transfer that hangs would end only at its time limit.
        self._thread.join(2.0 if self._current != manifest.stem else max(limit - 2.0, 0.0))
        threading.Thread(target=self._retry, args=(manifest, deadline), name="last upload", daemon=True).start()
        return self.wait(manifest.stem, max(deadline - time.monotonic(), 0.0))

    def close(self) -> None:
        """Stop uploading; the current upload is cancelled."""
        with self._changed:
            self._stop()
            if self._store is not None:
                self._store.cancel()

    def _stop(self) -> None:
        self._stopped = True
        self._changed.notify_all()

    def _retry(self, manifest: Manifest, deadline: float) -> None:
        while time.monotonic() < deadline and manifest.stem not in self._uploaded and not self._owner.superseded:
            try:
                self._upload(S3Store(self.location), manifest)
            except (StoreError, CancelledError) as error:
                log.error("%s", error)
                time.sleep(0.5)

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while (manifest := self._next()) is not None:
            try:
                store = self._connected()
                if manifest.stem not in self._uploaded:
                    self._before()
                    self._upload(store, manifest)
                pause = _FIRST_PAUSE
                self._prune(store)
            except CancelledError:
                log.info("upload of %s cancelled", manifest.stem)
            except FileNotFoundError as error:
                log.error("checkpoint %s is not uploaded: %s is gone", manifest.stem, error)
                with self._changed:
                    self._wanted = None if self._wanted is manifest else self._wanted
            except StoreError as error:
                if time.monotonic() >= self._silent_until:
                    self._silent_until = time.monotonic() + _COMPLAIN_EVERY
                    log.error(
                        "checkpoint %s is not uploaded yet; training continues, retrying: %s", manifest.stem, error
                    )
                with self._changed:
                    self._store, self._current = None, None
                    self._changed.wait_for(lambda: self._stopped, pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    def _next(self) -> Manifest | None:
        """Wait for the next checkpoint to upload; None: there will be no more."""
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._stopped or self._wanted is not None)
            if self._stopped or self._wanted is None:
                return None
            self._current = self._wanted.stem
            return self._wanted

    def _connected(self) -> S3Store:
        if self._store is None:
            store = S3Store(self.location)
            self._require_owned(store)
            store.abort_leftovers()
            with suppress(FileNotFoundError):
                store.put(RECORD, self._local.read(RECORD))
            with self._changed:
                self._store = store
        return self._store

    def _require_owned(self, store: S3Store) -> None:
        self._owner.renew(store)
        if self._owner.superseded:
            self.close()
            raise CancelledError

    def _upload(self, store: S3Store, manifest: Manifest) -> None:
        self._require_owned(store)
        if manifest.stem in self._damaged or not _has(store, manifest):
            began, name = time.monotonic(), manifest.file.name
            publish(store, manifest, lambda: store.put(name, self._local.path(name)))
            took, megabytes = time.monotonic() - began, manifest.file.size / 1e6
            log.info("uploaded %s to %s: %.1f MB in %.1f s", manifest.stem, store.location, megabytes, took)
        self._silent_until = 0.0
        with self._changed:
            self._uploaded.add(manifest.stem)
            self._damaged.discard(manifest.stem)
            self._newest = manifest.stem
            if self._wanted is not None and self._wanted.stem in self._uploaded:
                self._wanted = None
            self._changed.notify_all()

    def _prune(self, store: S3Store) -> None:
        try:
            removed = prune(store, self._keep, protect=[self._newest] if self._newest else (), ignore=self._damaged)
            self._uploaded.difference_update(removed)
        except StoreError as error:
            log.warning("old checkpoints could not be removed: %s", error)


def _has(store: S3Store, manifest: Manifest) -> bool:
    """Whether the bucket has exactly this checkpoint, not another run's at the same position."""
    with suppress(DamagedError):
        return manifest.stem in survey(store).complete and load_manifest(store, manifest.stem).files == manifest.files
    return False


class LogMirror:
    """Copies changed files below the run's folder, except checkpoints, to the bucket, in case this machine dies.

    It copies at a fixed interval, as long as `may_copy` allows this process to write the bucket's logs.
    """

    def __init__(
        self, places: Places, every: float = _COPY_LOGS_EVERY, may_copy: Callable[[], bool] = lambda: True
    ) -> None:
        self._places = places
        self._every = every
        self._may_copy = may_copy
        self._store: S3Store | None = None
        self._copied: dict[str, tuple[int, int]] = {}
        self._sizes: dict[str, int] = {}
        self._finished = False
        self._busy = threading.Lock()
        self._stopped = threading.Event()
        self._silent_until = 0.0
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)

    def start(self) -> None:
        """Start copying in the background."""
        self._thread.start()

    def close(self, limit: float, *, finished: bool) -> None:
        """Copy a last time, for at most `limit` seconds; a finished run's logs are whole, and replace longer ones."""
        self._finished = finished
        self._stopped.set()
        self._thread.join(limit)

    def copy(self) -> None:
        """Copy what has changed; a failing bucket is logged from time to time, and retried next time."""
        with self._busy:
            try:
                if self._store is None:
                    store = S3Store(f"{self._places.remote}/{LOGS}")
                    self._sizes = {entry.name: entry.size for entry in store.tree()}
                    self._store = store
                self._copy(self._store)
            except (StoreError, OSError) as error:
                self._store = None  # the next client reads credentials again, which may have been renewed
                if time.monotonic() >= self._silent_until:
                    self._silent_until = time.monotonic() + _COMPLAIN_EVERY
                    log.warning("the logs cannot be copied to the bucket now: %s", error)

    def _copy(self, store: S3Store) -> None:
        folder = self._places.run_folder
        for path in sorted(folder.rglob("*")):
            checkpoint = self._places.local in path.parents
            if path.name.startswith(".") or checkpoint or not path.is_file() or path.is_symlink():
                continue
            name, status = path.relative_to(folder).as_posix(), path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if self._copied.get(name) == stamp:
                continue
            if _grows(name) and status.st_size < self._sizes.get(name, 0) and not self._finished:
                continue  # The bucket's copy reaches further than what this process has repeated so far.
            if not self._may_copy():
                return
            with suppress(FileNotFoundError):  # a temporary file, gone again
                # A file that grows during the copy is copied as it was at one moment.
                store.put(name, path.read_bytes() if status.st_size <= _IN_MEMORY else path)
                self._copied[name] = stamp

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            self.copy()
        self.copy()


def restore_logs(folder: Path, store: S3Store) -> list[str]:
    """Download logs that are missing or shorter on disk, so that curves continue where a dead machine stopped.

    Logs that cannot be downloaded, or whose names are not valid below `folder`, are skipped with one log line. Returns
    the names of the downloaded logs.
    """
    fetched, refused = [], []
    entries = store.tree()
    names = sorted(entry.name for entry in entries)
    for name, size in entries:
        after = bisect_left(names, f"{name}/")
        is_folder = size == 0 and after < len(names) and names[after].startswith(f"{name}/")
        if name.endswith("/") or is_folder:
            continue  # a folder marker that browsers and bucket mounts create
        if name == CONFIG:
            continue  # A config would be trusted, and the run writes its own.
        try:
            # Whoever can write to the bucket must not be able to write outside the run's folder.
            path = folder / relative_path(name)
            if name.startswith((".", f"{CHECKPOINTS}/")) or "/." in name:
                raise ValueError(f"{shown(name)} is not a log")
            here = path.stat().st_size if path.exists() else -1
            if here < 0 or (_grows(name) and here < size):
                store.fetch(name, path)
                fetched.append(name)
        except (ValueError, StoreError, OSError) as error:
            refused.append(str(error))
    if refused:
        log.warning("%d of the run's logs in %s were not downloaded: %s", len(refused), store.location, refused[0])
    return fetched


def _grows(name: str) -> bool:
    """Whether a log is append-only, so that the longer of two copies reaches further."""
    return name.endswith((".txt", ".jsonl")) or "tfevents" in name
