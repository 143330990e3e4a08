"""Waiting for a loader's batches, but not forever."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from data.buffers import Batch
from data.errors import DataError, StalledError

_POLL_SECONDS = 1.0  # seconds between two checks of whether to keep waiting
_LOGGED_AFTER = 60.0  # seconds of waiting for one batch after which the log says what is being read

Gate = Callable[[bool, "str | DataError | None"], bool]
"""`gate(ready, trouble)` is called every second: with `ready` false while waiting for a batch, then with `ready` true
until it returns true, which delivers the batch. `trouble` says why no batch will come: the loader stalled, or (an
error) the data cannot be used. It may raise, which ends the wait."""

log = logging.getLogger(__name__)


class WaitingLoader(DataLoader[Batch]):
    """A DataLoader whose iterators wait with a limit, for workers as well as for reading in this process.

    torch's own `timeout` applies to workers only, and no signal ends it. torch's SIGCHLD handler is removed, because it
    raises wherever the program is when a worker is killed, even in the middle of an optimizer step.

    `limit`: seconds to wait for a batch; None: forever. `reading` says what a worker, or (None) all workers, are
    reading. Unless its `gate` is set, only `limit` and a dead worker end the wait, with StalledError.
    """

    def __init__(self, *, limit: float | None, reading: Callable[[int | None], str], **options: Any) -> None:
        self.limit, self.reading = limit, reading
        self.gate: Gate = _raise
        self._abandoned: Any = None
        super().__init__(**options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch's own base class is private
        if self._iterator is not None:  # persistent workers, for each of which torch waits without a limit
            return self._deliver(super().__iter__, self._iterator._workers)  # type: ignore[attr-defined]
        before = signal.getsignal(signal.SIGCHLD)
        # A worker inherits this until it has its own rules, or a signal to all processes would end it as it starts.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            batches = [super().__iter__()]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
        return self._deliver(batches.pop, getattr(batches[0], "_workers", []))

    def abandon(self) -> None:
        """Keep torch from waiting five seconds for each worker that cannot be killed."""
        self._abandoned, self._iterator = self._iterator, None

    def _deliver(self, begin: Callable[[], Iterator[Batch]], workers: Sequence[BaseProcess]) -> Iterator[Batch]:
        """Batches that a thread takes from the iterator of `begin`, so that the main thread stays responsive.

        Only that thread holds the iterator, as the last to hold it ends the workers, which can take seconds.
        """
        asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        answers: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
        # Pinning memory in a new thread would otherwise use the first GPU instead of this process's.
        device = torch.cuda.current_device() if self.pin_memory and torch.cuda.is_available() else None

        def fetch() -> None:
            if device is not None:
                torch.cuda.set_device(device)
            batches = None
            while asked.get():
                try:
                    batches = begin() if batches is None else batches
                    answers.put(next(batches))  # without a variable that would keep the batch alive
                except Exception as error:
                    answers.put(error)
                    if isinstance(error, StopIteration):
                        return

        thread = threading.Thread(target=fetch, name="loader", daemon=True)
        thread.start()
        try:
            while True:
                asked.put(True)
                answer: list[Any] = [self._wait(answers, workers)]
                error = answer[0] if isinstance(answer[0], Exception) else None
                ended = isinstance(error, StopIteration)
                trouble = None if error is None or ended else self._trouble(error, workers)
                while not self.gate(True, trouble):
                    pass
                if ended:
                    return
                if error is not None:
                    raise error
                yield answer.pop()  # without a variable that would keep the batch alive
        finally:
            asked.put(False)
            _join(thread)  # frees the workers' memory

    def _wait(self, answers: queue.SimpleQueue[Batch | Exception], workers: Sequence[BaseProcess]) -> Batch | Exception:
        waited, logged, last = 0.0, False, time.monotonic()
        while True:
            with suppress(queue.Empty):
                return answers.get(timeout=_POLL_SECONDS)
            now = time.monotonic()
            waited += min(now - last, 2 * _POLL_SECONDS)  # without time while this process was stopped
            last = now
            trouble = self._dead(workers)
            if trouble is None and self.limit is not None and waited >= self.limit:
                trouble = f"the loader has delivered nothing for {waited:.0f} s (data.timeout); {self.reading(None)}"
            if trouble is None and not logged and waited >= _LOGGED_AFTER:
                logged = True
                log.warning("waiting for the loader for %.0f s; %s", waited, self.reading(None))
            self.gate(False, trouble)

    def _trouble(self, error: Exception, workers: Sequence[BaseProcess]) -> str | DataError | None:
        """What the gate is told of an error; None: it is a bug, which is raised."""
        return self._dead(workers) or (error if isinstance(error, DataError) else None)

    def _dead(self, workers: Sequence[BaseProcess]) -> str | None:
        """How a worker ended unexpectedly; None if all are alive."""
        for number, worker in enumerate(workers):
            code = worker.exitcode
            if code:  # a normal end is 0
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                memory = "; the system does this when it runs out of memory" if code == -signal.SIGKILL else ""
                return f"loader worker {number} {how}; {self.reading(number)}{memory}"
        return None


def _raise(ready: bool, trouble: str | DataError | None) -> bool:
    """The gate of a loader without one."""
    if isinstance(trouble, DataError):
        raise trouble
    if trouble is not None:
        raise StalledError(trouble)
    return ready


def _join(thread: threading.Thread) -> None:
    """Wait until the thread has ended; one that hangs is abandoned.

    While it ends, OpenCV frees its memory under a lock. A worker forked at that moment would inherit the lock and wait
    for it forever at its first image.
    """
    ends = time.monotonic() + _POLL_SECONDS
    thread.join(_POLL_SECONDS)
    task = Path(f"/proc/self/task/{thread.native_id}")  # only Linux forks workers
    while task.exists() and time.monotonic() < ends:
        time.sleep(0.001)
