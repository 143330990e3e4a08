"""What a model hub reads of an export: timm's config.json, the card's metadata, and the upload itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from data.errors import InputError
from data.text import first_line
from recipes.export import CARD, CONFIG
from recipes.export.programs import TOLERANCE, difference, takes_weights
from recipes.trained import Trained


def write_timm_config(
    trained: Trained, folder: Path, preprocessing: Mapping[str, Any], classes: Sequence[str], probe: Tensor
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
    names = {"label_names": list(classes), "num_classes": trained.num_classes}
    save_config_for_hf(network, str(folder / CONFIG), {"pretrained_cfg": prepared, **names})
    with torch.no_grad():
        found = difference(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(probe), network(probe))
    if not found <= TOLERANCE:  # nor NaN
        raise InputError(f"{CONFIG}: timm's network from it has other logits, by {found:.2g}, allowed {TOLERANCE:g}")
    return True


def front_matter(trained: Trained, library: str, accuracies: Sequence[Mapping[str, Any]]) -> str:
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
