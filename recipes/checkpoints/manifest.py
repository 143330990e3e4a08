"""What a checkpoint is, beside its bytes: a small JSON without which it does not count as one."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

SUFFIX = ".safetensors"
"""Of a checkpoint's data; its manifest has the same name with `.json`."""
_STEM = re.compile(r"^ep[0-9]{3,9}-ba[0-9]{6,12}$")
_MAX_BYTES = 4 * 2**20
"""Of a manifest: far beyond what 20,000 class names need; below `SMALL` of store.py."""
_CHUNK = 4 * 2**20


class DamagedError(Exception):
    """A checkpoint is not what its manifest says, or its manifest is none; the text says in what."""


class Position(NamedTuple):
    """How far a run has come; `batch` and `samples` count over the whole run and all devices."""

    epoch: int
    batch_in_epoch: int
    batch: int
    samples: int


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    size: Annotated[int, Field(ge=1)]
    """Bytes."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """A complete checkpoint: its files, whose it is, and where in the run it was taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = 2
    run_name: str
    config_digest: str
    config: dict[str, Any]
    """The resolved keys that determine the result, to show which differ when another recipe's run finds this."""
    classes: tuple[str, ...] = ()
    """Class folder names in label order: what the classifier's outputs mean; empty where it was not recorded."""
    epoch: Annotated[int, Field(ge=0)]
    batch_in_epoch: Annotated[int, Field(ge=0)]
    batch: Annotated[int, Field(ge=0)]
    samples: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(ge=1)]
    train_images: int | None = None
    """Images of the training set; checkpoints of older versions do not say."""
    top1: float | None = None
    """Top-1 accuracy in [0, 1] of an evaluation of just these weights, where there was one."""
    finished: bool = False
    created_at: str
    """UTC, ISO 8601."""
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=1)]

    @property
    def stem(self) -> str:
        """The name that the checkpoint's files share; it sorts by position."""
        return stem_of(self.epoch, self.batch)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts checkpoints of one run from the oldest to the newest."""
        return (self.batch, self.epoch)

    def to_json(self) -> bytes:
        """The manifest as it is stored, with a checksum of its own: a flipped bit must not make it another run's."""
        content = self.model_dump(mode="json")
        return (json.dumps({"manifest": content, "sha256": _checksum(content)}, indent=1) + "\n").encode()

    def describe(self) -> str:
        """Where in the run it was taken, for people."""
        return f"{self.stem} (after {position_in_words(self.epoch, self.batch_in_epoch)}, {self.samples:,} images)"


def position_in_words(epochs: int, batches: int) -> str:
    """`6 epochs`, `1 epoch and 30 batches` or `30 batches`: what is done, and the batches of the epoch begun."""
    parts = [f"{epochs} epoch{'s' * (epochs != 1)}"] if epochs or not batches else []
    parts += [f"{batches} batch{'es' * (batches != 1)}"] if batches else []
    return " and ".join(parts)


def stem_of(epoch: int, batch: int) -> str:
    """Name of a checkpoint without its suffix; `batch` counts over the whole run, so that names sort by position."""
    return f"ep{epoch:03d}-ba{batch:06d}"


def is_stem(text: str) -> bool:
    """Whether `text` can be a checkpoint's name without suffix."""
    return _STEM.fullmatch(text) is not None


def parse(text: bytes, stem: str) -> Manifest:
    """The manifest stored under `stem`.

    Raises:
        DamagedError: It is not JSON, not a manifest of this format, or another checkpoint's.
    """
    if len(text) > _MAX_BYTES:
        raise DamagedError(f"its manifest has {len(text)} bytes")
    try:
        stored = json.loads(text, parse_int=parse_int)
        if _checksum(stored["manifest"]) != stored["sha256"]:
            raise DamagedError("its manifest's SHA-256 is not the one in it")
        manifest = Manifest.model_validate(stored["manifest"])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedError(f"its manifest is unreadable: {where}: {first['msg']}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DamagedError("its manifest is unreadable") from None
    if manifest.stem != stem:
        raise DamagedError(f"its manifest is that of {manifest.stem}")
    if manifest.files[0].name != f"{stem}{SUFFIX}":
        raise DamagedError(f"its manifest names the file {manifest.files[0].name}")
    return manifest


def parse_int(text: str) -> int:
    """A whole number in somebody else's JSON, of a length that can be computed with and printed.

    Raises:
        ValueError: It has more than 40 digits.
    """
    if len(text) > 40:
        raise ValueError("a number of more than 40 digits")
    return int(text)


def _checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, entry: FileEntry) -> None:
    """Compare a file's size and SHA-256 with its manifest's, before anything parses it.

    Raises:
        DamagedError: The file is missing, shorter, longer, or has other bytes.
    """
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise DamagedError(f"{size} bytes instead of {entry.size}")
        if sha256_of(path) != entry.sha256:
            raise DamagedError("its SHA-256 is not the manifest's")
    except OSError as error:
        raise DamagedError(f"cannot be read: {error.strerror or error}") from None
