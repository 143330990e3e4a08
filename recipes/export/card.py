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
from recipes.config import RunConfig
from recipes.export.programs import OPSET, TOLERANCE, Architecture
from recipes.resolved import NO_EFFECT_ON_WEIGHTS
from recipes.schedule import image_size
from recipes.trained import Trained

TEMPLATES = output.TEMPLATES.overlay(autoescape=False, keep_trailing_newline=True)
TEMPLATES.filters = TEMPLATES.filters | {"markdown": markdown}


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
    config = trained.config
    recipe = {"model": config.model.model_dump()} if trained.manifest is None else _determining(config)
    return TEMPLATES.get_template("export/card.md.jinja").render(
        trained=trained,
        run=config,
        library="timm" if config.model.name.startswith("timm/") else "torchvision",
        model=config.model.name.removeprefix("timm/"),
        classes=trained.num_classes,
        parameters=f"{sum(one.numel() for one in trained.network.parameters()):,}",
        shape=shape,
        changed=" and ".join(shape.techniques),
        facts=_facts(trained),
        accuracies=_accuracies(trained, evaluation),
        stages=_stages(trained),
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
    config, names = trained.config, ("top1", "top5", "loss")
    run = {"data": "the run's validation images", "crop_ratio": config.eval.crop_ratio, "flip": False}
    by_size = (trained.summary or {}).get("eval_by_size", {})
    found = [run | {"size": int(size)} | {name: by_size[size][name] for name in names} for size in by_size]
    if evaluation is not None:
        folder, flip = Path(evaluation["data"]).name, evaluation["flip"] is not None
        for one in evaluation["results"]:
            figures = {name: one[name] for name in ("size", "crop_ratio", *names)}
            found.append(figures | {"data": f"{folder}, {one['images']:,} images", "flip": flip})
    return found


def _facts(trained: Trained) -> list[tuple[str, str]]:
    """Name and value of the known facts about the run, for the card's table."""
    manifest, summary = trained.manifest, trained.summary or {}
    fingerprint = ("SHA-256 of the weights", f"`{trained.weights_sha256}`")
    if manifest is None:
        return [("weights", f"of another project: {markdown(Path(trained.location).name)}"), fingerprint]
    done = f"{manifest.epoch} of {trained.config.epochs}"
    if manifest.batch_in_epoch:
        done += f", and {manifest.batch_in_epoch} batches"
    averaged = "exponential moving average (EMA)" if trained.weights == "ema" else "as trained, not averaged"
    found = [
        ("weights", averaged),
        ("epochs", done),
        ("training images seen", f"{manifest.samples:,}"),
        ("checkpoint", f"{manifest.stem}, {markdown(manifest.created_at)}"),
        fingerprint,
        ("processes", str(manifest.world_size)),
    ]
    if "wall_seconds" in summary:
        minutes = summary["wall_seconds"] / 60
        found.append(("wall time", f"{minutes / 60:.2f} h" if minutes >= 60 else f"{minutes:.1f} min"))
    if summary.get("images_per_second"):
        found.append(("images/s in training", f"{summary['images_per_second']:,.0f}"))
    names = {"device": "hardware", "cpu": "processor", "memory": "memory", "commit": "commit of the recipe"}
    versions = summary.get("versions", {})
    found += [(label, markdown(versions[key])) for key, label in names.items() if versions.get(key)]
    packages = [f"{name} {version}" for name, version in versions.items() if version and name not in names]
    if packages:
        found.append(("trained with", markdown(", ".join(packages))))
    return [*found, ("exported with", f"torch {torch.__version__}")]


def _stages(trained: Trained) -> str:
    """The training up to this checkpoint: `2 epochs at 24 px, then 1 epoch at 32 px`."""
    if trained.manifest is None:
        return ""
    epochs = trained.manifest.epoch + bool(trained.manifest.batch_in_epoch)
    sizes = groupby(image_size(trained.config, epoch) for epoch in range(epochs))
    stages = [(size, len(list(same))) for size, same in sizes]
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
    used: list[tuple[str, Any]] = []
    for name, fields in config.algorithms.model_dump(mode="json").items():
        used += fields.items() if name == "composer" else [(name, fields)]
    lines = []
    for name, fields in used:
        if fields is not None:
            values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in fields.items()}
            text = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
            lines.append(f"`{name}`" + (f": {text}" if text else ""))
    return lines
