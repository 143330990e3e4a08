"""The end of a loader's worker processes, whatever state they are in."""

from __future__ import annotations

import multiprocessing
import time


def end_workers(seconds: float = 2.0) -> bool:
    """Kill this process's workers: at the end of a command nothing in them is worth waiting for.

    Python itself would wait for each without limit when it exits (`multiprocessing.util._exit_function`), and one that
    was stopped, or that waits for a disk that went away, never ends.

    Args:
        seconds: To wait for all of them together.

    Returns:
        Whether one is still there: the kernel ends none that waits for a device. `os._exit` leaves without it.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(deadline - time.monotonic(), 0.0))
    return any(worker.is_alive() for worker in workers)
