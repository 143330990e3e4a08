"""Where checkpoints lie: one small interface, and the local folder behind it (s3.py has the bucket)."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from data.files import open_regular
from data.text import escape

SMALL = 8 * 2**20
"""Bytes that are read of a manifest or a note, whatever lies in its place."""


class StoreError(Exception):
    """The store did not do what it was asked; the text is for people and holds no credentials.

    Args:
        message: What happened, and where.
        mistake: Waiting will not help: the bucket is missing, the credentials are wrong or lack a permission.
    """

    def __init__(self, message: str, *, mistake: bool = False) -> None:
        super().__init__(escape(message))
        self.mistake = mistake


class Entry(NamedTuple):
    """A file in a store; `size` in bytes."""

    name: str
    size: int


class Store(Protocol):
    """A flat set of named files. `put` is atomic: a name shows either the whole file or nothing.

    Every method raises `StoreError`; `read`, `size` and `fetch` raise `FileNotFoundError` for a name that is not there,
    and `delete` is silent about one.
    """

    location: str

    def entries(self) -> list[Entry]:
        """All files."""

    def read(self, name: str) -> bytes:
        """The first `SMALL` bytes of a file: all of one that is as small as it should be."""

    def size(self, name: str) -> int:
        """A file's size in bytes."""

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to `path`, through a temporary name."""

    def put(self, name: str, source: bytes | Sequence[memoryview] | Path) -> None:
        """Write a file from memory, in one piece or several, or from a local file."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove files."""


class LocalStore:
    """A folder, made when something is first put into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def path(self, name: str) -> Path:
        """Where the file of this name is or would be."""
        return self.folder / name

    def entries(self) -> list[Entry]:
        """The folder's files, without those that are still being written; none if there is no folder."""
        found = []
        try:
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # it was a file of a moment
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode) and not path.name.startswith("."):
                        found.append(Entry(path.name, status.st_size))
            return sorted(found)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _failed(self.folder, error) from None

    def read(self, name: str) -> bytes:
        """The first `SMALL` bytes of a file."""
        try:
            with os.fdopen(open_regular(self.path(name)), "rb") as file:
                return file.read(SMALL)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _failed(self.path(name), error) from None

    def size(self, name: str) -> int:
        """A file's size in bytes."""
        try:
            return self.path(name).stat().st_size
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _failed(self.path(name), error) from None

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to `path`."""
        partial = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            shutil.copyfile(self.path(name), partial)
            partial.replace(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _failed(self.path(name), error) from None

    def put(self, name: str, source: bytes | Sequence[memoryview] | Path) -> None:
        """Write to a temporary name, sync, rename, sync the folder: after a power cut it is whole or not there."""
        partial = self.path(f".{name}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.unlink(missing_ok=True)  # a link would lead elsewhere, a pipe block for ever
                with partial.open("xb") as file:
                    if isinstance(source, Path):
                        with source.open("rb") as original:
                            shutil.copyfileobj(original, file, 4 * 2**20)
                    else:
                        file.writelines([source] if isinstance(source, bytes) else source)
                    file.flush()
                    sync(file.fileno())
                partial.replace(self.path(name))
            except OSError:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
            sync_folder(self.folder)
        except OSError as error:
            raise _failed(self.path(name), error) from None

    def delete(self, names: Iterable[str]) -> None:
        """Remove files."""
        for name in names:
            try:
                self.path(name).unlink(missing_ok=True)
            except OSError as error:
                raise _failed(self.path(name), error) from None

    def sweep(self) -> None:
        """Remove what writers that died left half written; call it when no writer is alive."""
        with contextlib.suppress(OSError):
            for left in self.folder.glob(".*.part"):
                left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # A folder may be writable and not readable.
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """`fsync`, where the file system has it: CIFS, shared folders of virtual machines and many FUSE ones do not.

    Raises:
        OSError: The disk failed or is full.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}:
            raise


def _failed(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: {error.strerror or error}")
