"""Images in class folders: PATH/{train,val}/CLASS/IMAGE, the layout of ImageNet-1K and ImageNet-Mini."""

from __future__ import annotations

import errno
import heapq
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.decode import MAX_BYTES, BadImage, Fault
from data.errors import DataError
from data.files import NotRegularError, read_regular
from data.text import escape

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif")
"""Files with these endings, in either case, are images: torchvision's list (`torchvision/datasets/folder.py`), .gif
and .jfif. The actual format is determined when a file is decoded."""

_NOTES = 10  # how many skipped folders to log by name; the others are only counted
_ALSO_CALLED = {"train": {"train", "training"}, "val": {"val", "valid", "validation", "test", "testing", "eval"}}
"""Other common names of a split. Which set to validate on is the user's choice, so these are only suggested."""

_WORDNET_ID = re.compile(r"n\d{8}")

log = logging.getLogger(__name__)


def read_image(path: str | bytes | Path) -> bytes:
    """The bytes of an image file.

    Raises:
        BadImage: it is not a regular file, a broken link, or larger than `MAX_BYTES`.
        OSError: it is missing or cannot be read.
    """
    try:
        return read_regular(path, MAX_BYTES)
    except NotRegularError as error:
        raise BadImage(Fault.NOT_A_FILE) from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise BadImage(Fault.TOO_MANY_BYTES) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and os.path.islink(path):  # noqa: PTH114
            raise BadImage(Fault.BROKEN_LINK) from error
        raise


class ImageFolder:
    """One split: a folder with a folder of images per class.

    Images are ordered as torchvision's ImageFolder orders them (classes by name, then folders inside a class by path,
    then files by name), so an index means the same image in both; names that begin with a dot are skipped. `classes`
    are class folder names in label order, escaped; None: those of the folders, sorted.
    """

    def __init__(self, path: Path, classes: Sequence[str] | None) -> None:
        """DataError: there is no class folder, no image, or a class folder that is not in `classes`."""
        self.path = Path(path)
        listing = list_images(self.path)
        found = [escape(name) for name in listing.classes]
        if len(set(found)) < len(found):
            twice = next(name for name in found if found.count(name) > 1)
            raise DataError(f"{path}: two class folders cannot be told apart by their names: {twice}")
        if not found:
            raise DataError(f"{path}: no class folders; expected {path}/CLASS/IMAGE")
        self.classes = list(found if classes is None else classes)
        label_of = {name: label for label, name in enumerate(self.classes)}
        unknown = [name for name in found if name not in label_of]
        if unknown:
            raise DataError(f"{path}: class folder {_some(unknown)} is not among the {len(self.classes)} classes known")
        if not len(listing.ends):
            raise DataError(f"{path}: the class folders hold no images ({', '.join(EXTENSIONS)})")
        self.labels = np.repeat(np.array([label_of[name] for name in found]), listing.counts)
        self._folders = {label_of[escape(name)]: os.fsencode(name) for name in listing.classes}
        self._ends, self._names = listing.ends, listing.names
        self._root = os.fsencode(self.path)

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, index: int) -> bytes:
        """The image's path."""
        start = self._ends[index - 1] if index else 0
        name = self._names[start : self._ends[index]].tobytes()
        return b"/".join((self._root, self._folders[int(self.labels[index])], name))

    def read(self, index: int) -> bytes:
        """The encoded image; raises what `read_image` raises."""
        return read_image(self.file(index))

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], bytes]:
        """`read`, since there is only one resolution, on this machine."""
        return self.read

    def name(self, index: int) -> str:
        """The image's path, escaped."""
        return escape(os.fsdecode(self.file(index)))


def open_folders(path: Path) -> tuple[ImageFolder, ImageFolder]:
    """Open PATH/train and PATH/val with train's class numbering; val may lack classes, as a reduced copy does.

    Raises:
        DataError: a folder is missing, train has fewer than two classes or an empty one, val has no image or a class
            that train lacks.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    for split in ("train", "val"):
        if not (path / split).is_dir():
            raise missing_split(path, split)
    train = ImageFolder(path / "train", None)
    if len(train.classes) < 2:
        raise DataError(f"{train.path}: one class folder ({train.classes[0]}); at least two classes are needed")
    sizes = np.bincount(train.labels, minlength=len(train.classes))
    empty = [name for name, size in zip(train.classes, sizes, strict=True) if not size]
    if empty:
        raise DataError(f"{train.path}: class folder {_some(empty)} holds no images")
    only_val = [name for name in map(escape, class_folders(path / "val")) if name not in set(train.classes)]
    if only_val:
        raise DataError(f"{path / 'val'}: class folder {_some(only_val)} is not in {train.path}")
    return train, ImageFolder(path / "val", train.classes)


def missing_split(path: Path, split: str) -> DataError:
    """The error if `path` has no folder `split`, with a suggestion: a deeper folder, or another name."""
    inside, hint = class_folders(path), ""
    if deeper := [name for name in inside if (path / name / split).is_dir()]:
        hint = f"; did you mean {path / deeper[0]}?"
    elif other := [name for name in inside if name.lower() in _ALSO_CALLED[split]]:
        hint = f"; if {path / other[0]} is meant: ln -s {other[0]} {path / split}"
    return DataError(f"{path / split}: no such folder; expected {path}/{split}/CLASS/IMAGE{hint}")


def _some(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def class_names(folders: Sequence[str]) -> list[str]:
    """Human-readable names for class folders: n01440764 becomes "tench"; any other name is unchanged.

    The names are the WordNet lemmas that timm ships for the 21,841 synsets of ImageNet (`timm.data.ImageNetInfo`); they
    are read at the first folder that looks like a WordNet id. If two folders would get the same name (ImageNet has two
    cranes), their ids are appended.
    """
    names = [_lemma(folder) if _WORDNET_ID.fullmatch(folder) else folder for folder in folders]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return [f"{name} ({folder})" if name in twice else name for name, folder in zip(names, folders, strict=True)]


def _lemma(wordnet_id: str) -> str:
    """The first lemma of a synset, or the id if timm does not know it."""
    try:
        return str(_wordnet().label_name_to_description(wordnet_id)).split(", ")[0]
    except KeyError:
        return wordnet_id


@lru_cache(maxsize=1)
def _wordnet() -> Any:
    from timm.data.imagenet_info import ImageNetInfo  # timm imports torch, which takes seconds

    return ImageNetInfo("imagenet-22k")


class Listing(NamedTuple):
    """The images of a split: classes by name, then folders inside a class by path, then files by name."""

    classes: list[str]
    counts: NDArray[np.int64]  # images of each class
    ends: NDArray[np.int64]  # end of each image's name in `names`
    names: NDArray[np.uint8]  # paths relative to the class folder, concatenated


def list_images(path: Path) -> Listing:
    """List a split, and log skipped folders; raises DataError."""
    notes: list[str] = []
    classes = class_folders(path, notes)
    files: list[bytes] = []
    counts = []
    for name in classes:
        before = len(files)
        root = os.path.join(path, name)  # noqa: PTH118 (Path costs more than the rest)
        inside, skipped = walk(root)
        notes += skipped
        for folder in sorted(inside):
            below = "" if folder == root else f"{os.path.relpath(folder, root)}/"
            files.extend(os.fsencode(f"{below}{file}") for file in sorted(inside[folder]))
        counts.append(len(files) - before)
    for note in notes[:_NOTES]:
        log.warning("%s", note)
    if len(notes) > _NOTES:
        log.warning("%s: %d more folders were not listed", escape(str(path)), len(notes) - _NOTES)
    ends = np.cumsum([len(file) for file in files], dtype=np.int64)
    return Listing(classes, np.array(counts, dtype=np.int64), ends, np.frombuffer(b"".join(files), dtype=np.uint8))


def class_folders(path: Path, notes: list[str] | None = None) -> list[str]:
    """Sorted names of the class folders, without links to a parent folder (added to `notes`); raises DataError."""
    place, names, skipped = os.path.realpath(path), [], list[str]()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not _is_folder(entry):
                    continue
                if entry.is_symlink() and _holds(target := os.path.realpath(entry.path), place):
                    skipped.append(_loop(entry.path, target))
                else:
                    names.append(entry.name)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    if notes is not None:
        notes += sorted(skipped)
    return sorted(names)


def walk(root: str) -> tuple[dict[str, list[str]], list[str]]:
    """The images in a folder and its subfolders, following links.

    Anything with the name of an image counts as one: a pipe, a folder or a broken link is detected when it is read.
    Names that begin with a dot are skipped. Each folder is listed once, however many links lead to it, and a link to a
    folder that contains the link is not followed, so that the listing ends.

    Returns:
        (names of the images in `root` and each folder below it; why other folders are not listed, one line each).
    """
    found: dict[str, list[str]] = {}
    notes: list[str] = []
    top = os.path.realpath(root)
    listed: set[str] = set()
    waiting = [(False, root, top)]  # (reached by a link, those come last; path; real path)
    while waiting:
        _, folder, place = heapq.heappop(waiting)
        if place in listed:
            notes.append(escape(f"{folder}: not listed: it leads to {place}, which is listed already"))
            continue
        listed.add(place)
        try:
            with os.scandir(folder) as entries:
                names = found[folder] = []
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
    except OSError:  # a link to itself, or without permission
        return False


def _holds(folder: str, place: str) -> bool:
    """Whether a folder is or contains another; both paths without links."""
    return os.path.commonpath([folder, place]) == folder


def _loop(link: str, target: str) -> str:
    return escape(f"{link}: not followed: it is a link to {target}, a folder that contains it")
