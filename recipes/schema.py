"""What the config's classes say about a key: which keys a section has, and which values a key takes, in words."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Path = tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """The type of a place in the config.

    Args:
        members: Its types, without null: a section has one, a section chosen by a `name` several.
        nullable: Whether null is one of them.
        metadata: The limits that hold for the value.
        discriminator: The key that chooses between several sections, if any.
        default: The field's default, if any.
        examples: Values to show, where limits say too little.
        description: What the field means.
    """

    members: tuple[Any, ...]
    nullable: bool = False
    metadata: tuple[Any, ...] = ()
    discriminator: str | None = None
    default: Any = None
    examples: tuple[Any, ...] = ()
    description: str = ""

    @property
    def models(self) -> tuple[type[BaseModel], ...]:
        """The section classes among the members."""
        return tuple(member for member in self.members if isinstance(member, type) and issubclass(member, BaseModel))

    @property
    def is_section(self) -> bool:
        """Whether the value is a mapping whose keys are fields or arguments."""
        return bool(self.models) or (bool(self.members) and all(get_origin(m) is dict for m in self.members))

    @property
    def holds_techniques(self) -> bool:
        """Whether it maps names of any kind to arguments, as `algorithms.composer` does."""
        return self.is_section and not self.models and all(slot_of(get_args(m)[1]).is_section for m in self.members)

    def keys(self) -> list[str]:
        """The keys of the section, of all its variants."""
        return list(dict.fromkeys(name for model in self.models for name in model.model_fields))

    def child(self, key: str) -> Slot | None:
        """The slot of a key, or of a list's element; None where there is no such key."""
        for model in self.models:
            if key in model.model_fields:
                return slot_of(model.model_fields[key])
        for member in self.members:
            origin, args = get_origin(member), get_args(member)
            if origin is dict:
                return slot_of(args[1])
            if origin in (tuple, list) and key.isdigit():
                return slot_of(args[0] if args[-1] is Ellipsis or int(key) >= len(args) else args[int(key)])
        return None


def slot_of(annotation: Any) -> Slot:
    """The slot that an annotation or a pydantic field describes."""
    metadata: list[Any] = []
    found: dict[str, Any] = {"discriminator": None, "default": None, "examples": (), "description": ""}

    def take(info: FieldInfo) -> None:
        metadata.extend(info.metadata)
        found["discriminator"] = found["discriminator"] or info.discriminator
        found["examples"] = found["examples"] or tuple(info.examples or ())
        found["description"] = found["description"] or info.description or ""

    if isinstance(annotation, FieldInfo):
        take(annotation)
        default = annotation.default
        found["default"] = default if default is not ... and not annotation.is_required() else None
        annotation = annotation.annotation
    members, nullable = [], False
    pending = [annotation]
    while pending:
        current = pending.pop(0)
        if get_origin(current) is Annotated:
            inner, *extras = get_args(current)
            pending.insert(0, inner)
            for extra in extras:
                take(extra) if isinstance(extra, FieldInfo) else metadata.append(extra)
        elif get_origin(current) in (Union, types.UnionType):
            pending[:0] = get_args(current)
        elif current is type(None):
            nullable = True
        else:
            members.append(current)
    return Slot(tuple(members), nullable, tuple(metadata), **found)


def find(root: type[BaseModel], path: Sequence[str]) -> Slot | None:
    """The slot at a path below a section class; None where there is none."""
    slot: Slot | None = Slot((root,))
    for key in path:
        slot = slot.child(key) if slot else None
    return slot


def paths(root: type[BaseModel], prefix: Path = ()) -> Iterator[Path]:
    """Every key path below a section class."""
    for name, info in root.model_fields.items():
        yield (*prefix, name)
        for model in slot_of(info).models:
            yield from paths(model, (*prefix, name))


def allowed(slot: Slot) -> str:
    """The values that a slot takes, in words."""
    if slot.models:
        words = [f"a section with the keys {', '.join(slot.keys())}"]
    elif slot.examples:
        words = [f"text such as {' or '.join(map(str, slot.examples))}"]
    else:
        words = [_describe(member, slot) for member in slot.members]
    if slot.nullable:
        words.append("off" if slot.is_section else "null")
    return ", or ".join(dict.fromkeys(words))


def _describe(member: Any, slot: Slot) -> str:
    origin, args = get_origin(member), get_args(member)
    if origin is Literal:
        return ", ".join(str(arg) for arg in args)
    if origin is dict:
        key, value = slot_of(args[0]), slot_of(args[1])
        if key.members == (int,):
            return "one per image size such as {128: 256, 224: 128}"
        return f"{'names, each with' if value.is_section else 'a section with'} arguments"
    if origin in (tuple, list):
        count = "" if args[-1] is Ellipsis or origin is list else f" of {len(args)}"
        return f"a list{count}, each {allowed(slot_of(args[0]))}"
    if member is str:
        # A pattern says little to a person; the field's own words say what it takes.
        return f"text: {slot.description.rstrip('.')}" if slot.description and slot.metadata else "text"
    words = {bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(member, "any value") + _limits(slot.metadata)


def _limits(metadata: Sequence[Any]) -> str:
    limits: dict[str, Any] = {}
    for item in metadata:
        limits.update({name: getattr(item, name) for name in ("ge", "gt", "le", "lt") if hasattr(item, name)})
    words = {"ge": "from", "gt": "above", "le": "to" if "ge" in limits else "at most", "lt": "below"}
    parts = [f" {words[name]} {limits[name]:.12g}" for name in ("ge", "gt", "le", "lt") if name in limits]
    return ("" if "ge" in limits and "le" in limits else ",").join(parts)


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no choice is near."""
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(lower), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(lower[choice]) for choice in close)}?" if close else ""


def nearest_key(root: type[BaseModel], path: Path) -> str:
    """`; did you mean 'x'?` for an unknown key: one of its level, else the same or a like one anywhere."""
    section = find(root, path[:-1])
    hint = nearest(path[-1], section.keys() if section else [])
    if hint:
        return hint
    everywhere = list(paths(root))
    same = [".".join(other) for other in everywhere if other[-1] == path[-1].lower().replace("-", "_")]
    if same:
        return f"; did you mean {' or '.join(repr(other) for other in same[:2])}?"
    by_name = {other[-1]: ".".join(other) for other in reversed(everywhere)}
    close = difflib.get_close_matches(path[-1].lower().replace("-", "_"), list(by_name), n=1, cutoff=0.75)
    return f"; did you mean {by_name[close[0]]!r}?" if close else ""
