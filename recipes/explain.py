"""Validation errors in words for the person who wrote the YAML."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from recipes.read_yaml import Entry
from recipes.schema import Slot, allowed, find, nearest, nearest_key

Path = tuple[str, ...]


def explain(error: ValidationError, merged: Entry, root: type[BaseModel]) -> list[tuple[Path, str]]:
    """Every error as its key path and one line, `WHERE: key.path: what is wrong; allowed: ...`.

    Several complaints about the members of one union become one line.

    Args:
        error: What pydantic found.
        merged: The config as written, with the place of each value.
        root: The class that was validated.
    """
    lines: dict[str, Path] = {}
    for item in error.errors(include_url=False):
        path, slot = locate(item["loc"], root, item["type"])
        for text, at in _message(item, path, slot, merged, root):
            lines.setdefault(f"{where(merged, at)}: {'.'.join(at) + ': ' if at else ''}{text}", at)
    return [(path, line) for line, path in lines.items()]


def locate(loc: tuple[int | str, ...], root: type[BaseModel], kind: str) -> tuple[Path, Slot]:
    """The key path and slot of a pydantic location, without the names that it gives to members of unions."""
    path: Path = ()
    slot = Slot((root,))
    for element in map(str, loc):
        child = slot.child(element)
        if child is None and len(slot.models) > 1 and any(element == tag for tag in _tags(slot)):
            continue
        if child is None and kind == "extra_forbidden":
            return (*path, element), slot
        if child is None or not (slot.models or slot.is_section):
            break
        path, slot = (*path, element), child
    return path, slot


def _tags(slot: Slot) -> list[str]:
    if slot.discriminator is None:
        return []
    return [str(model.model_fields[slot.discriminator].default) for model in slot.models]


def where(merged: Entry, path: Path) -> str:
    """The place of the value at a path, or of the nearest section around it that was written."""
    entry = merged
    for key in path:
        if not isinstance(entry.value, dict) or key not in entry.value:
            break
        entry = entry.value[key]
    return entry.where


def _written(merged: Entry, path: Path) -> Any:
    entry: Any = merged
    for key in path:
        value = entry.value
        if isinstance(value, dict) and key in value:
            entry = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            entry = value[int(key)]
        else:
            return None
    return entry.plain()


def _message(item: Any, path: Path, slot: Slot, merged: Entry, root: type[BaseModel]) -> list[tuple[str, Path]]:
    kind = item["type"]
    written = _written(merged, path)
    if kind == "missing" and written is None:
        return [(f"missing; allowed: {allowed(slot)}", path)]
    if kind == "extra_forbidden":
        what = "unknown technique" if path[:-1] == ("algorithms",) else "unknown key"
        return [(f"{what}; allowed: {', '.join(slot.keys())}{nearest_key(root, path)}", path)]
    if kind in ("value_error", "assertion_error"):
        return [_own(line, path, root) for line in str(item["ctx"]["error"]).splitlines() if line.strip()]
    if kind.startswith("union_tag") and slot.discriminator:
        path = (*path, slot.discriminator)
        written, tags = _written(merged, path), _tags(slot)
        return [(f"got {show(written)}; allowed: {', '.join(tags)}{nearest(str(written), tags)}", path)]
    words = allowed(slot)
    hint = nearest(str(written), words.split(", ")) if kind == "literal_error" else ""
    return [(f"got {show(written)}; allowed: {words}{hint}", path)]


def _own(line: str, path: Path, root: type[BaseModel]) -> tuple[str, Path]:
    """A line of one of our validators, which may name its key itself: `key.path: what is wrong`."""
    name, colon, rest = line.partition(": ")
    if colon and re.fullmatch(r"[\w.]+", name):
        for at in (tuple(name.split(".")), (*path, *name.split("."))):
            if find(root, at) is not None:
                return rest, at
    return line, path


def show(value: Any) -> str:
    """A value as it may stand in an error, in YAML's notation: one line, at most 60 characters."""
    text = "nothing" if value is None else _flow(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)
