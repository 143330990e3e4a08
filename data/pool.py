"""Work on parts of a dataset, on all processors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Held = TypeVar("Held")
Part = TypeVar("Part")
Result = TypeVar("Result")


class WorkerKilledError(Exception):
    """A worker process ended without a word."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was killed, by the system where memory ran out; run the same command again, with fewer "
            "--workers to use less memory"
        )


def each_part(
    work: Callable[[Held, Part], Result], held: Held, parts: Sequence[Part], workers: int, preload: Sequence[str]
) -> Iterator[tuple[Part, Result]]:
    """Work on parts, and give each with its result as soon as it is done.

    Args:
        work: a function of a module, of (`held`, part).
        held: sent to each worker once.
        parts: what to work on.
        workers: processes.
        preload: modules that workers start with. Not the one that is started with -m, which has two names.

    Raises:
        WorkerKilledError: a worker was killed.
    """
    # A server that has everything imported forks the workers: quick to start, and no thread or connection is inherited.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(workers, context, initializer=_hold, initargs=(work, held, dict(os.environ))) as pool:
        futures = {pool.submit(_do, part): part for part in parts}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise WorkerKilledError from None
            raise


_held: tuple[Callable[[Any, Any], Any], Any]


def _hold(work: Callable[[Any, Any], Any], held: Any, environment: dict[str, str]) -> None:
    """Prepare a worker: the environment is the server's, of an earlier call; Ctrl-C ends it without a traceback."""
    global _held
    os.environ.update(environment)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
    _held = work, held


def _do(part: Any) -> Any:
    work, held = _held
    return work(held, part)
