"""Any other algorithm of Composer, by its class name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

from algorithms.composer_library.library import Argument, signatures

if TYPE_CHECKING:
    from composer.core import Algorithm

ROOMS = {
    "AugMix": "augmix",
    "BlurPool": "blurpool",
    "ChannelsLast": "channels_last",
    "ColOut": "colout",
    "CutMix": "cutmix",
    "EMA": "ema",
    "GradientClipping": "gradient_clipping",
    "LabelSmoothing": "label_smoothing",
    "MixUp": "mixup",
    "ProgressiveResizing": "progressive_resizing",
    "RandAugment": "randaugment",
    "SAM": "sam",
    "SqueezeExcite": "squeeze_excite",
    "StochasticDepth": "stochastic_depth",
    "SWA": "swa",
}
"""Composer's algorithms that have a line of their own."""

UNSUITABLE = {
    "Alibi": "it is for language models: it changes attention over tokens",
    "GatedLinearUnits": "it is for language models: it changes BERT's feed-forward layers",
    "LayerFreezing": "it takes parameters out of the optimizer, whose state then cannot be saved",
    "SeqLengthWarmup": "it is for language models: it shortens sequences of tokens",
    "SelectiveBackprop": "it runs the model on the batch as it is loaded, which here is not normalised yet",
    "NoOpModel": "it replaces the model by one that is no classifier, to time the loader",
}
"""Composer's algorithms that cannot work here, with the reason."""

NOT_RESUMABLE = {
    "GyroDropout": "Composer does not save the state of its masks",
}
"""Composer's algorithms with which an interrupted run cannot go on bit for bit, with the reason."""


def problems(chosen: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Everything that is wrong with a choice of algorithms: (key path, what is wrong and what is allowed)."""
    found: list[tuple[str, str]] = []
    for name, values in chosen.items():
        if name in ROOMS:
            found.append((name, f"has a line of its own; write algorithms.{ROOMS[name]}"))
        elif name in UNSUITABLE:
            found.append((name, f"cannot be used: {UNSUITABLE[name]}"))
        elif name not in signatures():
            usable = [known for known in signatures() if known not in UNSUITABLE and known not in ROOMS]
            hint = _nearest(name, [*usable, *ROOMS])
            found.append((name, f"unknown algorithm of Composer; allowed: {', '.join(usable)}{hint}"))
        else:
            found += [(f"{name}.{key}", text) for key, text in _argument_problems(signatures()[name], values)]
    return found


def _argument_problems(known: dict[str, Argument], values: dict[str, Any]) -> list[tuple[str, str]]:
    found = [
        (key, f"missing; allowed: {argument.annotation}")
        for key, argument in known.items()
        if argument.default is None and key not in values
    ]
    for key, value in values.items():
        if key not in known:
            allowed = ", ".join(known) or "no argument"
            found.append((key, f"unknown argument; allowed: {allowed}{_nearest(key, known)}"))
        elif known[key].type is None:
            found.append((key, f"cannot be written in YAML: it takes {known[key].annotation}"))
        elif not _fits(value, known[key].type):
            found.append((key, f"got {value!r}; allowed: {known[key].annotation}"))
    return found


def _fits(value: Any, kind: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _nearest(name: str, known: Iterable[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def _check(chosen: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    lines = [f"{key}: {text}" for key, text in problems(chosen)]
    if lines:
        raise ValueError("\n".join(lines))
    return chosen


ComposerLibrary = Annotated[dict[str, dict[str, Any]], AfterValidator(_check)]
"""Class name of Composer -> its arguments."""


def build_library(chosen: dict[str, dict[str, Any]]) -> list[Algorithm]:
    """Composer's algorithms, in the order given.

    Raises:
        ValueError: Composer refuses a value; the message names the algorithm.
    """
    if not chosen:
        return []
    import composer.algorithms

    built = []
    for name, values in chosen.items():
        try:
            built.append(getattr(composer.algorithms, name)(**values))
        except (ValueError, TypeError) as error:
            raise ValueError(f"algorithms.composer.{name}: {error}") from error
    return built
