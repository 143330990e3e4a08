"""The model card: what is known about a run and its export, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml

from data.text import markdown
from recipes import output
from recipes.checkpoints.manifest import Manifest
from recipes.config import RunConfig
from recipes.export import CONFIG
from recipes.export.hub import front_matter
from recipes.export.programs import OPSET, TOLERANCE, Architecture
from recipes.resolved import NO_EFFECT_ON_WEIGHTS
from recipes.schedule import image_size
from recipes.trained import Trained

TEMPLATES = output.TEMPLATES.overlay(autoescape=False, keep_trailing_newline=True)
TEMPLATES.filters = TEMPLATES.filters | {"markdown": markdown, "duration": output.duration}
PLACES = {"device": "hardware", "cpu": "processor", "memory": "memory", "commit": "commit of the recipe"}
"""The entries of summary.json's `versions` that are no packages, and their names here."""


def card(
    trained: Trained,
    shape: Architecture,
    preprocessing: Mapping[str, Any],
    differences: Mapping[str, float],
    evaluation: Mapping[str, Any] | None,
    files: Sequence[str],
) -> str:
    """The model card as Markdown.

    `differences` holds the difference between each program's logits and the network's, by file; `evaluation` is the
    output of `recipes.evaluate --save` for these weights, if any; `files` are the names of the other exported files.
    """
    config, summary = trained.config, trained.summary
    recipe = {"model": config.model.model_dump()} if trained.manifest is None else _determining(config)
    versions = {name: version for name, version in (summary.versions if summary else {}).items() if version}
    accuracies = _accuracies(trained, evaluation)
    return TEMPLATES.get_template("export/card.md.jinja").render(
        trained=trained,
        metadata=front_matter(trained, "timm" if CONFIG in files else "pytorch", accuracies),
        file=Path(trained.location).name,
        parameters=f"{sum(one.numel() for one in trained.network.parameters()):,}",
        shape=shape,
        places={label: versions[name] for name, label in PLACES.items() if name in versions},
        packages=", ".join(f"{name} {version}" for name, version in versions.items() if name not in PLACES),
        torch=torch.__version__,
        accuracies=accuracies,
        stages=_stages(trained.manifest, config) if trained.manifest else "",
        dataset=Path(config.data.path).name,
        techniques=[] if trained.manifest is None else _techniques(config),
        files=files,
        differences=differences,
        tolerance=TOLERANCE,
        prepared=preprocessing,
        opset=OPSET,
        config=yaml.safe_dump(recipe, sort_keys=False, width=110),
    )


def _accuracies(trained: Trained, evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The known accuracies of these weights: from the end of the run, and from `recipes.evaluate --save`."""
    run = {"data": "the run's validation images", "crop_ratio": trained.config.eval.crop_ratio, "flip": False}
    by_size = trained.summary.eval_by_size if trained.summary else {}
    found = [run | {"size": int(size)} | figures.model_dump() for size, figures in by_size.items()]
    if evaluation is not None:
        folder, flip = Path(evaluation["data"]).name, evaluation["flip"] is not None
        for one in evaluation["results"]:
            figures = {name: one[name] for name in ("size", "crop_ratio", "top1", "top5", "loss")}
            found.append(figures | {"data": f"{folder}, {one['images']:,} images", "flip": flip})
    return found


def _stages(manifest: Manifest, config: RunConfig) -> str:
    """The training up to this checkpoint: `2 epochs at 24 px, then 1 epoch at 32 px`."""
    epochs = manifest.epoch + bool(manifest.batch_in_epoch)
    stages = [(size, len(list(same))) for size, same in groupby(image_size(config, epoch) for epoch in range(epochs))]
    return ", then ".join(f"{count} epoch{'s' if count > 1 else ''} at {size} px" for size, count in stages)


def _determining(config: RunConfig) -> dict[str, Any]:
    """The config's keys that determine the weights, except those that are off."""

    def part(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if f"{prefix}{key}" not in NO_EFFECT_ON_WEIGHTS}
        kept = {key: value for key, value in kept.items() if value is not None and (key, value) != ("composer", {})}
        return {key: part(value, f"{key}.") if isinstance(value, dict) else value for key, value in kept.items()}

    return part(config.model_dump(mode="json"), "")


def _techniques(config: RunConfig) -> list[str]:
    """The techniques that were on, each with its fields."""
    used: dict[str, dict[str, Any]] = {}
    for name, fields in config.algorithms.model_dump(mode="json", exclude_none=True).items():
        used |= fields if name == "composer" else {name: fields}
    lines = []
    for name, fields in used.items():
        values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in fields.items()}
        text = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
        lines.append(f"`{name}`" + (f": {text}" if text else ""))
    return lines
