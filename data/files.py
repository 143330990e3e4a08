"""Files on this machine and in buckets, and the names that lead to them: nothing blocks, and nothing leads elsewhere.

Names from a manifest, an index, an archive or a bucket's listing are one path component each, or refused. Only regular
files are opened. Buckets are read through fsspec (s3fs), with retries.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.text import clean, first_line

log = logging.getLogger(__name__)

LONGEST = 255  # bytes of a file's name that every usual file system takes
_RETRY_SECONDS = 900.0
"""How long a bucket that is out of reach, or denies access, is tried again: longer than a training loader waits for its
worker, which then ends the run with its state saved."""

_WARN_SECONDS = 10.0  # after which each process that waits for a bucket says so, once
_RETRIES_IF_SHORT = 3  # an object with fewer bytes than were asked for is read again, in case it was the connection
_CHUNK = 1 << 24  # bytes that a download holds in memory
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}


def plain_name(name: object) -> str:
    """Return a name that is one component of a path, so that joined to a folder it stays in that folder.

    Raises:
        ValueError: it is not; the message shows the name, escaped and cut, and says why.
    """
    reason = _name_fault(name) if isinstance(name, str) else "it is not text"
    if reason:
        raise ValueError(f"the name {shown(name)} is refused: {reason}")
    return str(name)


def is_file_name(name: str) -> bool:
    """Whether a name of a disk or an archive, whose bytes need not be UTF-8, is one component of a path."""
    return not _name_fault(name, "surrogateescape")


def _name_fault(name: str, errors: str = "strict") -> str:
    """Why a name is not a component of a path; empty where it is one."""
    if name in ("", ".", ".."):
        return "it is empty" if not name else "it leads to another folder"
    if "/" in name:
        return "it is a path"
    if "\0" in name:
        return "it has a NUL character"
    try:
        size = len(name.encode(errors=errors))
    except UnicodeEncodeError:
        return "it is not UTF-8"
    return f"it has {size} bytes; allowed: {LONGEST}" if size > LONGEST else ""


def relative_path(path: object) -> str:
    """Return a path, `/` between its components, that leads to somewhere below the folder that it is joined to.

    Raises:
        ValueError: one of its components is not a plain name.
    """
    for name in path.split("/") if isinstance(path, str) else [path]:
        try:
            plain_name(name)
        except ValueError as error:
            raise ValueError(f"{error}, in {shown(path)}" if name != path else str(error)) from None
    return str(path)


def shown(name: object) -> str:
    """A name as it may be printed: quoted, everything but plain ASCII escaped, at most 100 characters."""
    text = ascii(name[:200] if isinstance(name, str | bytes) else type(name).__name__)
    return text if len(text) <= 100 else f"{text[:97]}..."


class NotRegularError(OSError):
    """A pipe, a socket, a device or a folder stands where a file is expected."""


def open_regular(path: str | bytes | Path) -> int:
    """Open a regular file, or a link to one, for reading; returns the descriptor.

    Raises:
        NotRegularError: it is something else.
        OSError: it cannot be opened.
    """
    # Checked before opening, too: to open a device may do something, as with a watchdog's.
    if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # nothing has taken its place meanwhile
            return descriptor
        os.close(descriptor)
    raise NotRegularError(errno.EINVAL, "not a regular file", os.fsdecode(path))


def read_regular(path: str | bytes | Path, limit: int) -> bytes:
    """The bytes of a regular file (else `NotRegularError`), at most `limit` (else an OSError with errno EFBIG)."""
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


def sync(descriptor: int) -> None:
    """`fsync`, where the file system has it: CIFS, shared folders of virtual machines and many FUSE ones do not."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def replace_file(path: Path, chunks: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
    """Write beside a file, sync, and rename over it, so that a reader, and a machine that dies, finds one or the other.

    Args:
        path: The file, in a folder that exists. Only one process writes it.
        chunks: Its content; may be read from the file itself.
        durable: Sync, which takes milliseconds; without it a loss of power may leave the new file empty.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.unlink(missing_ok=True)  # a link would lead elsewhere, a pipe block for ever
        with beside.open("xb") as file:
            file.writelines(chunks)
            file.flush()
            if durable:
                sync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text for people, without secrets, as `replace_file` does."""
    replace_file(path, [clean(text).encode()])


def is_remote(path: str) -> bool:
    """Whether a path is a bucket's."""
    return path.startswith("s3://")


def open_store(path: str) -> tuple[Any, str]:
    """The fsspec file system of a folder or of `s3://bucket/prefix`, and the path in it, without a slash at its end.

    Credentials and region come the AWS way, the endpoint from `S3_ENDPOINT_URL`, as for Composer and Streaming.
    """
    import fsspec  # checkpoints open regular files, too, and need none of this

    if not is_remote(path):
        return fsspec.filesystem("file", auto_mkdir=True), os.path.abspath(path)  # noqa: PTH100 (fsspec wants str)
    store = fsspec.filesystem(
        "s3",
        endpoint_url=os.environ.get("S3_ENDPOINT_URL"),
        use_listings_cache=False,
        config_kwargs={"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 3}},
    )
    return store, path.removeprefix("s3://").rstrip("/")


def renew_credentials() -> None:
    """Let stores that are opened from now on read the credentials again."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def named(path: str) -> Iterator[None]:
    """Turn an OSError, and what botocore raises, into a DataError of one line that names the path."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found ({first_line(error)})") from error
    except PermissionError as error:
        raise DataError(f"{path}: access denied ({first_line(error)})") from error
    except (OSError, ValueError) as error:  # a ValueError: the endpoint is not an address
        raise DataError(f"{path}: {first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        raise DataError(f"{path}: {first_line(error)}") from error


def read_ranges(store: Any, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | OSError]:
    """Read parts of objects, all at the same time, and with retries: a hiccup must not cost an image.

    Where access is denied, the credentials are read again: those of a session expire and are renewed while a run lasts.

    Args:
        store: an fsspec file system.
        ranges: (path, first byte, byte after the last) of each.

    Returns:
        The bytes of each; an OSError, such as FileNotFoundError, where the object does not have them.

    Raises:
        DataError: the store stayed out of reach, or access denied.
    """
    # An empty range cannot be asked for: a store would answer with the whole object.
    found: dict[int, bytes | OSError] = {i: b"" for i, (_, begin, end) in enumerate(ranges) if begin >= end}
    began, attempt, warned = time.monotonic(), 0, False
    while missing := [i for i in range(len(ranges)) if i not in found]:
        if attempt:
            time.sleep(min(0.1 * 2 ** (attempt - 1), 10.0))
        answers = store.cat_ranges(*(list(part) for part in zip(*(ranges[i] for i in missing), strict=True)))
        for i, answer in zip(missing, answers, strict=True):
            path, begin, end = ranges[i]
            is_bytes = isinstance(answer, bytes)
            if (is_bytes and len(answer) == end - begin) or isinstance(answer, FileNotFoundError):
                found[i] = answer
            elif (is_bytes or _code(answer) in ("InvalidRange", "416")) and attempt >= _RETRIES_IF_SHORT:
                found[i] = OSError(errno.EIO, f"s3://{path}: is shorter than its index says")
            else:
                reason = f"s3://{path}: {first_line(answer) if isinstance(answer, Exception) else 'is shorter'}"
                waited = time.monotonic() - began
                if not warned and waited > _WARN_SECONDS:
                    warned = True
                    log.warning("%s; trying again for up to %.0f minutes", reason, _RETRY_SECONDS / 60)
                if waited > _RETRY_SECONDS:
                    raise DataError(reason)
        attempt += 1
        if any(isinstance(one, PermissionError) or getattr(one, "errno", 0) == errno.EINVAL for one in answers):
            with suppress(Exception):  # there may be none for a moment
                store.connect(refresh=True)
    return [found[i] for i in range(len(ranges))]


def _code(error: object) -> str:
    """The store's own code for what went wrong."""
    response = getattr(getattr(error, "__cause__", None), "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def download(store: Any, path: str, size: int, target: Path) -> str:
    """Copy an object of `size` bytes to a file, piece by piece; returns its SHA-256 in hexadecimal digits.

    Raises:
        DataError: the store stayed out of reach, or its object is missing or shorter.
        OSError: the file cannot be written.
    """
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for begin in range(0, size, _CHUNK):
            with named(f"s3://{path}"):
                (piece,) = read_ranges(store, [(path, begin, min(begin + _CHUNK, size))])
                if isinstance(piece, OSError):
                    raise piece
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
