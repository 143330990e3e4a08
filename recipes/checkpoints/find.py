"""Which checkpoint to go on from: the newest that is complete, verified, and this run's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer import Algorithm

from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import SUFFIX, DamagedError, Manifest, is_stem, parse, verify
from recipes.checkpoints.store import LocalStore, Store, StoreError
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.resolved import NO_EFFECT_ON_WEIGHTS, config_digest, differing_keys

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Whose checkpoints count: a run's name, and the digest of the keys that determine its result."""

    run_name: str
    config_digest: str
    config: Mapping[str, Any]
    world_size: int
    train_images: int | None = None
    """Of the training set, which may lie anywhere but must not change; None: not known, and not compared."""
    classes: tuple[str, ...] = ()
    """Its class folders' names in label order; likewise."""

    @classmethod
    def of(
        cls, config: RunConfig, world_size: int, train_images: int | None = None, classes: Sequence[str] = ()
    ) -> Identity:
        """The identity of a run.

        Args:
            config: The run.
            world_size: Its processes.
            train_images: Images it trains on.
            classes: Class folder names in label order, to be kept with each checkpoint.
        """
        sections = {
            key for key in NO_EFFECT_ON_WEIGHTS if "." not in key
        }  # of these, `loggers` may hold keys to a service
        plain = config.model_dump(mode="json", exclude=sections)
        return cls(config.run_name, config_digest(config, world_size), plain, world_size, train_images, tuple(classes))

    def differences(self, manifest: Manifest) -> list[str]:
        """What in the config makes a checkpoint another recipe's, one line a key."""
        lines = differing_keys(self.config, manifest.config, self.world_size, manifest.world_size)
        return [line.replace(": here ", ": now ", 1).replace(", there ", ", in the checkpoint ", 1) for line in lines]


@dataclass(frozen=True)
class Listing:
    """What a store holds, told by the names alone: stems, sorted."""

    complete: tuple[str, ...]
    """With data and manifest (neither was read)."""
    begun: tuple[str, ...]
    """Left by a process that died while it wrote them: never complete, nothing is lost with them."""
    torn: tuple[str, ...]
    """Data without manifest or manifest without data, though the writing had ended."""
    old: tuple[str, ...]
    """In the pickled format of before October 2026, which is not read."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint, on the local disk."""

    manifest: Manifest
    path: Path
    content: dict[str, Any] = field(repr=False)
    """As `read_state` gives it."""
    location: str
    """Where it was taken from, for people."""


@dataclass
class Search:
    """The outcome of looking for a checkpoint."""

    found: Found | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    """By stem: why it was passed over."""


def survey(store: Store) -> Listing:
    """Sort a store's files into checkpoints.

    Raises:
        StoreError: The store cannot be listed.
    """
    names = {entry.name for entry in store.entries()}
    stems = sorted({name.split(".")[0] for name in names if is_stem(name.split(".")[0])}, key=position_of)
    data = {stem for stem in stems if f"{stem}{SUFFIX}" in names}
    old = {stem for stem in stems if f"{stem}.pt" in names} - data
    manifests = {stem for stem in stems if f"{stem}.json" in names} - old
    begun = {stem for stem in stems if f"{stem}.json.tmp" in names} - manifests
    return Listing(
        complete=tuple(stem for stem in stems if stem in data & manifests),
        begun=tuple(stem for stem in stems if stem in begun),
        torn=tuple(stem for stem in stems if stem in (data ^ manifests) - begun),
        old=tuple(stem for stem in stems if stem in old),
    )


def newest(
    local: LocalStore,
    remote: Store | None,
    identity: Identity,
    *,
    restart: bool,
    algorithms: Sequence[Algorithm],
) -> Search:
    """The newest complete and verified checkpoint of this run, fetched if only the remote store has a good copy.

    Size and SHA-256 are compared before anything parses the file. What is damaged, torn or unsafe is named in the log
    and passed over, and the next older one is taken.

    Args:
        local: The run's folder, which is searched first and into which a remote one is fetched.
        remote: The bucket, if there is one.
        identity: Whose checkpoint it must be.
        restart: Start from zero where checkpoints seem to exist but none can be used, instead of refusing.
        algorithms: The run's own, which the checkpoint must have too.

    Raises:
        InputError: A checkpoint is another run's or another recipe's; or there are some, and none can be used.
        StoreError: A store cannot be listed, or the remote one fails.
    """
    stores: list[Store] = [local] if remote is None else [local, remote]
    listings = {store.location: survey(store) for store in stores}
    search = Search()
    for listing in listings.values():
        for stem in listing.torn:
            search.skipped[stem] = "its data or its manifest is missing"
    for stem in sorted({stem for listing in listings.values() for stem in listing.complete}, key=position_of)[::-1]:
        holders = [store for store in stores if stem in listings[store.location].complete]
        search.found = _take(stem, holders, local, identity, algorithms, search.skipped)
        if search.found:
            break
    older = "" if search.found is None else f"; going on from {search.found.manifest.describe()}"
    for stem, reason in search.skipped.items():
        log.warning("checkpoint %s passed over: %s%s", stem, reason, older)
    for listing in listings.values():
        for stem in listing.begun:
            log.warning("checkpoint %s was begun and never completed", stem)
    old = [f"{place}/{stem}.pt" for place, listing in listings.items() for stem in listing.old]
    if search.found is None and old and not restart:
        raise InputError(
            f"{old[-1]}: is a checkpoint in an older format, which this version does not read; choose another "
            "run_name, or start from zero with checkpoints.restart=true"
        )
    if search.found is None and search.skipped and not restart:
        raise InputError(
            *(f"checkpoint {stem}: {reason}" for stem, reason in search.skipped.items()),
            f"{' and '.join(store.location for store in stores)}: checkpoints of {identity.run_name} are there, but "
            "none can be used; mend them, choose another run_name, or start from zero with checkpoints.restart=true",
        )
    return search


def _take(
    stem: str,
    holders: Sequence[Store],
    local: LocalStore,
    identity: Identity,
    algorithms: Sequence[Algorithm],
    skipped: dict[str, str],
) -> Found | None:
    """The checkpoint `stem` from the first of `holders` whose copy is good."""
    reasons = []
    for store in holders:
        try:
            manifest = load_manifest(store, stem)
            require_same(manifest, identity, store.location)
            path = local.path(manifest.files[0].name) if store is local else bring(store, manifest, local)
            content = read_state(path, manifest, algorithms)
        except DamagedError as error:
            reasons.append(f"{store.location}: {error}")
            continue
        except StoreError as error:
            if store is not local:
                raise  # It may come back; passing over its newest checkpoint would throw work away.
            reasons.append(str(error))
            continue
        skipped.pop(stem, None)
        return Found(manifest, path, content, f"{store.location.rstrip('/')}/{path.name}")
    skipped[stem] = "; ".join(reasons)
    return None


def load_manifest(store: Store, stem: str) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        DamagedError: It is missing or unreadable.
        StoreError: The store failed.
    """
    try:
        return parse(store.read(f"{stem}.json"), stem)
    except FileNotFoundError:
        raise DamagedError("its manifest is missing") from None


def bring(store: Store, manifest: Manifest, local: LocalStore) -> Path:
    """The checkpoint's verified file on the local disk, copied there from `store` if it is another one.

    Raises:
        DamagedError: The file is missing, or not what the manifest says.
        StoreError: The store failed.
    """
    entry = manifest.files[0]
    path = local.path(entry.name)
    if store.location == local.location:
        verify(path, entry)
        return path
    fetched = local.path(f".{entry.name}.fetched")
    try:
        if (size := store.size(entry.name)) != entry.size:  # before a disk is filled with it
            raise DamagedError(f"{size} bytes instead of {entry.size}")
        store.fetch(entry.name, fetched)
        return adopt(fetched, manifest, local)
    except FileNotFoundError:
        raise DamagedError("its data is missing") from None
    finally:
        fetched.unlink(missing_ok=True)


def adopt(fetched: Path, manifest: Manifest, local: LocalStore) -> Path:
    """Verify a checkpoint's file that was brought to the local disk, and make it one of the run's there.

    Args:
        fetched: In the folder of `local`, under another name.
        manifest: The checkpoint's.
        local: The run's folder.

    Returns:
        The file under its own name.

    Raises:
        DamagedError: The file is not what the manifest says.
        StoreError: The disk cannot be written to.
    """
    path = local.path(manifest.files[0].name)
    verify(fetched, manifest.files[0])
    local.put(f"{manifest.stem}.json.tmp", manifest.to_json())
    local.delete([f"{manifest.stem}.json"])
    try:
        fetched.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from None
    local.put(f"{manifest.stem}.json", manifest.to_json())
    local.delete([f"{manifest.stem}.json.tmp"])
    return path


def require_same(manifest: Manifest, identity: Identity, location: str) -> None:
    """Refuse a checkpoint of another run or another recipe.

    Raises:
        InputError: One line, and one for each key that differs.
    """
    if manifest.run_name != identity.run_name:
        raise InputError(
            f"{location}: holds checkpoints of run {manifest.run_name!r}, not of {identity.run_name!r}; "
            "choose another checkpoints.folder, or that run's run_name"
        )
    if manifest.config_digest != identity.config_digest:
        raise InputError(
            f"{location}: {manifest.stem} was made by another recipe; to go on from it these keys must be as they "
            "were, to begin anew choose another run_name:",
            *(f"  {line}" for line in identity.differences(manifest)),
        )
    now, then = identity.train_images, manifest.train_images
    different = None
    if None not in (now, then) and now != then:
        different = f"holds {now} training images, {manifest.stem} at {location} was trained on {then}"
    elif identity.classes and manifest.classes and identity.classes != manifest.classes:
        different = (
            f"holds {len(identity.classes)} classes, and not the {len(manifest.classes)} that {manifest.stem} at "
            f"{location} was trained on"
        )
    if different:
        raise InputError(
            f"data.path: {different}; to go on from it the data must be as they were, to begin anew choose another "
            "run_name"
        )


def position_of(stem: str) -> tuple[int, int]:
    """Sorts stems from the oldest to the newest."""
    epoch, _, batch = stem.partition("-ba")
    return (int(batch), int(epoch.removeprefix("ep")))
