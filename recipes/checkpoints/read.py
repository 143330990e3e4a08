"""A checkpoint to look at instead of going on from it: nothing is written to the run's folder or its bucket."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.checkpoints.find import bring, load_manifest, position_of, survey
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import DamagedError, Manifest
from recipes.checkpoints.places import Places, named
from recipes.checkpoints.store import LocalStore, Store, StoreError
from recipes.errors import InputError


@dataclass(frozen=True)
class Taken:
    """A verified checkpoint's content."""

    manifest: Manifest
    state: dict[str, Any]
    """The training state, tensors on the CPU."""
    store: Store
    """Where it was found."""
    skipped: tuple[str, ...]
    """Newer ones that were passed over, one line each with the reason."""

    @property
    def location(self) -> str:
        """Its address, for people."""
        return f"{self.store.location.rstrip('/')}/{self.manifest.files[0].name}"


def take(places: Places, run_name: str, checkpoint: str | None) -> Taken:
    """The newest good checkpoint of a run, on disk or in its bucket; or the one that the user names.

    Args:
        places: Where the run's checkpoints lie.
        run_name: The run's name, which a checkpoint that is found there must have.
        checkpoint: A checkpoint's file, or the folder that holds it, on disk or `s3://`; None: the run's newest.

    Raises:
        InputError: There is none, none is good, or a store cannot be read.
    """
    try:
        if checkpoint is not None:
            return _named(checkpoint)
        opener = places.opener
        stores: list[Store] = [LocalStore(places.local), *([] if opener is None else [opener()])]
        return _newest(stores, run_name)
    except StoreError as error:
        raise InputError(str(error)) from None


def _newest(stores: Sequence[Store], run_name: str) -> Taken:
    """The newest good one of several stores, the first store's copy before the others'."""
    found = [(position_of(stem), -order, stem) for order, store in enumerate(stores) for stem in survey(store).complete]
    where, skipped = " and ".join(store.location for store in stores), list[str]()
    for _, order, stem in sorted(found, reverse=True):
        store = stores[-order]
        try:
            manifest = load_manifest(store, stem)
            if manifest.run_name != run_name:
                raise InputError(
                    f"{store.location}: holds checkpoints of run {manifest.run_name!r}, not of {run_name!r}; "
                    "name the one that is meant with --checkpoint"
                )
            return Taken(manifest, _load(store, manifest), store, tuple(skipped))
        except DamagedError as error:
            skipped.append(f"checkpoint {store.location}/{stem} passed over: {error}")
    if skipped:
        raise InputError(*skipped, f"{where}: no good checkpoint of run {run_name!r}")
    raise InputError(f"{where}: no checkpoint of run {run_name!r}; train it, or name one with --checkpoint")


def _named(checkpoint: str) -> Taken:
    store, stem = named(checkpoint, "--checkpoint")
    stems = survey(store).complete
    stem = stems[-1] if stem is None and stems else stem
    if stem not in stems:
        raise InputError(f"--checkpoint: {store.location} holds no complete checkpoint{f' {stem}' if stem else ''}")
    try:
        manifest = load_manifest(store, stem)
        return Taken(manifest, _load(store, manifest), store, ())
    except DamagedError as error:
        raise InputError(f"--checkpoint: {store.location}/{stem}: {error}") from None


def _load(store: Store, manifest: Manifest) -> dict[str, Any]:
    """The state in a verified file; one from a bucket passes through a temporary folder.

    Into the run's own folder it must not go: another run's would stop that run from going on.
    """
    if isinstance(store, LocalStore):
        return _state(store.path(manifest.files[0].name), manifest)
    with tempfile.TemporaryDirectory() as folder:
        return _state(bring(store, manifest, LocalStore(Path(folder))), manifest)


def _state(path: Path, manifest: Manifest) -> dict[str, Any]:
    state: dict[str, Any] = read_state(path, manifest)["state"]
    return state
