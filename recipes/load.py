"""From YAML files and `key.path=value` to one RunConfig, or to a list of everything that is wrong.

The dialect is YAML without its surprises: `on`, `off`, `yes`, `no` and dates are text until the key's type gives them a
meaning, `017` is seventeen, `1e-3` is a number, and a key given twice is an error.
"""

from __future__ import annotations

import copy
import json
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from data.errors import InputError
from data.text import did_you_mean, first_line
from recipes.config import UNKNOWN, RunConfig
from recipes.schema import ANY, KeyPath, Schema, schema_of

Table = TypeVar("Table", bound=BaseModel)
YAMLS = Path(__file__).resolve().parent.parent / "yamls"
MAX_BYTES = 100_000
MAX_DEPTH = 40
MAX_VALUES = 10_000
MAX_BRACKETS = 4_000  # libyaml ends the process where lists are nested some ten thousand levels deep
ON, OFF = ("on", "yes", "true"), ("off", "no", "false")
TAG = "tag:yaml.org,2002:"
RESOLVERS: dict[str, tuple[re.Pattern[str], list[str]]] = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
            r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    ),
    "merge": (re.compile(r"^<<$"), ["<"]),
}
"""Which unquoted words are not text, and the characters they may begin with; anything else is text."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML, the `base` it names and overrides `key.path=value`, and check the result as a whole.

    A later layer wins: base, file, overrides in order. Mappings merge key by key, everything else is replaced;
    `off` removes a technique, and a section whose `name` changes does not inherit the other's fields.

    Raises:
        InputError: Every error found, one line each: `FILE:LINE: key.path: what is wrong; allowed: ...`.
    """
    schema = schema_of(RunConfig)
    layers, errors = _read_files(Path(path), schema), list[str]()
    for override in overrides:
        try:
            layers.append(_read_override(override, schema))
        except InputError as error:
            errors += error.lines
    data: Any = {}
    written_at: dict[KeyPath, str] = {(): str(path)}
    for layer in layers:
        data = _merge(data, layer.value, schema)
        written_at |= layer.written_at
        errors += layer.errors
    return _validate(RunConfig, data, written_at, errors)


def load_table(path: Path, table: type[Table]) -> Table:
    """Read and check a YAML file that is not a run's config; InputError: every error, as in `load_config`."""
    document = read_document(path, schema_of(table))
    return _validate(table, document.value, {(): str(path)} | document.written_at, document.errors)


def _read_files(path: Path, schema: Schema) -> list[Document]:
    """The file, below it its base."""
    top = read_document(path, schema)
    if "base" not in top.value:
        return [top]
    base, here = top.value.pop("base"), f"{top.written_at['base',]}: base: "
    if not isinstance(base, str):
        raise InputError(f"{here}got {show(base)}; allowed: a YAML file, its path from this one's folder")
    try:
        below = read_document(path.parent / base, schema)
    except InputError as error:
        raise InputError(*(here + line for line in error.lines)) from None
    if "base" in below.value:
        raise InputError(f"{below.written_at['base',]}: base: the base of {path} must not have a base of its own")
    return [below, top]


def _read_override(text: str, schema: Schema) -> Document:
    """`a.b=value` as a document that holds {a: {b: value}}."""
    where = f"{text!r} on the command line"
    name, equals, value = text.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path) or not name.isprintable() or not value.strip():
        raise InputError(f"{where}: an override is key.path=value, such as optimizer.lr=0.5")
    if path[0] == "base":
        raise InputError(f"{where}: base: can be set in the YAML file only")
    target = schema.find(path) or ANY
    # Where text is expected, `{runs_folder}/x`, `a: b` and `#1` are text.
    plain = target.types == ["string"] and not value.lstrip().startswith(("'", '"')) and value.strip() != "null"
    document = Document(where, numbered=False)
    document.read(yaml.ScalarNode(TAG + "str", value) if plain else value, target, path)
    for end in range(len(path), 0, -1):
        document.value = {path[end - 1]: document.value}
        document.written_at[path[:end]] = where
    return document


def _merge(below: Any, above: Any, schema: Schema) -> Any:
    """Merge one value over another; a section that is chosen by its `name` and has none gets the default name."""
    if not isinstance(above, dict):
        return above
    tag = schema.tag
    default = schema.default[tag] if tag and schema.default else None
    if not isinstance(below, dict) or (tag in above and above[tag] != below.get(tag, default)):
        below = {}
    merged = {tag: default, **below} if default is not None else dict(below)
    for key, value in above.items():
        child = schema.child(key)
        merged[key] = _merge(merged.get(key), value, child)
        if value is None and child.is_technique:
            del merged[key]
    return merged


class _Loader(yaml.CSafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name and type


for _name, (_pattern, _first) in RESOLVERS.items():
    _Loader.add_implicit_resolver(TAG + _name, _pattern, _first)


class Document:
    """A YAML document as dicts, lists and scalars; errors name its `source` and, if `numbered`, the line."""

    def __init__(self, source: str, numbered: bool = True) -> None:
        self.source, self.numbered = source, numbered
        self.value: Any = None
        self.written_at: dict[KeyPath, str] = {}  # `FILE:LINE` of each key, or the command-line argument
        self.errors: list[str] = []  # empty sections
        self._count = 0

    def read(self, content: str | yaml.Node, schema: Schema, path: KeyPath = ()) -> None:
        """Read the value of a key; InputError for invalid YAML, a key given twice, a tag, or too large a document."""
        if isinstance(content, str) and sum(map(content.count, ("[", "{", "- ", "? "))) > MAX_BRACKETS:
            raise InputError(f"{self.source}: more than {MAX_BRACKETS:,} lists and mappings")
        try:
            node = yaml.compose(content, Loader=_Loader) if isinstance(content, str) else content
            self.value = self._value(node or yaml.ScalarNode(TAG + "null", ""), schema, path)
        except yaml.MarkedYAMLError as error:
            problem = " ".join(" ".join(filter(None, (error.context, error.problem))).split())
            raise InputError(f"{self._where(error.problem_mark)}: not valid YAML: {problem}") from None
        except (yaml.YAMLError, UnicodeEncodeError) as error:
            raise InputError(f"{self.source}: not valid YAML: {first_line(error)}") from None

    def _where(self, mark: yaml.Mark | None) -> str:
        return f"{self.source}:{mark.line + 1}" if self.numbered and mark is not None else self.source

    def _refused(self, node: yaml.Node, path: KeyPath, message: str) -> InputError:
        return InputError(f"{self._where(node.start_mark)}: {'.'.join(path) + ': ' if path else ''}{message}")

    def _value(self, node: yaml.Node, schema: Schema, path: KeyPath, depth: int = 0) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise InputError(f"{self.source}: more than {MAX_VALUES:,} values once its aliases are written out")
        if depth > MAX_DEPTH:
            raise self._refused(node, (), f"nested more than {MAX_DEPTH} levels deep")
        if node.tag.removeprefix(TAG) not in (*RESOLVERS, "str", "map", "seq"):
            raise self._refused(node, path, f"the tag {node.tag!r} is not allowed; write the value without it")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, schema, path, depth)
        if isinstance(node, yaml.SequenceNode):
            element = schema.child("0") if "array" in schema.types else ANY
            return [self._value(child, element, path, depth + 1) for child in node.value]
        assert isinstance(node, yaml.ScalarNode)
        return self._typed(self._scalar(node, path), node, schema, path)

    def _mapping(self, node: yaml.MappingNode, schema: Schema, path: KeyPath, depth: int) -> dict[str, Any]:
        """Its values; those of merge keys come first, and an earlier merge source wins over a later one."""
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == TAG + "merge":
                parts = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for part in reversed(parts):
                    value = self._value(part, schema, path, depth + 1)
                    if not isinstance(value, dict):
                        raise self._refused(part, ("<<",), "takes an alias of a mapping, or a list of such")
                    merged |= value
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._refused(key_node, (), "a key must be a word or a number")
            key, at = key_node.value, (*path, key_node.value)
            if not key.isprintable():
                raise self._refused(key_node, (), f"the key {key!r} holds a character that cannot be printed")
            if key in lines:
                first = f", first at line {lines[key]}" if self.numbered else ""
                raise self._refused(key_node, at, f"given twice{first}")
            lines[key] = key_node.start_mark.line + 1
            own[key] = self._value(value_node, schema.child(key), at, depth + 1)
            self.written_at[at] = self._where(key_node.start_mark)
        return {**merged, **own}

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text, kind = node.value, node.tag.removeprefix(TAG)
        if any((ord(c) < 32 and c not in "\n\t") or 0xD800 <= ord(c) <= 0xDFFF or c == "\x7f" for c in text):
            raise self._refused(node, path, "holds a control character")
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text.replace("_", ""))
            if kind == "float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):
            raise self._refused(node, path, f"{text[:40]!r} is not a valid {kind}") from None
        return text

    def _typed(self, value: Any, node: yaml.ScalarNode, schema: Schema, path: KeyPath) -> Any:
        """A scalar as its key's type: a technique's `on` is an empty section, `off` is None; a name may be `7`."""
        word = str(value).lower() if isinstance(value, (str, bool)) else None
        if schema.is_section and path:
            optional = schema.nullable or schema.is_technique
            if value is None:
                hint = f"write '{path[-1]}: {{}}' for on, '{path[-1]}: off' for off" if optional else "give it keys"
                self.errors += self._refused(node, path, f"empty; {hint}").lines
                return {}
            if optional and word in ON + OFF:
                return {} if word in ON else None
        if "boolean" in schema.types and word in ON + OFF:
            return word in ON
        return node.value if schema.types == ["string"] and value is not None else value


def read_document(path: Path, schema: Schema = ANY) -> Document:
    """Read a YAML file that holds a mapping; InputError for anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes, so not a config")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text") from None
    except (OSError, ValueError) as error:
        hint = "" if isinstance(error, ValueError) else _nearest_file(path)
        raise InputError(f"{path}: {str(getattr(error, 'strerror', None) or error).lower()}{hint}") from None
    document = Document(str(path))
    document.read(text, schema)
    if not isinstance(document.value, dict):
        raise InputError(f"{path}: got {show(document.value)}; allowed: lines of `key: value`")
    return document


def _validate(model: type[Table], data: Any, written_at: Mapping[KeyPath, str], errors: Sequence[str]) -> Table:
    """The checked config; else InputError with `errors` and all that is wrong with the values.

    pydantic checks the rules between fields only once every field is valid. To report their errors too, each value that
    is wrong is taken out, as if it had not been written, and the rest is checked again.
    """
    schema, rest = schema_of(model), copy.deepcopy(data)
    wrong: list[tuple[KeyPath, str]] = []
    while True:
        try:
            # JSON, because only there does pydantic's strict mode (no number from text, no 1 from true) accept lists
            # for tuples.
            config = model.model_validate_json(json.dumps(rest), strict=True)
            break
        except ValidationError as error:
            every = {pair: None for item in error.errors(include_url=False) for pair in _explain(item, data, schema)}
        # An error about a value that was taken out would be about what is missing now, not about what the user wrote.
        before = {path for path, _ in wrong}
        names = {path[-1] for path in before if schema.find(path)}
        fresh = [(path, line) for path, line in every if path not in before]
        wrong += [(path, line) for path, line in fresh if names.isdisjoint((*path, *re.findall(r"\w+", line)))]
        if not [path for path, _ in fresh if _take_out(rest, path)]:
            break
    lines = list(errors)
    for path, line in wrong:
        place = next(written_at[path[:end]] for end in range(len(path), -1, -1) if path[:end] in written_at)
        lines.append(f"{place}: {'.'.join(path) + ': ' if path else ''}{line}")
    if lines:
        raise InputError(*lines)
    return config


_ABSENT = object()


def _take_out(data: Any, path: KeyPath) -> bool:
    """Remove the value at a path, in place; returns whether there was one."""
    inner = _at(path[:-1], data)
    return bool(path) and isinstance(inner, dict) and inner.pop(path[-1], _ABSENT) is not _ABSENT


def _at(path: KeyPath, data: Any) -> Any:
    for key in path:
        data = data.get(key, _ABSENT) if isinstance(data, dict) else _ABSENT
    return data


def _explain(item: Any, data: Any, root: Schema) -> list[tuple[KeyPath, str]]:
    """What one of pydantic's errors says, as (key, `got X; allowed: ...`)."""
    kind, schema, path = item["type"], root, KeyPath()
    for key in map(str, item["loc"]):
        if key in schema.tags:  # pydantic names the section that was chosen
            schema = Schema(schema.options[schema.tags.index(key)], schema.definitions)
            continue
        child = schema.child(key)
        if child is ANY and kind == "extra_forbidden":
            return [((*path, key), _unknown((*path, key), schema, root))]
        if child is ANY or not schema.is_section:
            break  # which member of a union it is about
        path, schema = (*path, key), child
    if kind in ("value_error", "assertion_error"):
        return [_from_validator(line, path, root) for line in str(item["ctx"]["error"]).splitlines() if line.strip()]
    allowed, words = schema.allowed(), schema.words
    if kind.startswith("union_tag") and schema.tag:
        path, allowed, words = (*path, schema.tag), ", ".join(schema.tags), schema.tags
    written = _at(path, data)
    if kind == "missing" and written is _ABSENT:
        return [(path, f"missing; allowed: {allowed}")]
    hint = did_you_mean(str(written), words)
    return [(path, f"got {show(written)}; allowed: {allowed}{hint}")]


def _from_validator(line: str, path: KeyPath, root: Schema) -> tuple[KeyPath, str]:
    """An error from one of our validators, which may name its key itself: `key.path: what is wrong`."""
    name, colon, rest = line.partition(": ")
    for at in (tuple(name.split(".")), (*path, *name.split("."))):
        if colon and root.find(at) is not None:
            return at, _unknown(at, root.find(at[:-1]) or root, root) if rest == UNKNOWN else rest
    return path, line


def _unknown(path: KeyPath, section: Schema, root: Schema) -> str:
    what = "unknown technique" if path[:-1] == ("algorithms",) else UNKNOWN
    return f"{what}; allowed: {', '.join(section.keys)}{_nearest_key(path, section, root)}"


def show(value: Any) -> str:
    """A value for an error message, in YAML notation: one line, at most 60 characters."""
    text = "nothing" if value is None or value is _ABSENT else json.dumps(value, ensure_ascii=False).replace('"', "'")
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest_key(path: KeyPath, section: Schema, root: Schema) -> str:
    """For an unknown key: a similar one at its level, else anywhere."""
    everywhere = {other[-1]: ".".join(other) for other in reversed(list(root.paths())) if other != path}
    return did_you_mean(path[-1], section.keys) or did_you_mean(path[-1], everywhere, cutoff=0.75)


def _nearest_file(path: Path) -> str:
    """For a YAML file: one in that folder, in `./yamls/` or in this project's `yamls/`."""
    files = [file for folder in (YAMLS, Path("yamls"), path.parent) for file in sorted(folder.glob("*.y*ml"))]
    return did_you_mean(path.stem, {file.stem: str(file) for file in files})
