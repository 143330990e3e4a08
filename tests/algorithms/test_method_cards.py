"""A technique's card says what its config says."""

import json
import re
from pathlib import Path

import pytest

import algorithms
from algorithms.composer_library import NOT_RESUMABLE, UNSUITABLE, USABLE
from algorithms.config import AlgorithmsConfig

ROOT = Path(algorithms.__file__).parent
TECHNIQUES = {name: field for name, field in AlgorithmsConfig.model_fields.items() if name != "composer"}
CONFIGS = {name: next(iter(field.annotation.__args__)) for name, field in TECHNIQUES.items()}
MODULES = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in {"__init__", "build", "config", "targets"})


def module(name):
    return "mix" if name in ("mixup", "cutmix") else name


def card(name):
    return (ROOT / f"{name}.md").read_text(encoding="utf-8")


def rows(text):
    """Field -> (default, meaning), in order, of the first table in a text."""
    table = re.search(r"^\| field \| default \| meaning \|\n\| --- \| --- \| --- \|\n((?:\|.*\n)*)", text, re.MULTILINE)
    if table is None:
        return {}
    lines = [re.fullmatch(r"\| `(\w+)` \| (.*?) \| (.*) \|", line) for line in table[1].splitlines()]
    return {line[1]: (line[2], line[3]) for line in lines}


def default(field):
    return "required" if field.is_required() else json.dumps(field.default).strip('"')


@pytest.mark.parametrize("name", CONFIGS)
def test_a_card_has_the_fields_of_its_config_and_promises_a_resume_that_it_keeps(name):
    text = card(module(name))
    assert text.split("## Resuming\n")[1].startswith("Exactly") == (CONFIGS[name].not_resumable is None)
    if module(name) == "mix":
        text = text.split(f"### `{name}`\n")[1]
    expected = [(key, (default(field), field.description)) for key, field in CONFIGS[name].model_fields.items()]
    assert list(rows(text).items()) == expected


def test_each_technique_has_a_module_and_a_card():
    assert {*map(module, CONFIGS), "composer_library"} == set(MODULES) == {path.stem for path in ROOT.glob("*.md")}


def test_the_librarys_card_names_what_is_usable_and_what_is_not():
    text = card("composer_library")
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)) == UNSUITABLE
    assert all(reason in text for reason in NOT_RESUMABLE.values())
    fields = text.split("## Fields\n")[1].split("```")[0]
    assert set(re.findall(r"`([A-Z]\w+)`", fields)) == set(USABLE)
