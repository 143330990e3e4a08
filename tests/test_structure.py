"""Who may import whom, and what the repository must not contain."""

import ast
import subprocess

import pytest

from tests.support import ROOT

FILES = sorted(path for package in ("recipes", "algorithms", "data") for path in (ROOT / package).rglob("*.py"))
ALLOWED = {"recipes": {"recipes", "algorithms", "data"}, "algorithms": {"algorithms"}, "data": {"data"}}


def imported(path):
    """Names of the modules that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_package_may(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name for name in imported(path) if name.split(".")[0] in {*ALLOWED, "entrypoint"}}
    assert {name.split(".")[0] for name in ours} <= ALLOWED[package]
    if package == "algorithms" and path.name not in ("config.py", "build.py"):
        shared = {"algorithms", "algorithms.config", "algorithms.targets"}
        assert ours <= shared, "a technique imports no other technique"


def test_nothing_names_a_package_index_or_a_home_folder():
    pattern = r"(--(extra-)?index-url|index-url *=|files\.pythonhosted|/home/[a-z]|/root/)"
    found = subprocess.run(["git", "grep", "-nIE", pattern, "--", "."], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in found.stdout.splitlines() if not line.startswith(("tests/test_structure.py", "Makefile"))]
    assert lines == []
