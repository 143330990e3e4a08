"""Searching for a checkpoint that is complete, verified, and this run's: the newest good one, or a named one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files import is_remote
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import Listing, Manifest, is_stem, load_manifest, position_of, publish, survey
from recipes.checkpoints.store import (
    CHECKPOINTS,
    DamagedError,
    LocalStore,
    Places,
    S3Store,
    Store,
    StoreError,
)
from recipes.config import RunConfig
from recipes.resolved import NO_EFFECT_ON_WEIGHTS, config_digest, differing_keys


@dataclass(frozen=True)
class Identity:
    """What a run's checkpoints must match: its name, and the digest of the keys that determine its result."""

    run_name: str
    config_digest: str
    config: Mapping[str, Any]
    world_size: int
    train_images: int | None = None
    """Images in the training set, which may move but must not change; None: not known, and not compared."""
    classes: tuple[str, ...] = ()  # its class folder names in label order; empty: not known, and not compared

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

    def started_from(self, sha256: str | None) -> Identity:
        """The identity of a run that starts from weights, once their hash is known; of any other run, this one."""
        model = self.config.get("model", {})
        if model.get("weights") is None or model["weights_sha256"] is not None:
            return self
        config = {**self.config, "model": {**model, "weights_sha256": sha256}}
        return replace(self, config=config, config_digest=config_digest(config, self.world_size))

    def differences(self, manifest: Manifest) -> list[str]:
        """The keys that make a checkpoint another recipe's, one line per key."""
        lines = differing_keys(self.config, manifest.config, self.world_size, manifest.world_size)
        return [line.replace(": here ", ": now ", 1).replace(", there ", ", in the checkpoint ", 1) for line in lines]

    def require_same(self, manifest: Manifest, location: str) -> None:
        """Raise InputError for a checkpoint of another run or recipe: one line, and one for each key that differs."""
        instead = "choose another checkpoints.folder, or the run_name of that run"
        _require_run(self.run_name, manifest, location, instead)
        self.require_same_recipe(manifest, location)

    def require_same_recipe(self, manifest: Manifest, location: str) -> None:
        """As `require_same`, but for any run name."""
        again = "to start again, choose another run_name"
        own = self.started_from(starting_sha256(manifest))  # a resume does not read the weights it started from
        if manifest.config_digest != own.config_digest:
            raise InputError(
                f"{location}: {manifest.stem} was made by another recipe; to resume from it, change these keys back; "
                f"{again}:",
                *(f"  {line}" for line in own.differences(manifest)),
            )
        here, there, different = self.train_images, manifest.train_images, None
        if None not in (here, there) and here != there:
            different = f"holds {here} training images, {manifest.stem} at {location} was trained on {there}"
        elif self.classes and manifest.classes and self.classes != manifest.classes:
            different = (
                f"holds {len(self.classes)} classes, and not the {len(manifest.classes)} that {manifest.stem} at "
                f"{location} was trained on"
            )
        if different:
            raise InputError(f"data.path: {different}; to resume from it, use the same data; {again}")


def starting_sha256(manifest: Manifest) -> str | None:
    """The hash of the weights from which a checkpoint's run started; None if it started from random ones."""
    model = manifest.config.get("model")
    found = model.get("weights_sha256") if isinstance(model, Mapping) else None
    return found if isinstance(found, str) else None


def _require_run(run_name: str, manifest: Manifest, location: str, instead: str) -> None:
    if manifest.run_name != run_name:
        raise InputError(f"{location}: holds checkpoints of run {manifest.run_name!r}, not of {run_name!r}; {instead}")


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
        publish(into, manifest, lambda: into.put(file.name, [memoryview(data)]))
    return content


def find_named(path: str, key: str) -> tuple[Store, Manifest]:
    """The checkpoint that a user names: its file, its manifest, or a folder, meaning its newest; on disk or `s3://`.

    InputError, with the user's `key`: there is no such checkpoint, or its manifest is damaged.
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
    try:
        return store, load_manifest(store, wanted[0])
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
        _require_run(run_name, manifest, location, "name a checkpoint with --checkpoint")

    try:
        if checkpoint is not None:
            return load_named(checkpoint, key)
        stores = places.stores()
        found, skipped = newest_good({store: survey(store) for store in stores}, require, into=None)
    except StoreError as error:
        raise InputError(str(error)) from None
    lines = {stem: f"checkpoint {stem} skipped: {reason}" for stem, reason in skipped.items()}
    if found is not None:
        newer = [line for stem, line in lines.items() if position_of(stem) > found.manifest.order]
        return replace(found, skipped=tuple(newer))
    if lines:
        raise InputError(*lines.values(), f"{locations(stores)}: no good checkpoint of run {run_name!r}")
    message = f"no checkpoint of run {run_name!r}; train it, or name one with --checkpoint"
    raise InputError(f"{locations(stores)}: {message}")


def locations(stores: Sequence[Store]) -> str:
    """The addresses of some stores, for display."""
    return " and ".join(store.location for store in stores)
