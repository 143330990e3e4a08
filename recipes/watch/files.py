"""Write a run's files atomically: a reader, or a machine after a crash, finds either the old file or the new one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from data.text import clean

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}


def sync(descriptor: int) -> None:
    """`fsync`, if the file system supports it: CIFS, shared folders of virtual machines and many FUSE ones do not."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a temporary file next to it, sync, and rename it over the old one.

    Args:
        path: The file, in a folder that exists. Only one process writes it.
        chunks: Its content; may be read from the file itself.

    Raises:
        OSError: It cannot be written; the old file is unchanged.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.unlink(missing_ok=True)  # a link would lead elsewhere, a pipe would block forever
        with beside.open("xb") as file:
            file.writelines(chunks)
            file.flush()
            sync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write text without secrets, as `replace_file` does."""
    replace_file(path, [clean(text).encode()])


def duration(seconds: float) -> str:
    """`1:02:03`, with any number of hours; `?` if not known."""
    if not 0 <= seconds < 1e7:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
