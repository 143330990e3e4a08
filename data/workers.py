"""Work in parts, on several processes, for commands that go through a whole dataset."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data.errors import Parser, WorkerKilledError


def add_workers_argument(parser: Parser) -> None:
    """Add `--workers`."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"got {text}; allowed: at least 1")
        return int(text)

    about = "processes (default: one per core)"
    parser.add_argument("--workers", type=count, metavar="N", default=os.cpu_count(), help=about)


def each_part(
    work: Callable[[Any, Any], Any], held: Any, parts: Sequence[Any], workers: int, preload: Sequence[str]
) -> Iterator[tuple[Any, Any]]:
    """Yield each part with `work(held, part)`, computed in worker processes, when done; raises WorkerKilledError.

    `held` is sent to each worker once. `preload` are modules to import before forking workers; not the one started with
    -m, which has two names.
    """
    # A server with the imports done forks the workers: they start quickly and inherit no thread or connection.
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
    """Set up a worker: the server's environment is that of an earlier call; Ctrl-C ends it without a traceback."""
    global _held
    os.environ.update(environment)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
    _held = work, held


def _do(part: Any) -> Any:
    work, held = _held
    return work(held, part)
