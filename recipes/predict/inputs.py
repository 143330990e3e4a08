"""Which images are meant: files, folders, a list on standard input, or one image's bytes there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.decode import BadImage, Fault
from data.imagefolder import EXTENSIONS, read_image, walk

STDIN = "-"


class Image(NamedTuple):
    """An encoded image, or why there is none."""

    name: str
    data: bytes
    """Empty where there is a fault."""
    fault: str | None


def paths(words: Sequence[str], stdin: BinaryIO) -> Iterator[str]:
    """The paths that are meant, in order; a folder gives all its images, sorted by path, however deep.

    Args:
        words: Files and folders; `-` is the list on standard input.
        stdin: Paths of files or folders, one a line.
    """
    for word in words:
        lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in stdin) if word == STDIN else [word]
        for path in lines:
            if path:
                yield from _below(path) if Path(path).is_dir() else [path]


def _below(folder: str) -> Iterator[str]:
    """The images in a folder; the folder itself where it has none, so that somebody complains of it."""
    inside, notes = walk(folder)
    for note in notes:
        print(note, file=sys.stderr)
    found = [str(Path(parent) / name) for parent in sorted(inside) for name in sorted(inside[parent])]
    yield from found or [folder]


def read(path: str) -> Image:
    """Read a file."""
    try:
        if Path(path).is_dir() and not path.lower().endswith(EXTENSIONS):
            return Image(path, b"", f"holds no images ({', '.join(EXTENSIONS)})")
        return Image(path, read_image(path), None)
    except BadImage as error:
        return Image(path, b"", error.fault.reason)
    except FileNotFoundError:
        return Image(path, b"", "no such file or folder")
    except OSError as error:
        return Image(path, b"", f"{Fault.UNREADABLE.reason}: {error.strerror or error}")
    except ValueError:  # a zero byte in it
        return Image(path, b"", "is no path")


def in_batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Cut a stream into lists of at most `size`."""
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
