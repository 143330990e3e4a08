"""A bucket as a store, through Composer's S3 object store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import boto3.exceptions
import botocore.exceptions
from composer.utils.object_store import S3ObjectStore

from data.text import hide, scrub
from recipes.checkpoints.store import SMALL, Entry, StoreError

_MIB = 2**20
_CLIENT = {
    # Patience is the callers' (upload.py, resume.py): a call that cannot work says so soon.
    "connect_timeout": 10,
    "read_timeout": 30,
    "retries": {"mode": "standard", "total_max_attempts": 2},
    "tcp_keepalive": True,
    # Not every maker's S3 knows the checksums that boto3 sends since 1.36; a manifest's SHA-256 is ours.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
_TRANSFER = {"multipart_threshold": 16 * _MIB, "multipart_chunksize": 16 * _MIB, "max_concurrency": 4}
_MISTAKES = {
    "403": "access denied",
    "AccessDenied": "access denied",
    "AllAccessDisabled": "access denied",
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is wrong",
    "NoSuchBucket": "the bucket does not exist",
    "PermanentRedirect": "the bucket is in another region",
    "AuthorizationHeaderMalformed": "the bucket is in another region",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "RequestExpired": "this machine's clock is wrong",
}
_ABSENT = {"404", "NoSuchKey"}


class CancelledError(Exception):
    """An upload was given up because it is no longer wanted."""


class S3Store:
    """The objects `s3://bucket/prefix/NAME`; credentials, region and endpoint come the AWS way.

    That is: environment, profile, or instance role, and `S3_ENDPOINT_URL` for an S3 of another maker.

    Args:
        url: `s3://bucket/prefix`.

    Raises:
        StoreError: No client can be made, such as for a profile that does not exist.
    """

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.location = f"s3://{bucket}/{prefix.strip('/')}"
        self._cancelled = False
        with self._named(""):
            self._objects = S3ObjectStore(bucket, prefix, client_config=dict(_CLIENT), transfer_config=dict(_TRANSFER))
            # Whatever the credentials come from, and whenever they are renewed: each signature shows those in use.
            self._objects.client.meta.events.register("before-sign.s3", _hide_credentials)

    def below(self, folder: str) -> S3Store:
        """The store one folder deeper."""
        return S3Store(f"{self.location}/{folder}")

    def entries(self) -> list[Entry]:
        """All objects directly below the prefix."""
        return [entry for entry in self.tree() if "/" not in entry.name]

    def tree(self) -> list[Entry]:
        """All objects below the prefix, those in folders as `folder/name`."""
        prefix = self._objects.prefix
        with self._named(""):
            pages = self._objects.client.get_paginator("list_objects_v2").paginate(
                Bucket=self._objects.bucket, Prefix=prefix
            )
            return [
                Entry(item["Key"].removeprefix(prefix), item["Size"])
                for page in pages
                for item in page.get("Contents", ())
                if item["Key"] != prefix
            ]

    def read(self, name: str) -> bytes:
        """The first `SMALL` bytes of an object."""
        return self.read_with_age(name)[0]

    def read_with_age(self, name: str) -> tuple[bytes, float]:
        """The first `SMALL` bytes of an object, and the seconds since it was written, by the server's clock."""
        with self._named(name):
            answer = self._objects.client.get_object(Bucket=self._objects.bucket, Key=self._objects.get_key(name))
            data: bytes = answer["Body"].read(SMALL)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return data, (now - answer["LastModified"]).total_seconds()

    def size(self, name: str) -> int:
        """An object's size in bytes."""
        with self._named(name):
            answer = self._objects.client.head_object(Bucket=self._objects.bucket, Key=self._objects.get_key(name))
        size: int = answer["ContentLength"]
        return size

    def fetch(self, name: str, path: Path) -> None:
        """Download an object to `path`, through a temporary name."""
        with self._named(name):
            self._objects.download_object(name, path, overwrite=True)

    def put(self, name: str, source: bytes | Sequence[memoryview] | Path) -> None:
        """Upload an object, a large file in parts; it shows when it is whole.

        Raises:
            CancelledError: `cancel` was called meanwhile.
        """
        with self._named(name):
            if isinstance(source, Path):
                self._objects.upload_object(name, source, callback=self._progress)
            else:
                body = source if isinstance(source, bytes) else b"".join(source)
                key = self._objects.get_key(name)
                self._objects.client.put_object(Bucket=self._objects.bucket, Key=key, Body=body)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects."""
        for name in names:
            with self._named(name):
                self._objects.client.delete_object(Bucket=self._objects.bucket, Key=self._objects.get_key(name))

    def cancel(self) -> None:
        """Make the upload that is under way end soon, and later ones at once."""
        self._cancelled = True

    def abort_leftovers(self) -> None:
        """Drop the parts of uploads that a dead process left; they cost storage and show nowhere."""
        client, bucket = self._objects.client, self._objects.bucket
        with self._named(""):
            answer = client.list_multipart_uploads(Bucket=bucket, Prefix=self._objects.prefix)
            for upload in answer.get("Uploads", ()):
                with suppress(botocore.exceptions.ClientError):
                    client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _progress(self, sent: int, total: int) -> None:
        del sent, total
        if self._cancelled:
            raise CancelledError

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Turn what boto raises into one line that names the object and holds no credentials."""
        where = f"{self.location}/{name}" if name else self.location
        try:
            yield
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise _explained(where, error) from None
        except boto3.exceptions.Boto3Error as error:
            raise _explained(where, error.__cause__ or error.__context__ or error) from None
        except FileNotFoundError as error:  # Composer takes 403 for "not found".
            raise _explained(where, error.__cause__ or error) from None
        except OSError as error:
            raise StoreError(f"{where}: {scrub(str(error.strerror or error))}") from None
        except ValueError as error:  # a malformed endpoint URL or region
            raise StoreError(f"{where}: {scrub(str(error))}", mistake=True) from None


def _hide_credentials(request_signer: Any, **_: Any) -> None:
    if credentials := request_signer._credentials:
        hide(*credentials.get_frozen_credentials()[:3])


def _explained(where: str, error: BaseException) -> Exception:
    if isinstance(error, botocore.exceptions.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _ABSENT:
            return FileNotFoundError(where)
        if code in _MISTAKES:
            return StoreError(f"{where}: {_MISTAKES[code]} ({code})", mistake=True)
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return StoreError(
            f"{where}: no AWS credentials in the environment, a profile or the instance's role", mistake=True
        )
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(where)
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return StoreError(f"{where}: {scrub(first)[:300]}", mistake=isinstance(error, botocore.exceptions.ProfileNotFound))


def open_s3(url: str) -> Callable[[], S3Store]:
    """What opens the bucket when it is needed: each thread of an upload has a client of its own."""
    return lambda: S3Store(url)
