"""Searching for a checkpoint that is complete, verified, and this run's: the newest good one, or a named one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.errors import InputError, StoreError
from data.files import is_remote
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import (
    Listing,
    Manifest,
    is_stem,
    load_manifest,
    position_of,
    publish,
    require_run,
    survey,
)
from recipes.checkpoints.store import CHECKPOINTS, DamagedError, LocalStore, Places, S3Store, Store


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


def newest_good(
    listings: Mapping[Store, Listing], require: Callable[[Manifest, str], None], *, into: LocalStore | None
) -> tuple[Found | None, dict[str, str]]:
    """The newest checkpoint of which some store has a good copy, and why others cannot be used, by stem.

    If the first store's copy is damaged or torn, the next store's is used, then the next older checkpoint. A failing
    bucket is a StoreError: it may work later, and its newest checkpoint must not be missed. `require` raises InputError
    for a manifest of another run; a checkpoint from another store than `into` is kept there (None: only read).
    """
    known = listings.values()
    skipped = dict.fromkeys((stem for listing in known for stem in listing.torn), "its data or its manifest is missing")
    for stem in sorted({stem for listing in known for stem in listing.complete}, key=position_of, reverse=True):
        reasons = []
        for store in (store for store, listing in listings.items() if stem in listing.complete):
            try:
                manifest = load_manifest(store, stem)
                require(manifest, store.location)
                content = read_checkpoint(store, manifest, into)
            except DamagedError as error:
                reasons.append(f"{store.location}: {error}")
            except StoreError as error:
                if is_remote(store.location):
                    raise
                reasons.append(str(error))
            else:
                skipped.pop(stem, None)
                return Found(manifest, store, content), skipped
        skipped[stem] = "; ".join(reasons)
    return None, skipped


def read_checkpoint(store: Store, manifest: Manifest, into: LocalStore | None) -> dict[str, Any]:
    """A checkpoint's content (`read_state`); one from another store than `into` is kept there once it is verified."""
    file = manifest.file
    try:
        data = store.load(file.name, file.size)
        content = read_state(data, manifest)
    except FileNotFoundError:
        raise DamagedError("its data is missing") from None
    except MemoryError:
        raise DamagedError(f"has {file.size} bytes, more than fit into memory") from None
    if into is not None and into.location != store.location:
        try:
            publish(into, manifest, lambda: into.put(file.name, [memoryview(data)]))
        except StoreError as error:  # of the disk, not of the bucket: neither waiting nor an older checkpoint helps
            raise InputError(f"{error}; needed for the checkpoint in {store.location}") from None
    return content


def find_named(path: str, key: str) -> tuple[Store, Manifest]:
    """The checkpoint that a user names: its file, its manifest, or a folder, meaning its newest; on disk or `s3://`.

    InputError, with the user's `key`: there is no such checkpoint, or its manifest is damaged.
    """
    folder, name = Path(path), Path(path).name.split(".")[0]
    stem = name if is_stem(name) and not folder.is_dir() else None
    store: Store
    if is_remote(path):
        store = S3Store(path.rstrip("/").rpartition("/")[0] if stem else path)
    elif not folder.exists() or (stem is None and not folder.is_dir()):
        fault = "is not a checkpoint of this program" if folder.exists() else "does not exist"
        raise InputError(f"{key}: {path} {fault}; name a checkpoint (ep003-ba000123.safetensors) or its folder")
    else:
        inside = folder / CHECKPOINTS
        store = LocalStore(folder.parent if stem else inside if inside.is_dir() else folder)
    complete = survey(store).complete
    if not complete or stem not in (None, *complete):
        raise InputError(f"{key}: {store.location} holds no complete checkpoint {stem or ''}".rstrip())
    try:
        return store, load_manifest(store, stem or complete[-1])
    except DamagedError as error:
        raise InputError(f"{key}: {path}: {error}") from None


def load_named(path: str, key: str) -> Found:
    """The checkpoint that a user names, read; errors as of `find_named`, and InputError for damaged data."""
    store, manifest = find_named(path, key)
    try:
        return Found(manifest, store, read_checkpoint(store, manifest, None))
    except DamagedError as error:
        raise InputError(f"{key}: {store.location}/{manifest.stem}: {error}") from None


def load_checkpoint(places: Places, run_name: str, checkpoint: str | None, key: str = "--checkpoint") -> Found:
    """A checkpoint to read, not to resume from: nothing is written to the run's folder or its bucket.

    InputError: the named checkpoint does not exist, or (None) the run has no good one; or a store cannot be read.
    """

    def require(manifest: Manifest, location: str) -> None:
        require_run(run_name, manifest, location, "name a checkpoint with --checkpoint")

    try:
        if checkpoint is not None:
            return load_named(checkpoint, key)
        stores = places.stores()
        found, skipped = newest_good({store: survey(store) for store in stores}, require, into=None)
    except StoreError as error:
        raise InputError(str(error)) from None
    lines = {stem: f"checkpoint {stem} skipped: {reason}" for stem, reason in skipped.items()}
    if found is not None:
        newer = [line for stem, line in lines.items() if position_of(stem) > position_of(found.manifest.stem)]
        return replace(found, skipped=tuple(newer))
    if lines:
        raise InputError(*lines.values(), f"{locations(stores)}: no good checkpoint of run {run_name!r}")
    message = f"no checkpoint of run {run_name!r}; train it, or name one with --checkpoint"
    raise InputError(f"{locations(stores)}: {message}")


def locations(stores: Sequence[Store]) -> str:
    """The addresses of some stores, for display."""
    return " and ".join(store.location for store in stores)
