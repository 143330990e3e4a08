"""What is wrong with a dataset, in words for its owner."""

from __future__ import annotations


class StalledError(Exception):
    """A loader gives no batch any more: a worker was killed, or hangs."""


class DataError(Exception):
    """A dataset cannot be used as it is: the message names the folder or the image, and what is expected."""
