"""What a model hub reads of an export: timm's config.json, the model card, and the upload itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from data.errors import InputError
from data.text import first_line
from recipes.checkpoints.manifest import Manifest
from recipes.config import RunConfig
from recipes.export import CARD, CONFIG, SavedEvaluation
from recipes.export.programs import OPSET, TOLERANCE, Architecture, difference, takes_weights
from recipes.output import TEXTS
from recipes.resolved import NO_EFFECT_ON_WEIGHTS
from recipes.schedule import image_size
from recipes.trained import Trained

HARDWARE = {"device": "hardware", "cpu": "processor", "memory": "memory", "commit": "commit of the recipe"}
"""The entries of summary.json's `versions` that are no packages, and their names here."""


def write_timm_config(
    trained: Trained, folder: Path, preprocessing: Mapping[str, Any], labels: Sequence[Mapping[str, str]], probe: Tensor
) -> bool:
    """Write timm's config.json beside model.safetensors, so that `timm.create_model("local-dir:FOLDER")` loads both.

    timm's network is the one with the same name; torchvision's ResNets have the same names and weights there. The
    folder is loaded with timm, and the logits of the images `probe` are compared.

    Returns:
        Whether it was written: not if timm has no such network, or a technique changed the architecture.
    """
    name = trained.config.model.name.removeprefix("timm/")
    if name not in timm.list_models():
        return False
    network: nn.Module = timm.create_model(name, num_classes=trained.num_classes)
    if not takes_weights(network, trained.network, probe):
        return False
    side = preprocessing["size"]
    prepared = {name: preprocessing[name] for name in ("interpolation", "mean", "std")}
    prepared |= {"input_size": (3, side, side), "crop_pct": preprocessing["crop_ratio"]}
    names = {"label_names": [label["class"] for label in labels], "num_classes": trained.num_classes}
    save_config_for_hf(network, str(folder / CONFIG), {"pretrained_cfg": prepared, **names})
    with torch.no_grad():
        found = difference(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(probe), network(probe))
    if not found <= TOLERANCE:  # nor NaN
        raise InputError(f"{CONFIG}: timm's network from it has other logits, by {found:.2g}, allowed {TOLERANCE:g}")
    return True


def card(
    trained: Trained,
    shape: Architecture,
    preprocessing: Mapping[str, Any],
    differences: Mapping[str, float],
    evaluation: SavedEvaluation | None,
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
    return TEXTS.get_template("export/card.md.jinja").render(
        trained=trained,
        metadata=_front_matter(trained, "timm" if CONFIG in files else "pytorch", accuracies),
        file=Path(trained.location).name,
        parameters=f"{sum(one.numel() for one in trained.network.parameters()):,}",
        shape=shape,
        hardware={label: versions[name] for name, label in HARDWARE.items() if name in versions},
        packages=", ".join(f"{name} {version}" for name, version in versions.items() if name not in HARDWARE),
        torch=torch.__version__,
        accuracies=accuracies,
        stages=_stages(trained.manifest, config) if trained.manifest else "",
        dataset=Path(config.data.path).name,
        techniques={} if trained.manifest is None else _techniques(config),
        files=files,
        differences=differences,
        tolerance=TOLERANCE,
        prepared=preprocessing,
        opset=OPSET,
        config=yaml.safe_dump(recipe, sort_keys=False, width=110),
    )


def _front_matter(trained: Trained, library: str, accuracies: Sequence[Mapping[str, Any]]) -> str:
    """The card's metadata in the hub's form (YAML): library, data, and each measured accuracy."""
    dataset = Path(trained.config.data.path).name
    slug = re.sub(r"[^\w.-]+", "-", dataset).strip("-.") or "unknown"
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=slug,
            dataset_name=f"{slug}, {one['data']}",
            metric_type="accuracy",
            metric_name=f"{metric.replace('top', 'top-')} at {one['size']} px{', with mirror images' * one['flip']}",
            metric_value=round(one[metric], 6),
        )
        for one in accuracies
        for metric in ("top1", "top5")
    ]
    data = ModelCardData(
        library_name=library,
        pipeline_tag="image-classification",
        tags=["image-classification", library],
        datasets=[slug] if trained.manifest else None,
        metrics=["accuracy"] if results else None,
        model_name=trained.config.run_name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _accuracies(trained: Trained, evaluation: SavedEvaluation | None) -> list[dict[str, Any]]:
    """The known accuracies of these weights: from the end of the run, and from `recipes.evaluate --save`."""
    run = {"data": "the run's validation images", "crop_ratio": trained.config.eval.crop_ratio, "flip": False}
    by_size = trained.summary.eval_by_size if trained.summary else {}
    found = [run | {"size": int(size)} | figures.model_dump() for size, figures in by_size.items()]
    if evaluation is not None:
        folder, flip = Path(evaluation.data).name, evaluation.flip is not None
        for one in evaluation.results:
            found.append(one.model_dump() | {"data": f"{folder}, {one.images:,} images", "flip": flip})
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


def _techniques(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The techniques that were on, each with its fields."""
    used: dict[str, dict[str, Any]] = {}
    for name, fields in config.algorithms.model_dump(mode="json", exclude_none=True).items():
        used |= fields if name == "composer" else {name: fields}
    return used


def require_repository(name: str) -> None:
    """Raise InputError unless the name is one of a repository and there is a token, before anything is computed."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub: {name!r}: {first_line(error)}") from None
    if get_token() is None:
        raise InputError("--push-to-hub: no access token; set HF_TOKEN, or run `hf auth login`")


def push(folder: Path, repository: str, files: Sequence[str]) -> str:
    """Upload an export's files, creating the repository if there is none; returns its address.

    Raises:
        InputError: The hub refused it or cannot be reached; the export in the folder is complete.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, allow_patterns=[*files, CARD])
    except (OSError, ValueError) as error:  # requests' and the hub's errors are OSErrors
        reason = f"{first_line(error)}; {folder} is complete, and can be uploaded later"
        raise InputError(f"--push-to-hub: {repository}: {reason}") from None
    return str(address)
