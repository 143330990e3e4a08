"""End a loader's worker processes, in whatever state they are."""

from __future__ import annotations

import multiprocessing
import time


def end_workers(seconds: float = 2.0) -> bool:
    """Kill this process's workers: at the end of a command they have nothing left to finish.

    On exit, Python would wait for each without limit (`multiprocessing.util._exit_function`), and a worker that is
    stopped, or waits for an unreachable disk, never ends.

    Args:
        seconds: Time to wait for all of them together.

    Returns:
        Whether one is still alive, because the kernel cannot end it while it waits for a device; `os._exit` does not
        wait for it.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(deadline - time.monotonic(), 0.0))
    return any(worker.is_alive() for worker in workers)
