"""Where checkpoints are stored: a local folder or a bucket, behind the same few methods.

Both are flat sets of named files. `put` is atomic: a name refers to either the whole file or nothing. Every method
raises `StoreError`; `read`, `load` and `fetch` raise `FileNotFoundError` for a missing name, and `delete` ignores it.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3.exceptions
import botocore.exceptions
from boto3.s3.transfer import S3TransferRetriesExceededError, TransferConfig
from composer.utils.object_store import S3ObjectStore

from data.errors import StoreError
from data.files import is_remote, open_regular, replace_file, sync
from data.text import first_line, hide, scrub

log = logging.getLogger(__name__)
T = TypeVar("T")
_BotoError, _ClientError = botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError

CHECKPOINTS = "checkpoints"  # folder in a run's folder for checkpoints on their way to a bucket
LOGS = "logs"  # folder below a bucket's prefix for the run's logs
RECORD = ".begun"  # file next to a run's checkpoints that records how and when the run began
SMALL = 8 * 2**20  # bytes read of a manifest or a note, whatever its size
_MIB = 2**20
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0
_CLIENT = {
    # The callers retry (`retry`, upload.py), so a single call should fail soon.
    "connect_timeout": 10,
    "read_timeout": 30,
    "retries": {"mode": "standard", "total_max_attempts": 2},
    "tcp_keepalive": True,
    # Not every S3-compatible server supports the checksums that boto3 has sent since 1.36; the manifest has a SHA-256.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
_TRANSFER = {"multipart_threshold": 16 * _MIB, "multipart_chunksize": 16 * _MIB, "max_concurrency": 4}
_MISTAKES = {
    "access denied": ("403", "AccessDenied", "AllAccessDisabled"),
    "the access key is unknown": ("InvalidAccessKeyId",),
    "the secret key is wrong": ("SignatureDoesNotMatch",),
    "the session token has expired": ("ExpiredToken",),
    "the session token is wrong": ("InvalidToken",),
    "the bucket does not exist": ("NoSuchBucket",),
    "the bucket is in another region": ("PermanentRedirect", "AuthorizationHeaderMalformed"),
    "this machine's clock is wrong": ("RequestTimeTooSkewed", "RequestExpired"),
}


class DamagedError(Exception):
    """A checkpoint is not what its manifest says, or its manifest cannot be read; the text says how."""


class LocalStore:
    """A folder, created when something is first put into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def path(self, name: str) -> Path:
        """The path of the file with this name, which need not exist."""
        return self.folder / name

    def entries(self) -> dict[str, int]:
        """Sizes of the folder's regular files by name, except those still being written; none if there is no folder."""
        found = {}
        with suppress(FileNotFoundError), self._errors(""):
            for path in sorted(self.folder.iterdir()):
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode) and not path.name.startswith("."):
                        found[path.name] = status.st_size
        return found

    def read(self, name: str, begin: int = 0) -> bytes:
        """At most `SMALL` bytes of a file from `begin` on; from 0, all of a valid manifest or note."""
        with self._errors(name), os.fdopen(open_regular(self.path(name)), "rb") as file:
            file.seek(begin)
            return file.read(SMALL)

    def load(self, name: str, size: int) -> bytes:
        """A whole file, which must be a regular one of this size, else `DamagedError`."""
        with self._errors(name), os.fdopen(open_regular(self.path(name)), "rb") as file:
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise DamagedError(f"{found} bytes instead of {size}")
            return file.read(size)

    def put(self, name: str, source: bytes | Sequence[memoryview]) -> None:
        """Write to a temporary name, sync, rename, sync the folder: after a power cut it is whole or absent."""
        with self._errors(name):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.path(name), [source] if isinstance(source, bytes) else source)
            with suppress(PermissionError):  # A folder may be writable but not readable.
                descriptor = os.open(self.folder, os.O_RDONLY)
                try:
                    sync(descriptor)
                finally:
                    os.close(descriptor)

    def delete(self, names: Iterable[str]) -> None:
        """Remove files."""
        for name in names:
            with self._errors(name):
                self.path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the incomplete files of writers that died; call it when no writer is alive."""
        with suppress(OSError):
            for left in self.folder.glob(".ep*"):
                left.unlink(missing_ok=True)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn an OSError into a StoreError, except FileNotFoundError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{self.path(name)}: {error.strerror or error}") from None


class S3Store:
    """The objects `s3://bucket/prefix/NAME`, through Composer's object store.

    Credentials, region and endpoint come from the usual AWS places: environment, profile, or instance role, and
    `S3_ENDPOINT_URL` for another S3-compatible server. Each thread uses a store, and so a client, of its own.
    """

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.location = f"s3://{bucket}/{prefix.strip('/')}"
        self._cancelled = False
        with self._errors(""):
            self._objects = S3ObjectStore(bucket, prefix, client_config=dict(_CLIENT), transfer_config=dict(_TRANSFER))
            self._client = self._objects.client
            # Wherever the credentials come from, and whenever they are renewed, each signature shows those in use.
            self._client.meta.events.register("before-sign.s3", _hide_credentials)

    def below(self, folder: str) -> S3Store:
        """The store one folder deeper."""
        return S3Store(f"{self.location}/{folder}")

    def entries(self) -> dict[str, int]:
        """Sizes of the objects directly below the prefix by name."""
        return {name: size for name, size in self.tree().items() if "/" not in name}

    def tree(self) -> dict[str, int]:
        """Sizes of all objects below the prefix, those in folders as `folder/name`."""
        prefix = self._objects.prefix
        with self._errors(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._objects.bucket, Prefix=prefix)
            objects = [item for page in pages for item in page.get("Contents", ()) if item["Key"] != prefix]
        return {item["Key"].removeprefix(prefix): item["Size"] for item in objects}

    def load(self, name: str, size: int) -> bytes:
        """A whole object, which must be of this size, else `DamagedError`."""
        data, config = io.BytesIO(), TransferConfig(**_TRANSFER)
        with self._errors(name):
            if (found := self._client.head_object(**self._key(name))["ContentLength"]) != size:
                raise DamagedError(f"{found} bytes instead of {size}")
            self._client.download_fileobj(**self._key(name), Fileobj=data, Config=config)
        return data.getvalue()

    def read(self, name: str) -> bytes:
        """An object; one of more than `SMALL` bytes is read as empty."""
        return self.read_with_age(name)[0]

    def read_with_age(self, name: str) -> tuple[bytes, float]:
        """As `read`, and the seconds since the object was written, by the server's clock."""
        with self._errors(name):
            answer = self._client.get_object(**self._key(name))
            # botocore checks that all has arrived only if all is read.
            data: bytes = answer["Body"].read() if answer["ContentLength"] <= SMALL else b""
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return data, (now - answer["LastModified"]).total_seconds()

    def fetch(self, name: str, path: Path) -> None:
        """Download an object to `path`, through a temporary name."""
        with self._errors(name):
            self._objects.download_object(name, path, overwrite=True)

    def put(self, name: str, source: bytes | Path) -> None:
        """Upload an object, a large file in parts; it becomes visible when complete. CancelledError after `cancel`."""
        with self._errors(name):
            if isinstance(source, Path):
                self._objects.upload_object(name, source, callback=self._progress)
            else:
                self._client.put_object(**self._key(name), Body=source)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects."""
        for name in names:
            with self._errors(name):
                self._client.delete_object(**self._key(name))

    def cancel(self) -> None:
        """Make the current upload fail soon, and later ones at once."""
        self._cancelled = True

    def abort_leftovers(self) -> None:
        """Delete the uploaded parts that a dead process left; they cost storage and are not listed."""
        bucket = self._objects.bucket
        with self._errors(""):
            answer = self._client.list_multipart_uploads(Bucket=bucket, Prefix=self._objects.prefix)
            for upload in answer.get("Uploads", ()):
                with suppress(_ClientError):
                    self._client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self._objects.bucket, "Key": self._objects.get_key(name)}

    def _progress(self, sent: int, total: int) -> None:
        if self._cancelled:
            raise CancelledError

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn boto's exceptions into one line that names the object and holds no credentials."""
        where = f"{self.location}/{name}" if name else self.location
        try:
            yield
        except S3TransferRetriesExceededError as error:
            raise _explained(where, error.last_exception) from None
        except (_BotoError, _ClientError, boto3.exceptions.Boto3Error, OSError, ValueError) as error:
            raise _explained(where, error) from None


Store = LocalStore | S3Store


def _hide_credentials(request_signer: Any, **_: Any) -> None:
    if credentials := request_signer._credentials:
        hide(*credentials.get_frozen_credentials()[:3])


def _explained(where: str, error: BaseException) -> Exception:
    if isinstance(error, boto3.exceptions.Boto3Error | FileNotFoundError):  # Composer turns 403 into "not found"
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, _ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in ("404", "NoSuchKey"):
            return FileNotFoundError(where)
        for mistake, codes in _MISTAKES.items():
            if code in codes:
                return StoreError(f"{where}: {mistake} ({code})", mistake=True)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(where)
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return StoreError(
            f"{where}: no AWS credentials in the environment, a profile or the instance role", mistake=True
        )
    text = getattr(error, "strerror", None) or first_line(error)
    # A ValueError: a malformed endpoint URL or region.
    wrong = isinstance(error, botocore.exceptions.ProfileNotFound | ValueError)
    return StoreError(f"{where}: {scrub(text)[:300]}", mistake=wrong)


def retry(action: Callable[[], T], limit: float) -> T:
    """Retry `action` on StoreError for at most `limit` seconds; a user's mistake is not retried."""
    deadline, pause = time.monotonic() + limit, _FIRST_PAUSE
    while True:
        try:
            return action()
        except StoreError as error:
            left = deadline - time.monotonic()
            if error.mistake or left <= 0:
                raise
            log.warning("%s; retrying for up to %d s", error, left)
            time.sleep(min(pause, left))
            pause = min(pause * 2, _LONGEST_PAUSE)


@dataclass(frozen=True)
class Places:
    """Where a run's checkpoints are stored."""

    local: Path
    """Always present: uploads are written here first, and a restart on the same machine needs no download."""
    remote: str | None  # `s3://bucket/prefix`, if there is a bucket
    run_folder: Path  # the run's folder, whose logs go to the bucket too

    @classmethod
    def of(cls, folder: str, runs_folder: str, run_name: str) -> Places:
        """The places of a run; `folder` is `checkpoints.folder` of its config."""
        filled, run_folder = folder.format(runs_folder=runs_folder, run_name=run_name), Path(runs_folder) / run_name
        if is_remote(filled):
            return cls(run_folder / CHECKPOINTS, filled.rstrip("/"), run_folder)
        return cls(Path(filled), None, run_folder)

    def stores(self) -> list[Store]:
        """The local folder, and the bucket if there is one."""
        return [LocalStore(self.local), *([] if self.remote is None else [S3Store(self.remote)])]
