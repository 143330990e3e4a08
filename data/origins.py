"""Datasets in their original layouts, as sources for data.prepare.

An ImageFolder (ImageNet-Mini, Imagenette, your own), local or in a bucket; the tree of the Kaggle competition "ImageNet
Object Localization Challenge"; the ILSVRC2012 tar files with their devkit, which `unpack_tars` makes an ImageFolder.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import is_file_name, is_remote, named, open_store, read_regular, relative_path
from data.imagefolder import EXTENSIONS, ImageFolder, check_classes, open_folders, read_image
from data.source import Source
from data.text import escape, first_line

log = logging.getLogger(__name__)

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_ARCHIVES = {"val": (_DEVKIT, _VAL_TAR), "train": (_TRAIN_TAR,)}  # what each split is unpacked from
_SPACE = 1.02  # bytes needed per byte of tar files, because files end at blocks
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "")
_SOLUTION = "LOC_val_solution.csv"
_COLUMNS = ("ImageId", "PredictionString")
_LARGEST_TABLE = 2**26  # limit in bytes of the table: many times its actual size


class Files(Source):
    """A list of files under one folder or `s3://bucket/prefix`, each with its class."""

    def __init__(self, path: str, files: Sequence[str], of_class: Sequence[str], classes: Sequence[str]) -> None:
        label = {name: number for number, name in enumerate(classes)}
        self.path, self.classes, self._files = path, list(classes), list(files)
        self.labels = np.array([label[name] for name in of_class], dtype=np.int64)

    def read(self, index: int) -> bytes:
        """The file's bytes; raises OSError or BadImage."""
        if not is_remote(self.path):
            return read_image(f"{self.path}/{self._files[index]}")
        store, root = open_store(self.path)  # opened once per process, and again after `renew_credentials`
        data: bytes = store.cat_file(f"{root}/{self._files[index]}")
        return data

    def name(self, index: int) -> str:
        """The file's path, escaped."""
        return escape(f"{self.path}/{self._files[index]}")


def open_origin(path: str) -> dict[str, Source]:
    """Open the splits `train` and `val` of any known layout in a folder, or of an ImageFolder in a bucket.

    Raises DataError if the layout is unknown or incomplete.
    """
    if is_remote(path):
        return _remote_folder(path)
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{path}: no such folder")
    if (folder / _SOLUTION).is_file():
        return _kaggle(folder)
    inner = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if not (folder / "train").is_dir() and len(inner) == 1 and (inner[0] / "train").is_dir():
        folder = inner[0]  # an archive's top folder, such as imagenet-mini/
    train, val = open_folders(folder)
    return {"train": train, "val": val}


def images_in_keys(keys: Iterable[str]) -> tuple[list[str], int]:
    """The images `CLASS/.../IMAGE` among the keys of a split in a bucket, in the order of data/imagefolder.py.

    Returns them and the number of keys that no disk could hold; keys that a disk's listing would skip, such as names
    that begin with a dot, are in neither.
    """
    listed = list(keys)
    folders = {key[:end] for key in listed for end, letter in enumerate(key) if letter == "/"}
    found, skipped = [], 0
    for key in listed:
        try:
            # U+FFFD stands for bytes that are not UTF-8.
            is_file = key not in folders and "\ufffd" not in relative_path(key)
        except ValueError:
            is_file = False
        if not is_file:
            skipped += 1
        elif "/" in key and key.lower().endswith(EXTENSIONS) and not any(part[0] == "." for part in key.split("/")):
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
        log.warning("%s: %d keys skipped: they stand for folders, or no disk can hold their names", path, skipped)
    folders = {split: [key.split("/")[0] for key in found] for split, found in splits.items()}
    classes = sorted(set(folders["train"]))
    check_classes(f"{path}/train", classes, f"{path}/val", sorted(set(folders["val"])))
    return {split: Files(f"{path}/{split}", found, folders[split], classes) for split, found in splits.items()}


def _kaggle(folder: Path) -> dict[str, Source]:
    """Kaggle's tree: train/CLASS/IMAGE, and a flat val/ whose classes are in LOC_val_solution.csv."""
    root = next((folder / place for place in _KAGGLE if (folder / place / "train").is_dir()), None)
    if root is None:
        raise DataError(f"{folder}: has {_SOLUTION} but no {_KAGGLE[0]}/train")
    train = ImageFolder(root / "train", None)
    found = dict(sorted(_solution(folder / _SOLUTION).items()))
    for image, name in found.items():
        if name not in train.classes:
            raise DataError(f"{folder / _SOLUTION}: {image} has class {name}, which {train.path} lacks")
    val = Files(str(root / "val"), [f"{image}.JPEG" for image in found], list(found.values()), train.classes)
    return {"train": train, "val": val}


def _solution(path: Path) -> dict[str, str]:
    """The class of each image in Kaggle's table; raises DataError if it cannot be read or a row is incomplete."""
    found: dict[str, str] = {}
    with named(str(path)):
        data = read_regular(path, _LARGEST_TABLE)
    try:
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        if not set(_COLUMNS) <= set(rows.fieldnames or ()):
            raise DataError(f"{path}: expected the columns {' and '.join(_COLUMNS)}, separated by commas")
        for row in rows:
            image, classes = ((row[name] or "").strip() for name in _COLUMNS)
            place = f"{path}:{rows.line_num}: {image or 'a row'}"
            if not image or not classes:
                raise DataError(f"{place} has no {_COLUMNS[1] if image else _COLUMNS[0]}")
            if not is_file_name(f"{image}.JPEG"):
                raise DataError(f"{place}: not a name that a file can have")
            if image in found:
                raise DataError(f"{place} occurs twice")
            found[image] = classes.split()[0]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table in UTF-8: {error}") from error
    if not found:
        raise DataError(f"{path}: lists no image")
    return found


def unpack_tars(folder: Path, report: Callable[[str], None]) -> None:
    """Unpack the ILSVRC2012 tar files of image-net.org, if the folder has them, into FOLDER/train and FOLDER/val.

    A split that exists is left alone; each gets its name when it is complete, so that one that was interrupted starts
    again. `report` is called with a line before it begins. Raises DataError if a file is missing or not the original,
    or the disk has too little space.
    """
    splits = [split for split in _ARCHIVES if not os.path.lexists(folder / split)]
    files = [folder / file for split in splits for file in _ARCHIVES[split]]
    if not any(file.is_file() for file in files):
        return
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: missing; {_TRAIN_TAR}, {_VAL_TAR} and {_DEVKIT} belong together")
    needed, free = _SPACE * sum(file.stat().st_size for file in files), shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: unpacking the tar files takes {needed / 1e9:.3f} GB there, but {free / 1e9:.3f} GB are free; "
            "to use another disk, make a folder on it with links to the files"
        )
    report(f"unpacking the tar files into {folder}: {' and '.join(splits)}, {needed / 1e9:.3f} GB")
    for split in splits:
        _unpack(folder, split)


def _unpack(folder: Path, split: str) -> None:
    """Unpack one split with torchvision, which refuses a file that has not the original's MD5."""
    from torchvision.datasets import imagenet  # takes seconds to import

    partial = f".{split}.unpacking"
    try:
        shutil.rmtree(folder / partial, ignore_errors=True)  # of a call that was killed
        if split == "train":
            imagenet.parse_train_archive(folder, folder=partial)
        else:
            imagenet.parse_devkit_archive(folder)
            imagenet.parse_val_archive(folder, wnids=imagenet.load_meta_file(folder)[1], folder=partial)
        (folder / partial).replace(folder / split)
    except Exception as error:  # tarfile, gzip and SciPy raise many different exceptions on damaged data
        raise DataError(f"{folder / split}: cannot be unpacked: {first_line(error)}") from error
    finally:
        shutil.rmtree(folder / partial, ignore_errors=True)
