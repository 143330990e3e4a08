"""Load a trained network, and what is known about it, for the commands evaluate, predict and export."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from composer.core import Precision, get_precision_context
from composer.utils import get_device
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from algorithms.config import AlgorithmsConfig
from data.augment import Normalise
from data.errors import InputError, StoreError
from data.imagefolder import class_folders, class_names
from data.text import escape, first_line
from recipes.checkpoints.find import load_checkpoint
from recipes.checkpoints.manifest import Manifest
from recipes.checkpoints.store import LOGS, LocalStore, Places, Store
from recipes.config import RunConfig
from recipes.model import for_inference, operated_network
from recipes.preflight import device_problems, with_precision
from recipes.processes import on_first
from recipes.results import SUMMARY
from recipes.trainer import device_name
from recipes.weights import Start, Tensors, Weights, choose, is_state_dict, read_state_dict


class _Figures(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    top1: float
    top5: float
    loss: float


class Summary(BaseModel):
    """The used keys of a summary.json, which may come from anybody."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    weights_sha256: str
    eval_by_size: dict[Annotated[str, Field(pattern="^[0-9]{1,5}$")], _Figures] = {}
    wall_seconds: float | None = None
    images_per_second: float | None = None
    versions: dict[str, str | None] = {}


@dataclass(frozen=True)
class Trained:
    """A network with trained weights, in evaluation mode on the CPU, and where they come from."""

    network: nn.Module  # maps float images (N, 3, H, W) to logits (N, num_classes)
    config: RunConfig  # the config that the run was trained with, whatever the YAML says
    num_classes: int
    location: str  # the checkpoint's address, for display
    weights: Weights
    weights_sha256: str  # as in summary.json
    manifest: Manifest | None = None  # None: the weights of another project, about which nothing more is known
    summary: Summary | None = None  # the run's summary.json, if it describes these weights

    @property
    def classes(self) -> tuple[str, ...]:
        """Class folder names in label order; empty if the checkpoint does not hold them."""
        return () if self.manifest is None else self.manifest.classes

    @property
    def weights_name(self) -> str:
        """The weights in words."""
        if self.manifest is None:
            return "weights of another project"
        return "EMA's average" if self.weights == "ema" else "trained weights"


def load_trained(
    config: RunConfig, checkpoint: str | None = None, weights: Weights | None = None, key: str = "--checkpoint"
) -> Trained:
    """Load a network; every process calls this and gets the same weights, which the first process reads.

    A run's checkpoint determines the architecture, whatever the YAML says. Another project's state dict is loaded into
    the YAML's network, with or without its techniques, whichever it fits.

    Args:
        config: Which run, and where its checkpoints are.
        checkpoint: As in `load_checkpoint`, or another project's state dict; None: the run's newest.
        weights: None: EMA's average if there is one, as in the run's own evaluation.
        key: What named the checkpoint, for messages.

    Raises:
        InputError: There is no such checkpoint, it is damaged, it lacks these weights, or they do not fit.
    """
    start, summary = on_first(partial(_read, config, checkpoint, weights, key))
    manifest, location, tensors = start.manifest, start.location, start.tensors
    if manifest is not None:
        config = _config_of(manifest, location)
    num_classes = config.model.num_classes or len(start.classes) or _outputs(tensors, location)
    try:
        network = _build(config, num_classes, tensors, location)
    except InputError:
        if manifest is not None:
            raise
        config = config.model_copy(update={"algorithms": AlgorithmsConfig()})
        network = _build(config, num_classes, tensors, location)
    return Trained(network, config, num_classes, location, start.weights, start.sha256, manifest, summary)


def _read(config: RunConfig, checkpoint: str | None, weights: Weights | None, key: str) -> tuple[Start, Summary | None]:
    if checkpoint is not None and is_state_dict(checkpoint):
        if weights == "ema":
            raise InputError(f"--weights: {checkpoint} is a plain state dict, without a moving average")
        return read_state_dict(checkpoint), None
    places = Places.of(config.checkpoints.folder, config.runs_folder, config.run_name)
    found = load_checkpoint(places, config.run_name, checkpoint, key)
    for line in found.skipped:
        print(escape(line), file=sys.stderr)
    start = choose(found, weights)
    return start, _summary(found.store, places, start.sha256)


def _summary(store: Store, places: Places, sha256: str) -> Summary | None:
    """The summary.json in the run's folder or beside the checkpoint, if it describes the weights with this SHA-256."""
    beside = LocalStore(store.folder.parent) if isinstance(store, LocalStore) else store.below(LOGS)
    for place in (LocalStore(places.run_folder), beside):
        with suppress(OSError, StoreError, ValueError):
            summary = Summary.model_validate_json(place.read(SUMMARY))
            if summary.weights_sha256 == sha256:
                return summary
    return None


def _config_of(manifest: Manifest, location: str) -> RunConfig:
    """The config with which a checkpoint was trained."""
    # The manifest's config has no run name. Without autoresume, techniques that cannot be resumed are allowed.
    known = {**manifest.config, "run_name": manifest.run_name, "autoresume": False}
    try:
        return RunConfig.model_validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{location}: its config is from another version: {where}: {first['msg']}") from None


def _outputs(tensors: Tensors, location: str) -> int:
    linear = [tensor.shape[0] for tensor in tensors.values() if tensor.ndim == 2]
    if not linear:
        raise InputError(f"{location}: holds no linear layer, so the number of classes is unknown")
    return linear[-1]


def _build(config: RunConfig, num_classes: int, tensors: Tensors, location: str) -> nn.Module:
    """The network with its weights, ready for inference; memory is allocated only if the weights fit."""

    def filled(assign: bool) -> nn.Module:
        network = operated_network(config.model.name, num_classes, config.algorithms)
        network.load_state_dict(tensors, assign=assign)
        return network

    try:
        # A few networks compute with their initial weights, which the meta device does not have.
        with suppress(NotImplementedError), torch.device("meta"):
            filled(assign=True)
        network = filled(assign=False)
    except (RuntimeError, TypeError, ValueError) as error:
        text = str(error).partition("state_dict for")[2].partition("\n")[2] or str(error)
        reason = " ".join(text.split())[:300]
        raise InputError(f"{location}: its weights do not fit {config.model.name}: {reason}") from None
    for_inference(network)
    return network.eval()


def with_usable_precision(config: RunConfig) -> RunConfig:
    """The config with FP32 unless the device is a GPU: half precision needs one.

    Raises:
        InputError: The device is not available.
    """
    if device_name(config.device) != "gpu":
        config = config.model_copy(update={"precision": "fp32"})
    config = with_precision(config)
    if lines := list(device_problems(config)):
        raise InputError(*lines)
    return config


class Logits:
    """A network on the config's device, in the config's precision.

    Calling it with images, uint8 (N, 3, H, W), gives float32 logits (N, num_classes) on that device; with `flip`, the
    mean of those of each image and its mirror image.

    Raises:
        InputError: The network does not accept images of one of `sizes`, in pixels.
    """

    def __init__(self, trained: Trained, config: RunConfig, sizes: Iterable[int]) -> None:
        self.device = get_device(device_name(config.device)).tensor_to_device(torch.zeros(())).device
        # torch's stubs leave this overload out.
        self.network = trained.network.to(memory_format=torch.channels_last).to(self.device)  # type: ignore[call-overload]
        self.precision = Precision(config.precision)
        self.normalise = Normalise(trained.config.data.mean, trained.config.data.std)
        for size in dict.fromkeys(sizes):
            try:
                self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
            except (RuntimeError, AssertionError, ValueError) as error:
                name = trained.config.model.name
                raise InputError(f"{name} does not accept images of {size} px: {first_line(error)}") from None

    @torch.no_grad()
    def __call__(self, images: Tensor, flip: bool = False) -> Tensor:
        """The logits; the images may be on any device."""
        batch, _ = self.normalise((images.to(self.device, non_blocking=True), None))
        with get_precision_context(self.precision):
            logits: Tensor = self.network(batch)
            return ((logits + self.network(batch.flip(3))) / 2 if flip else logits).float()


def labels(trained: Trained, data_path: str) -> list[dict[str, str]]:
    """What each output means; if the checkpoint does not say it, it is taken from the dataset at `data_path`."""
    train, known = Path(data_path) / "train", trained.classes
    if not known and train.is_dir():
        folders = class_folders(train)
        known = tuple(folders) if len(folders) == trained.num_classes else ()
    return named(known, trained.num_classes)


def named(folders: Sequence[str], outputs: int) -> list[dict[str, str]]:
    """The `class` folder and its English `name` for each output, of which only the first may have a folder."""
    every = [*folders, *(f"output {index}" for index in range(len(folders), outputs))]
    pairs = zip(every, class_names(every), strict=True)
    return [{"class": escape(folder), "name": escape(name)} for folder, name in pairs]
