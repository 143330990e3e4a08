"""From YAML files and `key.path=value` to one RunConfig, or to a list of everything that is wrong.

The dialect is YAML without its surprises: `on`, `off`, `yes`, `no` and dates are text until the key's type gives them a
meaning, `017` is seventeen, `1e-3` is a number, and a key given twice is an error.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from recipes.config import ANY, KeyPath, RunConfig, Schema, schema_of
from recipes.errors import InputError

Table = TypeVar("Table", bound=BaseModel)
YAMLS = Path(__file__).resolve().parent.parent / "yamls"
MAX_BYTES = 100_000
MAX_DEPTH = 40
MAX_VALUES = 10_000
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
    layers, errors = _read_layers(Path(path), schema)
    complete = not errors
    for override in overrides:
        try:
            layers.append(_read_override(override, schema))
        except InputError as error:
            errors += error.lines
    data: Any = {}
    places: dict[KeyPath, str] = {(): str(path)}
    for layer in layers:
        data = _merge(data, layer.value, schema)
        places |= layer.places
        errors += layer.errors
    config, wrong = _validate(data, places, schema)
    # A missing key may be in the base that could not be read.
    errors += [line for line in wrong if line not in errors and (complete or ": missing" not in line)]
    if errors or config is None:
        raise InputError(*errors)
    return config


def load_table(path: Path, table: type[Table]) -> Table:
    """Read and check a YAML file that is not a run's config; InputError: every error, as in `load_config`."""
    schema = schema_of(table)
    document = read_document(path, schema)
    try:
        loaded = table.model_validate_json(json.dumps(document.value), strict=True)
    except ValidationError as error:
        places = document.places | {(): str(path)}
        raise InputError(*document.errors, *_explain(error, document.value, places, schema)) from None
    if document.errors:
        raise InputError(*document.errors)
    return loaded


def _read_layers(path: Path, schema: Schema) -> tuple[list[Document], list[str]]:
    """The layers (base, file), and the errors in the base."""
    top = read_document(path, schema)
    if "base" not in top.value:
        return [top], []
    base, here = top.value.pop("base"), f"{top.places['base',]}: base: "
    if not isinstance(base, str):
        return [top], [f"{here}got {show(base)}; allowed: a YAML file, its path from this one's folder"]
    base_path = path.parent / base
    try:
        below = read_document(base_path, schema)
    except InputError as error:
        return [top], [here + line for line in error.lines]
    if base_path.resolve() == path.resolve():
        return [top], [f"{here}is this file itself"]
    if "base" in below.value:
        del below.value["base"]
        return [below, top], [f"{below.places['base',]}: base: the base of {path} must not have a base of its own"]
    return [below, top], []


def _suggest_file(path: Path) -> str:
    """A hint with YAML files of similar names: in that folder, else in `./yamls/`, else in this project's `yamls/`."""
    for place in (path.parent, Path("yamls"), YAMLS):
        found = {other.stem: other for other in sorted(place.glob("*.y*ml"))} if place.is_dir() else {}
        close = difflib.get_close_matches(path.stem, list(found), n=2, cutoff=0.6)
        if close:
            return f"; did you mean {' or '.join(repr(str(found[name])) for name in close)}?"
    return ""


def _read_override(text: str, schema: Schema) -> Document:
    """`a.b=value` as a document that holds {a: {b: value}}."""
    where = f"{text!r} on the command line"
    name, equals, value = text.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path) or not name.isprintable():
        raise InputError(f"{where}: an override is key.path=value, such as optimizer.lr=0.5")
    if path[0] == "base":
        raise InputError(f"{where}: base: can be set in the YAML file only")
    if not value.strip():
        raise InputError(f"{where}: {name}: no value; allowed: key.path=value")
    document, target = Document(where, numbered=False), schema.find(path) or ANY
    if target.types == ["string"] and not value.lstrip().startswith(("'", '"')) and value.strip() != "null":
        if holds_control(value):
            raise InputError(f"{where}: {name}: holds a control character")
        document.value = value  # `{runs_folder}/x`, `a: b` and `#1` are text here
    else:
        document.parse(value, target, path)
    for end in range(len(path), 0, -1):
        document.value = {path[end - 1]: document.value}
        document.places[path[:end]] = where
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


def _validate(data: Any, places: dict[KeyPath, str], schema: Schema) -> tuple[RunConfig | None, list[str]]:
    """The config, or every error.

    pydantic checks the rules between fields only once every field is valid. To report those errors in the same list,
    the invalid values are removed and the rest is checked again; errors about a removed value are ignored.
    """
    errors: list[str] = []
    removed: list[KeyPath] = []
    rest = copy.deepcopy(data)
    for _ in range(4):
        try:
            # JSON, because only there does pydantic's strict mode (no number from text, no 1 from true) accept lists
            # for tuples.
            config = RunConfig.model_validate_json(json.dumps(rest), strict=True)
            return (None if errors else config), errors
        except ValidationError as error:
            found = _explain(error, data, places, schema)
        known = {path[-1] for path in removed if schema.find(path)}
        for line, path in found.items():
            if line not in errors and path not in removed and known.isdisjoint(re.findall(r"\w+", line)):
                errors.append(line)
        fresh = [path for path in found.values() if path not in removed and _take_out(rest, path)]
        if not fresh:
            break
        removed += fresh
    return None, errors


def _take_out(data: Any, path: KeyPath) -> bool:
    for key in path[:-1]:
        data = data.get(key) if isinstance(data, dict) else None
    if not path or not isinstance(data, dict) or path[-1] not in data:
        return False
    del data[path[-1]]
    return True


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name and type


for _name, (_pattern, _first) in RESOLVERS.items():
    _Loader.add_implicit_resolver(TAG + _name, _pattern, _first)


class Document:
    """A YAML document as dicts, lists and scalars; errors name its `source` and, if `numbered`, the line."""

    def __init__(self, source: str, numbered: bool = True) -> None:
        self.source, self.numbered = source, numbered
        self.value: Any = None
        self.places: dict[KeyPath, str] = {}  # where each key was written: `FILE:LINE`, or the command-line argument
        self.errors: list[str] = []  # empty sections
        self._twice: list[str] = []
        self._count = 0

    def parse(self, text: str, schema: Schema, path: KeyPath = ()) -> None:
        """Read the value of a key; InputError for invalid YAML, a key given twice, a tag, or too large a document."""
        try:
            node = yaml.compose(text, Loader=_Loader) or yaml.ScalarNode(TAG + "null", "")
            self.value = self._value(node, schema, path)
        except RecursionError:
            raise InputError(f"{self.source}: nested more than {MAX_DEPTH} levels deep") from None
        except yaml.MarkedYAMLError as error:
            problem = f"not valid YAML: {' '.join((error.problem or 'cannot be parsed').split())}"
            if "'\\t'" in problem:
                problem = "not valid YAML: a tab cannot indent; use spaces"
            if "single document" in (error.context or ""):
                problem = "more than one document (a line `---`); a config is one"
            raise InputError(f"{self._where(error.problem_mark)}: {problem}") from None
        except yaml.YAMLError as error:
            reason = f"character {error.character!r}" if isinstance(error, yaml.reader.ReaderError) else str(error)
            raise InputError(f"{self.source}: not valid YAML: {reason}") from None
        if self._twice:
            raise InputError(*self._twice)

    def _where(self, mark: yaml.Mark | None) -> str:
        return f"{self.source}:{mark.line + 1}" if self.numbered and mark is not None else self.source

    def _refuse(self, node: yaml.Node, path: KeyPath, message: str) -> InputError:
        return InputError(f"{self._where(node.start_mark)}: {'.'.join(path) + ': ' if path else ''}{message}")

    def _refuse_tag(self, node: yaml.Node, path: KeyPath) -> InputError:
        return self._refuse(node, path, f"the tag {node.tag!r} is not allowed; write the value without it")

    def _value(self, node: yaml.Node, schema: Schema, path: KeyPath, depth: int = 0) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise InputError(f"{self.source}: more than {MAX_VALUES:,} values once its aliases are written out")
        if depth > MAX_DEPTH:
            raise self._refuse(node, (), f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, yaml.ScalarNode):
            return self._typed(self._scalar(node, path), node, schema, path)
        if node.tag not in (TAG + "map", TAG + "seq"):
            raise self._refuse_tag(node, path)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, schema, path, depth)
        element = schema.child("0") if "array" in schema.types else ANY
        return [self._value(child, element, path, depth + 1) for child in node.value]

    def _mapping(self, node: yaml.MappingNode, schema: Schema, path: KeyPath, depth: int) -> dict[str, Any]:
        """Its values; those of merge keys come first, and an earlier merge source wins over a later one."""
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == TAG + "merge":
                for part in reversed(list(self._merge_sources(value_node))):
                    merged |= self._mapping(part, schema, path, depth + 1)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._refuse(key_node, (), "a key must be a word or a number")
            key, at = key_node.value, (*path, key_node.value)
            if not key.isprintable():
                raise self._refuse(key_node, (), f"the key {key!r} holds a character that cannot be printed")
            own[key] = self._value(value_node, schema.child(key), at, depth + 1)
            if key in lines:
                first = f", first at line {lines[key]}" if self.numbered else ""
                self._twice.append(f"{self._where(key_node.start_mark)}: {'.'.join(at)}: given twice{first}")
            lines[key] = key_node.start_mark.line + 1
            self.places[at] = self._where(key_node.start_mark)
        return {**merged, **own}

    def _merge_sources(self, node: yaml.Node) -> Iterator[yaml.MappingNode]:
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            self._count += 1
            if not isinstance(part, yaml.MappingNode) or self._count > MAX_VALUES:
                raise self._refuse(node, ("<<",), "takes an alias of a mapping, or a list of such")
            yield part

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text, tag = node.value, node.tag.removeprefix(TAG)
        if holds_control(text):
            raise self._refuse(node, path, "holds a control character")
        try:
            if tag == "null":
                return None
            if tag == "bool":
                return {"true": True, "false": False}[text.lower()]
            if tag == "int":
                return int(text.replace("_", ""))
            if tag == "float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):
            raise self._refuse(node, path, f"{text[:40]!r} is not a valid {tag}") from None
        if tag not in ("str", "merge"):
            raise self._refuse_tag(node, path)
        return text

    def _typed(self, value: Any, node: yaml.ScalarNode, schema: Schema, path: KeyPath) -> Any:
        """A scalar as its key's type: a technique's `on` is an empty section, `off` is None; a name may be `7`."""
        word = str(value).lower() if isinstance(value, (str, bool)) else None
        if schema.is_section and path:
            optional = schema.nullable or schema.is_technique
            if value is None:
                hint = f"write '{path[-1]}: {{}}' for on, '{path[-1]}: off' for off" if optional else "give it keys"
                self.errors.append(f"{self._where(node.start_mark)}: {'.'.join(path)}: empty; {hint}")
                return {}
            if optional and word in ON + OFF:
                return {} if word in ON else None
        if schema.types == ["boolean"] and word in ON + OFF:
            return word in ON
        return node.value if schema.types == ["string"] and value is not None else value


def holds_control(text: str) -> bool:
    """Whether a text holds a control character or half of a surrogate pair, which no name or path may."""
    return any((ord(c) < 32 and c not in "\n\t") or 0xD800 <= ord(c) <= 0xDFFF or c == "\x7f" for c in text)


def read_document(path: Path, schema: Schema = ANY) -> Document:
    """Read a YAML file that holds a mapping; InputError for anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder, not a YAML file" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise InputError(f"{path}: is {kind}{_suggest_file(path)}")
        if status.st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes, so not a config")
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file{_suggest_file(path)}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    document = Document(str(path))
    document.parse(text, schema)
    if not isinstance(document.value, dict):
        kinds = {type(None): "empty", list: "holds a list"}
        found = kinds.get(type(document.value), "holds a single value")
        raise InputError(f"{path}: {found}; allowed: lines of `key: value`")
    return document


def _explain(error: ValidationError, data: Any, places: Mapping[KeyPath, str], schema: Schema) -> dict[str, KeyPath]:
    """Every error as one line, `WHERE: key.path: what is wrong; allowed: ...`, with its key path.

    Several errors about the members of one union become one line. `places`: where each key was written; (): the file.
    """
    lines: dict[str, KeyPath] = {}
    for item in error.errors(include_url=False):
        for path, text in _explain_one(item, data, schema):
            written = (path[:end] for end in range(len(path), -1, -1) if _written(path[:end], data) is not _ABSENT)
            place = next(places[section] for section in written if section in places)
            lines.setdefault(f"{place}: {'.'.join(path) + ': ' if path else ''}{text}", path)
    return lines


_ABSENT = object()


def _written(path: KeyPath, data: Any) -> Any:
    for key in path:
        data = data.get(key, _ABSENT) if isinstance(data, dict) else _ABSENT
    return data


def _explain_one(item: Any, data: Any, schema: Schema) -> list[tuple[KeyPath, str]]:
    kind, root = item["type"], schema
    path: KeyPath = ()
    for key in map(str, item["loc"]):
        child = schema.child(key)
        if child is ANY and key in schema.tags:
            schema = Schema(schema.options[schema.tags.index(key)], schema.definitions)
            continue
        if child is ANY and kind == "extra_forbidden":
            what = "unknown technique" if path == ("algorithms",) else "unknown key"
            hint = _nearest_key((*path, key), schema, root)
            return [((*path, key), f"{what}; allowed: {', '.join(schema.keys)}{hint}")]
        if child is ANY or not schema.is_section:
            break
        path, schema = (*path, key), child
    if kind in ("value_error", "assertion_error"):
        return [_own(line, path, root) for line in str(item["ctx"]["error"]).splitlines() if line.strip()]
    allowed = schema.allowed()
    if kind.startswith("union_tag") and schema.tag:
        path, kind, allowed = (*path, schema.tag), "literal_error", ", ".join(schema.tags)
    written = _written(path, data)
    if kind == "missing" and written is _ABSENT:
        return [(path, f"missing; allowed: {allowed}")]
    hint = _nearest(str(written), allowed.split(", ")) if kind == "literal_error" else ""
    return [(path, f"got {show(written)}; allowed: {allowed}{hint}")]


def _own(line: str, path: KeyPath, root: Schema) -> tuple[KeyPath, str]:
    """An error from one of our validators, which may name its key itself: `key.path: what is wrong`."""
    name, colon, rest = line.partition(": ")
    if colon and re.fullmatch(r"[\w.]+", name):
        for at in (tuple(name.split(".")), (*path, *name.split("."))):
            if root.find(at) is not None:
                return at, rest
    return path, line


def show(value: Any) -> str:
    """A value for an error message, in YAML notation: one line, at most 60 characters."""

    def flow(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(flow, value)) + "]"
        return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)

    text = "nothing" if value is None or value is _ABSENT else flow(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing if no choice is similar."""
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(lower), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(lower[choice]) for choice in close)}?" if close else ""


def _nearest_key(path: KeyPath, section: Schema, root: Schema) -> str:
    """`; did you mean 'x'?` for an unknown key: a similar key at its level, else the same or a similar one anywhere."""
    if hint := _nearest(path[-1], section.keys):
        return hint
    word, everywhere = path[-1].lower().replace("-", "_"), [other for other in root.paths() if other != path]
    found = [".".join(other) for other in everywhere if other[-1] == word][:2]
    if not found:
        by_name = {other[-1]: ".".join(other) for other in reversed(everywhere)}
        found = [by_name[name] for name in difflib.get_close_matches(word, list(by_name), n=1, cutoff=0.75)]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
