"""A checkpoint in a store: its data and a small JSON, the manifest, without which it does not count.

`ep003-ba000123.safetensors` and `ep003-ba000123.json`. While one is written or removed, `ep003-ba000123.json.tmp` marks
it, so that after a crash each checkpoint is either complete or visibly incomplete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from data.errors import InputError, StoreError
from recipes.checkpoints.store import DamagedError, Store
from recipes.config import RunConfig
from recipes.resolved import NO_EFFECT_ON_WEIGHTS, config_digest, differing_keys

SUFFIX = ".safetensors"  # suffix of a checkpoint's data; its manifest has the same name with `.json`
_STEM = re.compile(r"^ep[0-9]{3,9}-ba[0-9]{6,12}$")
_MAX_BYTES = 4 * 2**20
"""Limit of a manifest's size: far more than 20,000 class names need; below `SMALL` of store.py."""


class FileEntry(BaseModel):
    """One file of a checkpoint; `size` in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    size: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Identity(BaseModel):
    """What a run's checkpoints must match: its name, and the digest of the keys that determine its result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_name: str
    config_digest: str
    config: dict[str, Any]
    """The resolved keys that determine the result, to show which differ when a run with another recipe finds this."""
    classes: tuple[str, ...] = ()
    """Class folder names in label order: what the classifier's outputs mean; empty where it was not recorded."""
    world_size: Annotated[int, Field(ge=1)]
    train_images: int | None = None
    """Images in the training set, which may move but must not change; None in checkpoints of older versions."""

    @classmethod
    def of(
        cls, config: RunConfig, world_size: int, train_images: int | None = None, classes: Sequence[str] = ()
    ) -> Identity:
        """The identity of a run of `world_size` processes."""
        # Whole sections, because `loggers` may hold API keys.
        sections = {key for key in NO_EFFECT_ON_WEIGHTS if "." not in key}
        return cls(
            run_name=config.run_name,
            config_digest=config_digest(config, world_size),
            config=config.model_dump(mode="json", exclude=sections),
            classes=tuple(classes),
            world_size=world_size,
            train_images=train_images,
        )

    def started_from(self, sha256: str | None) -> Identity:
        """The identity of a run that starts from weights, once their hash is known; of any other run, this one."""
        model = self.config.get("model", {})
        if model.get("weights") is None or model["weights_sha256"] is not None:
            return self
        config = {**self.config, "model": {**model, "weights_sha256": sha256}}
        digest = config_digest(config, self.world_size)
        return self.model_copy(update={"config": config, "config_digest": digest})

    def require_same(self, manifest: Manifest, location: str) -> None:
        """Raise InputError for a checkpoint of another run or recipe: one line, and one for each key that differs."""
        require_run(self.run_name, manifest, location, "choose another checkpoints.folder, or the run_name of that run")
        self.require_same_recipe(manifest, location)

    def require_same_recipe(self, manifest: Manifest, location: str) -> None:
        """As `require_same`, but for any run name."""
        again = "to start again, choose another run_name"
        own = self.started_from(manifest.started_from_sha256)  # a resume does not read the weights it started from
        if manifest.config_digest != own.config_digest:
            keys = differing_keys(own.config, manifest.config, own.world_size, manifest.world_size)
            raise InputError(
                f"{location}: {manifest.stem} was made by another recipe; to resume from it, change these keys back; "
                f"{again}:",
                *("  " + key.replace(": here ", ": now ").replace(", there ", ", in the checkpoint ") for key in keys),
            )
        here, there = self.train_images, manifest.train_images
        different = ""
        if None not in (here, there) and here != there:
            different = f"{here} training images, {manifest.stem} at {location} was trained on {there}"
        elif self.classes and manifest.classes and self.classes != manifest.classes:
            theirs = f"{len(manifest.classes)} that {manifest.stem} at {location} was trained on"
            different = f"{len(self.classes)} classes, and not the {theirs}"
        if different:
            raise InputError(f"data.path: holds {different}; to resume from it, use the same data; {again}")


class Manifest(Identity):
    """A complete checkpoint: its file, whose it is, and where in the run it was taken."""

    format_version: Literal[2] = 2
    epoch: Annotated[int, Field(ge=0)]
    """Complete epochs; `batch` and `samples` count over the whole run and all devices."""
    batch_in_epoch: Annotated[int, Field(ge=0)]
    batch: Annotated[int, Field(ge=0)]
    samples: Annotated[int, Field(ge=0)]
    top1: float | None = None  # Top-1 accuracy in [0, 1] of an evaluation of exactly these weights, if there was one
    finished: bool = False
    created_at: str  # UTC, ISO 8601
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=1)]

    @property
    def started_from_sha256(self) -> str | None:
        """The hash of the weights from which its run started; None if it started from random ones."""
        model = self.config.get("model")
        found = model.get("weights_sha256") if isinstance(model, Mapping) else None
        return found if isinstance(found, str) else None

    @property
    def file(self) -> FileEntry:
        """The checkpoint's data."""
        return self.files[0]

    @property
    def stem(self) -> str:
        """The name that the checkpoint's files share."""
        return stem_of(self.epoch, self.batch)

    def to_json(self) -> bytes:
        """The manifest as stored, with its own checksum: a flipped bit must not make it another run's."""
        content = self.model_dump(mode="json")
        return (json.dumps({"manifest": content, "sha256": _checksum(content)}, indent=1) + "\n").encode()

    def describe(self) -> str:
        """Its position in the run, for display."""
        return f"{self.stem} (after {position_in_words(self.epoch, self.batch_in_epoch)}, {self.samples:,} images)"


def require_run(run_name: str, manifest: Manifest, location: str, instead: str) -> None:
    """Raise InputError for another run's checkpoint; `instead` says what the user may do."""
    if manifest.run_name != run_name:
        raise InputError(f"{location}: holds checkpoints of run {manifest.run_name!r}, not of {run_name!r}; {instead}")


def position_in_words(epochs: int, batches: int) -> str:
    """`6 epochs`, `1 epoch and 30 batches` or `30 batches`: complete epochs, and batches of the current one."""
    parts = [f"{epochs} epoch{'s' * (epochs != 1)}"] if epochs or not batches else []
    parts += [f"{batches} batch{'es' * (batches != 1)}"] if batches else []
    return " and ".join(parts)


def stem_of(epoch: int, batch: int) -> str:
    """Name of a checkpoint without its suffix; `batch` counts over the whole run."""
    return f"ep{epoch:03d}-ba{batch:06d}"


def is_stem(text: str) -> bool:
    """Whether `text` can be a checkpoint's name without suffix."""
    return _STEM.fullmatch(text) is not None


def position_of(stem: str) -> tuple[int, int]:
    """(batch, epoch) of a stem, by which the stems of one run sort from the oldest to the newest."""
    epoch, _, batch = stem.partition("-ba")
    return (int(batch), int(epoch.removeprefix("ep")))


def parse_int(text: str) -> int:
    """An integer in untrusted JSON; ValueError beyond 40 digits, which take long to compute with."""
    if len(text) > 40:
        raise ValueError("a number of more than 40 digits")
    return int(text)


def parse_manifest(text: bytes, stem: str) -> Manifest:
    """The manifest stored under `stem`; `DamagedError` if it is malformed, or another checkpoint's."""
    if len(text) > _MAX_BYTES:
        raise DamagedError(f"its manifest has {len(text)} bytes")
    try:
        stored = json.loads(text, parse_int=parse_int)
        if _checksum(stored["manifest"]) != stored["sha256"]:
            raise DamagedError("its manifest's SHA-256 differs from the one stored in it")
        manifest = Manifest.model_validate(stored["manifest"])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedError(f"its manifest is unreadable: {where}: {first['msg']}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DamagedError("its manifest is unreadable") from None
    if manifest.stem != stem:
        raise DamagedError(f"its manifest is that of {manifest.stem}")
    if manifest.file.name != f"{stem}{SUFFIX}":
        raise DamagedError(f"its manifest names the file {manifest.file.name}")
    return manifest


def load_manifest(store: Store, stem: str) -> Manifest:
    """A checkpoint's manifest; `DamagedError` if it is missing or unreadable."""
    try:
        return parse_manifest(store.read(f"{stem}.json"), stem)
    except FileNotFoundError:
        raise DamagedError("its manifest is missing") from None


def _checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Listing(NamedTuple):
    """The checkpoints in a store, judged by file names alone: stems, from the oldest to the newest."""

    complete: tuple[str, ...]  # with data and manifest (neither was read)
    incomplete: tuple[str, ...]
    """Left by a process that died while writing or removing them: nothing is lost with them."""
    torn: tuple[str, ...]  # data without manifest or manifest without data, although writing had ended


def survey(store: Store) -> Listing:
    """Sort a store's files into checkpoints."""
    names = store.entries().keys()
    stems = sorted({name.split(".")[0] for name in names if is_stem(name.split(".")[0])}, key=position_of)
    data = {stem for stem in stems if f"{stem}{SUFFIX}" in names}
    manifests = {stem for stem in stems if f"{stem}.json" in names}
    incomplete = {stem for stem in stems if f"{stem}.json.tmp" in names} - manifests
    groups = (data & manifests, incomplete, (data ^ manifests) - incomplete)
    return Listing(*(tuple(stem for stem in stems if stem in group) for group in groups))


def publish(store: Store, manifest: Manifest, put_data: Callable[[], None]) -> None:
    """Add a checkpoint to a store: mark it incomplete, put its data, put its manifest, remove the mark.

    Without the mark, incomplete data would look like a checkpoint whose manifest was lost.
    """
    stem, text = manifest.stem, manifest.to_json()
    store.put(f"{stem}.json.tmp", text)
    store.delete([f"{stem}.json"])
    put_data()
    store.put(f"{stem}.json", text)
    store.delete([f"{stem}.json.tmp"])


def remove(store: Store, stems: Iterable[str]) -> None:
    """Remove checkpoints."""
    for stem in stems:
        # The mark first and the manifest before the data: a crash in between leaves it visibly incomplete.
        with suppress(StoreError):  # There may be no room even for the mark; then the order alone must suffice.
            store.put(f"{stem}.json.tmp", b"{}")
        store.delete([f"{stem}.json", f"{stem}{SUFFIX}", f"{stem}.json.tmp"])


def prune(store: Store, keep: int, *, protect: Collection[str] = (), ignore: Collection[str] = ()) -> list[str]:
    """Remove complete checkpoints except the newest `keep` and the best by top-1, and torn ones before the newest.

    `protect`: stems that stay whatever their age, such as one being uploaded. `ignore`: stems known to be damaged,
    which are neither counted nor removed. Returns the stems that were removed.
    """
    listing, manifests = survey(store), []
    for stem in listing.complete:
        with suppress(DamagedError):
            if stem not in ignore:
                manifests.append(load_manifest(store, stem))
    if not manifests:
        return []
    # Of equally good ones, the newest.
    best = max(reversed(manifests), key=lambda manifest: -1.0 if manifest.top1 is None else manifest.top1)
    known = [manifest.stem for manifest in manifests]
    stay = {*known[-keep:], best.stem, *protect, *ignore}
    left = [stem for stem in (*listing.incomplete, *listing.torn) if position_of(stem) < position_of(known[-1])]
    removed = [stem for stem in (*known, *left) if stem not in stay]
    remove(store, removed)
    return removed
