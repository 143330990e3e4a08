"""How a user's files are opened: only regular ones, and so that neither opening nor reading can wait for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from data.decode import MAX_BYTES, BadImage, Fault


class NotRegularError(OSError):
    """A pipe, a socket, a device or a folder stands where a file is expected."""


def open_regular(path: str | bytes | Path) -> int:
    """Open a regular file, or a link to one, for reading; returns the descriptor.

    Raises:
        NotRegularError: it is something else.
        OSError: it cannot be opened.
    """
    # Looked at before, too: to open a device may do something, as with a watchdog's.
    if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # nothing has taken its place meanwhile
            return descriptor
        os.close(descriptor)
    raise NotRegularError(errno.EINVAL, Fault.NOT_A_FILE.reason, os.fsdecode(path))


def read_regular(path: str | bytes | Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        limit: its size in bytes at most.

    Raises:
        OSError: it is no regular file (`NotRegularError`), is larger (errno EFBIG), or cannot be read.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes, more than the {limit} allowed", os.fsdecode(path))
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def read_image(path: str | bytes | Path) -> bytes:
    """The bytes of an image file.

    Raises:
        BadImage: it is no regular file, a link that leads to no file, or larger than `MAX_BYTES`.
        OSError: it is missing or cannot be read.
    """
    try:
        return read_regular(path, MAX_BYTES)
    except NotRegularError as error:
        raise BadImage(Fault.NOT_A_FILE) from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise BadImage(Fault.TOO_MANY_BYTES) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and os.path.islink(path):  # noqa: PTH114
            raise BadImage(Fault.BROKEN_LINK) from error
        raise
