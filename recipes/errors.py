"""Errors that a user can correct, as opposed to bugs."""

from __future__ import annotations

from data.text import escape


class DivergedError(Exception):
    """The loss is not finite: exit status 1, one line, no traceback."""


class InputError(Exception):
    """The config or the input is wrong: exit status 2, one line each, no traceback.

    Each says where it is, what is wrong, what is allowed. Names in it are escaped here.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(map(escape, lines))
        super().__init__("\n".join(self.lines))
