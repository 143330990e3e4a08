"""From a YAML text to a tree of values that know where they were written.

The dialect is YAML without its surprises: `on`, `off`, `yes`, `no` and dates are text (the field decides what they
mean), `017` is seventeen, `1e-3` is a number, and a key given twice is an error.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import InputError

MAX_BYTES = 100_000
MAX_DEPTH = 40
MAX_VALUES = 10_000
TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Entry:
    """A value of the config and the place that set it.

    Args:
        value: A dict or a list of entries, or a scalar.
        where: `FILE:LINE`, or the quoted argument of the command line.
        text: A scalar as it is written, for a key that takes text: `7` may be a name.
    """

    value: Any
    where: str
    text: str | None = None

    def plain(self) -> Any:
        """The value without the places, as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value


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


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and parser with the resolvers above; values are made by `_Builder`."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name and type


for _name, (_pattern, _first) in RESOLVERS.items():
    _Loader.add_implicit_resolver(TAG + _name, _pattern, _first)


class _Bad(Exception):
    """One thing wrong at one line, on its way to the list of errors."""

    def __init__(self, mark: yaml.Mark | None, message: str) -> None:
        super().__init__(message)
        self.mark, self.message = mark, message


class _Builder:
    """Makes entries of nodes and keeps count, so that aliases cannot multiply without end."""

    def __init__(self, source: str, numbered: bool) -> None:
        self.source, self.numbered, self.values, self.errors = source, numbered, 0, list[str]()

    def where(self, mark: yaml.Mark | None) -> str:
        return f"{self.source}:{mark.line + 1}" if self.numbered and mark is not None else self.source

    def build(self, node: yaml.Node, path: str = "", depth: int = 0) -> Entry:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _Bad(None, f"more than {MAX_VALUES:,} values once its aliases are written out")
        if depth > MAX_DEPTH:
            raise _Bad(node.start_mark, f"nested more than {MAX_DEPTH} levels deep")
        where = self.where(node.start_mark)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in (TAG + "map", TAG + "seq"):
            raise self._tagged(node, path)
        if isinstance(node, yaml.MappingNode):
            return Entry(self._mapping(node, path, depth), where)
        if isinstance(node, yaml.SequenceNode):
            return Entry([self.build(child, path, depth + 1) for child in node.value], where)
        return Entry(self._scalar(node, path), where, node.value)

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Entry]:
        merged: dict[str, Entry] = {}
        own: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            if key_node.tag == TAG + "merge":
                for part in reversed(list(self._merge_sources(value_node))):
                    merged.update(self._mapping(part, path, depth + 1))
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Bad(key_node.start_mark, "a key must be a word or a number")
            key = key_node.value
            if not key.isprintable():
                raise _Bad(key_node.start_mark, f"the key {key!r} holds a character that cannot be printed")
            here = f"{path}.{key}" if path else key
            entry = self.build(value_node, here, depth + 1)
            if key in own:
                first = own[key].where.rsplit(":", 1)[-1]
                line = f", first at line {first}" if self.numbered else ""
                self.errors.append(f"{self.where(key_node.start_mark)}: {here}: given twice{line}")
            own[key] = replace(entry, where=self.where(key_node.start_mark))
        return {**merged, **own}

    def _merge_sources(self, node: yaml.Node) -> Iterator[yaml.MappingNode]:
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            self.values += 1
            if not isinstance(part, yaml.MappingNode) or self.values > MAX_VALUES:
                raise _Bad(node.start_mark, "<<: takes an alias of a mapping, or a list of such")
            yield part

    def _scalar(self, node: yaml.Node, path: str) -> Any:
        text, tag = node.value, node.tag.removeprefix(TAG)
        shown = f"{path}: " if path else ""
        if holds_control(text):
            raise _Bad(node.start_mark, f"{shown}holds a control character")
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
            raise _Bad(node.start_mark, f"{shown}{text[:40]!r} is not a {tag}") from None
        if tag in ("str", "merge"):
            return text
        raise self._tagged(node, path)

    def _tagged(self, node: yaml.Node, path: str) -> _Bad:
        shown = f"{path}: " if path else ""
        return _Bad(node.start_mark, f"{shown}the tag {node.tag!r} is not allowed; write the value without it")


def holds_control(text: str) -> bool:
    """Whether a text holds what no name or path may: a control character, or half of a surrogate pair."""
    return any((ord(c) < 32 and c not in "\n\t") or 0xD800 <= ord(c) <= 0xDFFF or c == "\x7f" for c in text)


def parse(text: str, source: str, numbered: bool = True) -> Entry:
    """Parse one YAML document.

    Args:
        text: The document.
        source: The file, or the argument of the command line, that errors name.
        numbered: Whether errors name lines.

    Raises:
        InputError: Not YAML, a key given twice, a tag, or a document that is too deep or grows too large.
    """
    builder = _Builder(source, numbered)
    try:
        node = yaml.compose(text, Loader=_Loader)
        entry = Entry(None, source) if node is None else builder.build(node)
    except RecursionError:
        raise InputError(f"{source}: nested more than {MAX_DEPTH} levels deep") from None
    except _Bad as error:
        raise InputError(f"{builder.where(error.mark)}: {error.message}") from None
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{builder.where(error.problem_mark)}: {_yaml_problem(error)}") from None
    except yaml.YAMLError as error:
        reason = f"character {error.character!r}" if isinstance(error, yaml.reader.ReaderError) else str(error)
        raise InputError(f"{source}: not valid YAML: {reason}") from None
    if builder.errors:
        raise InputError(*builder.errors)
    return entry


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join((error.problem or "cannot be parsed").split())
    if "'\\t'" in problem:
        return "not valid YAML: a tab cannot indent; use spaces"
    if "single document" in (error.context or ""):
        return "more than one document (a line `---`); a config is one"
    return f"not valid YAML: {problem}"


def read_file(path: Path, suggest: str = "") -> Entry:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file; errors name it as it is written here.
        suggest: What to add where there is no such file.

    Raises:
        InputError: No such file, not readable as UTF-8, too large, not YAML, empty, or not a mapping.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise InputError(f"{path}: is {kind}, not a YAML file{suggest}")
        if status.st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes, so not a config")
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file{suggest}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    entry = parse(text, str(path))
    if entry.value is None:
        raise InputError(f"{path}: empty; a config needs at least run_name and data.path, or a base")
    if not isinstance(entry.value, dict):
        kind = "a list" if isinstance(entry.value, list) else "a single value"
        raise InputError(f"{path}: holds {kind}; a config is lines of `key: value`")
    return entry
