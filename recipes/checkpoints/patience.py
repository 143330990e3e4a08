"""Trying again while a store is out of reach."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from recipes.checkpoints.store import StoreError

log = logging.getLogger(__name__)
T = TypeVar("T")
_LONGEST = 15.0
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Read `30s`, `5m` or `1h`."""
    return int(text[:-1]) * _UNITS[text[-1]]


def patiently(action: Callable[[], T], limit: float) -> T:
    """Run `action` until it works, for at most `limit` seconds; a mistake of the user's is not tried again.

    Raises:
        StoreError: Of the last attempt.
    """
    deadline, pause = time.monotonic() + limit, 1.0
    while True:
        try:
            return action()
        except StoreError as error:
            left = deadline - time.monotonic()
            if error.mistake or left <= 0:
                raise
            log.warning("%s; trying again for %d s", error, left)
            time.sleep(min(pause, left))
            pause = min(pause * 2, _LONGEST)
