"""A trained network out of a checkpoint, and all that says what it is: the loader of evaluate, predict and export."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from composer.utils import dist, get_device
from pydantic import ValidationError
from torch import Tensor, nn

from data.errors import printable
from data.listing import class_folders
from recipes.checkpoints.manifest import Manifest
from recipes.checkpoints.mirror import FOLDER
from recipes.checkpoints.places import Places
from recipes.checkpoints.read import Taken, take
from recipes.checkpoints.resume import on_first
from recipes.checkpoints.s3 import S3Store
from recipes.checkpoints.store import LocalStore, StoreError
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.preflight import device_problems
from recipes.surgery import for_inference, operated_network
from recipes.trainer import device_name
from recipes.watch.fingerprint import bare_name, weights_sha256

Weights = Literal["ema", "raw"]
Tensors = dict[str, Tensor]


class Content(NamedTuple):
    """What is taken from a checkpoint."""

    manifest: Manifest
    location: str
    """The checkpoint's address, for people."""
    skipped: tuple[str, ...]
    """Newer checkpoints that were passed over, one line each with the reason."""
    weights: Weights
    tensors: Tensors
    """The network's state dict, by its own names."""
    weights_sha256: str
    """Their fingerprint, as in summary.json."""
    summary: dict[str, Any] | None
    """The run's summary.json as far as it is about these very weights."""


@dataclass(frozen=True)
class Trained:
    """A network with a run's weights, in evaluation mode on the CPU."""

    content: Content
    network: nn.Module
    """Maps float images (N, 3, H, W) to logits (N, num_classes)."""
    config: RunConfig
    """The run's as it was trained; where its files lie is not in it."""
    num_classes: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Class folder names in label order; empty where the checkpoint does not say."""
        return self.content.manifest.classes


def load_trained(places: Places, run_name: str, checkpoint: str | None, weights: Weights | None) -> Trained:
    """Load a network; every process calls it and gets the same weights, which the first one reads.

    The architecture is that of the checkpoint's own config, whatever the YAML at hand says.

    Args:
        places: Where the run's checkpoints lie.
        run_name: The run's name.
        checkpoint: As in `take`; None: the newest of the run.
        weights: EMA's average or the trained ones; None: the average where there is one, as the run evaluates.

    Raises:
        InputError: There is no such checkpoint, it is damaged, or it lacks these weights.
    """
    content = on_first(lambda: _content(places, run_name, checkpoint, weights))
    config = run_config(content.manifest, content.location)
    num_classes = config.model.num_classes or len(content.manifest.classes) or _outputs(content.tensors)
    network = operated_network(config.model.name, num_classes, config.algorithms)
    try:
        network.load_state_dict(content.tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:300]
        raise InputError(f"{content.location}: its weights do not fit {config.model.name}: {reason}") from None
    for_inference(network)
    return Trained(content, network.eval(), config, num_classes)


def _content(places: Places, run_name: str, checkpoint: str | None, weights: Weights | None) -> Content:
    taken = take(places, run_name, checkpoint)
    chosen, tensors = choose(taken.state, weights, taken.location)
    digest = weights_sha256(tensors)
    summary = _summary(taken, places, digest)
    return Content(taken.manifest, taken.location, taken.skipped, chosen, tensors, digest, summary)


def choose(state: Mapping[str, Any], weights: Weights | None, location: str) -> tuple[Weights, Tensors]:
    """EMA's average or the trained weights out of a training state.

    The checkpoint holds the trained ones under `model` and the average in EMA's own state.

    Args:
        state: A checkpoint's.
        weights: Which; None: the average where there is one.
        location: Of the checkpoint, for messages.

    Returns:
        Which they are, and the state dict by the network's own names.

    Raises:
        InputError: The average is asked for, and there is none.
    """
    model = {bare_name(name): tensor for name, tensor in state["model"].items() if isinstance(tensor, Tensor)}
    average = _average(state)
    if weights == "ema" and average is None:
        raise InputError(f"--weights: {location} holds no moving average (algorithms.ema was off, or had not begun)")
    if weights == "raw" or average is None:
        return "raw", model
    return "ema", {name: average.get(name, tensor) for name, tensor in model.items()}


def _average(state: Mapping[str, Any]) -> Tensors | None:
    for _, algorithm in state["algorithms"]:
        if isinstance(algorithm.get("ema_model"), Mapping) and algorithm.get("ema_started"):
            stores = algorithm["ema_model"].values()
            return {bare_name(name): tensor for store in stores for name, tensor in store.items()}
    return None


def run_config(manifest: Manifest, location: str) -> RunConfig:
    """The config that a checkpoint was made by, out of its manifest.

    Raises:
        InputError: It is not one that this version understands.
    """
    # Left out of a manifest and without effect here; a run that cannot resume is only right without autoresume.
    known = {**manifest.config, "run_name": manifest.run_name, "autoresume": False}
    try:
        return RunConfig.model_validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{location}: its config is another version's: {where}: {first['msg']}") from None


def _outputs(tensors: Tensors) -> int:
    """Outputs of the last linear layer, by its weight: of an older checkpoint, which does not hold its classes."""
    return [tensor.shape[0] for tensor in tensors.values() if tensor.ndim == 2][-1]


def _summary(taken: Taken, places: Places, sha256: str) -> dict[str, Any] | None:
    """summary.json of the checkpoint's run, where it stands for these weights: told by their fingerprint."""
    for read in _summaries(taken, places):
        try:
            summary = json.loads(read())
        except (OSError, StoreError, ValueError):
            continue
        if isinstance(summary, dict) and summary.get("weights_sha256") == sha256:
            return summary
    return None


def _summaries(taken: Taken, places: Places) -> list[Any]:
    store = taken.store
    own = (places.run_folder / "summary.json").read_bytes
    if isinstance(store, S3Store):
        return [own, lambda: store.below(FOLDER).read("summary.json")]
    assert isinstance(store, LocalStore)
    return [own, (store.folder.parent / "summary.json").read_bytes]


def to_device(network: nn.Module, device: str) -> tuple[nn.Module, torch.device]:
    """Move a network to where it is to compute, in the memory format that convolutions like best.

    Args:
        network: Anywhere.
        device: The config's name of it.

    Returns:
        The network, and torch's name of the device.
    """
    place = get_device(device_name(device)).tensor_to_device(torch.zeros(())).device
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    return network.to(place), place


def usable(config: RunConfig) -> RunConfig:
    """The config with a precision that its device has: half precision needs a GPU, and a result is none the worse.

    Raises:
        InputError: The device is not there.
    """
    if device_name(config.device) != "gpu":
        config = config.model_copy(update={"precision": "fp32"})
    if lines := list(device_problems(config)):
        raise InputError(*lines)
    return config


def say_skipped(trained: Trained) -> None:
    """Tell the user, once, of newer checkpoints that were passed over."""
    if trained.content.skipped and dist.get_global_rank() == 0:
        print(*trained.content.skipped, sep="\n", file=sys.stderr)


def labels(trained: Trained, data_path: str) -> list[str]:
    """What each output is called, in order.

    Args:
        trained: The network.
        data_path: The run's dataset, whose class folders tell where an older checkpoint does not.
    """
    known = list(trained.classes)
    if not known:
        train = Path(data_path) / "train"
        folders = [printable(name) for name in class_folders(train)] if train.is_dir() else []
        known = folders if len(folders) == trained.num_classes else []
    return [*known, *(f"output {index}" for index in range(len(known), trained.num_classes))]
