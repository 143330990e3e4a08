"""Find the newest checkpoint that is complete, verified, and this run's. All searches go through this module."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from composer import Algorithm

from data.files import is_remote
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import (
    DamagedError,
    Listing,
    Manifest,
    is_stem,
    load_manifest,
    position_of,
    publish,
    survey,
)
from recipes.checkpoints.store import CHECKPOINTS, LocalStore, Places, S3Store, Store, StoreError
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.resolved import NO_EFFECT_ON_WEIGHTS, config_digest, differing_keys

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """What a run's checkpoints must match: its name, and the digest of the keys that determine its result."""

    run_name: str
    config_digest: str
    config: Mapping[str, Any]
    world_size: int
    train_images: int | None = None
    """Images in the training set, which may move but must not change; None: not known, and not compared."""
    classes: tuple[str, ...] = ()  # its class folder names in label order; None: not known, and not compared

    @classmethod
    def of(
        cls, config: RunConfig, world_size: int, train_images: int | None = None, classes: Sequence[str] = ()
    ) -> Identity:
        """The identity of a run of `world_size` processes."""
        # Whole sections, because `loggers` may hold API keys.
        sections = {key for key in NO_EFFECT_ON_WEIGHTS if "." not in key}
        plain = config.model_dump(mode="json", exclude=sections)
        return cls(config.run_name, config_digest(config, world_size), plain, world_size, train_images, tuple(classes))

    def fields(self) -> dict[str, Any]:
        """The manifest's fields about the run."""
        names = ("run_name", "config_digest", "world_size", "train_images", "classes")
        return {name: getattr(self, name) for name in names} | {"config": dict(self.config)}

    def differences(self, manifest: Manifest) -> list[str]:
        """The keys that make a checkpoint another recipe's, one line per key."""
        lines = differing_keys(self.config, manifest.config, self.world_size, manifest.world_size)
        return [line.replace(": here ", ": now ", 1).replace(", there ", ", in the checkpoint ", 1) for line in lines]

    def require_same(self, manifest: Manifest, location: str) -> None:
        """Raise InputError for a checkpoint of another run or recipe: one line, and one for each key that differs."""
        if manifest.run_name != self.run_name:
            raise InputError(
                f"{location}: holds checkpoints of run {manifest.run_name!r}, not of {self.run_name!r}; "
                "choose another checkpoints.folder, or the run_name of that run"
            )
        self.require_same_recipe(manifest, location)

    def require_same_recipe(self, manifest: Manifest, location: str) -> None:
        """As `require_same`, but for any run name."""
        again = "to start again, choose another run_name"
        if manifest.config_digest != self.config_digest:
            raise InputError(
                f"{location}: {manifest.stem} was made by another recipe; to resume from it, change these keys back; "
                f"{again}:",
                *(f"  {line}" for line in self.differences(manifest)),
            )
        now, then, different = self.train_images, manifest.train_images, None
        if None not in (now, then) and now != then:
            different = f"holds {now} training images, {manifest.stem} at {location} was trained on {then}"
        elif self.classes and manifest.classes and self.classes != manifest.classes:
            different = (
                f"holds {len(self.classes)} classes, and not the {len(manifest.classes)} that {manifest.stem} at "
                f"{location} was trained on"
            )
        if different:
            raise InputError(f"data.path: {different}; to resume from it, use the same data; {again}")


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    manifest: Manifest
    store: Store  # where it was found
    content: dict[str, Any] = field(repr=False)  # as `read_state` gives it
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that were skipped, one line each with the reason; set by `load_checkpoint`."""

    @property
    def state(self) -> dict[str, Any]:
        """The training state, tensors on the CPU."""
        state: dict[str, Any] = self.content["state"]
        return state

    @property
    def location(self) -> str:
        """Its address, for display."""
        return f"{self.store.location.rstrip('/')}/{self.manifest.file.name}"


class Search(NamedTuple):
    """The outcome of looking for the newest good checkpoint."""

    found: Found | None
    skipped: dict[str, str]  # why other checkpoints cannot be used, by stem
    listings: dict[str, Listing]  # what each store holds, by its location


def newest_good(
    stores: Sequence[Store],
    require: Callable[[Manifest, str], None],
    *,
    into: LocalStore | None,
    algorithms: Sequence[Algorithm] | None = None,
) -> Search:
    """The newest checkpoint of which some store has a good copy.

    If the first store's copy is damaged or torn, the next store's is used, then the next older checkpoint.

    Args:
        stores: Searched in this order for each checkpoint.
        require: Raises InputError for a manifest of another run.
        into: Where to keep a checkpoint from the bucket; None: only read it.
        algorithms: The run's own, which the checkpoint must match; None: any.

    Raises:
        StoreError: A store cannot be listed, or a bucket fails: it may work later, and its newest checkpoint must not
        be missed.
    """
    listings = {store.location: survey(store) for store in stores}
    known = listings.values()
    skipped = dict.fromkeys((stem for listing in known for stem in listing.torn), "its data or its manifest is missing")
    for stem in sorted({stem for listing in known for stem in listing.complete}, key=position_of, reverse=True):
        reasons = []
        for store in (store for store in stores if stem in listings[store.location].complete):
            try:
                manifest = load_manifest(store, stem)
                require(manifest, store.location)
                content = read_checkpoint(store, manifest, into, algorithms)
            except DamagedError as error:
                reasons.append(f"{store.location}: {error}")
            except StoreError as error:
                if into is None or store.location != into.location:
                    raise
                reasons.append(str(error))
            else:
                skipped.pop(stem, None)
                return Search(Found(manifest, store, content), skipped, listings)
        skipped[stem] = "; ".join(reasons)
    return Search(None, skipped, listings)


def read_checkpoint(
    store: Store, manifest: Manifest, into: LocalStore | None, algorithms: Sequence[Algorithm] | None = None
) -> dict[str, Any]:
    """A checkpoint's content (`read_state`); unless it is in `into`, it is downloaded, verified and kept there."""
    name = manifest.file.name
    if isinstance(store, LocalStore) and (into is None or store.location == into.location):
        return read_state(store.path(name), manifest, algorithms)
    if into is None:
        with tempfile.TemporaryDirectory() as folder:
            return read_checkpoint(store, manifest, LocalStore(Path(folder)), algorithms)
    fetched = into.path(f".{name}.fetched")
    try:
        size = dict(store.entries()).get(name)
        if size != manifest.file.size:  # before it fills a disk
            raise DamagedError(f"{size} bytes instead of {manifest.file.size}" if size else "its data is missing")
        store.fetch(name, fetched)
        content = read_state(fetched, manifest, algorithms)
        publish(into, manifest, lambda: into.adopt(fetched, name))
        return content
    except FileNotFoundError:
        raise DamagedError("its data is missing") from None
    finally:
        fetched.unlink(missing_ok=True)


def find_newest(
    local: LocalStore, remote: Store | None, identity: Identity, *, restart: bool, algorithms: Sequence[Algorithm]
) -> Search:
    """The checkpoint to resume from, downloaded if only the bucket has a good copy; logs what is skipped.

    Raises:
        InputError: A checkpoint belongs to another run or recipe; or, without `restart`, none can be used.
        StoreError: As `newest_good`.
    """
    stores: list[Store] = [local] if remote is None else [local, remote]
    search = newest_good(stores, identity.require_same, into=local, algorithms=algorithms)
    found, skipped, listings = search
    instead = "" if found is None else f"; resuming from {found.manifest.describe()}"
    for stem, reason in skipped.items():
        log.warning("checkpoint %s skipped: %s%s", stem, reason, instead)
    for stem in (stem for listing in listings.values() for stem in listing.incomplete):
        log.warning("checkpoint %s was started but never completed", stem)
    old = [f"{location}/{stem}.pt" for location, listing in listings.items() for stem in listing.old]
    if found is None and old and not restart:
        raise InputError(
            f"{old[-1]}: a checkpoint in an older format, which this version does not read; choose another "
            "run_name, or start from scratch with checkpoints.restart=true"
        )
    if found is None and skipped and not restart:
        raise InputError(
            *(f"checkpoint {stem}: {reason}" for stem, reason in skipped.items()),
            f"{' and '.join(listings)}: checkpoints of {identity.run_name} exist, but none can be used; repair them, "
            "choose another run_name, or start from scratch with checkpoints.restart=true",
        )
    return search


def find_named(path: str, key: str) -> tuple[Store, Manifest]:
    """The checkpoint that a user names: its file, its manifest, or a folder, meaning its newest; on disk or `s3://`.

    Raises:
        InputError: There is no such checkpoint; the message names the `key` that the user set.
        DamagedError: Its manifest is damaged.
    """
    store: Store
    folder = Path(path)
    stem = folder.name.split(".")[0]
    if is_remote(path):
        parent, _, _ = path.rstrip("/").rpartition("/")
        store = S3Store(parent if is_stem(stem) else path)
    elif folder.is_dir():
        inside = folder / CHECKPOINTS
        store = LocalStore(inside if inside.is_dir() else folder)
    elif not folder.exists():
        raise InputError(f"{key}: {path} does not exist; name a checkpoint (ep003-ba000123.safetensors) or its folder")
    elif not is_stem(stem):
        raise InputError(f"{key}: {path} is not a checkpoint of this program (such as ep003-ba000123.safetensors)")
    else:
        store = LocalStore(folder.parent)
    complete = survey(store).complete
    wanted = (stem,) if is_stem(stem) and not folder.is_dir() else complete[-1:]
    if not set(wanted) & set(complete):
        raise InputError(f"{key}: {store.location} holds no complete checkpoint{''.join(f' {one}' for one in wanted)}")
    return store, load_manifest(store, wanted[0])


def load_checkpoint(places: Places, run_name: str, checkpoint: str | None) -> Found:
    """A checkpoint to read, not to resume from: nothing is written to the run's folder or its bucket.

    Raises:
        InputError: The named checkpoint does not exist, or (None) the run has no good one; or a store cannot be read.
    """

    def require(manifest: Manifest, location: str) -> None:
        if manifest.run_name != run_name:
            raise InputError(
                f"{location}: holds checkpoints of run {manifest.run_name!r}, not of {run_name!r}; "
                "name a checkpoint with --checkpoint"
            )

    try:
        if checkpoint is not None:
            where = checkpoint
            try:
                store, manifest = find_named(checkpoint, "--checkpoint")
                where = f"{store.location}/{manifest.stem}"
                return Found(manifest, store, read_checkpoint(store, manifest, None))
            except DamagedError as error:
                raise InputError(f"--checkpoint: {where}: {error}") from None
        stores = places.stores()
        found, skipped, _ = newest_good(stores, require, into=None)
    except StoreError as error:
        raise InputError(str(error)) from None
    lines = {stem: f"checkpoint {stem} skipped: {reason}" for stem, reason in skipped.items()}
    if found is not None:
        newer = [line for stem, line in lines.items() if position_of(stem) > found.manifest.order]
        return replace(found, skipped=tuple(newer))
    where = " and ".join(store.location for store in stores)
    if lines:
        raise InputError(*lines.values(), f"{where}: no good checkpoint of run {run_name!r}")
    raise InputError(f"{where}: no checkpoint of run {run_name!r}; train it, or name one with --checkpoint")
