"""Where a run starts or resumes: process 0 decides, all others follow, and each node gets the file.

`resume=X` and `autoresume=false` set how a run begins. Once it has begun that way, the same command resumes from the
run's own newest state. Checkpoints of this run name and recipe from a run that began otherwise are replaced, on disk
and in the bucket.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from composer import Algorithm
from composer.utils import dist

from recipes.checkpoints.claim import on_first
from recipes.checkpoints.find import Identity, find_named, find_newest, read_checkpoint
from recipes.checkpoints.format import read_state, read_verified
from recipes.checkpoints.manifest import DamagedError, Manifest, load_manifest, position_of, publish, remove, survey
from recipes.checkpoints.store import LOGS, LocalStore, Places, S3Store, Store, StoreError, retry
from recipes.checkpoints.upload import RECORD, restore_logs
from recipes.config import RunConfig, seconds
from recipes.errors import InputError

log = logging.getLogger(__name__)

_PROBE = "write-test"
_CHUNK = 32 * 2**20  # bytes of a message between nodes: a checkpoint need not fit into a device's memory twice


@dataclass
class Resume:
    """Where a run resumes."""

    manifest: Manifest | None = None
    """The manifest of the verified checkpoint, which is on each node's disk; None: start from scratch."""
    resumed_from: str | None = None  # where it was found, for display
    damaged: tuple[str, ...] = ()  # stems that were skipped
    content: dict[str, Any] | None = field(default=None, repr=False)
    """The checkpoint's content, from `read_state`; None once restored, because it is large."""

    @property
    def finished(self) -> bool:
        """Whether the run has nothing left to train."""
        return self.manifest is not None and self.manifest.finished


def find_resume(config: RunConfig, places: Places, identity: Identity, algorithms: Sequence[Algorithm]) -> Resume:
    """Decide where the run starts or resumes; every process calls this and gets the same answer.

    Raises:
        InputError: On every process: a checkpoint of another recipe; none that can be used; a store cannot be reached.
    """
    decision, content = _Decision(config, places, identity, algorithms), None

    def decide() -> Resume:
        nonlocal content
        found = decision.everywhere()
        content = found.content  # Each process reads its own disk, which avoids sending 300 MB.
        return replace(found, content=None)

    answer = on_first(decide)
    if answer.manifest is not None:
        if dist.get_world_size() > dist.get_local_world_size():
            _copy_to_every_node(answer.manifest, decision.local)
        path = decision.local.path(answer.manifest.file.name)
        try:
            content = content or read_state(path, answer.manifest, algorithms)
        except DamagedError as error:
            raise InputError(f"{path}: {error}") from None
    return replace(answer, content=content)


@dataclass(frozen=True, order=True)
class _Beginning:
    """A recorded beginning of a run."""

    at: str  # UTC, ISO 8601
    how: str  # `resume=X`, `autoresume=false`, or empty for a command that resumes from any checkpoint

    @classmethod
    def of(cls, store: Store) -> _Beginning | None:
        """The record of a store with checkpoints; None if it has no record or no checkpoints."""
        listing = survey(store)
        if listing.complete or listing.incomplete or listing.torn:
            with suppress(FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
                content = json.loads(store.read(RECORD))
                return cls(ascii(content["at"])[1:-1][:40], str(content["how"]))
        return None


@dataclass(frozen=True)
class _Decision:
    """Process 0's decision: which checkpoints of this run name count, and which of them is the newest good one."""

    config: RunConfig
    places: Places
    identity: Identity
    algorithms: Sequence[Algorithm]

    @property
    def local(self) -> LocalStore:
        """The run's folder."""
        return LocalStore(self.places.local)

    @property
    def how(self) -> str:
        """The part of the command that decides where the run begins."""
        if self.config.resume is not None:
            return f"resume={self.config.resume}"
        return "" if self.config.autoresume else "autoresume=false"

    def everywhere(self) -> Resume:
        """Search the disk and the bucket; only the disk if the bucket cannot be reached and nothing is lost by that."""
        if self.places.remote is None:
            return self._among(None)
        try:
            return retry(self._in_both, seconds(self.config.checkpoints.patience))
        except StoreError as error:
            if error.mistake:
                raise
            log.error("the bucket cannot be reached: %s", error)
            reason = str(error)
        if not self.config.checkpoints.restart and (
            self._starts_again([self.local]) or not survey(self.local).complete
        ):
            raise InputError(
                reason,
                f"{self.places.local}: no checkpoint here, and the bucket, which may hold some, cannot be reached; "
                "try again later, or start from scratch with checkpoints.restart=true",
            )
        log.error("resuming from the local disk; uploads will be retried while training runs")
        return self._among(None)

    def _in_both(self) -> Resume:
        assert self.places.remote is not None
        store = S3Store(self.places.remote)
        try:  # Find out now, not at the first save, if uploads are not allowed; a full store may get room later.
            store.put(_PROBE, b"may this run write here?")
            store.delete([_PROBE])
        except StoreError as error:
            if error.mistake:
                raise
            log.error("the bucket does not accept uploads at the moment: %s", error)
        resume = self._among(store)
        if resume.manifest is not None and (fetched := restore_logs(self.places.run_folder, store.below(LOGS))):
            log.info("downloaded the run's logs: %s", ", ".join(fetched))
        return resume

    def _among(self, remote: S3Store | None) -> Resume:
        stores: list[Store] = [self.local] if remote is None else [self.local, remote]
        again, chosen = self._starts_again(stores), None
        if again and (path := self.config.resume) is not None:
            try:
                chosen = retry(lambda: find_named(path, "resume"), seconds(self.config.checkpoints.patience))
            except (DamagedError, StoreError) as error:
                raise InputError(f"resume: {path}: {error}") from None
            self.identity.require_same_recipe(chosen[1], chosen[0].location)
        try:
            self._begin(stores, again, chosen)
        except DamagedError as error:
            raise InputError(f"resume: {self.config.resume}: {error}") from None
        search = find_newest(
            self.local, remote, self.identity, restart=self.config.checkpoints.restart, algorithms=self.algorithms
        )
        if (found := search.found) is None:
            return Resume(damaged=tuple(search.skipped))
        log.info("resuming from %s at %s", found.manifest.describe(), found.location)
        return Resume(found.manifest, found.location, tuple(search.skipped), found.content)

    def _starts_again(self, stores: Sequence[Store]) -> bool:
        """Whether this command begins a new run, instead of resuming one that it began."""
        latest = max(filter(None, map(_Beginning.of, stores)), default=None)
        if not self.how or latest is None or latest.how != self.how:
            return bool(self.how)
        return bool(self.config.algorithms.not_resumable) and not any(map(_is_finished, stores))

    def _begin(self, stores: Sequence[Store], again: bool, named: tuple[Store, Manifest] | None) -> None:
        """Keep in the run's stores only the checkpoints of one beginning, and record which.

        InputError: checkpoints of another recipe or run would be replaced, or two runs have one name.
        """
        found = [_Beginning.of(store) for store in stores]
        known = sorted(one for one in found if one is not None)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        record = _Beginning(now, self.how) if again or not known else known[-1]
        older = [store for store, one in zip(stores, found, strict=True) if again or one not in (None, record)]
        if older and not (self.how or self.config.checkpoints.restart):
            raise InputError(
                f"{' and '.join(store.location for store in stores)}: hold checkpoints of two runs named "
                f"{self.identity.run_name}, started {' and '.join(one.at for one in known)}; remove one of them, "
                "choose another run_name, or let the later one replace the earlier with checkpoints.restart=true"
            )
        # Going back to one of the run's own checkpoints keeps it and those before it.
        back = named is not None and named[0].location in [store.location for store in stores]
        last = named[1].order if named is not None and back else (-1, -1)
        replaced = [
            (store, stem)
            for store in older
            for listing in [survey(store)]
            for stem in (*listing.complete, *listing.incomplete, *listing.torn)
            if position_of(stem) > last
        ]
        for store, stem in replaced:
            with suppress(DamagedError):
                self.identity.require_same(load_manifest(store, stem), store.location)
        if named is not None:
            self._take_over(*named)
        for store, stem in replaced:
            if named is None or store is not stores[0] or stem != named[1].stem:
                log.warning("%s: removing checkpoint %s of an older run", store.location, stem)
                remove(store, [stem])
        for store in older:
            if isinstance(store, S3Store) and not back:
                logs = store.below(LOGS)
                logs.delete([entry.name for entry in logs.tree()])
        for store, one in zip(stores, found, strict=True):
            if one != record:
                _write_record(store, record)

    def _take_over(self, store: Store, manifest: Manifest) -> None:
        """Make a checkpoint the first one of the run."""
        run_name = self.identity.run_name
        read_checkpoint(store, manifest, self.local, self.algorithms)
        if manifest.run_name != run_name:
            self.local.put(f"{manifest.stem}.json", manifest.model_copy(update={"run_name": run_name}).to_json())
        log.info("%s starts from %s/%s", run_name, store.location, manifest.stem)


def _is_finished(store: Store) -> bool:
    with suppress(DamagedError):
        return any(load_manifest(store, stem).finished for stem in survey(store).complete[-1:])
    return False


def _write_record(store: Store, record: _Beginning) -> None:
    try:
        store.put(RECORD, json.dumps(asdict(record)).encode())
    except StoreError as error:
        if error.mistake:
            raise
        log.warning("%s", error)  # a full disk or bucket, which may get room; an upload writes the record too


def _copy_to_every_node(manifest: Manifest, local: LocalStore) -> None:
    """Copy process 0's checkpoint to each node's disk; every process calls this, and all raise InputError if one fails.

    It comes from process 0 and not from the bucket, where it may not have arrived: a node often dies during an upload,
    and the newest checkpoint is then only on the disk of process 0.
    """
    name, entry = manifest.file.name, manifest.file
    wanted, complaint, data = False, None, bytearray()
    if dist.get_local_rank() == 0 and dist.get_global_rank() != 0:
        try:
            read_verified(local.path(name), entry)
        except DamagedError:
            wanted = True
    if not any(dist.all_gather_object(wanted)):
        return
    # All take part to the end, whatever happens to one of them, so that none waits for another forever.
    for begin in range(0, entry.size, _CHUNK):
        chunk = [b""]
        if dist.get_global_rank() == 0:
            with suppress(OSError), local.path(name).open("rb") as file:
                file.seek(begin)
                chunk = [file.read(_CHUNK)]
        dist.broadcast_object_list(chunk, src=0)
        data += chunk[0] if wanted else b""
    if wanted:
        try:
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise DamagedError("could not be read on the first node")
            publish(local, manifest, lambda: local.put(name, [memoryview(data)]))
        except (DamagedError, StoreError) as error:
            complaint = f"{manifest.stem}: {error}"
    if lines := [line for line in dist.all_gather_object(complaint) if line]:
        raise InputError(*lines)
