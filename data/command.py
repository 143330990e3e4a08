"""What all commands share: how they read their arguments, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from data.errors import InputError, StalledError, WorkerKilledError
from data.text import guard


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other wrong input: one line, exit status 2."""

    def __init__(self, prog: str | None, description: str, **options: Any) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def add_workers_argument(parser: Parser) -> None:
    """Add `--workers`."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"got {text}; allowed: at least 1")
        return int(text)

    about = "processes (default: one per core)"
    parser.add_argument("--workers", type=count, metavar="N", default=os.cpu_count(), help=about)


def _print_error(text: str) -> None:
    print(text, file=sys.stderr)


def run_main(main: Callable[[], int | None], tell: Callable[[str], None] = _print_error) -> int:
    """Run a command and return its exit status: that of `main` (None: 0), 2 for wrong input, 1 if it was stopped.

    Errors become lines on stderr; `tell` prints those that each process of a command would print. Other exceptions
    propagate.
    """
    guard()
    try:
        return main() or 0
    except InputError as error:
        tell(str(error))
        return 2
    except (StalledError, WorkerKilledError) as error:
        _print_error(str(error))
    except KeyboardInterrupt:
        tell("interrupted; run the same command again")
    return 1
