"""Images in class folders: PATH/{train,val}/CLASS/IMAGE, the layout of ImageNet-1K and ImageNet-Mini."""

from __future__ import annotations

import errno
import heapq
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.decode import MAX_BYTES, BadImage, Fault
from data.errors import DataError
from data.files import NotRegularError, read_regular
from data.source import Source
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
    """The bytes of an image file; raises BadImage (no regular file, broken link, too large) and OSError."""
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


class ImageFolder(Source):
    """One split: a folder with a folder of images per class.

    Images are ordered as torchvision's ImageFolder orders them, so an index means the same image in both; names that
    begin with a dot are skipped. `classes` are class folder names in label order, escaped; None: the folders', sorted.
    """

    def __init__(self, path: Path, classes: Sequence[str] | None) -> None:
        """DataError: there is no class folder, no image, or a class folder that is not in `classes`."""
        self.path = Path(path)
        folders, counts, files = list_images(self.path)
        found = [escape(name) for name in folders]
        if twice := sorted({name for name in found if found.count(name) > 1}) if len(set(found)) < len(found) else []:
            raise DataError(f"{path}: two class folders cannot be told apart by their names: {twice[0]}")
        if not found:
            raise DataError(f"{path}: no class folders; expected {path}/CLASS/IMAGE")
        self.classes = list(found if classes is None else classes)
        label_of = {name: label for label, name in enumerate(self.classes)}
        if unknown := [name for name in found if name not in label_of]:
            raise DataError(
                f"{path}: class folders that are not among the {len(self.classes)} known classes: {_some(unknown)}"
            )
        if not files:
            raise DataError(f"{path}: the class folders hold no images ({', '.join(EXTENSIONS)})")
        self.labels = np.repeat(np.array([label_of[name] for name in found]), counts)
        self._folders = {label_of[escape(name)]: os.fsencode(name) for name in folders}
        # The paths below the class folders, concatenated.
        self._ends = np.cumsum([len(file) for file in files], dtype=np.int64)
        self._names = np.frombuffer(b"".join(files), dtype=np.uint8)
        self._root = os.fsencode(self.path)

    def file(self, index: int) -> bytes:
        """The image's path."""
        start = self._ends[index - 1] if index else 0
        name = self._names[start : self._ends[index]].tobytes()
        return b"/".join((self._root, self._folders[int(self.labels[index])], name))

    def read(self, index: int) -> bytes:
        """The encoded image; raises what `read_image` raises."""
        return read_image(self.file(index))

    def name(self, index: int) -> str:
        """The image's path, escaped."""
        return escape(os.fsdecode(self.file(index)))


def open_folders(path: Path) -> tuple[ImageFolder, ImageFolder]:
    """Open PATH/train and PATH/val with train's class numbering; val may lack classes, as a reduced copy does.

    Raises DataError if a folder is missing, train has fewer than two classes or an empty one, val has no image or a
    class that train lacks.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    for split in ("train", "val"):
        if not (path / split).is_dir():
            raise missing_split(path, split)
    train = ImageFolder(path / "train", None)
    check_classes(str(train.path), train.classes, str(path / "val"), map(escape, class_folders(path / "val")))
    sizes = np.bincount(train.labels, minlength=len(train.classes))
    if empty := [name for name, size in zip(train.classes, sizes, strict=True) if not size]:
        raise DataError(f"{train.path}: class folders without images: {_some(empty)}")
    return train, ImageFolder(path / "val", train.classes)


def check_classes(train: str, classes: Sequence[str], val: str, val_classes: Iterable[str]) -> None:
    """Raise DataError if the training images are of less than two classes, or validation images of an unknown one."""
    if len(classes) < 2:
        raise DataError(f"{train}: one class folder ({classes[0]}); at least two classes are needed")
    known = set(classes)
    if only_val := [name for name in val_classes if name not in known]:
        raise DataError(f"{val}: class folders that {train} lacks: {_some(only_val)}")


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

    The names are the WordNet lemmas that timm ships for the 21,841 synsets of ImageNet. If two folders would get the
    same name (ImageNet has two cranes), their ids are appended.
    """
    names = list(folders)
    if any(map(_WORDNET_ID.fullmatch, folders)):
        from timm.data.imagenet_info import ImageNetInfo  # timm imports torch, which takes seconds

        info = ImageNetInfo("imagenet-22k")
        known = set(info.label_names())
        names = [str(info.label_name_to_description(id_)).split(", ")[0] if id_ in known else id_ for id_ in folders]
    count = Counter(names)
    return [f"{name} ({id_})" if count[name] > 1 else name for name, id_ in zip(names, folders, strict=True)]


def list_images(path: Path) -> tuple[list[str], list[int], list[bytes]]:
    """List a split, and log skipped folders; raises DataError.

    Returns (class folders; number of images in each; their paths below the class folders, by folder, then by name).
    """
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
    for note in sorted(notes)[:_NOTES]:
        log.warning("%s", note)
    if len(notes) > _NOTES:
        log.warning("%s: %d more folders were not listed", escape(str(path)), len(notes) - _NOTES)
    return classes, counts, files


def class_folders(path: Path, notes: list[str] | None = None) -> list[str]:
    """Sorted names of the class folders, without links to a parent folder (added to `notes`); raises DataError."""
    errors: list[OSError] = []
    _, inside, _ = next(os.walk(path, onerror=errors.append), ("", [], []))
    if errors:
        raise DataError(f"{path}: {errors[0].strerror or errors[0]}")
    place, skipped = os.path.realpath(path), [] if notes is None else notes
    return sorted(name for name in inside if name[0] != "." and not _leads_up(f"{path}/{name}", (place,), skipped))


def walk(root: str) -> tuple[dict[str, list[str]], list[str]]:
    """The images in a folder and its subfolders, following links.

    Anything with the name of an image counts as one: a pipe, a folder or a broken link is detected when it is read.
    Names that begin with a dot are skipped. Each folder is listed once, however many links lead to it, and a link to a
    folder that contains the link is not followed, so that the listing ends.

    Returns (names of the images in `root` and each folder below it; why other folders are not listed, a line each).
    """
    found: dict[str, list[str]] = {}
    notes: list[str] = []
    listed: set[str] = set()

    def cannot_be_listed(error: OSError) -> None:
        notes.append(escape(f"{error.filename}: cannot be listed: {error.strerror or error}"))

    real_root = os.path.realpath(root)
    waiting = [root]  # and links to folders, which are followed when all folders without a link are listed
    while waiting:
        top = heapq.heappop(waiting)
        real_top = os.path.realpath(top)
        for folder, inside, names in os.walk(top, onerror=cannot_be_listed):
            place = real_top + folder[len(top) :]
            if place in listed:
                notes.append(escape(f"{folder}: not listed: it leads to {place}, which is listed already"))
                inside.clear()
                continue
            listed.add(place)
            visible = [name for name in (*inside, *names) if name[0] != "."]
            found[folder] = [name for name in visible if name.lower().endswith(EXTENSIONS)]
            below = [name for name in inside if name[0] != "." and not name.lower().endswith(EXTENSIONS)]
            inside[:] = sorted(name for name in below if not os.path.islink(f"{folder}/{name}"))  # noqa: PTH114
            for name in sorted(set(below) - set(inside)):
                if not _leads_up(f"{folder}/{name}", (place, real_root), notes):
                    heapq.heappush(waiting, f"{folder}/{name}")
    return found, sorted(notes)


def _leads_up(path: str, places: Sequence[str], notes: list[str]) -> bool:
    """Whether a path is a link to a folder that contains one of `places`; if so, it is noted."""
    if not os.path.islink(path):  # noqa: PTH114 (first, because most are none, and each step of a real path costs a call)
        return False
    target = os.path.realpath(path)
    if target not in (os.path.commonpath([target, place]) for place in places):
        return False
    notes.append(escape(f"{path}: not followed: it is a link to {target}, a folder that contains it"))
    return True
