"""Safe access to files on this machine and in buckets: no open blocks, and no name leads outside its folder.

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

LONGEST = 255  # longest file name, in bytes, that every common file system accepts
_RETRY_SECONDS = 900.0
"""How long to retry a bucket that is unreachable or denies access: longer than a training loader waits for its worker,
after which the run ends with its state saved."""

_WARN_SECONDS = 10.0  # after which a process that waits for a bucket logs it, once
_RETRIES_IF_SHORT = 3  # how often to reread an object that returned too few bytes, in case the connection failed
_CHUNK = 1 << 24  # bytes of a file or a download that are held in memory
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}


def plain_name(name: object) -> str:
    """Return the name if it is one path component, so that joined to a folder it stays in that folder.

    Raises:
        ValueError: it is not; the message has the escaped and shortened name, and the reason.
    """
    reason = _name_fault(name) if isinstance(name, str) else "it is not text"
    if reason:
        raise ValueError(f"the name {shown(name)} is refused: {reason}")
    return str(name)


def is_file_name(name: str) -> bool:
    """Whether a name from a disk or an archive, which need not be UTF-8, is one path component."""
    return not _name_fault(name, "surrogateescape")


def _name_fault(name: str, errors: str = "strict") -> str:
    """Why a name is not one path component; empty if it is."""
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
    """Return the path, with `/` between its components, if it stays below the folder that it is joined to.

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
    """A printable form of a name: quoted, non-ASCII characters escaped, at most 100 characters."""
    text = ascii(name[:200] if isinstance(name, str | bytes) else type(name).__name__)
    return text if len(text) <= 100 else f"{text[:97]}..."


class NotRegularError(OSError):
    """A pipe, socket, device or folder was found instead of a file."""


def open_regular(path: str | bytes | Path) -> int:
    """Open a regular file, or a link to one, for reading; returns the descriptor.

    Raises:
        NotRegularError: it is something else.
        OSError: it cannot be opened.
    """
    # Checked before opening too, because opening a device, such as a watchdog, can have effects.
    if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # it has not been replaced in the meantime
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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync(descriptor: int) -> None:
    """`fsync`, if the file system supports it: CIFS, shared folders of virtual machines and many FUSE ones do not."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def replace_file(path: Path, chunks: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
    """Write a temporary file next to it, sync, and rename it over the old one.

    Args:
        path: The file, in a folder that exists. Only one process writes it.
        chunks: Its content; may be read from the file itself.
        durable: Sync, which takes milliseconds; without it a loss of power may leave the new file empty.

    Raises:
        OSError: It cannot be written; the old file is unchanged.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.unlink(missing_ok=True)  # a link would lead elsewhere, a pipe would block forever
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
    """Write text without secrets, as `replace_file` does."""
    replace_file(path, [clean(text).encode()])


def is_remote(path: str) -> bool:
    """Whether a path is in a bucket."""
    return path.startswith("s3://")


def open_store(path: str) -> tuple[Any, str]:
    """The fsspec file system of a folder or of `s3://bucket/prefix`, and the path in it without a trailing slash.

    Credentials and region come from the usual AWS places, the endpoint from `S3_ENDPOINT_URL`, as for Composer and
    Streaming.
    """
    import fsspec  # not needed to open regular files, as checkpoints do

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
    """Make stores that are opened from now on read the credentials again."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def named(path: str) -> Iterator[None]:
    """Turn OSError and botocore's exceptions into a DataError of one line that names the path."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found ({first_line(error)})") from error
    except PermissionError as error:
        raise DataError(f"{path}: access denied ({first_line(error)})") from error
    except (OSError, ValueError) as error:  # ValueError: the endpoint is not an address
        raise DataError(f"{path}: {first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        raise DataError(f"{path}: {first_line(error)}") from error


def read_ranges(store: Any, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | OSError]:
    """Read byte ranges of objects concurrently, with retries, so that a transient error does not cost an image.

    If access is denied, the credentials are read again: session credentials expire and are renewed during a run.

    Args:
        store: an fsspec file system.
        ranges: (path, first byte, byte after the last) of each.

    Returns:
        The bytes of each; an OSError, such as FileNotFoundError, if the object does not have them.

    Raises:
        DataError: the store stayed unreachable, or access stayed denied.
    """
    # An empty range cannot be requested: a store would return the whole object.
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
            with suppress(Exception):  # there may briefly be none
                store.connect(refresh=True)
    return [found[i] for i in range(len(ranges))]


def _code(error: object) -> str:
    """The store's own error code."""
    response = getattr(getattr(error, "__cause__", None), "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def download(store: Any, path: str, size: int, target: Path) -> str:
    """Copy an object of `size` bytes to a file, piece by piece; returns its SHA-256 in hexadecimal digits.

    Raises:
        DataError: the store stayed unreachable, or its object is missing or too short.
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
