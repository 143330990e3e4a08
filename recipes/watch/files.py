"""How a run's files are written: replaced as a whole, so that a reader, and a machine that dies, finds one or other."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from data.text import clean

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}


def sync(descriptor: int) -> None:
    """`fsync`, where the file system has it: CIFS, shared folders of virtual machines and many FUSE ones do not."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write beside the file, sync, and rename over it.

    Args:
        path: The file, in a folder that exists. Only one process writes it.
        chunks: Its content; may be read from the file itself.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.unlink(missing_ok=True)  # a link would lead elsewhere, a pipe block for ever
        with beside.open("xb") as file:
            file.writelines(chunks)
            file.flush()
            sync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text for people, without secrets, as `replace_file` does."""
    replace_file(path, [clean(text).encode()])


def duration(seconds: float) -> str:
    """`1:02:03`, hours growing without bound; `?` where it is not known."""
    if not 0 <= seconds < 1e7:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
