"""Writing a file so that a reader, and a machine that dies, finds the old one or the new one."""

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
