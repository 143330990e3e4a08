"""Which variants of a recipe an ablation compares; nothing but names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from algorithms.config import AlgorithmsConfig
from recipes.errors import InputError


class Variant(NamedTuple):
    """A recipe with some of its techniques."""

    name: str
    """`recipe`, `without-TECHNIQUE`, `baseline` or `with-TECHNIQUE`."""
    on: tuple[str, ...]
    off: tuple[str, ...]
    """Key paths below `algorithms`, in the order in which they stand there."""

    @property
    def overrides(self) -> list[str]:
        """What makes the recipe this variant, as on a command line."""
        return [f"algorithms.{name}=off" for name in self.off]


def techniques(algorithms: AlgorithmsConfig) -> tuple[str, ...]:
    """The techniques that are on, as key paths below `algorithms`; those under `composer` count one by one."""
    found: list[str] = []
    for name in type(algorithms).model_fields:
        value = getattr(algorithms, name)
        if name == "composer":
            found += [f"composer.{inner}" for inner in value]
        elif value is not None:
            found.append(name)
    return tuple(found)


def all_variants(names: Sequence[str]) -> tuple[Variant, ...]:
    """The recipe, the recipe without each technique, the baseline with none, the baseline with each alone.

    What is the same twice is there once: of two techniques, `without-a` is `with-b` as well; of a single one, `recipe`
    and `baseline` are all.

    Args:
        names: The recipe's techniques.
    """
    first: dict[tuple[str, ...], str] = {}
    for label, on in _labels(names).items():
        if on or label == "baseline":
            first.setdefault(on, label)
    return tuple(Variant(label, on, tuple(name for name in names if name not in on)) for on, label in first.items())


def _labels(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What is on in each variant, by all its names."""
    return {
        "recipe": tuple(names),
        **{f"without-{name}": tuple(other for other in names if other != name) for name in names},
        "baseline": (),
        **{f"with-{name}": (name,) for name in names},
    }


def choose(variants: Sequence[Variant], words: Sequence[str]) -> tuple[Variant, ...]:
    """The variants that some words name, with those that they are compared with.

    A technique stands for both of its variants. The baseline is always there, and the recipe where one is chosen that
    lacks a technique of it.

    Args:
        variants: All of the recipe's.
        words: Names of variants and techniques; none: all variants.

    Raises:
        InputError: A word names neither.
    """
    if not words:
        return tuple(variants)
    names = variants[0].on
    labels = _labels(names)
    known = {label: {label} for label in labels} | {name: {f"without-{name}", f"with-{name}"} for name in names}
    wrong = [word for word in words if word not in known]
    if wrong:
        raise InputError(*(f"--only: {word} is no variant or technique; {_allowed(word, known)}" for word in wrong))
    chosen = set.union({"baseline"}, *(known[word] for word in words))
    if any(label.startswith("without-") for label in chosen):
        chosen.add("recipe")
    on = {labels[label] for label in chosen}
    return tuple(variant for variant in variants if variant.on in on)


def _allowed(word: str, known: dict[str, set[str]]) -> str:
    plain = [name for name in known if not name.startswith(("without-", "with-"))]
    close = difflib.get_close_matches(word, list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"allowed: {', '.join(plain)}, and without-TECHNIQUE, with-TECHNIQUE{hint}"
