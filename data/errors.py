"""Errors about a dataset, worded for its owner."""

from __future__ import annotations

from data.text import escape


class StalledError(Exception):
    """A loader delivers no more batches: a worker was killed, or hangs."""


class DataError(Exception):
    """A dataset cannot be used: the message, one line, names the folder or the image, and what is expected."""

    def __init__(self, message: str) -> None:
        # torch re-raises a loader worker's exception with the worker's traceback in front of its message.
        own = message.rpartition("DataError: ")[2].strip() if "Original Traceback (" in message else message
        super().__init__(escape(own))
