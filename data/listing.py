"""Which images lie in a folder of class folders: read from the disk once, then from an index that is checked.

Listing a million files takes seconds on a local disk and minutes on a network's. The index names every folder with
its times of change: a file added, removed or renamed changes its folder's, so looking at the folders is enough, a
thousandth of the work. It lies beside the split as `.SPLIT.index`, or, where that cannot be written, in the user's
cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif")
"""Files with these endings, in either case, are images: torchvision's list (`torchvision/datasets/folder.py`), .gif
and .jfif. What a file really holds is found out when it is decoded."""

INDEXED_FROM = 10_000
"""Images from which an index is written; fewer are listed in a blink."""

_FORMAT = "composer-resnet-index/1"
_SETTLED = 2.0
"""Seconds that a folder must have been left alone for its time of change to be trusted: the coarsest clock of a file
system in use."""

_Change = tuple[int, int]
"""Times at which a folder's entries (mtime) and anything about it (ctime, which no copying restores) changed, in ns."""


class Listing(NamedTuple):
    """The images of a split: classes by name, then folders inside a class by path, then files by name."""

    classes: list[str]
    """Names of the class folders."""
    counts: NDArray[np.int64]
    """Images of each class, int64."""
    ends: NDArray[np.int64]
    """Where each image's name ends in `names`, int64."""
    names: NDArray[np.uint8]
    """Paths relative to the class folder, one after the other, uint8."""


def list_images(path: Path) -> Listing:
    """List a split.

    Args:
        path: the split's folder.

    Raises:
        DataError: the folder is missing or cannot be read.
    """
    for file in _places(path):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # whatever a damaged index may raise
            return _read(file, path)
    began = time.time()
    found, folders = _scan(path)
    latest = max((change for times in folders.values() for change in times), default=0) / 1e9
    if len(found.ends) >= INDEXED_FROM and 0 < latest < began - _SETTLED:
        for file in _places(path):
            with contextlib.suppress(OSError):
                _write(file, found, folders)
                break
    return found


def class_folders(path: Path) -> list[str]:
    """Names of the class folders, sorted; those that begin with a dot are passed over.

    Raises:
        DataError: the folder is missing or cannot be read.
    """
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _scan(path: Path) -> tuple[Listing, dict[str, _Change]]:
    """The listing, and when each folder under `path` had changed before it was listed."""
    folders: dict[str, _Change] = {}
    with contextlib.suppress(OSError):  # class_folders says what is wrong
        folders[""] = _change(os.fspath(path))
    classes = class_folders(path)
    files: list[bytes] = []
    counts = []
    for name in classes:
        before = len(files)
        root = os.path.join(path, name)  # noqa: PTH118 (Path costs more than the rest)
        inside = _walk(root)
        for folder in sorted(inside):
            change, names = inside[folder]
            below = os.path.relpath(folder, root)
            folders[name if below == os.curdir else f"{name}/{below}"] = change
            files.extend(os.fsencode(one if below == os.curdir else f"{below}/{one}") for one in sorted(names))
        counts.append(len(files) - before)
    ends = np.cumsum([len(file) for file in files], dtype=np.int64)
    listed = np.frombuffer(b"".join(files), dtype=np.uint8)
    return Listing(classes, np.array(counts, dtype=np.int64), ends, listed), folders


def _walk(root: str) -> dict[str, tuple[_Change, list[str]]]:
    """Each folder from `root` on, links followed, with its times of change and the images in it."""
    found: dict[str, tuple[_Change, list[str]]] = {}
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        names: list[str] = []
        with contextlib.suppress(OSError):  # as os.walk: what cannot be listed has no images
            found[folder] = _change(folder), names
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                        names.append(entry.name)
    return found


def _change(folder: str) -> _Change:
    status = os.stat(folder)  # noqa: PTH116
    return status.st_mtime_ns, status.st_ctime_ns


def _places(path: Path) -> list[Path]:
    """Where a split's index may lie, the best place first; none in the home folder of a user who has no such."""
    whole = path.resolve()
    places = [whole.parent / f".{whole.name}.index"]
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry for this user number, as in containers
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "composer-resnet"
        places.append(user / f"{hashlib.sha256(os.fsencode(whole)).hexdigest()[:32]}.index")
    return places


def _write(file: Path, listing: Listing, folders: dict[str, _Change]) -> None:
    """Write an index whole or not at all: a line of JSON, then the ends and the names."""
    ends, names = listing.ends.astype("<i8").tobytes(), listing.names.tobytes()
    head = {
        "format": _FORMAT,
        "crc32": zlib.crc32(names, zlib.crc32(ends)),
        "images": len(listing.ends),
        "names": len(names),
        "classes": listing.classes,
        "counts": listing.counts.tolist(),
        "folders": folders,
    }
    line = json.dumps(head).encode()
    line += b" " * (-(len(line) + 1) % 8) + b"\n"  # so that the ends are aligned
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=file.name, suffix=".part", dir=file.parent)  # ranks may write at once
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.writelines((line, ends, names))
            os.fchmod(descriptor, 0o644)  # for the next user of the same images
        os.replace(partial, file)  # noqa: PTH105
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)  # noqa: PTH108
        raise


def _read(file: Path, path: Path) -> Listing:
    """The listing in an index, mapped, so that ranks share it.

    Raises:
        OSError: there is none, or a folder has gone.
        ValueError: it is damaged, or a folder has changed.
    """
    whole = np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)
    with file.open("rb") as lines:
        line = lines.readline()
    head: dict[str, Any] = json.loads(line)
    ends = whole[len(line) : len(line) + 8 * head["images"]]
    names = whole[len(line) + 8 * head["images"] :]
    crc32 = zlib.crc32(names.data, zlib.crc32(ends.data))
    if head["format"] != _FORMAT or len(names) != head["names"] or crc32 != head["crc32"]:
        raise ValueError(f"{file}: damaged")
    root = os.fspath(path)
    for folder, change in head["folders"].items():
        if _change(f"{root}/{folder}" if folder else root) != tuple(change):
            raise ValueError(f"{file}: {folder} has changed")
    return Listing(head["classes"], np.array(head["counts"], dtype=np.int64), ends.view("<i8"), names)
