"""Files that may lie in a folder or in a bucket, through fsspec (s3fs)."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from data.errors import DataError

log = logging.getLogger(__name__)

_PATIENCE = 900.0
"""Seconds for which a bucket that is out of reach, or denies access, is tried again: longer than a training loader
waits for its worker, which then ends the run with its state saved."""

_SILENCE = 10.0
"""Seconds after which each process that waits for a bucket says so, once."""

_TRIES_WHERE_SHORT = 3
"""An object that has fewer bytes than were asked for is asked again as often, in case it was the connection."""

_PIECE = 1 << 24
"""Bytes that a download holds in memory."""


def is_remote(path: str) -> bool:
    """Whether a path is a bucket's."""
    return path.startswith("s3://")


def open_store(path: str) -> tuple[Any, str]:
    """The file system that a path lies in, and the path in it.

    Credentials and region come the AWS way, the endpoint from `S3_ENDPOINT_URL`, as for Composer and Streaming.

    Args:
        path: a folder, or `s3://bucket/prefix`.

    Returns:
        (an fsspec file system that lists afresh each time, the path without `s3://` and without a slash at its end).
    """
    if not is_remote(path):
        return fsspec.filesystem("file", auto_mkdir=True), os.path.abspath(path)  # noqa: PTH100 (fsspec wants str)
    store = fsspec.filesystem(
        "s3",
        endpoint_url=os.environ.get("S3_ENDPOINT_URL"),
        use_listings_cache=False,
        config_kwargs={"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 3}},
    )
    return store, path.removeprefix("s3://").rstrip("/")


@contextmanager
def named(path: str) -> Iterator[None]:
    """Turn whatever goes wrong with a store into one line that names the path.

    Raises:
        DataError: instead of an OSError, or of what botocore raises.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found ({_first_line(error)})") from error
    except PermissionError as error:
        raise DataError(f"{path}: access denied ({_first_line(error)})") from error
    except (OSError, ValueError) as error:  # a ValueError: the endpoint is no address
        raise DataError(f"{path}: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        raise DataError(f"{path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_ranges(store: Any, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | OSError]:
    """Read stretches of objects, all at the same time, and patiently: a hiccup must not cost an image.

    Where access is denied, the credentials are read anew: those of a session expire and are renewed while a run lasts.

    Args:
        store: an fsspec file system.
        ranges: (path, first byte, byte after the last) of each.

    Returns:
        The bytes of each; an OSError, FileNotFoundError among them, where the object does not have them.

    Raises:
        DataError: the store stayed out of reach, or access denied.
    """
    # An empty range cannot be asked for: a store would answer with the whole object.
    found: dict[int, bytes | OSError] = {i: b"" for i, (_, begin, end) in enumerate(ranges) if begin >= end}
    began, pause, attempt, is_said = time.monotonic(), 0.1, 0, False
    while True:
        missing = [i for i in range(len(ranges)) if i not in found]
        if not missing:
            return [found[i] for i in range(len(ranges))]
        if attempt:
            time.sleep(pause)
            pause = min(2 * pause, 10.0)
        answers = store.cat_ranges(*(list(part) for part in zip(*(ranges[i] for i in missing), strict=True)))
        for i, answer in zip(missing, answers, strict=True):
            path, begin, end = ranges[i]
            is_bytes = isinstance(answer, bytes)
            if (is_bytes and len(answer) == end - begin) or isinstance(answer, FileNotFoundError):
                found[i] = answer
            elif (is_bytes or _code(answer) in ("InvalidRange", "416")) and attempt >= _TRIES_WHERE_SHORT:
                found[i] = OSError(errno.EIO, f"s3://{path}: is shorter than its index says")
            else:
                reason = f"s3://{path}: {_first_line(answer) if isinstance(answer, Exception) else 'is shorter'}"
                if time.monotonic() > began + _PATIENCE:
                    raise DataError(reason)
                if not is_said and time.monotonic() > began + _SILENCE:
                    is_said = True
                    log.warning("%s; trying again for up to %.0f minutes", reason, _PATIENCE / 60)
        attempt += 1
        if any(
            isinstance(answer, PermissionError) or getattr(answer, "errno", 0) == errno.EINVAL for answer in answers
        ):
            with suppress(Exception):  # there may be none for a moment
                store.connect(refresh=True)


def _code(error: object) -> str:
    """The store's own code for what went wrong."""
    response = getattr(getattr(error, "__cause__", None), "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def download(store: Any, path: str, size: int, target: Path) -> str:
    """Bring an object of `size` bytes to a file, piece by piece.

    Returns:
        Its SHA-256, in hexadecimal digits.

    Raises:
        DataError: the store stayed out of reach, or its object is missing or shorter.
        OSError: the file cannot be written.
    """
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for begin in range(0, size, _PIECE):
            with named(f"s3://{path}"):
                (piece,) = read_ranges(store, [(path, begin, min(begin + _PIECE, size))])
                if isinstance(piece, OSError):
                    raise piece
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def renew_credentials() -> None:
    """Let stores that are opened from now on read the credentials anew."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
