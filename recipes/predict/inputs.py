"""Which images are meant: files, folders, a list on standard input, or one image's bytes there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.decode import Fault
from data.listing import EXTENSIONS

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
    found = False
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                found = True
                yield str(Path(parent) / name)
    if not found:
        yield folder


def read(path: str) -> Image:
    """Read a file."""
    try:
        return Image(path, Path(path).read_bytes(), None)
    except FileNotFoundError:
        return Image(path, b"", "no such file or folder")
    except IsADirectoryError:
        return Image(path, b"", f"holds no images ({', '.join(EXTENSIONS)})")
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
