"""SIGTERM and SIGINT: finish the step, save, leave with status 75."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from data.workers import end_workers

EXIT_INTERRUPTED = 75
"""sysexits' EX_TEMPFAIL: run the same command again."""
EXIT_NOT_UPLOADED = 74
"""sysexits' EX_IOERR: the run is finished, but its last state is on the local disk only."""

GRACE = 22.0
"""Seconds from a signal until the state should be saved and uploaded; Slurm and Composer's launcher kill after 30."""


class Interrupted(Exception):
    """Training was asked to stop, and stopped; raised on every rank.

    Args:
        saved: Whether the state is on the local disk or in the bucket.
        message: What was saved where, for people.
    """

    def __init__(self, saved: bool, message: str) -> None:
        super().__init__(message)
        self.saved = saved

    @property
    def status(self) -> int:
        """The process's exit status."""
        return EXIT_INTERRUPTED if self.saved else 1


class Interrupt:
    """Remembers that the process was asked to stop; `Checkpoints` looks at it after each batch.

    Composer installs handlers of its own when it is imported (composer/core/engine.py), which exit without saving: call
    `install` after that. The launcher answers a Ctrl-C, which its ranks got too, by sending them SIGTERM as well, so
    only a second SIGINT leaves at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.deadline = float("inf")
        """On the clock `time.monotonic`: when the process should be gone."""
        self._keyboard = 0
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.reason is not None

    def request(self, reason: str, grace: float) -> None:
        """Ask for a stop after the current step.

        Args:
            reason: What asked, for people.
            grace: Seconds until the process should be gone.
        """
        if self.reason is None:
            self.reason = reason
        self.deadline = min(self.deadline, time.monotonic() + grace)

    def seconds_left(self) -> float:
        """Seconds until the process should be gone; as after a signal, if only another process was asked."""
        return GRACE if self.reason is None else max(self.deadline - time.monotonic(), 0.0)

    def install(self) -> None:
        """Take SIGTERM and SIGINT over; call it in the main thread."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if os.getpid() != self._process:
            return  # A loader's worker, forked from us: it works on until its parent stops it.
        if number == signal.SIGINT:
            self._keyboard += 1
            if self._keyboard > 1:
                end_workers(0.0)
                os._exit(128 + signal.SIGINT)
        if self.reason is None:
            again = "; press Ctrl-C again to leave at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving{again}\n".encode())
        self.request(signal.Signals(number).name, GRACE)
