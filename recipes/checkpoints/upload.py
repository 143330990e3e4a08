"""Bringing checkpoints to the bucket beside the training, however long that takes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from recipes.checkpoints.begin import RECORD
from recipes.checkpoints.find import load_manifest, survey
from recipes.checkpoints.manifest import DamagedError, Manifest
from recipes.checkpoints.owner import Owner
from recipes.checkpoints.publish import prune, publish
from recipes.checkpoints.s3 import CancelledError, S3Store
from recipes.checkpoints.store import LocalStore, StoreError

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_BETWEEN_COMPLAINTS = 300.0


class Uploader:
    """Uploads the newest local checkpoint; one that a newer overtakes while it waits is left out.

    So a slow or absent bucket costs neither training time nor disk: at most one checkpoint is kept on disk for it.

    Args:
        local: Where the checkpoints are.
        remote: Opens the bucket.
        location: Where that is, for people.
        keep: How many of the newest stay in the bucket.
        damaged: Stems that are known to be damaged.
        owner: Who may write there.
        before: Called before each upload, to copy the logs that belong to the checkpoint.
    """

    def __init__(
        self,
        local: LocalStore,
        remote: Callable[[], S3Store],
        location: str,
        keep: int,
        *,
        damaged: Collection[str],
        owner: Owner,
        before: Callable[[], None],
    ) -> None:
        self._local = local
        self._open = remote
        self.location = location
        self._owner = owner
        self._before = before
        self._keep = keep
        self._damaged = set(damaged)
        self._changed = threading.Condition()
        self._wanted: Manifest | None = None
        self._current: str | None = None
        self._store: S3Store | None = None
        self._uploaded: set[str] = set()
        self._newest_verified: str | None = None
        self._stopped = False
        self._complained = float("-inf")
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def start(self) -> None:
        """Begin to work in the background."""
        self._thread.start()

    def offer(self, manifest: Manifest) -> None:
        """Have this checkpoint uploaded, instead of one that still waits."""
        with self._changed:
            if self._wanted is not None and self._wanted.stem != self._current:
                log.warning("checkpoint %s is not uploaded: %s overtook it", self._wanted.stem, manifest.stem)
            self._wanted = manifest
            self._changed.notify_all()

    def pinned(self) -> Collection[str]:
        """Stems that the disk must keep until they are uploaded."""
        with self._changed:
            return {stem for stem in (self._current, self._wanted and self._wanted.stem) if stem}

    def wait(self, stem: str, seconds: float) -> bool:
        """Whether this checkpoint is in the bucket, after at most `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: stem in self._uploaded or self._owner.superseded, seconds)
            return stem in self._uploaded

    def hurry(self, manifest: Manifest, seconds: float) -> bool:
        """Bring this checkpoint to the bucket now, giving up what else is under way; whether that was done in time."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._stopped = True
            self._wanted = None
            if self._store is not None and self._current != manifest.stem:
                self._store.cancel()
            self._changed.notify_all()
            if manifest.stem in self._uploaded:
                return True
        # Past a moment of grace: a transfer that hangs would end only at its time limit.
        self._thread.join(2.0 if self._current != manifest.stem else max(seconds - 2.0, 0.0))
        threading.Thread(target=self._insist, args=(manifest, deadline), name="last upload", daemon=True).start()
        return self.wait(manifest.stem, max(deadline - time.monotonic(), 0.0))

    def close(self) -> None:
        """Upload no more; what is under way is given up."""
        with self._changed:
            self._stopped = True
            if self._store is not None:
                self._store.cancel()
            self._changed.notify_all()

    def _insist(self, manifest: Manifest, deadline: float) -> None:
        while time.monotonic() < deadline and manifest.stem not in self._uploaded and not self._owner.superseded:
            try:
                self._upload(self._open(), manifest)
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
                log.info("upload of %s given up", manifest.stem)
            except FileNotFoundError as error:
                log.error("checkpoint %s is not uploaded: %s is gone", manifest.stem, error)
                self._drop(manifest)
            except StoreError as error:
                self._complain(manifest, error)
                with self._changed:
                    self._store, self._current = None, None
                    self._changed.wait_for(lambda: self._stopped, pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    def _next(self) -> Manifest | None:
        """What to upload; waits for it. None: there will be nothing more."""
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._stopped or self._wanted is not None)
            if self._stopped or self._wanted is None:
                return None
            self._current = self._wanted.stem
            return self._wanted

    def _connected(self) -> S3Store:
        """The open bucket."""
        if self._store is None:
            store = self._open()
            self._require_owned(store)
            store.abort_leftovers()
            with suppress(FileNotFoundError):
                store.put(RECORD, self._local.read(RECORD))
            with self._changed:
                self._store = store
        return self._store

    def _upload(self, store: S3Store, manifest: Manifest) -> None:
        self._require_owned(store)
        if manifest.stem in self._damaged or not self._is_there(store, manifest):
            began = time.monotonic()
            publish(store, manifest, self._local.path(manifest.files[0].name))
            seconds, megabytes = time.monotonic() - began, manifest.files[0].size / 1e6
            log.info("uploaded %s to %s: %.1f MB in %.1f s", manifest.stem, store.location, megabytes, seconds)
        self._complained = float("-inf")
        with self._changed:
            self._uploaded.add(manifest.stem)
            self._damaged.discard(manifest.stem)
            self._newest_verified = manifest.stem
            self._changed.notify_all()
        self._drop_uploaded()

    def _require_owned(self, store: S3Store) -> None:
        self._owner.renew(store)
        if self._owner.superseded:
            self.close()
            raise CancelledError

    @staticmethod
    def _is_there(store: S3Store, manifest: Manifest) -> bool:
        """Whether the bucket has this very checkpoint, not one that another run left at the same position."""
        with suppress(DamagedError):
            return (
                manifest.stem in survey(store).complete and load_manifest(store, manifest.stem).files == manifest.files
            )
        return False

    def _drop_uploaded(self) -> None:
        with self._changed:
            if self._wanted is not None and self._wanted.stem in self._uploaded:
                self._wanted = None

    def _drop(self, manifest: Manifest) -> None:
        with self._changed:
            if self._wanted is manifest:
                self._wanted = None

    def _prune(self, store: S3Store) -> None:
        protect = [self._newest_verified] if self._newest_verified else []
        try:
            for stem in prune(store, self._keep, protect=protect, ignore=self._damaged):
                self._uploaded.discard(stem)
        except StoreError as error:
            log.warning("old checkpoints could not be removed: %s", error)

    def _complain(self, manifest: Manifest, error: StoreError) -> None:
        """Say it loudly once, and again every few minutes while it lasts."""
        if time.monotonic() - self._complained >= _BETWEEN_COMPLAINTS:
            self._complained = time.monotonic()
            log.error("checkpoint %s is not uploaded yet, training goes on, trying again: %s", manifest.stem, error)
