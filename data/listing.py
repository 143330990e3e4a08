"""Which images lie in a folder of class folders: read from the disk once, then from an index that is checked.

Listing a million files takes seconds on a local disk and minutes on a network's. The index names every folder with
its times of change and its size: a file added, removed or renamed changes its folder's, so looking at the folders is
enough, a thousandth of the work. It lies beside the split as `.SPLIT.index`, or, where that cannot be written, in the
user's cache folder. Where folders do not show that they changed, as in a mounted bucket, no index is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.files import open_regular
from data.text import escape

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif")
"""Files with these endings, in either case, are images: torchvision's list (`torchvision/datasets/folder.py`), .gif
and .jfif. What a file really holds is found out when it is decoded."""

INDEXED_FROM = 10_000
"""Images from which an index is written; fewer are listed in a blink."""

_FORMAT = "composer-resnet-index/2"
_LONGEST_HEAD = 2**28
"""Bytes of an index's first line at most."""
_NOTES = 10
"""Folders that were passed over and are named; the others are counted."""
_SETTLED = 2.0
"""Seconds that a folder must have been left alone for its time of change to be trusted: the coarsest clock of a file
system in use."""

_Change = tuple[int, int, int, int]
"""Times at which a folder's entries (mtime) and anything about it (ctime, which no copying restores) changed, in ns;
its size and its number of links, which change with its entries on many file systems."""

log = logging.getLogger(__name__)


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
    notes: list[str]
    """Folders that were passed over, one line each with the reason."""


def list_images(path: Path) -> Listing:
    """List a split; folders that are passed over are named in the log.

    Args:
        path: the split's folder.

    Raises:
        DataError: the folder is missing or cannot be read.
    """
    found = _from_index(path) or _from_disk(path)
    for note in found.notes[:_NOTES]:
        log.warning("%s", note)
    if len(found.notes) > _NOTES:
        log.warning("%s: %d more folders were not listed", escape(str(path)), len(found.notes) - _NOTES)
    return found


def class_folders(path: Path) -> list[str]:
    """Names of the class folders, sorted; passed over are those that begin with a dot and links to a parent folder.

    Raises:
        DataError: the folder is missing or cannot be read.
    """
    return _class_folders(path)[0]


def _class_folders(path: Path) -> tuple[list[str], list[str]]:
    """Names of the class folders, and what is to be said of others."""
    place, names, notes = os.path.realpath(path), [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not _is_folder(entry):
                    continue
                if entry.is_symlink() and _holds(target := os.path.realpath(entry.path), place):
                    notes.append(_loop(entry.path, target))
                else:
                    names.append(entry.name)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    return sorted(names), sorted(notes)


def walk(root: str) -> tuple[dict[str, tuple[_Change, list[str]]], list[str]]:
    """The images in a folder and the folders in it, links followed.

    Whatever has an image's name counts as one: that it is a pipe, a folder or a link to nowhere is found out when it is
    read. Names that begin with a dot are passed over. Each folder is listed once, however many links lead to it, and a
    link to a folder that it lies in is not followed, so that the listing ends.

    Args:
        root: the folder.

    Returns:
        (for each folder from `root` on its times of change and the names of the images in it; why others are not
        there, one line each).
    """
    found: dict[str, tuple[_Change, list[str]]] = {}
    notes: list[str] = []
    top = os.path.realpath(root)
    listed: set[str] = set()
    waiting = [(False, root, top)]  # (reached by a link: those come last; path; where it really is)
    while waiting:
        _, folder, place = heapq.heappop(waiting)
        if place in listed:
            notes.append(escape(f"{folder}: not listed: it leads to {place}, which is listed already"))
            continue
        listed.add(place)
        names: list[str] = []
        try:
            found[folder] = _change(folder), names
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.name.lower().endswith(EXTENSIONS):
                        names.append(entry.name)
                    elif _is_folder(entry):
                        linked = entry.is_symlink()
                        target = os.path.realpath(entry.path) if linked else os.path.join(place, entry.name)  # noqa: PTH118
                        if linked and (_holds(target, place) or _holds(target, top)):
                            notes.append(_loop(entry.path, target))
                        else:
                            heapq.heappush(waiting, (linked, entry.path, target))
        except OSError as error:
            notes.append(escape(f"{folder}: cannot be listed: {error.strerror or error}"))
    return found, sorted(notes)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or where nobody may look
        return False


def _holds(folder: str, place: str) -> bool:
    """Whether a folder is another or a parent of it, both without links."""
    return os.path.commonpath([folder, place]) == folder


def _loop(link: str, target: str) -> str:
    return escape(f"{link}: not followed: it is a link to {target}, a folder that it lies in")


def _from_disk(path: Path) -> Listing:
    """The listing, kept in an index where that will tell when it is out of date."""
    began = time.time()
    found, folders = _scan(path)
    latest = max((max(change[:2]) for change in folders.values()), default=0) / 1e9
    if len(found.ends) < INDEXED_FROM or not 0 < latest < began - _SETTLED or not _differ(folders.values()):
        return found
    beside, *elsewhere = _places(path)
    try:
        before = _change(os.fspath(beside.parent))
        _write(beside, found, folders)
        if _change(os.fspath(beside.parent)) == before:  # a folder here does not show that it was changed
            beside.unlink()
    except OSError:
        for file in elsewhere if not _is_fuse(path) else []:
            with contextlib.suppress(OSError):
                _write(file, found, folders)
    return found


def _differ(changes: Collection[_Change]) -> bool:
    """Whether folders changed at different times: else it is the time of the mount that they show."""
    return len({change[:2] for change in changes}) > 1


def _is_fuse(path: Path) -> bool:
    """Whether a folder's file system is a program's, as those of mounted buckets are (Linux)."""
    device = os.stat(path).st_dev  # noqa: PTH116
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
        number = f"{os.major(device)}:{os.minor(device)}"
        return any(line.split()[2] == number and " - fuse" in line for line in mounts)
    return False


def _scan(path: Path) -> tuple[Listing, dict[str, _Change]]:
    """The listing, and when each folder under `path` had changed before it was listed."""
    folders: dict[str, _Change] = {}
    with contextlib.suppress(OSError):  # _class_folders says what is wrong
        folders[""] = _change(os.fspath(path))
    classes, notes = _class_folders(path)
    files: list[bytes] = []
    counts = []
    for name in classes:
        before = len(files)
        root = os.path.join(path, name)  # noqa: PTH118 (Path costs more than the rest)
        inside, passed_over = walk(root)
        notes += passed_over
        for folder in sorted(inside):
            change, names = inside[folder]
            below = os.path.relpath(folder, root)
            folders[name if below == os.curdir else f"{name}/{below}"] = change
            files.extend(os.fsencode(one if below == os.curdir else f"{below}/{one}") for one in sorted(names))
        counts.append(len(files) - before)
    ends = np.cumsum([len(file) for file in files], dtype=np.int64)
    listed = np.frombuffer(b"".join(files), dtype=np.uint8)
    return Listing(classes, np.array(counts, dtype=np.int64), ends, listed, notes), folders


def _change(folder: str) -> _Change:
    status = os.stat(folder)  # noqa: PTH116
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_nlink


def _places(path: Path) -> list[Path]:
    """Where a split's index may lie, the best place first."""
    whole = Path(os.path.realpath(path))
    places = [whole.parent / f".{whole.name}.index"]
    with contextlib.suppress(RuntimeError):  # a user may have no home folder
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "composer-resnet"
        places.append(user / f"{hashlib.sha256(os.fsencode(whole)).hexdigest()[:32]}.index")
    return places


def _from_index(path: Path) -> Listing | None:
    """The listing in the first index that is true; None where none is."""
    for file in _places(path):
        with contextlib.suppress(Exception):  # whatever a damaged index may raise
            return _read(file, path)
    return None


def _checksum(names: Any, ends: Any, rest: Sequence[Any]) -> int:
    return zlib.crc32(names, zlib.crc32(ends, zlib.crc32(json.dumps(rest).encode())))


def _write(file: Path, listing: Listing, folders: dict[str, _Change]) -> None:
    """Write an index whole or not at all: a line of JSON, then the ends and the names."""
    ends, names = listing.ends.astype("<i8").tobytes(), listing.names.tobytes()
    counts = listing.counts.tolist()
    head = {
        "format": _FORMAT,
        "crc32": _checksum(names, ends, [listing.classes, counts, listing.notes]),
        "images": len(listing.ends),
        "names": len(names),
        "classes": listing.classes,
        "counts": counts,
        "notes": listing.notes,
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
    with os.fdopen(open_regular(file), "rb") as lines:
        line = lines.readline(_LONGEST_HEAD)
        whole = np.memmap(lines, dtype=np.uint8, mode="r").view(np.ndarray)
    head: dict[str, Any] = json.loads(line)
    ends = whole[len(line) : len(line) + 8 * head["images"]]
    names = whole[len(line) + 8 * head["images"] :]
    crc32 = _checksum(names.data, ends.data, [head["classes"], head["counts"], head["notes"]])
    if head["format"] != _FORMAT or len(names) != head["names"] or crc32 != head["crc32"]:
        raise ValueError(f"{file}: damaged")
    root = os.fspath(path)
    for folder, change in head["folders"].items():
        if _change(f"{root}/{folder}" if folder else root) != tuple(change):
            raise ValueError(f"{file}: {folder} has changed")
    counts = np.array(head["counts"], dtype=np.int64)
    return Listing(head["classes"], counts, ends.view("<i8"), names, head["notes"])
