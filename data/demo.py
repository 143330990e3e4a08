"""Write a small real dataset that needs no download: the handwritten digits that scikit-learn ships.

    python -m data.demo DIR [--size 32]

1,797 scans of 8 x 8 pixels (UCI Optical Recognition of Handwritten Digits, test set) become grey JPEGs in
DIR/train/0..9 (1,500) and DIR/val/0..9 (297).
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import cv2

from data.errors import DataError, Parser, run_main

_VAL_SAMPLES = 297
_MARK = "digits.txt"


def write_digits(folder: Path, size: int) -> Path:
    """Write the digits as an ImageFolder of images of `size` px, at least 8; do nothing if they already exist.

    The split is stratified and always the same. The folder gets its name when complete, so a half-written one is never
    used, and if several processes write it at once, one wins. Raises DataError if it cannot be written, or holds
    something else.
    """
    mark = folder / _MARK
    try:
        if not mark.is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder}: holds something else; expected a new or empty folder to write the digits to")
        if not mark.is_file():
            _write(folder, size)
        written = mark.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise DataError(f"{folder}: cannot write the digits: {error.strerror or error}") from error
    if written != str(size):
        raise DataError(f"{folder}: holds the digits at {written} px, not {size} px; choose another or delete it")
    return folder


def _write(folder: Path, size: int) -> None:
    from sklearn.datasets import load_digits  # takes seconds to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    numbers = range(len(digits.target))
    train, val = train_test_split(numbers, test_size=_VAL_SAMPLES, stratify=digits.target, random_state=0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        partial = Path(scratch) / "digits"
        for split, indices in (("train", train), ("val", val)):
            for index in indices:
                scan = (digits.images[index] * (255 / 16)).astype("uint8")
                picture = cv2.resize(scan, (size, size), interpolation=cv2.INTER_CUBIC)
                _, jpeg = cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, 95))
                file = partial / split / str(digits.target[index]) / f"{index:04}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(jpeg.tobytes())
        (partial / _MARK).write_text(f"{size}\n", encoding="utf-8")
        with suppress(OSError):  # another process finished first
            partial.replace(folder)


def main(arguments: list[str] | None = None) -> None:
    """The command line; raises InputError."""
    parser = Parser("python -m data.demo", "Write scikit-learn's handwritten digits as JPEGs in train/ and val/.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write; left alone if already complete")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not 8 <= options.size <= 1024:
        parser.error(f"--size: got {options.size}; allowed: 8 to 1024")
    print(f"digits in {write_digits(options.folder, options.size)}: 1,500 for training, 297 for validation")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
