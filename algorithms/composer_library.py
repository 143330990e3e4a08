"""Any other algorithm of Composer, by its class name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import AfterValidator, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from composer.core import Algorithm

OWN_KEY = {
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
"""Composer's algorithms with their own YAML line: class name -> key."""

UNSUITABLE = {
    "Alibi": "it is for language models: it changes attention over tokens",
    "GatedLinearUnits": "it is for language models: it changes BERT's feed-forward layers",
    "LayerFreezing": "it takes parameters out of the optimizer, whose state then cannot be saved",
    "SeqLengthWarmup": "it is for language models: it shortens sequences of tokens",
    "SelectiveBackprop": "it runs the model on the batch as it is loaded, which here is not normalised yet",
    "NoOpModel": "it replaces the model by one that is not a classifier, to time the loader",
}
"""Composer's algorithms that cannot work here, with the reason."""

NOT_RESUMABLE = {"GyroDropout": "Composer does not save the state of its masks"}
"""Composer's algorithms with which an interrupted run cannot be resumed bit for bit, with the reason."""

USABLE: dict[str, dict[str, Any]] = {
    "CutOut": {"num_holes": int, "length": float, "uniform_sampling": bool, "input_key": str | int},
    "Factorize": {
        "factorize_convs": bool,
        "factorize_linears": bool,
        "min_channels": int,
        "latent_channels": int | float,
        "min_features": int,
        "latent_features": int | float,
    },
    "GhostBatchNorm": {"ghost_batch_size": int},
    "GyroDropout": {"p": float, "sigma": int, "tau": int},
    "LowPrecisionGroupNorm": {"apply_at": None},
    "LowPrecisionLayerNorm": {"apply_at": None},
    "WeightStandardization": {"n_last_layers_ignore": int},
}
"""The other algorithms of Composer 0.32.1: argument -> its type; None: YAML cannot express it."""


def problems(chosen: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """All errors in a choice of algorithms: (key path, what is wrong and what is allowed)."""
    for name, values in chosen.items():
        if name in OWN_KEY:
            yield name, f"has its own key; write algorithms.{OWN_KEY[name]}"
        elif name in UNSUITABLE:
            yield name, f"cannot be used: {UNSUITABLE[name]}"
        elif name not in USABLE:
            hint = _nearest(name, [*USABLE, *OWN_KEY])
            yield name, f"unknown algorithm of Composer; allowed: {', '.join(USABLE)}{hint}"
        else:
            for key, value in values.items():
                if text := _argument_problem(USABLE[name], key, value):
                    yield f"{name}.{key}", text


def _argument_problem(known: dict[str, Any], key: str, value: Any) -> str | None:
    if key not in known:
        return f"unknown argument; allowed: {', '.join(known)}{_nearest(key, known)}"
    if known[key] is None:
        return "cannot be written in YAML; it keeps its default"
    try:
        TypeAdapter(known[key]).validate_python(value, strict=True)
    except ValidationError:
        allowed = " or ".join(kind.__name__ for kind in get_args(known[key]) or [known[key]])
        return f"got {value!r}; allowed: {allowed}"
    return None


def _nearest(name: str, known: Iterable[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def _check(chosen: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if lines := [f"{key}: {text}" for key, text in problems(chosen)]:
        raise ValueError("\n".join(lines))
    return chosen


ComposerLibrary = Annotated[dict[str, dict[str, Any]], AfterValidator(_check)]
"""Class name of Composer -> its arguments."""


def build_library(chosen: dict[str, dict[str, Any]]) -> list[Algorithm]:
    """Composer's algorithms, in the given order; ValueError if Composer refuses a value."""
    import composer.algorithms

    built = []
    for name, values in chosen.items():
        try:
            built.append(getattr(composer.algorithms, name)(**values))
        except (ValueError, TypeError) as error:
            raise ValueError(f"algorithms.composer.{name}: {error}") from error
    return built
