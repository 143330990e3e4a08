"""The only reader of YAML files and of `key.path=value`: both become one RunConfig, or one list of all errors."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.explain import explain, show
from recipes.read_yaml import Entry, holds_control, parse, read_file
from recipes.resolved import flat_items
from recipes.schema import Slot, find

_PASSWORD = re.compile(r"//[^/\s\"':]+:[^/\s\"']*@")
ON, OFF = ("on", "yes", "true"), ("off", "no", "false")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML, the `base` that it names and the overrides, and check all of it.

    A later layer wins: base, file, overrides in their order. Mappings merge key by key, everything else replaces;
    `off` removes a technique, and a section whose `name` changes does not inherit the other's fields.

    Args:
        path: The YAML file.
        overrides: `key.path=value`, the value in YAML's notation.

    Raises:
        InputError: Every error found, one line each: `FILE:LINE: key.path: what is wrong; allowed: ...`.
    """
    layers, errors = _files(Path(path))
    whole = not errors
    for override in overrides:
        try:
            layers.append(_override(override))
        except InputError as error:
            errors += error.lines
    root = Slot((RunConfig,))
    merged = Entry({}, str(path))
    for layer in layers:
        merged = _merge(merged, _switches(layer, root, (), errors), root)
    merged = Entry(_finish(merged.value, root), str(path))
    config, wrong = _validate(merged)
    # What is missing may stand in the base that could not be read.
    errors += [line for line in wrong if line not in errors and (whole or ": missing" not in line)]
    if errors or config is None:
        raise InputError(*errors)
    return _without_passwords(config)


def _without_passwords(config: RunConfig) -> RunConfig:
    """The config, which every run and checkpoint keeps and shows, and so may hold no secret.

    Raises:
        InputError: An address in it holds a password.
    """
    for key, value in flat_items(config.model_dump(mode="json"), ""):
        if _PASSWORD.search(str(value)):
            raise InputError(
                f"{key}: holds a password, which the run's files would show; allowed: an address without one (keys "
                "and passwords come from the environment, such as AWS_ACCESS_KEY_ID or MLFLOW_TRACKING_PASSWORD)"
            )
    return config


def _files(path: Path) -> tuple[list[Entry], list[str]]:
    """The file's entries, after its base's, and what is wrong with the base."""
    top = read_file(path, _suggest_file(path))
    base = top.value.pop("base", None)
    if base is None:
        return [top], []
    here = f"{base.where}: base: "
    if not isinstance(base.value, str):
        return [top], [f"{here}got {show(base.plain())}; allowed: a YAML file, its path from this one's folder"]
    base_path = path.parent / base.value
    try:
        below = read_file(base_path, _suggest_file(base_path))
    except InputError as error:
        return [top], [here + line for line in error.lines]
    if base_path.resolve() == path.resolve():
        return [top], [f"{here}is this file itself"]
    deeper = below.value.pop("base", None)
    if deeper is not None:
        return [below, top], [f"{deeper.where}: base: the base of {path} must not have a base of its own"]
    return [below, top], []


def _suggest_file(path: Path) -> str:
    """The YAML files with the nearest names, in that folder, else in `yamls/` here, else in this project's."""
    for place in (path.parent, Path("yamls"), Path(__file__).resolve().parent.parent / "yamls"):
        found = {other.stem: other for other in sorted(place.glob("*.y*ml"))} if place.is_dir() else {}
        close = difflib.get_close_matches(path.stem, list(found), n=2, cutoff=0.6)
        if close:
            return f"; did you mean {' or '.join(repr(str(found[name])) for name in close)}?"
    return ""


def _override(text: str) -> Entry:
    """`a.b=value` as the nested entry {a: {b: value}}."""
    where = f"{text!r} on the command line"
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys) or not key.isprintable():
        raise InputError(f"{where}: an override is key.path=value, such as optimizer.lr=0.5")
    if keys[0] == "base":
        raise InputError(f"{where}: base: can be set in the YAML file only")
    if not value.strip():
        raise InputError(f"{where}: {key}: no value; allowed: key.path=value")
    slot = find(RunConfig, keys)
    if slot and slot.members == (str,) and not value.lstrip().startswith(("'", '"')) and value.strip() != "null":
        if holds_control(value):
            raise InputError(f"{where}: {key}: holds a control character")
        entry = Entry(value, where, value)  # `{runs_folder}/x`, `a: b` and `#1` are text here
    else:
        entry = parse(value, where, numbered=False)
    for name in reversed(keys):
        entry = Entry({name: entry}, where)
    return entry


def _switches(entry: Entry, slot: Slot | None, path: tuple[str, ...], errors: list[str], named: bool = False) -> Entry:
    """Resolve `on` and `off` by what the key takes, and refuse a section that holds nothing.

    A technique that is `off` becomes None, one that is `on` an empty section; for a flag both become booleans, and for
    a text every scalar stays as it was written.
    """
    if slot is None:
        return entry
    word = str(entry.value).lower() if isinstance(entry.value, (str, bool)) else None
    if slot.is_section and path:
        optional = slot.nullable or named
        if entry.value is None:
            hint = f"write '{path[-1]}: {{}}' for on, '{path[-1]}: off' for off" if optional else "give it keys"
            errors.append(f"{entry.where}: {'.'.join(path)}: empty; {hint}")
            return Entry({}, entry.where)
        if optional and word in ON + OFF:
            return Entry({} if word in ON else None, entry.where)
    if slot.members == (bool,) and word in ON + OFF:
        return Entry(word in ON, entry.where)
    if slot.members == (str,) and entry.text is not None and entry.value is not None:
        return Entry(entry.text, entry.where)
    if isinstance(entry.value, dict):
        named = slot.holds_techniques
        items = {
            key: _switches(item, slot.child(key), (*path, key), errors, named) for key, item in entry.value.items()
        }
        return Entry(items, entry.where)
    return entry


def _merge(below: Entry, above: Entry, slot: Slot | None) -> Entry:
    """Lay one entry over another."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    if slot and slot.discriminator:
        old, new = (e.value.get(slot.discriminator) for e in (below, above))
        default = getattr(slot.default, slot.discriminator, None)
        if new is not None and new.plain() != (old.plain() if old else default):
            return above
    merged = dict(below.value)
    for key, entry in above.value.items():
        merged[key] = _merge(merged[key], entry, slot.child(key) if slot else None) if key in merged else entry
    return Entry(merged, above.where)


def _finish(items: dict[str, Entry], slot: Slot) -> dict[str, Entry]:
    """Write the default's `name` into a section that is chosen by one and has none; drop what is off by name."""
    out: dict[str, Entry] = {}
    for key, entry in items.items():
        child = slot.child(key)
        if child and isinstance(entry.value, dict):
            value = _finish(entry.value, child)
            if child.discriminator and child.default is not None:
                name = Entry(getattr(child.default, child.discriminator), entry.where)
                value = {child.discriminator: name, **value}
            entry = Entry(value, entry.where)
        if entry.value is not None or not slot.holds_techniques:
            out[key] = entry
    return out


def _validate(merged: Entry) -> tuple[RunConfig | None, list[str]]:
    """The config, or every error.

    pydantic checks the rules between fields only once all the fields are right. So that those errors come in the same
    list, what is wrong is taken out and the rest is checked again; what then complains of something taken out is left.
    """
    errors: list[str] = []
    data, removed = merged.plain(), list[tuple[str, ...]]()
    for _ in range(4):
        try:
            # JSON, because pydantic's strict mode (no number from text, no 1 from true) takes lists for tuples there.
            config = RunConfig.model_validate_json(json.dumps(data), strict=True)
            return (None if errors else config), errors
        except ValidationError as error:
            found = explain(error, merged, RunConfig)
        errors += [line for path, line in found if line not in errors and not _about(path, line, removed)]
        fresh = [path for path, _ in found if path not in removed and _take_out(data, path)]
        if not fresh:
            break
        removed += fresh
    return None, errors


def _about(path: tuple[str, ...], line: str, removed: Sequence[tuple[str, ...]]) -> bool:
    """Whether an error may come of what was taken out; an unknown key that is gone is missed nowhere."""
    known = {gone[-1] for gone in removed if find(RunConfig, gone)}
    return path in removed or not known.isdisjoint(re.findall(r"\w+", line))


def _take_out(data: Any, path: Sequence[str]) -> bool:
    for key in path[:-1]:
        data = data.get(key) if isinstance(data, dict) else None
    if not path or not isinstance(data, dict) or path[-1] not in data:
        return False
    del data[path[-1]]
    return True
