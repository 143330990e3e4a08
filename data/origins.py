"""Datasets in their original layouts, as sources for data.prepare.

An ImageFolder (ImageNet-Mini, Imagenette, your own), local or in a bucket; the tree of the Kaggle competition "ImageNet
Object Localization Challenge"; the ILSVRC2012 tar files with their devkit, read without unpacking.
"""

from __future__ import annotations

import csv
import gzip
import io
import logging
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.decode import MAX_BYTES, BadImage, Fault
from data.errors import DataError
from data.files import is_file_name, is_remote, named, open_regular, open_store, read_path, read_regular
from data.imagefolder import EXTENSIONS, ImageFolder, check_classes, open_folders, read_image
from data.source import Source
from data.text import escape

log = logging.getLogger(__name__)

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "")
_SOLUTION = "LOC_val_solution.csv"
_COLUMNS = ("ImageId", "PredictionString")
_LARGEST_TABLE = 2**26  # limit in bytes of the table, and of the unpacked devkit: many times their actual sizes

_Member = tuple[str, int, int]  # name, offset and length of a file in a tar file


class Files(Source):
    """A list of files under one folder or `s3://bucket/prefix`, each with its class."""

    def __init__(self, path: str, files: Sequence[str], of_class: Sequence[str], classes: Sequence[str]) -> None:
        label = {name: number for number, name in enumerate(classes)}
        self.path, self.classes, self._files = path, list(classes), list(files)
        self.labels = np.array([label[name] for name in of_class], dtype=np.int64)

    def read(self, index: int) -> bytes:
        """The file's bytes; raises OSError or BadImage."""
        path = f"{self.path}/{self._files[index]}"
        return read_path(path) if is_remote(path) else read_image(path)

    def name(self, index: int) -> str:
        """The file's path, escaped."""
        return escape(f"{self.path}/{self._files[index]}")


class TarMembers(Files):
    """Files inside a tar file, read without unpacking."""

    def __init__(self, path: str, members: Sequence[_Member], of_class: Sequence[str], classes: Sequence[str]) -> None:
        super().__init__(path, [name for name, _, _ in members], of_class, classes)
        self._places = np.array([place for _, *place in members], dtype=np.int64).reshape(-1, 2)

    def read(self, index: int) -> bytes:
        """The member's bytes; raises OSError or BadImage."""
        offset, length = self._places[index].tolist()
        if length > MAX_BYTES:
            raise BadImage(Fault.TOO_MANY_BYTES)
        with os.fdopen(open_regular(self.path), "rb") as file:
            file.seek(offset)
            return file.read(length)


def open_origin(path: str) -> dict[str, Source]:
    """Open the splits `train` and `val` of any known layout in a folder, or of an ImageFolder in a bucket.

    Raises DataError if the layout is unknown or incomplete.
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
        folder = inner[0]  # an archive's top folder, such as imagenet-mini/
    train, val = open_folders(folder)
    return {"train": train, "val": val}


def images_in_keys(keys: Iterable[str]) -> tuple[list[str], int]:
    """The images `CLASS/.../IMAGE` among the keys of a split in a bucket, in the order of data/imagefolder.py.

    Returns them and the number of images whose names no disk could hold, which are left out.
    """
    images = [key for key in keys if "/" in key and key.lower().endswith(EXTENSIONS) and "/." not in f"/{key}"]
    found = [key for key in images if all(map(is_file_name, key.split("/")))]
    return sorted(found, key=lambda key: (key.split("/")[0], *key.rpartition("/")[::2])), len(images) - len(found)


def _remote_folder(path: str) -> dict[str, Source]:
    """An ImageFolder in a bucket."""
    store, root = open_store(path)
    splits: dict[str, list[str]] = {}
    for split in ("train", "val"):
        place = f"{root}/{split}/"
        with named(path):
            splits[split], skipped = images_in_keys(key.removeprefix(place) for key in store.find(place))
        if skipped:
            log.warning("%s/%s: %d images skipped, as no disk can hold their names", path, split, skipped)
        if not splits[split]:
            raise DataError(f"{path}/{split}: no images; expected {path}/{split}/CLASS/IMAGE")
    folders = {split: [key.split("/")[0] for key in found] for split, found in splits.items()}
    classes = sorted(set(folders["train"]))
    check_classes(f"{path}/train", classes, f"{path}/val", sorted(set(folders["val"])))
    return {split: Files(f"{path}/{split}", found, folders[split], classes) for split, found in splits.items()}


def _kaggle(folder: Path) -> dict[str, Source]:
    """Kaggle's tree: train/CLASS/IMAGE, and a flat val/ whose classes are in LOC_val_solution.csv."""
    root = next((folder / place for place in _KAGGLE if (folder / place / "train").is_dir()), None)
    if root is None:
        raise DataError(f"{folder}: has {_SOLUTION} but no {_KAGGLE[0]}/train")
    train, table = ImageFolder(root / "train", None), folder / _SOLUTION
    with named(str(table)):  # also a wrong encoding, which is a ValueError
        text = read_regular(table, _LARGEST_TABLE).decode("utf-8-sig")
    found: dict[str, str] = {}
    known = set(train.classes)
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        if not set(_COLUMNS) <= set(rows.fieldnames or ()):
            raise DataError(f"{table}: expected the columns {' and '.join(_COLUMNS)}, separated by a comma")
        for row in rows:
            image, classes = (row[column] or "" for column in _COLUMNS)
            name = classes.partition(" ")[0]
            if not image or image in found or not is_file_name(f"{image}.JPEG") or name not in known:
                what = f"{rows.line_num}: {image or 'no image'}, {name or 'no class'}"
                raise DataError(f"{table}:{what}; expected each image once, a file's name, and a class of {train.path}")
            found[image] = name
    except csv.Error as error:
        raise DataError(f"{table}: cannot be read as a table: {error}") from error
    if not found:
        raise DataError(f"{table}: lists no image")
    found = dict(sorted(found.items()))
    val = Files(str(root / "val"), [f"{image}.JPEG" for image in found], list(found.values()), train.classes)
    return {"train": train, "val": val}


def _ilsvrc_tars(folder: Path) -> dict[str, Source]:
    """The tar files of image-net.org: one that contains a tar file per class, and one with the validation images."""
    for file in (_TRAIN_TAR, _VAL_TAR, _DEVKIT):
        if not (folder / file).is_file():
            raise DataError(f"{folder / file}: missing; {_TRAIN_TAR}, {_VAL_TAR} and {_DEVKIT} belong together")
    classes: list[str] = []
    members: list[_Member] = []
    of_class: list[str] = []
    for name, offset, size in sorted(_members(folder / _TRAIN_TAR)):
        classes.append(escape(Path(name).stem))
        inner = sorted(_members(folder / _TRAIN_TAR, offset, size))
        members += [(f"{classes[-1]}/{image}", at, length) for image, at, length in inner]
        of_class += [classes[-1]] * len(inner)
    val = sorted(_members(folder / _VAL_TAR))
    wnids = _val_classes(folder / _DEVKIT)
    if len(wnids) != len(val):
        raise DataError(f"{folder / _VAL_TAR}: {len(val)} images, but the devkit has {len(wnids)} labels")
    if unknown := sorted(set(wnids) - set(classes)):
        raise DataError(f"{folder / _TRAIN_TAR}: lacks class {unknown[0]}, which the devkit has")
    return {
        "train": TarMembers(str(folder / _TRAIN_TAR), members, of_class, classes),
        "val": TarMembers(str(folder / _VAL_TAR), val, wnids, classes),
    }


def _members(path: Path, start: int = 0, size: int | None = None) -> list[_Member]:
    """The files in a tar that begins at offset `start` of a file; raises DataError."""
    found = []
    with named(str(path)), os.fdopen(open_regular(path), "rb") as file:
        end = os.fstat(file.fileno()).st_size if size is None else start + size
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:  # ends at the tar's end mark
                for member in tar:
                    # tarfile would read a member of negative size forever.
                    if member.size < 0 or member.offset_data + member.size > end:
                        raise DataError(f"{path}: truncated or damaged at {escape(member.name)}")
                    name = member.name.removeprefix("./")
                    if not member.isfile() or name.startswith("._"):  # macOS adds these next to files
                        continue
                    if not is_file_name(name):
                        raise DataError(f"{path}: {member.name}: not a name that a file can have")
                    found.append((name, member.offset_data, member.size))
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{path}: damaged, or not a tar file: {error}") from error
    return found


def _val_classes(devkit: Path) -> list[str]:
    """The WordNet id of each validation image, in the order of their names; raises DataError."""
    from scipy.io import loadmat

    files: dict[str, bytes] = {}
    with named(str(devkit)):
        data = read_regular(devkit, _LARGEST_TABLE)
    try:
        with gzip.open(io.BytesIO(data)) as unpacked:
            data = unpacked.read(_LARGEST_TABLE)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if (name := Path(member.name).name) in (_META, _TRUTH) and (file := tar.extractfile(member)):
                    files[name] = file.read()
        meta = loadmat(io.BytesIO(files[_META]), squeeze_me=True)["synsets"]
        wnid = {int(number): str(name) for number, name in zip(meta["ILSVRC2012_ID"], meta["WNID"], strict=True)}
        return [wnid[int(number)] for number in files[_TRUTH].split()]
    except Exception as error:  # gzip, tarfile and SciPy raise many different exceptions on invalid data
        raise DataError(f"{devkit}: truncated, damaged, or not the devkit: {error}") from error
