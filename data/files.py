"""Safe access to files on this machine and in buckets: no open blocks, and no name leads outside its folder.

Names from a manifest, an index or a bucket's listing are one path component each, or refused.
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

from data.errors import DataError, InputError
from data.text import clean, first_line

log = logging.getLogger(__name__)

LONGEST = 255  # longest file name, in bytes, that every common file system accepts
_RETRY_SECONDS = 900.0
"""How long to retry a bucket that is unreachable or denies access: longer than a training loader waits for its worker,
after which the run ends with its state saved."""

_WARN_SECONDS = 10.0  # after which a process that waits for a bucket logs it, once
_RETRIES_IF_SHORT = 3  # an object with too few bytes is read again, in case the connection failed
_CHUNK = 1 << 24  # bytes of a file or a download that are held in memory
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}


def is_file_name(name: str, errors: str = "surrogateescape") -> bool:
    """Whether a name from a disk, which need not be UTF-8, is one path component."""
    if name in (".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return 0 < len(name.encode(errors=errors)) <= LONGEST
    except UnicodeEncodeError:
        return False


def plain_name(name: object) -> str:
    """Return the name if it is one path component, which joined to a folder stays in it; else raise ValueError."""
    if not isinstance(name, str) or not is_file_name(name, "strict"):
        raise ValueError(f"the name {shown(name)} is refused: expected UTF-8, 1 to {LONGEST} bytes, no path")
    return name


def relative_path(path: object) -> str:
    """Return the path if all between `/` are plain names, so that it stays below its folder; else raise ValueError."""
    if not isinstance(path, str) or not all(is_file_name(name, "strict") for name in path.split("/")):
        raise ValueError(f"the path {shown(path)} is refused: it leads elsewhere, or has a name that no file can have")
    return path


def shown(name: object) -> str:
    """A printable form of a name: quoted, non-ASCII characters escaped, at most 100 characters."""
    text = ascii(name[:200] if isinstance(name, str | bytes) else type(name).__name__)
    return text if len(text) <= 100 else f"{text[:97]}..."


class NotRegularError(OSError):
    """A pipe, socket, device or folder was found instead of a file."""


def open_regular(path: str | bytes | Path) -> int:
    """Open a regular file, or a link to one, for reading; raises `NotRegularError` for anything else, and OSError."""
    # Checked before opening too, because opening a device, such as a watchdog, can have effects.
    if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # it has not been replaced in the meantime
            return descriptor
        os.close(descriptor)
    raise NotRegularError(errno.EINVAL, "not a regular file", os.fsdecode(path))


def read_regular(path: str | bytes | Path, limit: int) -> bytes:
    """The bytes of a regular file (else `NotRegularError`), at most `limit` (else an OSError with errno EFBIG)."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes, more than the {limit} allowed", os.fsdecode(path))
        return file.read(size)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
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
    """Write a temporary file next to it, sync, and rename it over the old one, which an OSError leaves unchanged.

    A pipe, socket, device or folder is not replaced (`NotRegularError`): for root, `/dev/null` would be a file then.
    Only one process may write it. `chunks` may be read from the file itself. Without `durable`, nothing is synced,
    which saves milliseconds, but a loss of power may leave the new file empty.
    """
    if path.exists() and not path.is_file():
        raise NotRegularError(errno.EINVAL, "not a regular file", str(path))
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


@contextmanager
def writing(path: Path, hint: str = "") -> Iterator[None]:
    """Raise InputError, one line that names the file or folder, where a result cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}{hint}") from None


def is_remote(path: str) -> bool:
    """Whether a path is in a bucket."""
    return path.startswith("s3://")


def open_store(path: str) -> tuple[Any, str]:
    """The fsspec file system of a folder or of `s3://bucket/prefix`, and the path in it without a trailing slash.

    Credentials and region come from the usual AWS places, the endpoint from `S3_ENDPOINT_URL`, as for Composer.
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
    except Exception as error:
        # ValueError: the endpoint is not an address.
        known = isinstance(error, OSError | ValueError)
        if not known and type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        reason = first_line(error)
        if isinstance(error, FileNotFoundError | PermissionError):
            kind = "not found" if isinstance(error, FileNotFoundError) else "access denied"
            reason = kind if error.filename else f"{kind} ({reason})"  # no file name: a store's own words
        raise DataError(f"{path}: {reason}") from error


def read_path(path: str) -> bytes:
    """The bytes of a file or an object; raises DataError."""
    with named(path):
        store, place = open_store(path)
        data: bytes = store.cat_file(place)
    return data


def write_path(path: str, data: bytes) -> None:
    """Write a file or an object atomically; raises DataError."""
    with named(path):
        store, place = open_store(path)
        if is_remote(path):
            store.pipe_file(place, data)
        else:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            replace_file(Path(place), [data], durable=False)


def read_ranges(store: Any, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | OSError]:
    """Read ranges (path, begin, end) of objects concurrently, with retries: a transient error costs no image.

    If access is denied, the credentials are read again: session credentials expire and are renewed during a run. An
    object that lacks the bytes gives an OSError, such as FileNotFoundError. Raises DataError if the store stayed
    unreachable, or access stayed denied.
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
            is_short = isinstance(answer, bytes) or _code(answer) in ("InvalidRange", "416")
            if isinstance(answer, FileNotFoundError) or (isinstance(answer, bytes) and len(answer) == end - begin):
                found[i] = answer
            elif is_short and attempt >= _RETRIES_IF_SHORT:
                found[i] = OSError(errno.EIO, f"s3://{path}: is shorter than its index says")
            else:
                reason = f"s3://{path}: {'is shorter' if isinstance(answer, bytes) else first_line(answer)}"
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


def download(path: str, size: int, target: Path) -> None:
    """Copy an object of `size` bytes to a file, in pieces; raises DataError for the store, OSError for the disk."""
    store, place = open_store(path)
    with target.open("wb") as file:
        for begin in range(0, size, _CHUNK):
            with named(path):
                (piece,) = read_ranges(store, [(place, begin, min(begin + _CHUNK, size))])
                if isinstance(piece, OSError):
                    raise piece
            file.write(piece)
