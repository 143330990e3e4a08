"""A config written out: as YAML that reads back as an equal config, and as a digest of what determines the result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from recipes.config import RunConfig, flat_items
from recipes.load import RESOLVERS, TAG
from recipes.schema import Schema, schema_of

NO_EFFECT_ON_WEIGHTS = frozenset(
    """
    run_name runs_folder device device_memory_gb autoresume resume checkpoints loggers profile stop_on_nan
    data.path data.cache_folder data.cache_gb data.stage_first data.workers data.prefetch_factor data.timeout
    data.max_bad_fraction model.weights_strict eval.sizes eval.interval eval.device_batch_size
    """.split()
)
"""Keys and sections that may change when a run resumes: the trained weights do not depend on them.

The same images may have another path on another machine. The crop ratio of the evaluation does count, because it is
that of the FixRes stage too; and which weights were loaded does, unlike whether others would have been refused.
"""

ADDED_LATER: dict[str, Any] = {
    "model.weights": None,
    "model.weights_strict": True,
    "model.weights_sha256": None,
    "cudnn_benchmark": False,
    "loss.mean_over_classes": False,
    "loss.target_threshold": None,
    "scheduler.first_lr_ratio": 0.0,
    "scheduler.overlap": False,
    "data.augment.repeats": 1,
    "algorithms.randaugment.timm": None,
}
"""Keys that were added later, with the value at which a run is as before: checkpoints from before stay valid."""

_COUNTED_WHEN_OFF = frozenset(
    """
    blurpool squeeze_excite stochastic_depth channels_last randaugment augmix colout progressive_resizing fixres mixup
    cutmix label_smoothing gradient_clipping ema swa sam
    """.split()
)
"""The first techniques, which stand in a digest even if they are off. Later ones do not, and are not added here."""


class _Dumper(yaml.CSafeDumper):
    """Quotes text that our reader would not read as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name and type

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, all(isinstance(key, int) for key in mapping) or flow_style)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, True)


for _name, (_pattern, _first) in RESOLVERS.items():
    _Dumper.add_implicit_resolver(TAG + _name, _pattern, _first)


def resolved(config: RunConfig) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back to an equal config."""
    form: dict[str, Any] = {"sort_keys": False, "default_flow_style": False, "width": 120, "allow_unicode": True}
    text: str = yaml.dump(resolved_values(config), Dumper=_Dumper, **form)
    return text


def resolved_values(config: RunConfig) -> dict[str, Any]:
    """The whole config as dicts, lists and scalars; an absent section is `off`."""

    def plain(value: Any, schema: Schema) -> Any:
        if isinstance(value, dict):
            return {key: plain(item, schema.child(str(key))) for key, item in value.items()}
        return "off" if value is None and schema.is_section else list(value) if isinstance(value, tuple) else value

    values: dict[str, Any] = plain(config.model_dump(), schema_of(RunConfig))
    return values


def config_digest(config: RunConfig | Mapping[str, Any], world_size: int = 1) -> str:
    """SHA-256, in hex, of what determines the trained weights, on `world_size` devices that share each batch.

    `config` may be in the form of `config.model_dump(mode="json")`.

    The batch size counts over all devices, so eight devices with 32 images each and four with 64 give the same digest.
    """
    plain = config.model_dump(mode="json") if isinstance(config, RunConfig) else config
    text = json.dumps(determining_values(plain, world_size), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differing_keys(
    here: Mapping[str, Any], there: Mapping[str, Any], world_size_here: int = 1, world_size_there: int = 1
) -> list[str]:
    """The keys that make the digests of two configs differ, as lines `key: here X, there Y`.

    The configs are in the form of `config.model_dump(mode="json")`; one from an older version may lack keys.
    """

    def shown(flat: Mapping[str, Any], key: str) -> str:
        return json.dumps(flat[key]) if key in flat else "unset"

    mine, theirs = determining_values(here, world_size_here), determining_values(there, world_size_there)
    unset = object()
    return [
        f"{key}: here {shown(mine, key)}, there {shown(theirs, key)}"
        for key in sorted({*mine, *theirs})
        if mine.get(key, unset) != theirs.get(key, unset)
    ]


def determining_values(config: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """The values that determine the result, by key path, with the batch size over all devices."""
    sections = tuple(f"{name}." for name in NO_EFFECT_ON_WEIGHTS)
    flat = {key: value for key, value in flat_items(config) if not f"{key}.".startswith(sections)}
    flat = {key: value for key, value in flat.items() if (key, value) not in ADDED_LATER.items()}
    # A technique that is off, not a field of one that is on.
    off = {key for key, value in flat.items() if re.fullmatch(r"algorithms\.\w+", key) and value is None}
    for key in off - {f"algorithms.{name}" for name in _COUNTED_WHEN_OFF}:
        del flat[key]
    for key in [key for key in flat if key.split(".")[0] == "device_batch_size"]:
        images = flat.pop(key)
        if images is not None:
            flat.pop("global_batch_size", None)
            # In a checkpoint's config it may be anything.
            flat[key.replace("device", "global", 1)] = images * world_size if isinstance(images, int) else images
    return flat
