"""What the benchmarks use of the project is there: most of them take too long for a test."""

import importlib

import pytest

from tests.support import ROOT


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")))
def test_it_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")
