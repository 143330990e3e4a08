"""The model card: what a run and its export say of themselves, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.text import markdown
from recipes.config import RunConfig
from recipes.export.programs import OPSET
from recipes.export.weights import TOLERANCE, Architecture
from recipes.resolved import NO_EFFECT_ON_WEIGHTS
from recipes.schedule import image_size
from recipes.trained import Content, Trained

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=False,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["markdown"] = markdown
WHAT = {
    "model.safetensors": "the weights, in safetensors' format",
    "model.pth": "the weights, as a state dict that `torch.load(weights_only=True)` reads",
    "model.pt2": "the network as a program, for `torch.export.load`; any batch size",
    "model.onnx": "the network as a program, for onnxruntime and others; any batch size",
    "preprocessing.json": "how an image becomes the input",
    "classes.json": "what the outputs mean, in order",
}


LOADED = {
    "model.pth": 'torch.load("model.pth", weights_only=True)',
    "model.safetensors": 'safetensors.torch.load_file("model.safetensors")',
}
"""How Python reads the weights."""


class Accuracy(NamedTuple):
    """Figures of just these weights."""

    data: str
    size: int
    crop_ratio: float
    flip: bool
    top1: float
    """In [0, 1]."""
    top5: float
    """In [0, 1]."""
    loss: float


def accuracies(content: Content, config: RunConfig, evaluation: Mapping[str, Any] | None) -> list[Accuracy]:
    """What is known of these weights' accuracy: from the end of the run, and from `recipes.evaluate --save`.

    Args:
        content: Of the checkpoint; its summary is there only where it is about these weights.
        config: The run's.
        evaluation: What `recipes.evaluate --save` wrote for these weights; None: nothing.
    """
    found = []
    if content.summary is not None:
        for size, figures in content.summary.get("eval_by_size", {}).items():
            values = (figures["top1"], figures["top5"], figures["loss"])
            found.append(Accuracy("the run's validation images", int(size), config.eval.crop_ratio, False, *values))
    if evaluation is None:
        return found
    for one in evaluation["results"]:
        values = (one["top1"], one["top5"], one["loss"])
        where = f"{Path(evaluation['data']).name}, {one['images']:,} images"
        found.append(Accuracy(where, one["size"], one["crop_ratio"], evaluation["flip"] is not None, *values))
    return found


def facts(trained: Trained) -> list[tuple[str, str]]:
    """Name and value of what is known of the run, in the card's table."""
    content, manifest, summary = trained.content, trained.content.manifest, trained.content.summary or {}
    if manifest is None:
        name = Path(content.location).name
        return [
            ("weights", f"of another project: {markdown(name)}"),
            ("SHA-256 of the weights", f"`{content.weights_sha256}`"),
        ]
    done = f"{manifest.epoch} of {trained.config.epochs}"
    if manifest.batch_in_epoch:
        done += f", and {manifest.batch_in_epoch} batches"
    averaged = "exponential moving average (EMA)" if trained.content.weights == "ema" else "as trained, not averaged"
    found = [
        ("weights", averaged),
        ("epochs", done),
        ("training images seen", f"{manifest.samples:,}"),
        ("checkpoint", f"{manifest.stem}, {markdown(manifest.created_at)}"),
        ("SHA-256 of the weights", f"`{trained.content.weights_sha256}`"),
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


def data_lines(trained: Trained) -> str:
    """What it was trained on."""
    manifest, config = trained.content.manifest, trained.config
    if manifest is None:
        return "Trained by another project, on data and by a recipe that its file does not name."
    text = f"Trained on {markdown(Path(config.data.path).name)}"
    if manifest.epoch and not manifest.batch_in_epoch:
        text += f", {manifest.samples // manifest.epoch:,} images in each epoch"
    sizes = [image_size(config, epoch) for epoch in range(manifest.epoch + bool(manifest.batch_in_epoch))]
    stages = [(size, len(list(epochs))) for size, epochs in groupby(sizes)]
    each = ", then ".join(f"{count} epoch{'s' if count > 1 else ''} at {size} px" for size, count in stages)
    return f"{text}: {each}. Seed {config.seed}, {config.precision}."


def determining(config: RunConfig) -> dict[str, Any]:
    """The config's keys that determine the weights, without those that are off."""

    def part(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if f"{prefix}{key}" not in NO_EFFECT_ON_WEIGHTS}
        kept = {key: value for key, value in kept.items() if value is not None and (key, value) != ("composer", {})}
        return {key: part(value, f"{key}.") if isinstance(value, dict) else value for key, value in kept.items()}

    return part(config.model_dump(mode="json"), "")


def technique_lines(config: RunConfig) -> list[str]:
    """The techniques that were on, each with its fields."""
    lines = []
    for name, fields in config.algorithms.model_dump(mode="json").items():
        parts = fields.items() if name == "composer" and fields else [(name, fields)] if fields is not None else []
        for label, values in parts:
            if label != "composer":
                values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
                text = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
                lines.append(f"`{label}`" + (f": {text}" if text else ""))
    return lines


def limits(trained: Trained, known: Sequence[Accuracy], folded: bool) -> list[str]:
    """What can and cannot be relied on."""
    lines = [f"It tells the {trained.num_classes} classes of classes.json apart; anything else gets one of them too."]
    if known:
        lines.append("Accuracy was measured on the images that the table names, and on no others.")
    lines.append("Nothing here was measured about fairness, robustness or calibration.")
    if trained.content.manifest is not None and trained.content.manifest.epoch < trained.config.epochs:
        lines.append("The training was not finished when this checkpoint was taken.")
    if folded:
        lines.append("Stochastic depth's scale at the test is multiplied into each block's last BatchNorm.")
    return lines


def card(
    trained: Trained,
    *,
    shape: Architecture,
    preprocessing: Mapping[str, Any],
    differences: Mapping[str, float],
    evaluation: Mapping[str, Any] | None,
    files: Sequence[str],
) -> str:
    """The model card as Markdown.

    Args:
        trained: The network and its run.
        shape: How its architecture differs from the plain one.
        preprocessing: As in preprocessing.json.
        differences: Of each program's logits from the network's, by file.
        evaluation: As in `accuracies`.
        files: Names of the files beside the card.
    """
    config = trained.config
    known = accuracies(trained.content, config, evaluation)
    what = dict(WHAT)
    for name, value in differences.items():
        what[name] += f" (its logits differ from the network's by {value:.1g} at most; {TOLERANCE:g} is allowed)"
    weights = next((how for name, how in LOADED.items() if name in files), "")
    sigmoid = preprocessing["probabilities"] == "sigmoid"
    recipe = {"model": config.model.model_dump()} if trained.content.manifest is None else determining(config)
    return TEMPLATES.get_template("card.md.jinja").render(
        run_name=config.run_name,
        library="timm" if config.model.name.startswith("timm/") else "torchvision",
        model=config.model.name.removeprefix("timm/"),
        classes=trained.num_classes,
        parameters=f"{sum(one.numel() for one in trained.network.parameters()):,}",
        plain=shape.plain,
        changed=" and ".join(shape.techniques),
        blurpool_only=shape.techniques == ("blurpool",),
        blur_first=shape.blur_first,
        blurred=shape.blurred,
        blurred_pools=shape.blurred_pools,
        facts=facts(trained),
        accuracies=known,
        data=data_lines(trained),
        techniques=[] if trained.content.manifest is None else technique_lines(config),
        files=[(name, what[name]) for name in files],
        resize=preprocessing["resize_short_side"],
        size=preprocessing["size"],
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        probabilities="model(preprocess(image)[None])[0]" + (".sigmoid()" if sigmoid else ".softmax(0)"),
        names=list(files),
        imports="import safetensors.torch\nimport torch" if weights.startswith("safetensors") else "import torch",
        weights=weights,
        opset=OPSET,
        limits=limits(trained, known, config.algorithms.stochastic_depth is not None),
        config=yaml.safe_dump(recipe, sort_keys=False, width=110),
    )
