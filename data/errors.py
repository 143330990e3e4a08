"""Errors that a user can correct, as opposed to bugs, and how a command reports them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from data.text import escape, guard


class InputError(Exception):
    """The config or the input is wrong: exit status 2, one line each, no traceback.

    Each says where it is, what is wrong, what is allowed. Names in it are escaped here.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(map(escape, lines))
        super().__init__("\n".join(self.lines))


class DataError(InputError):
    """A dataset cannot be used: the message, one line, names the folder or the image, and what is expected."""

    def __init__(self, message: str) -> None:
        # torch re-raises a loader worker's exception with the worker's traceback in front of its message.
        super().__init__(message.rpartition("DataError: ")[2].strip() if "Original Traceback (" in message else message)


class StoreError(Exception):
    """An operation of a store failed; the text is for display and holds no credentials."""

    def __init__(self, message: str, *, mistake: bool = False) -> None:
        super().__init__(escape(message))
        self.mistake = mistake
        """Retrying will not help: the bucket is missing, or the credentials are wrong or lack a permission."""


class StalledError(Exception):
    """A loader delivers no more batches: a worker was killed, or hangs."""


class WorkerKilledError(Exception):
    """A worker process of a command was killed from outside."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was killed, probably because memory ran out; run the same command again, with fewer "
            "--workers to use less memory"
        )


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other wrong input: one line, exit status 2."""

    def __init__(self, prog: str | None, description: str, **options: Any) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


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
