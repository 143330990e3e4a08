"""Datasets as people download them, as sources to prepare from.

An ImageFolder (ImageNet-Mini, Imagenette, one's own), local or in a bucket; the tree of the Kaggle competition
"ImageNet Object Localization Challenge"; the ILSVRC2012 tar files with their devkit.
"""

from __future__ import annotations

import csv
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.imagefolder import ImageFolder, open_split_pair
from data.listing import EXTENSIONS
from data.names import relative_path
from data.remote import is_remote, named, open_store
from data.source import Source

log = logging.getLogger(__name__)

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "")
_SOLUTION = "LOC_val_solution.csv"


class Files:
    """A list of files under one folder or bucket, each with its label."""

    def __init__(self, path: str, files: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> None:
        """Join them.

        Args:
            path: a folder, or `s3://bucket/prefix`.
            files: paths below it.
            labels: label of each.
            classes: class names in label order.
        """
        self.path, self.classes, self.labels = path, list(classes), np.asarray(labels, dtype=np.int64)
        self._files = list(files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        """The file's bytes; raises OSError."""
        store, root = open_store(self.path)  # a process opens a store once, and anew after `renew_credentials`
        data: bytes = store.cat_file(f"{root}/{self._files[index]}")
        return data

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], bytes]:
        """`read`."""
        return self.read

    def name(self, index: int) -> str:
        """The file's path."""
        return f"{self.path}/{self._files[index]}"


class TarMembers:
    """Files inside a tar file, read where they lie, without unpacking."""

    def __init__(self, path: str, members: Sequence[tuple[str, int, int]], labels: Any, classes: Sequence[str]) -> None:
        """Join them.

        Args:
            path: the tar file.
            members: (name, offset, length) of each.
            labels: label of each.
            classes: class names in label order.
        """
        self.path, self.classes, self.labels = path, list(classes), np.asarray(labels, dtype=np.int64)
        self._names = [name for name, _, _ in members]
        self._places = np.array([place for _, *place in members], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        """The member's bytes; raises OSError."""
        offset, length = self._places[index].tolist()
        with Path(self.path).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], bytes]:
        """`read`."""
        return self.read

    def name(self, index: int) -> str:
        """The tar file's path and the member's name."""
        return f"{self.path}/{self._names[index]}"


def open_origin(path: str) -> dict[str, Source]:
    """Find out what lies at a path, and open it.

    Args:
        path: a folder, or `s3://bucket/prefix` of an ImageFolder.

    Returns:
        The splits, `train` and `val`, with one numbering of the classes.

    Raises:
        DataError: it is none of the layouts known, or is not whole.
    """
    if is_remote(path):
        return _remote_folder(path)
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{path}: no such folder")
    if (folder / _TRAIN_TAR).is_file() or (folder / _VAL_TAR).is_file():
        return _ilsvrc_tars(folder)
    if (folder / _SOLUTION).is_file():
        return _kaggle(folder)
    inner = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if not (folder / "train").is_dir() and len(inner) == 1 and (inner[0] / "train").is_dir():
        folder = inner[0]  # an archive's own top folder, such as imagenet-mini/
    train, val = open_split_pair(folder)
    return {"train": train, "val": val}


def images_in_keys(keys: Iterable[str]) -> tuple[list[str], int]:
    """The images among the keys of a split in a bucket, as a disk would hold them (data/listing.py), in its order.

    Args:
        keys: below the split's place.

    Returns:
        Keys `CLASS/.../IMAGE`, and how many others no disk could hold; what a disk's listing leaves out, such as a
        class folder or an image that begins with a dot, is left out of both.
    """
    listed = list(keys)
    folders = {key[:end] for key in listed for end, letter in enumerate(key) if letter == "/"}
    found, skipped = [], 0
    for key in listed:
        try:
            is_file = key not in folders and "\ufffd" not in relative_path(
                key
            )  # which stands for bytes that no UTF-8 has
        except ValueError:
            is_file = False
        name = key.rpartition("/")[2]
        if not is_file:
            skipped += 1
        elif "/" in key and name.lower().endswith(EXTENSIONS) and not key.startswith(".") and not name.startswith("."):
            found.append(key)
    return sorted(found, key=lambda key: (key.split("/")[0], *key.rpartition("/")[::2])), skipped


def _remote_folder(path: str) -> dict[str, Source]:
    """An ImageFolder in a bucket."""
    store, root = open_store(path)
    splits: dict[str, list[str]] = {}
    skipped = 0
    for split in ("train", "val"):
        place = f"{root}/{split}/"
        with named(path):
            keys = [key.removeprefix(place) for key in store.find(place) if key.startswith(place) and key != place]
        splits[split], others = images_in_keys(keys)
        skipped += others
        if not splits[split]:
            raise DataError(f"{path}/{split}: no images; expected {path}/{split}/CLASS/IMAGE")
    if skipped:
        log.warning("%s: %d keys skipped: they stand for folders, or are names that no disk can hold", path, skipped)
    classes = sorted({key.split("/")[0] for key in splits["train"]})
    if len(classes) < 2:
        raise DataError(f"{path}/train: one class folder ({classes[0]}); at least two classes are needed")
    label = {name: number for number, name in enumerate(classes)}
    unknown = sorted({key.split("/")[0] for key in splits["val"]} - set(classes))
    if unknown:
        raise DataError(f"{path}/val: class folder {unknown[0]} is not in {path}/train")
    return {
        split: Files(f"{path}/{split}", found, [label[key.split("/")[0]] for key in found], classes)
        for split, found in splits.items()
    }


def _kaggle(folder: Path) -> dict[str, Source]:
    """Kaggle's tree: train/CLASS/IMAGE, and a flat val/ whose classes stand in LOC_val_solution.csv."""
    root = next((folder / place for place in _KAGGLE if (folder / place / "train").is_dir()), None)
    if root is None:
        raise DataError(f"{folder}: has {_SOLUTION} but no {_KAGGLE[0]}/train")
    train = ImageFolder(root / "train", None)
    label = {name: number for number, name in enumerate(train.classes)}
    files, labels = [], []
    with (folder / _SOLUTION).open(newline="", encoding="utf-8") as table:
        for row in sorted(csv.DictReader(table), key=lambda row: row["ImageId"]):
            name = row["PredictionString"].split()[0]
            if name not in label:
                raise DataError(f"{folder / _SOLUTION}: {row['ImageId']} is of class {name}, which {train.path} lacks")
            files.append(f"{row['ImageId']}.JPEG")
            labels.append(label[name])
    if not files:
        raise DataError(f"{folder / _SOLUTION}: lists no image")
    return {"train": train, "val": Files(str(root / "val"), files, labels, train.classes)}


def _ilsvrc_tars(folder: Path) -> dict[str, Source]:
    """The tar files of image-net.org."""
    for file in (_TRAIN_TAR, _VAL_TAR, _DEVKIT):
        if not (folder / file).is_file():
            raise DataError(f"{folder / file}: missing; {_TRAIN_TAR}, {_VAL_TAR} and {_DEVKIT} belong together")
    try:
        members, labels, classes = _train_members(folder / _TRAIN_TAR)
        val = sorted(_members(folder / _VAL_TAR, 0))
        wnids = _val_classes(folder / _DEVKIT)
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(f"{folder}: a tar file is damaged or not what its name says: {error}") from error
    if len(wnids) != len(val):
        raise DataError(f"{folder / _VAL_TAR}: {len(val)} images, but the devkit has {len(wnids)} labels")
    label = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(wnids) - set(classes))
    if unknown:
        raise DataError(f"{folder / _TRAIN_TAR}: lacks class {unknown[0]}, which the devkit has")
    return {
        "train": TarMembers(str(folder / _TRAIN_TAR), members, labels, classes),
        "val": TarMembers(str(folder / _VAL_TAR), val, [label[name] for name in wnids], classes),
    }


def _members(path: Path, start: int) -> list[tuple[str, int, int]]:
    """(name, offset, length) of the files in a tar that begins at a byte of a file."""
    with path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:  # ends at the tar's own end mark
            return [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]


def _train_members(path: Path) -> tuple[list[tuple[str, int, int]], list[int], list[str]]:
    """The images of the tar of one tar per class."""
    classes: list[str] = []
    members: list[tuple[str, int, int]] = []
    labels: list[int] = []
    for name, offset, _ in sorted(_members(path, 0)):
        label, wnid = len(classes), Path(name).stem
        classes.append(wnid)
        inner = sorted(_members(path, offset))
        members += [(f"{wnid}/{image}", at, size) for image, at, size in inner]
        labels += [label] * len(inner)
    return members, labels, classes


def _val_classes(devkit: Path) -> list[str]:
    """The WordNet id of each validation image, in the order of their names."""
    from scipy.io import loadmat

    names = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    files: dict[str, bytes] = {}
    with tarfile.open(devkit) as tar:
        for member in tar:
            if Path(member.name).name in names and (file := tar.extractfile(member)) is not None:
                files[Path(member.name).name] = file.read()
    meta = loadmat(BytesIO(files[names[0]]), squeeze_me=True)["synsets"]
    truth = files[names[1]].split()
    wnid = {int(number): str(name) for number, name in zip(meta["ILSVRC2012_ID"], meta["WNID"], strict=True)}
    return [wnid[int(number)] for number in truth]
