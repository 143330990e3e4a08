"""What each key of a YAML accepts, in words: from pydantic's JSON schema of the classes that describe it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

KeyPath = tuple[str, ...]


class Schema:
    """What a key accepts, from pydantic's JSON schema of the key and the definitions it refers to."""

    def __init__(self, node: Mapping[str, Any], definitions: Mapping[str, Any], is_item: bool = False) -> None:
        # `is_item`: a value of a mapping with free keys.
        self.definitions = definitions
        options = [
            definitions[option["$ref"].rpartition("/")[2]] if "$ref" in option else option
            for option in node.get("anyOf") or node.get("oneOf") or [node]
        ]
        # The accepted types, without null; a section that is chosen by its `name` has several.
        self.options = [option for option in options if option.get("type") != "null"]
        self.nullable = len(self.options) < len(options)
        self.types = ["literal" if {"enum", "const"} & option.keys() else option.get("type") for option in self.options]
        self.is_section = all(kind == "object" for kind in self.types)
        self.is_technique = is_item and self.is_section  # a free name with arguments, as in algorithms.composer
        self.tag: str | None = node.get("discriminator", {}).get("propertyName")  # the key that chooses a section
        self.tags = [option["properties"][self.tag]["const"] for option in self.options] if self.tag else []
        self.default = node.get("default")
        self.description = node.get("description", "")

    @property
    def keys(self) -> list[str]:
        """The keys of a section, in all its variants."""
        return list(dict.fromkeys(key for option in self.options for key in option.get("properties", ())))

    def child(self, key: str) -> Schema:
        """The schema of a key, or of a list's element; ANY if there is no such key."""
        for option in self.options:
            if key in option.get("properties", ()):
                return Schema(option["properties"][key], self.definitions)
            if option.get("additionalProperties"):
                items = option["additionalProperties"]
                return Schema({} if items is True else items, self.definitions, is_item=True)
            if option.get("type") == "array" and key.isdigit():
                return Schema(option.get("items") or option["prefixItems"][0], self.definitions)
        return ANY

    def find(self, path: KeyPath) -> Schema | None:
        """The schema of a key path; None if there is none."""
        found = functools.reduce(Schema.child, path, self)
        return None if found is ANY else found

    def paths(self, prefix: KeyPath = ()) -> Iterator[KeyPath]:
        """Every key path below."""
        for key in self.keys:
            yield (*prefix, key)
            yield from self.child(key).paths((*prefix, key))

    def allowed(self) -> str:
        """The accepted values, in words."""
        if self.keys or not self.options[0].get("additionalProperties", True):
            words = [f"a section with the keys {', '.join(self.keys)}"]
        else:
            words = [self._words(option) for option in self.options]
        if self.nullable:
            words.append("on or off" if self.is_section else "null")
        return ", or ".join(dict.fromkeys(words))

    @property
    def words(self) -> list[str]:
        """The accepted values that are a choice."""
        return [str(word) for option in self.options for word in option.get("enum", [option.get("const")]) if word]

    def _words(self, option: Mapping[str, Any]) -> str:
        if "examples" in option:
            return f"text such as {' or '.join(option['examples'])}"
        if "enum" in option or "const" in option:
            return ", ".join(map(str, option.get("enum") or [option["const"]]))
        kind = option.get("type", "")
        if kind == "object":
            if "integer" in self.child("").types:
                return "one per image size such as {128: 256, 224: 128}"
            return f"{'names, each with' if self.child('').is_section else 'a section with'} arguments"
        if kind == "array":
            least = " of at least one" if "minItems" in option else ""
            count = f" of {option['maxItems']}" if "maxItems" in option else least
            return f"a list{count}, each {self.child('0').allowed()}"
        if kind == "string":
            # A regular expression says little to a person; the field's description says what is accepted.
            limited = self.description and {"pattern", "minLength"} & option.keys()
            return f"text: {self.description.rstrip('.')}" if limited else "text"
        words = {"boolean": "true or false", "integer": "a whole number", "number": "a number"}
        most = "to" if "minimum" in option else "at most"
        limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": most, "exclusiveMaximum": "below"}
        parts = [f" {word} {option[name]:.12g}" for name, word in limits.items() if name in option]
        joined = ("" if {"minimum", "maximum"} <= option.keys() else ",").join(parts)
        return words.get(kind, "any value") + joined


ANY = Schema({}, {})  # accepts anything


@functools.lru_cache
def schema_of(model: type[BaseModel]) -> Schema:
    """The schema of a class; it takes 20 ms."""
    node = model.model_json_schema()
    return Schema(node, node.get("$defs", {}))
