import importlib
import io
import sys

import pytest

from recipes.cli import run_command

MODULES = {"train": "entrypoint", "evaluate": "recipes.evaluate", "predict": "recipes.predict"}


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("evaluate", *words, stdin=b"")` -> exit status, standard output, standard error; in this process.

    `stdin=None`: it is closed.
    """

    def command(name, *words, stdin=b""):
        module = importlib.import_module(MODULES.get(name, f"recipes.{name}.__main__"))
        monkeypatch.setattr(sys, "argv", ["recipe", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        status = run_command(module.main)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture
def refused(command):
    """`refused("plan", *words)` -> the line that a command prints on standard error, ending with status 2."""

    def refused(name, *words):
        status, out, err = command(name, *words)
        assert (status, out, err.count("\n")) == (2, "", 1), (words, err)
        return err

    return refused
