"""SIGTERM, SIGINT and EC2's spot notices: finish the step, save, exit with status 75."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import urllib.error
import urllib.request
from types import FrameType

from recipes.cli import end_workers

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: run the same command again
EXIT_NOT_UPLOADED = 74  # sysexits' EX_IOERR: the run is finished, but its last state is on the local disk only
GRACE = 22.0
"""Seconds from a signal until the state must be saved and uploaded; Slurm and Composer's launcher kill after 30."""
_SPOT_GRACE = 100.0  # seconds from a spot notice, which comes two minutes ahead, until the process must have ended
_ASK_EVERY = 5.0
_TIMEOUT = 2.0

# Never through a proxy: the address is local to the machine.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Interrupted(Exception):
    """Training stopped on request, with the state `saved` or not; raised on every rank."""

    def __init__(self, saved: bool, message: str) -> None:
        super().__init__(message)
        self.saved = saved

    @property
    def status(self) -> int:
        """The process's exit status."""
        return EXIT_INTERRUPTED if self.saved else 1


class Interrupt:
    """Records a request to stop; `CheckpointManager` checks it after each batch.

    Composer installs handlers of its own when it is imported (composer/core/engine.py), which exit without saving: call
    `install` after that. On Ctrl-C, which its ranks receive too, the launcher also sends them SIGTERM, so only a second
    SIGINT exits at once.

    While `preparing`, a signal ends the process at once with status 75: there is nothing to save, and what a run waits
    for before its first step, such as a bucket or a copy of the data, may take longer than the 30 s until SIGKILL.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.deadline = float("inf")  # when the process must have ended, on the clock `time.monotonic`
        self.preparing = False
        self._keyboard = 0
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.reason is not None

    def request(self, reason: str, grace: float) -> None:
        """Request a stop after the current step, and the end of the process within `grace` seconds."""
        if self.reason is None:
            self.reason = reason
        self.deadline = min(self.deadline, time.monotonic() + grace)

    def seconds_left(self) -> float:
        """Seconds until the process must have ended; as after a signal, if only another process was asked to stop."""
        return GRACE if self.reason is None else max(self.deadline - time.monotonic(), 0.0)

    def install(self) -> None:
        """Install handlers for SIGTERM and SIGINT; call it in the main thread."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # A loader worker, forked from this process: its parent stops it.
        if self.preparing:
            name = signal.Signals(number).name
            os.write(2, f"\ninterrupted ({name}) before the first step; run the same command again\n".encode())
            end_workers(0.0)
            os._exit(EXIT_INTERRUPTED)
        if number == signal.SIGINT:
            self._keyboard += 1
            if self._keyboard > 1:
                end_workers(0.0)
                os._exit(128 + signal.SIGINT)
        if self.reason is None:
            again = "; press Ctrl-C again to exit at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving{again}\n".encode())
        self.request(signal.Signals(number).name, GRACE)


def watch_spot_notices(address: str, interrupt: Interrupt, every: float = _ASK_EVERY) -> None:
    """Poll the instance metadata (IMDSv2) every few seconds, and request an interrupt when there is a notice.

    Source: "Spot Instance interruption notices" in the EC2 user guide: `spot/instance-action` answers 404 until then.
    """
    silent = False
    while not interrupt.requested:
        time.sleep(every)
        try:
            notice, silent = _spot_notice(address.rstrip("/")), False
        except (OSError, ValueError) as error:
            if not silent:
                log.warning("%s does not answer; spot interruption notices will not be seen: %s", address, error)
            notice, silent = None, True
        if notice is not None:
            log.warning("EC2 will reclaim this instance: %s", notice)
            interrupt.request(f"EC2 spot notice: {notice}", _SPOT_GRACE)


def _spot_notice(address: str) -> str | None:
    token = _ask(f"{address}/latest/api/token", "PUT", "X-aws-ec2-metadata-token-ttl-seconds", "60")
    try:
        text = _ask(f"{address}/latest/meta-data/spot/instance-action", "GET", "X-aws-ec2-metadata-token", token)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    notice = json.loads(text)
    return f"{notice.get('action')} at {notice.get('time')}" if isinstance(notice, dict) else None


def _ask(url: str, method: str, header: str, value: str) -> str:
    request = urllib.request.Request(url, method=method, headers={header: value})
    with _open(request, timeout=_TIMEOUT) as answer:
        text: bytes = answer.read(65536)
    return text.decode()
