"""How a run began, and so which of the checkpoints under its name are its own.

`resume=X` and `autoresume=false` say how a run begins. Once it has begun so, the same command goes on from the run's
own newest state. Checkpoints of this run name and recipe that began otherwise are replaced, on disk and in the bucket.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from composer import Algorithm

from recipes.checkpoints.find import Identity, bring, load_manifest, position_of, require_same, survey
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import DamagedError, Manifest
from recipes.checkpoints.mirror import FOLDER
from recipes.checkpoints.places import named as find_named
from recipes.checkpoints.publish import remove
from recipes.checkpoints.s3 import S3Store
from recipes.checkpoints.store import LocalStore, Store, StoreError
from recipes.errors import InputError

log = logging.getLogger(__name__)

RECORD = ".begun"
"""Lies beside a run's checkpoints."""


@dataclass(frozen=True, order=True)
class Beginning:
    """One beginning of a run of some name."""

    at: str
    """UTC, ISO 8601."""
    how: str
    """`resume=X`, `autoresume=false`, or nothing: the command that goes on with whatever is there."""

    @classmethod
    def of(cls, store: Store) -> Beginning | None:
        """What a store with checkpoints records; None: nothing, or there are none."""
        listing = survey(store)
        if listing.complete or listing.begun or listing.torn:
            with suppress(FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
                content = json.loads(store.read(RECORD))
                return cls(ascii(content["at"])[1:-1][:40], str(content["how"]))
        return None


def how_it_begins(autoresume: bool, resume: str | None) -> str:
    """What of the command decides where the run begins."""
    return f"resume={resume}" if resume is not None else "" if autoresume else "autoresume=false"


def begins_anew(stores: Sequence[Store], how: str, *, resumable: bool) -> bool:
    """Whether this command begins a run, instead of going on with one that began so.

    Raises:
        StoreError: A store failed.
    """
    latest = max(filter(None, map(Beginning.of, stores)), default=None)
    same = latest is not None and latest.how == how
    return bool(how) and not (same and (resumable or any(map(_is_finished, stores))))


def begin(
    local: LocalStore,
    remote: S3Store | None,
    how: str,
    identity: Identity,
    *,
    anew: bool,
    restart: bool,
    named: Named | None,
) -> None:
    """Leave in a run's stores only what is of one beginning, and record which.

    Args:
        local: The run's folder.
        remote: Its bucket, if there is one.
        how: How the command begins a run.
        identity: Of the run.
        anew: Begin a run, instead of going on.
        restart: Where the two stores' records differ, replace the earlier by the later, instead of refusing.
        named: For `resume=X` that begins a run: the checkpoint.

    Raises:
        InputError: Checkpoints of another recipe or run would be replaced, or two runs have one name.
        DamagedError: The named checkpoint cannot be used.
        StoreError: A store failed.
    """
    stores: list[Store] = [local] if remote is None else [local, remote]
    found = [Beginning.of(store) for store in stores]
    known = sorted(one for one in found if one is not None)
    record = Beginning(_now(), how) if anew or not known else known[-1]
    older = [store for store, one in zip(stores, found, strict=True) if anew or one not in (None, record)]
    if older and not (how or restart):
        raise InputError(
            f"{' and '.join(store.location for store in stores)}: hold checkpoints of two runs named "
            f"{identity.run_name}, begun {' and '.join(one.at for one in known)}; remove one of them, choose another "
            "run_name, or let the later one replace the earlier with checkpoints.restart=true"
        )
    back = named if named is not None and named.store.location in [store.location for store in stores] else None
    doomed = [(store, stem) for store in older for stem in _stems(store) if back is None or not back.covers(stem)]
    for store, stem in doomed:
        with suppress(DamagedError):
            require_same(load_manifest(store, stem), identity, store.location)
    if named is not None:
        named.bring_into(local, identity)
    for store, stem in doomed:
        if named is None or store is not local or stem != named.manifest.stem:
            log.warning("%s: checkpoint %s of an older run is removed", store.location, stem)
            remove(store, [stem])
    if remote is not None and remote in older and back is None:
        logs = remote.below(FOLDER)
        logs.delete([entry.name for entry in logs.tree()])
    for store, one in zip(stores, found, strict=True):
        if one != record:
            _write(store, record)


@dataclass(frozen=True)
class Named:
    """The checkpoint that `resume=X` names, of any run's name, but of this recipe."""

    store: Store
    manifest: Manifest
    algorithms: Sequence[Algorithm]
    """The run's own, which it must have too."""

    @classmethod
    def of(cls, path: str, identity: Identity, algorithms: Sequence[Algorithm]) -> Named:
        """Look it up.

        Raises:
            InputError: There is none, or it is of another recipe.
            DamagedError: Its manifest is damaged.
            StoreError: Its store failed.
        """
        store, stem = find_named(path)
        stems = survey(store).complete
        stem = stems[-1] if stem is None and stems else stem
        if stem not in stems:
            raise InputError(f"resume: {store.location} holds no complete checkpoint{f' {stem}' if stem else ''}")
        manifest = load_manifest(store, stem)
        require_same(manifest, replace(identity, run_name=manifest.run_name), store.location)
        return cls(store, manifest, algorithms)

    def covers(self, stem: str) -> bool:
        """Whether a checkpoint of the same run is this one or before it: going back keeps those."""
        return position_of(stem) <= self.manifest.order

    def bring_into(self, local: LocalStore, identity: Identity) -> None:
        """Make it the run's own first checkpoint.

        Raises:
            DamagedError: It is not what its manifest says, or unsafe.
            StoreError: A store failed.
        """
        stem = self.manifest.stem
        try:
            read_state(bring(self.store, self.manifest, local), self.manifest, self.algorithms)
        except DamagedError:
            if self.store.location != local.location:
                remove(local, [stem])
            raise
        if self.manifest.run_name != identity.run_name:
            adopted = self.manifest.model_copy(update={"run_name": identity.run_name})
            local.put(f"{stem}.json", adopted.to_json())
        log.info("%s begins with %s/%s", identity.run_name, self.store.location, stem)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def _stems(store: Store) -> list[str]:
    listing = survey(store)
    return [*listing.complete, *listing.begun, *listing.torn]


def _is_finished(store: Store) -> bool:
    with suppress(DamagedError):
        return any(load_manifest(store, stem).finished for stem in survey(store).complete[-1:])
    return False


def _write(store: Store, record: Beginning) -> None:
    try:
        store.put(RECORD, json.dumps(asdict(record)).encode())
    except StoreError as error:
        if error.mistake:
            raise
        log.warning("%s", error)  # a full disk or bucket, which may get room; an upload writes it, too
