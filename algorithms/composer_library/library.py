"""What Composer's library offers, read from its source without importing it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import types
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

_SIMPLE: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}


class Argument(NamedTuple):
    """An argument of an algorithm's constructor."""

    annotation: str
    """As written in Composer."""
    type: Any
    """The part of it that YAML can write; None: no part."""
    default: str | None
    """As written in Composer; None: required."""


@functools.cache
def signatures() -> dict[str, dict[str, Argument]]:
    """The algorithms of the installed Composer: class name -> argument name -> argument.

    Finding a top-level package does not execute it, so this takes milliseconds instead of Composer's seconds.

    Raises:
        ModuleNotFoundError: Composer is not installed.
    """
    spec = importlib.util.find_spec("composer")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("Composer is not installed (pip install mosaicml)")
    found: dict[str, dict[str, Argument]] = {}
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder, "algorithms").glob("*/*.py")):
            source = path.read_text(encoding="utf-8")
            if "(Algorithm)" in source:
                found.update(_classes(ast.parse(source)))
    return found


def _classes(module: ast.Module) -> dict[str, dict[str, Argument]]:
    return {
        node.name: _arguments(node)
        for node in module.body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Algorithm" for base in node.bases)
    }


def _arguments(node: ast.ClassDef) -> dict[str, Argument]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            names = item.args.args[1:]
            defaults = [None] * (len(names) - len(item.args.defaults)) + [ast.unparse(it) for it in item.args.defaults]
            return {name.arg: _argument(name, default) for name, default in zip(names, defaults, strict=True)}
    return {}


def _argument(name: ast.arg, default: str | None) -> Argument:
    if name.annotation is None:
        return Argument("anything", Any, default)
    return Argument(ast.unparse(name.annotation), writable(name.annotation), default)


def writable(annotation: ast.expr) -> Any:
    """The part of an annotation that YAML can write, as a type; None where there is no such part."""
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return types.NoneType
    if isinstance(annotation, ast.Name):
        return _SIMPLE.get(annotation.id)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _union(annotation.left, annotation.right)
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        members = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if annotation.value.id == "Union":
            return _union(*members)
        if annotation.value.id == "Optional":
            inner = writable(members[0])
            return None if inner is None else Optional[inner]  # noqa: UP045
    return None


def _union(*members: ast.expr) -> Any:
    kinds = tuple(kind for kind in map(writable, members) if kind is not None)
    return Union[kinds] if kinds else None  # noqa: UP007
