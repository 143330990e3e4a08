"""Copy checkpoints and logs to the bucket in the background, however long that takes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path, PurePosixPath

from data.errors import StoreError
from data.files import relative_path, shown
from recipes.checkpoints.claim import Owner
from recipes.checkpoints.interrupt import Interrupt
from recipes.checkpoints.manifest import Manifest, load_manifest, prune, publish, survey
from recipes.checkpoints.store import CHECKPOINTS, LOGS, RECORD, DamagedError, LocalStore, Places, S3Store
from recipes.results import CONFIG

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_COMPLAIN_EVERY = 300.0  # seconds between two log lines about a failing bucket
_COPY_LOGS_EVERY = 30.0
_POLL = 1.0  # seconds between two looks at the deadline, which a signal brings forward
_RESERVED = 2.0  # seconds of the last upload's time that are kept for a second attempt
_IN_MEMORY = 64 * 2**20


class Uploader:
    """Uploads the newest local checkpoint; one that is still waiting when a newer one is submitted is not uploaded.

    So a slow or unreachable bucket costs no training time and little disk: at most one checkpoint is kept for it.
    `logs` are copied before each upload, so that they reach as far as the checkpoint, and from time to time. It works
    in the background from the start.
    """

    def __init__(
        self, places: Places, keep: int, damaged: Iterable[str], owner: Owner, logs: LogMirror | None = None
    ) -> None:
        self._places, self._keep, self._damaged, self._owner = places, keep, set(damaged), owner
        self._logs = logs
        self.location = str(places.remote)
        self._changed = threading.Condition()  # guards what follows
        self._wanted: Manifest | None = None
        self._current: str | None = None
        self._store: S3Store | None = None
        self._uploaded: set[str] = set()
        self._stopped = False
        self._silent_until = 0.0
        threading.Thread(target=self._run, name="uploads", daemon=True).start()

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

    def wait(self, stem: str, limit: float, interrupt: Interrupt | None = None) -> bool:
        """Wait at most `limit` seconds, and not beyond an interruption; returns whether the checkpoint is uploaded."""
        ends = time.monotonic() + limit
        with self._changed:
            while stem not in self._uploaded and not self._owner.superseded:
                left = (ends if interrupt is None else min(ends, interrupt.deadline)) - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, _POLL))
            return stem in self._uploaded

    def upload_now(self, manifest: Manifest, limit: float) -> bool:
        """Upload the submitted checkpoint, and then no other; returns whether it took at most `limit` seconds."""
        deadline = time.monotonic() + limit
        is_free = self._current in (None, manifest.stem)
        if is_free and self.wait(manifest.stem, limit - _RESERVED):
            return True
        # The transfer of an older checkpoint, or one that hangs, would end too late: use another connection.
        self.close()
        another = Uploader(self._places, self._keep, self._damaged, self._owner)
        another.submit(manifest)
        uploaded = another.wait(manifest.stem, deadline - time.monotonic())
        another.close()
        return uploaded

    def close(self) -> None:
        """Stop uploading; the current upload is cancelled."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            if self._store is not None:
                self._store.cancel()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._stopped or self._wanted is not None, _COPY_LOGS_EVERY)
                if self._stopped:
                    return
                manifest = self._wanted
                self._current = None if manifest is None else manifest.stem
            if manifest is None:
                self._copy_logs()
                continue
            try:
                self._upload(manifest)
                pause = _FIRST_PAUSE
            except CancelledError:
                log.info("upload of %s cancelled", manifest.stem)
                return
            except (StoreError, FileNotFoundError) as error:
                if time.monotonic() >= self._silent_until:
                    self._silent_until = time.monotonic() + _COMPLAIN_EVERY
                    log.error(
                        "checkpoint %s is not uploaded yet; training continues, retrying: %s", manifest.stem, error
                    )
                with self._changed:
                    self._store, self._current = None, None  # the next client reads credentials again
                    if not self._stopped:
                        self._changed.wait(pause)  # or until something changes
                pause = min(pause * 2, _LONGEST_PAUSE)

    def _upload(self, manifest: Manifest) -> None:
        local, store = LocalStore(self._places.local), self._store
        if store is None:
            store = S3Store(self.location)
            self._require_owned(store)
            store.abort_leftovers()
            with suppress(FileNotFoundError):
                store.put(RECORD, local.read(RECORD))
            with self._changed:
                self._store = store
        self._copy_logs()
        self._require_owned(store)
        if manifest.stem in self._damaged or not _has(store, manifest):
            began, name = time.monotonic(), manifest.file.name
            publish(store, manifest, lambda: store.put(name, local.path(name)))
            took, megabytes = time.monotonic() - began, manifest.file.size / 1e6
            log.info("uploaded %s to %s: %.1f MB in %.1f s", manifest.stem, store.location, megabytes, took)
        self._silent_until = 0.0
        with self._changed:
            self._uploaded.add(manifest.stem)
            self._damaged.discard(manifest.stem)
            self._wanted = None if self._wanted is manifest else self._wanted
            self._changed.notify_all()
        try:
            self._uploaded.difference_update(prune(store, self._keep, protect=[manifest.stem], ignore=self._damaged))
        except StoreError as error:
            log.warning("old checkpoints could not be removed: %s", error)

    def _copy_logs(self) -> None:
        if self._logs is not None:
            self._logs.copy()

    def _require_owned(self, store: S3Store) -> None:
        self._owner.renew(store)
        if self._owner.superseded:
            self.close()
            raise CancelledError


def _has(store: S3Store, manifest: Manifest) -> bool:
    """Whether the bucket has exactly this checkpoint, not another run's at the same position."""
    with suppress(DamagedError):
        return manifest.stem in survey(store).complete and load_manifest(store, manifest.stem).files == manifest.files
    return False


class LogMirror:
    """Copies changed files below the run's folder, except checkpoints, to the bucket, in case this machine dies.

    Once another owner has the bucket, nothing is copied.
    """

    def __init__(self, places: Places, owner: Owner) -> None:
        self._places, self._owner = places, owner
        self._store: S3Store | None = None
        self._copied: dict[str, tuple[int, int]] = {}
        self._sizes: dict[str, int] = {}
        self._busy = threading.Lock()
        self._silent_until = 0.0

    def copy_last(self, limit: float, *, finished: bool) -> None:
        """Copy for at most `limit` seconds; a finished run's logs are whole, and replace longer ones."""
        thread = threading.Thread(target=self.copy, args=(finished,), name="logs", daemon=True)
        thread.start()
        thread.join(limit)

    def copy(self, finished: bool = False) -> None:
        """Copy what has changed; a failing bucket is logged from time to time, and retried next time."""
        with self._busy:
            try:
                if self._store is None:
                    store = S3Store(f"{self._places.remote}/{LOGS}")
                    self._sizes = store.tree()
                    self._store = store
                self._copy(self._store, finished)
            except (StoreError, OSError) as error:
                self._store = None  # the next client reads credentials again, which may have been renewed
                if time.monotonic() >= self._silent_until:
                    self._silent_until = time.monotonic() + _COMPLAIN_EVERY
                    log.warning("the logs cannot be copied to the bucket now: %s", error)

    def _copy(self, store: S3Store, finished: bool) -> None:
        folder = self._places.run_folder
        for path in sorted(folder.rglob("*")):
            checkpoint = self._places.local in path.parents
            if path.name.startswith(".") or checkpoint or not path.is_file() or path.is_symlink():
                continue
            name, status = path.relative_to(folder).as_posix(), path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if self._copied.get(name) == stamp:
                continue
            if _grows(name) and status.st_size < self._sizes.get(name, 0) and not finished:
                continue  # The bucket's copy reaches further than what this process has repeated so far.
            if self._owner.superseded:
                return
            with suppress(FileNotFoundError):  # a temporary file, gone again
                # A file that grows during the copy is copied as it was at one moment.
                store.put(name, path.read_bytes() if status.st_size <= _IN_MEMORY else path)
                self._copied[name] = stamp


def restore_logs(folder: Path, store: S3Store) -> list[str]:
    """Download logs that are missing or shorter on disk, so that curves continue where a dead machine stopped.

    Logs that cannot be downloaded, or whose names are not valid below `folder`, are skipped with one log line. Returns
    the names of the downloaded logs.
    """
    fetched, refused, sizes = [], [], store.tree()
    folders = {str(parent) for name in sizes for parent in PurePosixPath(name).parents}
    for name, size in sizes.items():
        marks_folder = name.endswith("/") or (size == 0 and name in folders)  # as browsers and bucket mounts do
        if marks_folder or name == CONFIG:  # a config would be trusted, and the run writes its own
            continue
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
