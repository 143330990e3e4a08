"""Images in class folders: PATH/{train,val}/CLASS/IMAGE, the layout of ImageNet-1K and ImageNet-Mini."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import read_image
from data.listing import EXTENSIONS, class_folders, list_images
from data.text import escape

_ALSO_CALLED = {"train": {"train", "training"}, "val": {"val", "valid", "validation", "test", "testing", "eval"}}
"""What other datasets call a split. Which one to choose weights by is the user's word, so none is taken unasked."""


class ImageFolder:
    """One split: a folder with a folder of images per class.

    Images are ordered as torchvision's ImageFolder orders them (classes by name, then folders inside a class by path,
    then files by name), so an index means the same image in both; names that begin with a dot are passed over.

    Attributes:
        path: the split's folder.
        classes: class folder names in label order, escaped.
        labels: label of each image, int64 of shape (len(self),).
    """

    def __init__(self, path: Path, classes: Sequence[str] | None) -> None:
        """Read the folder's listing.

        Args:
            path: the split's folder.
            classes: class names in label order, escaped; None: the names of the class folders, sorted.

        Raises:
            DataError: the folder is missing or unreadable, holds no class folder or no image, or has a class folder
                that `classes` lacks.
        """
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
        """`read`: there is one resolution, and it is near."""
        return self.read

    def name(self, index: int) -> str:
        """The image's path, escaped."""
        return escape(os.fsdecode(self.file(index)))


def open_split_pair(path: Path) -> tuple[ImageFolder, ImageFolder]:
    """Open PATH/train and PATH/val, with one numbering of the classes: that of train.

    val may lack classes, as a cut-down copy does, but not have one of its own.

    Args:
        path: the dataset's folder.

    Returns:
        (train, val).

    Raises:
        DataError: a folder is missing, train has fewer than two classes or an empty one, val has no image or a class
            that train lacks.
    """
    path = Path(path)
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
    known = set(train.classes)
    only_val = [name for name in map(escape, class_folders(path / "val")) if name not in known]
    if only_val:
        raise DataError(f"{path / 'val'}: class folder {_some(only_val)} is not in {train.path}")
    return train, ImageFolder(path / "val", train.classes)


def missing_split(path: Path, split: str) -> DataError:
    """What to say where `path` has no folder `split`, with what may be meant instead."""
    return DataError(f"{path / split}: no such folder; expected {path}/{split}/CLASS/IMAGE{_hint(path, split)}")


def _hint(path: Path, split: str) -> str:
    """What may be meant: a folder further in, or the split under another name."""
    inside = class_folders(path)
    for name in inside:
        if (path / name / split).is_dir():
            return f"; did you mean {path / name}?"
    for name in inside:
        if name.lower() in _ALSO_CALLED[split]:
            return f"; if {path / name} is meant: ln -s {name} {path / split}"
    return ""


def _some(names: Sequence[str], shown: int = 3) -> str:
    """The first few names, and how many there are beyond."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
