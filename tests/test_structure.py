"""The rooms and their walls: who may import whom, and how large a file may get."""

import ast
import subprocess

import pytest

from tests.support import ROOT

FILES = sorted(path for room in ("recipes", "algorithms", "data") for path in (ROOT / room).rglob("*.py"))
ALLOWED = {"recipes": {"recipes", "algorithms", "data"}, "algorithms": {"algorithms"}, "data": {"data"}}


def imported(path):
    """Names of the modules that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path):
    room = path.relative_to(ROOT).parts[0]
    ours = {name for name in imported(path) if name.split(".")[0] in {*ALLOWED, "entrypoint"}}
    assert {name.split(".")[0] for name in ours} <= ALLOWED[room]
    parts = path.relative_to(ROOT).parts
    if room == "algorithms" and len(parts) > 2:
        mine = f"algorithms.{parts[1]}"
        strangers = [name for name in ours if name != "algorithms.technique" and not name.startswith(mine)]
        assert not strangers, "a technique's room imports no other room"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_go(path):
    assert len(path.read_text().splitlines()) <= 400


def test_each_technique_has_its_room_and_its_card():
    from algorithms.config import AlgorithmsConfig

    rooms = {path.parent.name for path in (ROOT / "algorithms").glob("*/__init__.py")}
    shared = {"mixup": "mix", "cutmix": "mix", "composer": "composer_library"}
    assert {shared.get(name, name) for name in AlgorithmsConfig.model_fields} == rooms
    assert all((ROOT / "algorithms" / room / "README.md").is_file() for room in rooms)


def test_nothing_names_a_package_index_or_a_home_folder():
    pattern = r"(--(extra-)?index-url|index-url *=|files\.pythonhosted|/home/[a-z]|/root/)"
    found = subprocess.run(["git", "grep", "-nIE", pattern, "--", "."], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in found.stdout.splitlines() if not line.startswith(("tests/test_structure.py", "Makefile"))]
    assert lines == []
