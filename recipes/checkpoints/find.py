"""Where a run starts or resumes, and every other search for a checkpoint that is complete, verified, and this run's.

`find_resume`, on process 0: how the run begins (`_begin`), then what the disk and the bucket hold (`survey`), then the
newest checkpoint of which one has a good copy (`newest_good`), read and verified. All other processes get its bytes.

`resume=X` and `autoresume=false` set how a run begins. Once it has begun that way, the same command resumes from the
run's own newest state. Checkpoints of this run name and recipe from a run that began otherwise are replaced, on disk
and in the bucket.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from composer.utils import dist

from data.errors import InputError
from data.files import is_remote
from recipes.checkpoints.claim import on_first
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import Listing, Manifest, is_stem, load_manifest, position_of, publish, remove, survey
from recipes.checkpoints.store import (
    CHECKPOINTS,
    LOGS,
    RECORD,
    SMALL,
    DamagedError,
    LocalStore,
    Places,
    S3Store,
    Store,
    StoreError,
    retry,
)
from recipes.checkpoints.upload import restore_logs
from recipes.config import RunConfig, seconds
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


# --- where a run resumes --------------------------------------------------------------------------------------------


def find_resume(config: RunConfig, places: Places, identity: Identity) -> Resume:
    """Decide where the run starts or resumes; every process calls this and gets the same answer.

    InputError, on every process: a checkpoint of another recipe; none that can be used; a store cannot be reached.
    """
    local, content = LocalStore(places.local), None

    def decide() -> Resume:
        nonlocal content
        resume = _resume(config, places, identity)
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


def _resume(config: RunConfig, places: Places, identity: Identity) -> Resume:
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
        bucket.probe()
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
    instead = "" if found is None else f"; resuming from {found.manifest.describe()}"
    for stem, reason in skipped.items():
        log.warning("checkpoint %s skipped: %s%s", stem, reason, instead)
    for stem in (stem for listing in listings.values() for stem in listing.incomplete):
        log.warning("checkpoint %s was started but never completed", stem)
    if found is None and skipped and not restart:
        raise InputError(
            *(f"checkpoint {stem}: {reason}" for stem, reason in skipped.items()),
            f"{_locations(stores)}: checkpoints of {identity.run_name} exist, but none can be used; repair them, "
            "choose another run_name, or start from scratch with checkpoints.restart=true",
        )
    return found, skipped


# --- how a run begins -----------------------------------------------------------------------------------------------


def _begins_anew(config: RunConfig, stores: Sequence[Store]) -> bool:
    """Whether this command begins a new run, instead of resuming one that it began."""
    how, latest = _how(config), max(filter(None, map(_recorded, stores)), default=None)
    if not how or latest is None or latest[1] != how:
        return bool(how)
    return bool(config.algorithms.not_resumable) and not any(map(_is_finished, stores))


def _how(config: RunConfig) -> str:
    """The part of the command that decides where the run begins; empty if it resumes from any checkpoint."""
    if config.resume is not None:
        return f"resume={config.resume}"
    return "" if config.autoresume else "autoresume=false"


def _recorded(store: Store) -> tuple[str, str] | None:
    """When (UTC, ISO 8601) and how a store's checkpoints began; None if it has no record or no checkpoints."""
    if any(survey(store)[:3]):
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
    found = [_recorded(store) for store in stores]
    known = sorted(filter(None, found))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    record = (now, how) if again or not known else known[-1]
    older = [store for store, one in zip(stores, found, strict=True) if again or one not in (None, record)]
    if older and not (how or config.checkpoints.restart):
        raise InputError(
            f"{_locations(stores)}: hold checkpoints of two runs named {identity.run_name}, started "
            f"{' and '.join(at for at, _ in known)}; remove one of them, choose another run_name, or let the later one "
            "replace the earlier with checkpoints.restart=true"
        )
    # Going back to one of the run's own checkpoints keeps it and those before it.
    back = named is not None and named[0].location in [store.location for store in stores]
    last = named[1].order if named is not None and back else (-1, -1)
    replaced = [(store, stem) for store in older for stem in sum(survey(store)[:3], ()) if position_of(stem) > last]
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


# --- the newest good checkpoint, or a named one ---------------------------------------------------------------------


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


def load_checkpoint(places: Places, run_name: str, checkpoint: str | None) -> Found:
    """A checkpoint to read, not to resume from: nothing is written to the run's folder or its bucket.

    InputError: the named checkpoint does not exist, or (None) the run has no good one; or a store cannot be read.
    """

    def require(manifest: Manifest, location: str) -> None:
        _require_run(run_name, manifest, location, "name a checkpoint with --checkpoint")

    try:
        if checkpoint is not None:
            return load_named(checkpoint, "--checkpoint")
        stores = places.stores()
        found, skipped = newest_good({store: survey(store) for store in stores}, require, into=None)
    except StoreError as error:
        raise InputError(str(error)) from None
    lines = {stem: f"checkpoint {stem} skipped: {reason}" for stem, reason in skipped.items()}
    if found is not None:
        newer = [line for stem, line in lines.items() if position_of(stem) > found.manifest.order]
        return replace(found, skipped=tuple(newer))
    if lines:
        raise InputError(*lines.values(), f"{_locations(stores)}: no good checkpoint of run {run_name!r}")
    message = f"no checkpoint of run {run_name!r}; train it, or name one with --checkpoint"
    raise InputError(f"{_locations(stores)}: {message}")


def _locations(stores: Sequence[Store]) -> str:
    return " and ".join(store.location for store in stores)
