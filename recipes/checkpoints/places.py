"""From the config's `checkpoints.folder` and `resume` to where they point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recipes.checkpoints.manifest import is_stem
from recipes.checkpoints.s3 import S3Store, open_s3
from recipes.checkpoints.store import LocalStore, Store
from recipes.errors import InputError

CHECKPOINTS = "checkpoints"
"""Of a run's folder: where they pass through on their way to a bucket."""


@dataclass(frozen=True)
class Places:
    """Where a run's checkpoints lie."""

    local: Path
    """Always: what goes to a bucket passes through it, and a restart on the same machine needs no download."""
    remote: str | None
    """`s3://bucket/prefix`, if there is a bucket."""
    run_folder: Path
    """The run's folder, whose logs go to the bucket too."""

    @classmethod
    def of(cls, folder: str, runs_folder: str, run_name: str) -> Places:
        """The places of a run.

        Args:
            folder: `checkpoints.folder`; its placeholders {runs_folder} and {run_name} are filled in.
            runs_folder: Where all runs' folders are.
            run_name: The run's name, and its folder's.
        """
        filled, run_folder = folder.format(runs_folder=runs_folder, run_name=run_name), Path(runs_folder) / run_name
        if filled.startswith("s3://"):
            return cls(run_folder / CHECKPOINTS, filled.rstrip("/"), run_folder)
        return cls(Path(filled), None, run_folder)

    @property
    def opener(self) -> Callable[[], S3Store] | None:
        """Opens the bucket, if there is one."""
        return None if self.remote is None else open_s3(self.remote)


def named(path: str, key: str = "resume") -> tuple[Store, str | None]:
    """A checkpoint as the user names it: its file, its manifest, or the folder that holds it, on disk or in a bucket.

    Args:
        path: What the user wrote ...
        key: ... and where, for messages.

    Returns:
        The store, and the checkpoint's stem there; None for the stem: the newest.

    Raises:
        InputError: There is no such file or folder.
        StoreError: The bucket cannot be opened.
    """
    place, _, name = path.rstrip("/").rpartition("/")
    stem = name.split(".")[0]
    if path.startswith("s3://"):
        return (S3Store(place), stem) if is_stem(stem) else (S3Store(path.rstrip("/")), None)
    folder = Path(path)
    if folder.is_dir():
        inside = folder / CHECKPOINTS
        return LocalStore(inside if inside.is_dir() else folder), None
    if not folder.exists():
        raise InputError(f"{key}: {path} does not exist; name a checkpoint (ep003-ba000123.safetensors) or its folder")
    if not is_stem(stem):
        raise InputError(f"{key}: {path} is not a checkpoint of this program (such as ep003-ba000123.safetensors)")
    return LocalStore(folder.parent), stem
