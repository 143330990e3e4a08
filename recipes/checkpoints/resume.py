"""Where a run starts or resumes.

`find_resume`, on process 0: how the run begins (`_begin`), then the newest checkpoint with a good copy on disk or in
the bucket (find.py). All other processes get its bytes.

`resume=X` and `autoresume=false` set how a run begins. Once it has begun that way, the same command resumes from the
run's own newest state. Checkpoints of this run name and recipe from a run that began otherwise are replaced, on disk
and in the bucket.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from composer.utils import dist

from data.errors import InputError, StoreError
from recipes.checkpoints.find import Found, find_named, locations, newest_good, read_checkpoint
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import Identity, Manifest, load_manifest, position_of, remove, survey
from recipes.checkpoints.store import LOGS, RECORD, SMALL, DamagedError, LocalStore, Places, S3Store, Store, retry
from recipes.checkpoints.upload import restore_logs
from recipes.config import RunConfig, seconds
from recipes.processes import on_first

log = logging.getLogger(__name__)


@dataclass
class Resume:
    """Where a run resumes."""

    manifest: Manifest | None = None  # of a verified checkpoint, on process 0's disk; None: start from scratch
    resumed_from: str | None = None  # where it was found, for display
    damaged: tuple[str, ...] = ()  # stems that were skipped
    content: dict[str, Any] | None = field(default=None, repr=False)
    """The checkpoint's content, from `read_state`; None once restored, because it is large."""

    @property
    def finished(self) -> bool:
        """Whether the run has nothing left to train."""
        return self.manifest is not None and self.manifest.finished


def find_resume(config: RunConfig, places: Places, identity: Identity) -> Resume:
    """Decide where the run starts or resumes; every process calls this and gets the same answer.

    InputError, on every process: a checkpoint of another recipe; none that can be used; a store cannot be reached.
    """
    local, content = LocalStore(places.local), None

    def decide() -> Resume:
        nonlocal content  # of process 0, which has read it; the others get it below
        resume = _search(config, places, identity)
        content = resume.content
        return replace(resume, content=None)

    resume = on_first(decide)
    if resume.manifest is not None and dist.get_world_size() > 1:
        # From process 0's disk: another node has another one, and the newest state may not be in the bucket yet, since
        # a node often dies during an upload. In pieces, because a device's memory may have to hold each message.
        file = resume.manifest.file
        data = b"".join(on_first(partial(local.read, file.name, at)) for at in range(0, file.size, SMALL))
        try:
            content = content or read_state(data, resume.manifest)
        except DamagedError as error:
            raise InputError(f"{local.path(file.name)}: {error}") from None
    return replace(resume, content=content)


def _search(config: RunConfig, places: Places, identity: Identity) -> Resume:
    """Search the disk and the bucket; only the disk if the bucket cannot be reached and nothing is lost by that."""
    local = LocalStore(places.local)
    local.sweep()

    def among(*stores: Store) -> Resume:
        _begin(config, stores, identity)
        found, skipped = find_newest(stores, identity, restart=config.checkpoints.restart)
        if found is None:
            return Resume(damaged=tuple(skipped))
        log.info("resuming from %s at %s", found.manifest.describe(), found.location)
        return Resume(found.manifest, found.location, tuple(skipped), found.content)

    def with_bucket() -> Resume:
        bucket = S3Store(str(places.remote))
        resume = among(local, bucket)
        if resume.manifest is not None and (fetched := restore_logs(places.run_folder, bucket.below(LOGS))):
            log.info("downloaded the run's logs: %s", ", ".join(fetched))
        return resume

    if places.remote is None:
        return among(local)
    try:
        return retry(with_bucket, seconds(config.checkpoints.patience))
    except StoreError as error:
        if error.mistake:
            raise
        log.error("the bucket cannot be reached: %s", error)
        reason = str(error)
    if not config.checkpoints.restart and (_begins_anew(config, [local]) or not survey(local).complete):
        raise InputError(
            reason,
            f"{places.local}: no checkpoint here, and the bucket, which may hold some, cannot be reached; "
            "try again later, or start from scratch with checkpoints.restart=true",
        )
    log.error("resuming from the local disk; uploads will be retried while training runs")
    return among(local)


def find_newest(stores: Sequence[Store], identity: Identity, *, restart: bool) -> tuple[Found | None, dict[str, str]]:
    """The checkpoint to resume from, then on the first store's disk, and why others cannot be used, which is logged.

    InputError: a checkpoint belongs to another run or recipe; or, without `restart`, none can be used.
    """
    (local, *_), listings = stores, {store: survey(store) for store in stores}
    assert isinstance(local, LocalStore)
    found, skipped = newest_good(listings, identity.require_same, into=local)
    if found is None and skipped and not restart:
        raise InputError(
            *(f"checkpoint {stem}: {reason}" for stem, reason in skipped.items()),
            f"{locations(stores)}: checkpoints of {identity.run_name} exist, but none can be used; repair them, "
            "choose another run_name, or start from scratch with checkpoints.restart=true",
        )
    instead = "" if found is None else f"; resuming from {found.manifest.describe()}"
    for stem, reason in skipped.items():
        log.warning("checkpoint %s skipped: %s%s", stem, reason, instead)
    for stem in (stem for listing in listings.values() for stem in listing.incomplete):
        log.warning("checkpoint %s was started but never completed", stem)
    return found, skipped


# --- how a run begins -----------------------------------------------------------------------------------------------


def _begins_anew(config: RunConfig, stores: Sequence[Store]) -> bool:
    """Whether this command begins a new run, instead of resuming one that it began."""
    how, latest = _how(config), max(filter(None, map(_recorded, stores)), default=None)
    if how and latest is not None and latest[1] == how:  # it has begun already
        return bool(config.algorithms.not_resumable) and not any(map(_is_finished, stores))
    return bool(how)


def _how(config: RunConfig) -> str:
    """The part of the command that decides where the run begins; empty if it resumes from any checkpoint."""
    if config.resume is not None:
        return f"resume={config.resume}"
    return "" if config.autoresume else "autoresume=false"


def _recorded(store: Store) -> tuple[str, str] | None:
    """When (UTC, ISO 8601) and how a store's checkpoints began; None if it has no record or no checkpoints."""
    if any(survey(store)):
        with suppress(FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
            content = json.loads(store.read(RECORD))
            return ascii(content["at"])[1:-1][:40], str(content["how"])
    return None


def _is_finished(store: Store) -> bool:
    with suppress(DamagedError):
        return any(load_manifest(store, stem).finished for stem in survey(store).complete[-1:])
    return False


def _begin(config: RunConfig, stores: Sequence[Store], identity: Identity) -> None:
    """Keep in the run's stores only the checkpoints of one beginning, and record which.

    InputError: checkpoints of another recipe or run would be replaced, two runs have one name, or `resume` names no
    good checkpoint of this recipe.
    """
    again, how = _begins_anew(config, stores), _how(config)
    named = _named(config.resume, config, identity) if again and config.resume is not None else None
    found = [_recorded(store) for store in stores]  # when and how each store's checkpoints began
    known = sorted(filter(None, found))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    record = (now, how) if again or not known else known[-1]
    older = [store for store, one in zip(stores, found, strict=True) if again or one not in (None, record)]
    if older and not (how or config.checkpoints.restart):
        raise InputError(
            f"{locations(stores)}: hold checkpoints of two runs named {identity.run_name}, started "
            f"{' and '.join(at for at, _ in known)}; remove one of them, choose another run_name, or let the later one "
            "replace the earlier with checkpoints.restart=true"
        )
    # Going back to one of the run's own checkpoints keeps it and those before it.
    back = named is not None and named[0].location in [store.location for store in stores]
    last = position_of(named[1].stem) if named is not None and back else (-1, -1)
    replaced = [(store, stem) for store in older for stem in chain(*survey(store)) if position_of(stem) > last]
    for store, stem in replaced:
        with suppress(DamagedError):
            identity.require_same(load_manifest(store, stem), store.location)
    if named is not None:
        _take_over(*named, stores[0], identity.run_name)
        replaced = [one for one in replaced if one != (stores[0], named[1].stem)]
    for store, stem in replaced:
        log.warning("%s: removing checkpoint %s of an older run", store.location, stem)
        remove(store, [stem])
    for store, one in zip(stores, found, strict=True):
        if isinstance(store, S3Store) and store in older and not back:
            logs = store.below(LOGS)
            logs.delete(logs.tree())
        if one != record:
            _write_record(store, record)


def _named(path: str, config: RunConfig, identity: Identity) -> tuple[Store, Manifest]:
    try:
        store, manifest = retry(lambda: find_named(path, "resume"), seconds(config.checkpoints.patience))
    except StoreError as error:
        raise InputError(f"resume: {path}: {error}") from None
    identity.require_same_recipe(manifest, store.location)
    return store, manifest


def _write_record(store: Store, record: tuple[str, str]) -> None:
    try:
        store.put(RECORD, json.dumps({"at": record[0], "how": record[1]}).encode())
    except StoreError as error:
        if error.mistake:
            raise
        log.warning("%s", error)  # a full disk or bucket, which may get room; an upload writes the record too


def _take_over(store: Store, manifest: Manifest, local: Store, run_name: str) -> None:
    """Make a checkpoint the first one of the run."""
    assert isinstance(local, LocalStore)
    try:
        read_checkpoint(store, manifest, local)
    except DamagedError as error:
        raise InputError(f"resume: {store.location}/{manifest.stem}: {error}") from None
    if manifest.run_name != run_name:
        local.put(f"{manifest.stem}.json", manifest.model_copy(update={"run_name": run_name}).to_json())
    log.info("%s starts from %s/%s", run_name, store.location, manifest.stem)
