"""Writing checkpoints to the local disk beside the training."""

from __future__ import annotations

import datetime
import hashlib
import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from recipes.checkpoints.find import Identity
from recipes.checkpoints.interrupt import EXIT_NOT_UPLOADED
from recipes.checkpoints.manifest import SUFFIX, DamagedError, FileEntry, Manifest, Position, stem_of, verify
from recipes.checkpoints.publish import prune, publish
from recipes.checkpoints.store import LocalStore, StoreError
from recipes.checkpoints.upload import Uploader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A run's state at one position, serialised."""

    payload: Sequence[memoryview]
    """The file's bytes, in pieces; empty on every process but the first."""
    position: Position
    world_size: int
    top1: float | None
    finished: bool

    @property
    def stem(self) -> str:
        """Name of the checkpoint that it becomes."""
        return stem_of(self.position.epoch, self.position.batch)

    def manifest(self, identity: Identity) -> Manifest:
        """What is stored beside it."""
        digest = hashlib.sha256()
        for piece in self.payload:
            digest.update(piece)
        size = sum(len(piece) for piece in self.payload)
        return Manifest(
            run_name=identity.run_name,
            config_digest=identity.config_digest,
            config=dict(identity.config),
            **self.position._asdict(),
            world_size=self.world_size,
            train_images=identity.train_images,
            classes=identity.classes,
            top1=self.top1,
            finished=self.finished,
            created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            files=(FileEntry(name=f"{self.stem}{SUFFIX}", size=size, sha256=digest.hexdigest()),),
        )


class Writer:
    """Writes snapshots to the local folder, one at a time, beside the training; one process of the run has it.

    A snapshot that cannot be written is said and dropped; training goes on.

    Args:
        store: The run's folder.
        identity: Whose checkpoints these are.
        keep: How many of the newest stay.
        verified: The checkpoint that the run goes on from, if any.
        damaged: Stems that were passed over when looking for it.
        uploader: Brings complete checkpoints to the bucket, if there is one.
    """

    def __init__(
        self,
        store: LocalStore,
        identity: Identity,
        keep: int,
        *,
        verified: Manifest | None,
        damaged: Collection[str],
        uploader: Uploader | None,
    ) -> None:
        self._store = store
        self._identity = identity
        self._keep = keep
        self._damaged = set(damaged)
        self._uploader = uploader
        self._thread: threading.Thread | None = None
        self._complete: dict[str, Manifest] = {}
        self._verified: str | None = None
        store.sweep()
        if uploader is not None:
            uploader.start()
        if verified is not None:
            self._took(verified)

    def put(self, snapshot: Snapshot, patience: float) -> None:
        """Begin to write a snapshot, once the one before it is written.

        Args:
            snapshot: What to write.
            patience: Seconds to wait for the one before; after that, this one is dropped.
        """
        if not self.wait(patience):
            log.error("checkpoint %s dropped: the disk is still busy with the one before", snapshot.stem)
            return
        if snapshot.stem in self._complete:
            return  # This very position is on disk and verified; a run's state is a function of its position.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoints", daemon=True)
        self._thread.start()

    def wait(self, patience: float) -> bool:
        """Whether nothing is left to write, after at most `patience` seconds."""
        if self._thread is not None:
            self._thread.join(patience)
            return not self._thread.is_alive()
        return True

    def close(self, patience: float) -> None:
        """Let a write that has begun end, for at most `patience` seconds, and upload no more."""
        self.wait(patience)
        if self._uploader is not None:
            self._uploader.close()

    def _write(self, snapshot: Snapshot) -> None:
        manifest = snapshot.manifest(self._identity)
        try:
            self._publish(manifest, snapshot.payload)
        except (StoreError, DamagedError) as error:
            log.error("checkpoint %s could not be saved, trying again at the next interval: %s", manifest.stem, error)
            return
        log.info("saved checkpoint %s", manifest.describe())
        self._took(manifest)
        self.prune(self._keep)

    def _publish(self, manifest: Manifest, payload: Sequence[memoryview]) -> None:
        """Write and read back; if that fails, once more after making room, for the newest state is worth the most."""
        try:
            publish(self._store, manifest, payload)
        except StoreError as error:
            if not self.prune(keep=1):
                raise
            log.warning("%s; trying again after removing older checkpoints", error)
            publish(self._store, manifest, payload)
        verify(self._store.path(manifest.files[0].name), manifest.files[0])

    def _took(self, manifest: Manifest) -> None:
        self._damaged.discard(manifest.stem)
        self._complete[manifest.stem] = manifest
        self._verified = manifest.stem
        if self._uploader is not None:
            self._uploader.offer(manifest)

    def deliver(self, stem: str, seconds: float) -> int:
        """Exit status of a run that ends with this checkpoint, which may take `seconds` to the bucket if there is one.

        Returns:
            1 if it is not on the disk, `EXIT_NOT_UPLOADED` if it is not in the bucket, else 0.
        """
        if stem not in self._complete:
            return 1
        return 0 if self._uploader is None or self._uploader.wait(stem, seconds) else EXIT_NOT_UPLOADED

    def leave(self, stem: str, seconds: float) -> tuple[bool, str]:
        """Bring this checkpoint, the last one, to where it belongs in at most `seconds`.

        Returns:
            Whether it is saved at all, and where, in words.
        """
        manifest = self._complete.get(stem)
        if manifest is None:
            return False, f"{stem} could NOT be saved"
        if self._uploader is None:
            return True, f"{stem} saved in {self._store.location}"
        if self._uploader.hurry(manifest, seconds):
            return True, f"{stem} saved in {self._uploader.location}"
        return True, f"{stem} saved in {self._store.location}, but NOT uploaded to {self._uploader.location}"

    def prune(self, keep: int) -> list[str]:
        """Remove all but the newest `keep` checkpoints and those that are needed; what cannot be removed stays.

        Returns:
            The stems that were removed.
        """
        protect = {*(self._uploader.pinned() if self._uploader else ()), *([self._verified] if self._verified else [])}
        try:
            removed = prune(self._store, keep, protect=protect, ignore=self._damaged)
        except StoreError as error:
            log.warning("old checkpoints could not be removed: %s", error)
            return []
        for stem in removed:
            self._complete.pop(stem, None)
        return removed
