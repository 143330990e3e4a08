"""Files that may lie in a folder or in a bucket, through fsspec (s3fs)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec

from data.errors import DataError

_PATIENCE = 300.0
"""Seconds for which a bucket that is out of reach is tried again before an image is given up."""


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


def read_ranges(store: Any, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Read stretches of objects, all at the same time, and patiently: a hiccup must not cost an image.

    Args:
        store: an fsspec file system.
        ranges: (path, first byte, byte after the last) of each.

    Raises:
        DataError: an object is missing or access denied, or the store stayed out of reach.
    """
    found: list[bytes | None] = [None] * len(ranges)
    missing, deadline, pause = list(range(len(ranges))), time.monotonic() + _PATIENCE, 0.1
    while True:
        answers = store.cat_ranges(*(list(part) for part in zip(*(ranges[i] for i in missing), strict=True)))
        for i, answer in zip(missing, answers, strict=True):
            if isinstance(answer, bytes) and len(answer) == ranges[i][2] - ranges[i][1]:
                found[i] = answer
        failed = [i for i in missing if found[i] is None]
        if not failed:
            return found  # type: ignore[return-value]
        error = answers[missing.index(failed[0])]
        if isinstance(error, FileNotFoundError | PermissionError) or time.monotonic() > deadline:
            reason = _first_line(error) if isinstance(error, Exception) else "shorter than the index says"
            raise DataError(f"s3://{ranges[failed[0]][0]}: {reason}")
        time.sleep(pause)
        missing, pause = failed, min(2 * pause, 10.0)
