"""Errors that a user can correct, as opposed to bugs."""

from __future__ import annotations

from data.text import escape


class InputError(Exception):
    """The config or the input is wrong: exit status 2, one line each, no traceback.

    Each says where it is, what is wrong, what is allowed. Names in it are escaped here.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(map(escape, lines))
        super().__init__("\n".join(self.lines))


class DataError(InputError):
    """A dataset cannot be used: the message, one line, names the folder or the image, and what is expected."""

    def __init__(self, message: str) -> None:
        # torch re-raises a loader worker's exception with the worker's traceback in front of its message.
        super().__init__(message.rpartition("DataError: ")[2].strip() if "Original Traceback (" in message else message)


class StoreError(Exception):
    """An operation of a store failed; the text is for display and holds no credentials."""

    def __init__(self, message: str, *, mistake: bool = False) -> None:
        super().__init__(escape(message))
        self.mistake = mistake
        """Retrying will not help: the bucket is missing, or the credentials are wrong or lack a permission."""


class StalledError(Exception):
    """A loader delivers no more batches: a worker was killed, or hangs."""


class WorkerKilledError(Exception):
    """A worker process of a command was killed from outside."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was killed, probably because memory ran out; run the same command again, with fewer "
            "--workers to use less memory"
        )
