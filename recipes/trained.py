"""Load a trained network, and what is known about it, for the commands evaluate, predict and export."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from composer.utils import get_device
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from algorithms import bare_name
from algorithms.config import AlgorithmsConfig
from data.imagefolder import class_folders
from data.text import escape, first_line
from recipes.checkpoints.claim import on_first
from recipes.checkpoints.find import Found, load_checkpoint
from recipes.checkpoints.format import is_tensors
from recipes.checkpoints.manifest import Manifest, is_stem
from recipes.checkpoints.store import LOGS, LocalStore, Places, S3Store, StoreError
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.model import for_inference, operated_network
from recipes.preflight import device_problems
from recipes.results import SUMMARY, parse_summary
from recipes.trainer import device_name
from recipes.watch.summary import weights_sha256

Weights = Literal["ema", "raw"]
Tensors = dict[str, Tensor]
FOREIGN = (".pt", ".pth", ".bin", ".tar", ".safetensors")  # suffixes of another project's state dict


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
    summary: dict[str, Any] | None = None  # the run's summary.json, if it describes these weights

    @property
    def classes(self) -> tuple[str, ...]:
        """Class folder names in label order; empty if the checkpoint does not hold them."""
        return () if self.manifest is None else self.manifest.classes


def load_trained(config: RunConfig, checkpoint: str | None = None, weights: Weights | None = None) -> Trained:
    """Load a network; every process calls this and gets the same weights, which the first process reads.

    A run's checkpoint determines the architecture, whatever the YAML says. Another project's state dict is loaded into
    the YAML's network, with or without its techniques, whichever has matching names.

    Args:
        config: Which run, and where its checkpoints are.
        checkpoint: As in `load_checkpoint`, or a local state dict with a suffix of `FOREIGN`; None: the run's newest.
        weights: EMA's average or the trained weights; None: the average if there is one, as in the run's own
        evaluation.

    Raises:
        InputError: There is no such checkpoint, it is damaged, it lacks these weights, or they do not fit.
    """
    path = Path(checkpoint or "")
    if path.suffix in FOREIGN and not is_stem(path.stem) and path.is_file():
        return _load_foreign(path, config, weights)
    manifest, location, chosen, tensors, sha256, summary = on_first(lambda: _read(config, checkpoint, weights))
    config = _config_of(manifest, location)
    num_classes = config.model.num_classes or len(manifest.classes) or _outputs(tensors, location)
    network = _build(config, num_classes, tensors, location)
    return Trained(network, config, num_classes, location, chosen, sha256, manifest, summary)


def _read(config: RunConfig, checkpoint: str | None, weights: Weights | None) -> tuple[Any, ...]:
    places = Places.of(config.checkpoints.folder, config.runs_folder, config.run_name)
    taken = load_checkpoint(places, config.run_name, checkpoint)
    for line in taken.skipped:
        print(escape(line), file=sys.stderr)
    chosen, tensors = _choose(taken.state, weights, taken.location)
    sha256 = weights_sha256(tensors)
    return taken.manifest, taken.location, chosen, tensors, sha256, _summary(taken, places, sha256)


def _choose(state: Mapping[str, Any], weights: Weights | None, location: str) -> tuple[Weights, Tensors]:
    """The trained weights, stored in a checkpoint as `model`, or EMA's average, stored in EMA's state."""
    model = {bare_name(name): tensor for name, tensor in state["model"].items()}
    average: Tensors | None = None
    for _, algorithm in state["algorithms"]:
        if isinstance(algorithm.get("ema_model"), Mapping) and algorithm.get("ema_started"):
            stores = algorithm["ema_model"].values()
            if not all(map(is_tensors, stores)):
                raise InputError(f"{location}: its moving average is malformed")
            average = {bare_name(name): tensor for store in stores for name, tensor in store.items()}
    if weights == "ema" and average is None:
        raise InputError(f"--weights: {location} holds no moving average (algorithms.ema was off or had not started)")
    if weights == "raw" or average is None:
        return "raw", model
    return "ema", {name: average.get(name, tensor) for name, tensor in model.items()}


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


class _Figures(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    top1: float
    top5: float
    loss: float


class _Summary(BaseModel):
    """The used keys of a summary.json, which may come from anybody."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    weights_sha256: str
    eval_by_size: dict[Annotated[str, Field(pattern="^[0-9]{1,5}$")], _Figures] = {}
    wall_seconds: float = 0.0
    images_per_second: float | None = None
    versions: dict[str, str | None] = {}


def _summary(taken: Found, places: Places, sha256: str) -> dict[str, Any] | None:
    """The summary.json of the checkpoint's run, if it describes the weights with this SHA-256."""
    for read in _summaries(taken, places):
        try:
            text = read()
            if _Summary.model_validate_json(text).weights_sha256 == sha256:
                return parse_summary(text)
        except (OSError, StoreError, ValueError):
            continue
    return None


def _summaries(taken: Found, places: Places) -> Iterator[Callable[[], bytes]]:
    yield partial(LocalStore(places.run_folder).read, SUMMARY)
    if isinstance(taken.store, LocalStore):
        yield partial(LocalStore(taken.store.folder.parent).read, SUMMARY)
    elif isinstance(taken.store, S3Store):
        yield partial(taken.store.below(LOGS).read, SUMMARY)


def _outputs(tensors: Tensors, location: str) -> int:
    linear = [tensor.shape[0] for tensor in tensors.values() if tensor.ndim == 2]
    if not linear:
        raise InputError(f"{location}: holds no linear layer, so the number of classes is unknown")
    return linear[-1]


def _build(config: RunConfig, num_classes: int, tensors: Tensors, location: str) -> nn.Module:
    """The network with its weights, ready for inference; memory is allocated only if the weights fit."""
    name = config.model.name
    try:
        with torch.device("meta"):
            outline = operated_network(name, num_classes, config.algorithms)
        _fill(outline, tensors, f"{location}: its weights do not fit {name}", assign=True)
    except NotImplementedError:  # a few networks compute with their initial weights
        pass
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{location}: {name} with {num_classes} outputs cannot be built: {reason}") from None
    network = operated_network(name, num_classes, config.algorithms)
    _fill(network, tensors, f"{location}: its weights do not fit {name}")
    for_inference(network)
    return network.eval()


def _fill(network: nn.Module, tensors: Tensors, problem: str, *, assign: bool = False) -> None:
    try:
        network.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).partition("\n")[2].split())[:300]
        raise InputError(f"{problem}: {reason}") from None


def _load_foreign(path: Path, config: RunConfig, weights: Weights | None) -> Trained:
    if weights == "ema":
        raise InputError(f"--weights: {path} is a plain state dict, without a moving average")
    tensors = on_first(lambda: _read_foreign(path))
    num_classes = config.model.num_classes or _outputs(tensors, str(path))
    if operated_network(config.model.name, num_classes, config.algorithms).state_dict().keys() != tensors.keys():
        config = config.model_copy(update={"algorithms": AlgorithmsConfig()})
    network = _build(config, num_classes, tensors, str(path))
    return Trained(network, config, num_classes, str(path), "raw", weights_sha256(tensors))


def _read_foreign(path: Path) -> Tensors:
    """The tensors of a state dict; no code in the file is run."""
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load(path.read_bytes())
        else:
            torch.serialization.clear_safe_globals()  # drop the types that some library has allowed
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch raises about ten different exceptions
        raise InputError(f"{path}: cannot be loaded as weights only: {first_line(error)[:200]}") from None
    for key in ("state_dict", "model"):  # as timm and torchvision's reference scripts save them
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError(f"{path}: is not a state dict of tensors")
    return {bare_name(str(name)): tensor for name, tensor in found.items()}


def with_usable_precision(config: RunConfig) -> RunConfig:
    """The config with FP32 unless the device is a GPU: half precision needs one.

    Raises:
        InputError: The device is not available.
    """
    if device_name(config.device) != "gpu":
        config = config.model_copy(update={"precision": "fp32"})
    if lines := list(device_problems(config)):
        raise InputError(*lines)
    return config


def to_device(trained: Trained, device: str, *sizes: int) -> tuple[nn.Module, torch.device]:
    """Move a network to the config's `device`, in channels-last memory, and try it on images of these sizes.

    Raises:
        InputError: It does not accept images of such a size.
    """
    place = get_device(device_name(device)).tensor_to_device(torch.zeros(())).device
    trained.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    network = trained.network.to(place)
    for size in dict.fromkeys(sizes):
        try:
            with torch.no_grad():
                network(torch.zeros(1, 3, size, size, device=place))
        except (RuntimeError, AssertionError, ValueError) as error:
            name = trained.config.model.name
            raise InputError(f"{name} does not accept images of {size} px: {first_line(error)}") from None
    return network, place


def labels(trained: Trained, data_path: str) -> list[str]:
    """The class folder of each output; if the checkpoint does not hold them, those of the dataset at `data_path`."""
    known = list(trained.classes)
    if not known:
        train = Path(data_path) / "train"
        folders = [escape(name) for name in class_folders(train)] if train.is_dir() else []
        known = folders if len(folders) == trained.num_classes else []
    return [*known, *(f"output {index}" for index in range(len(known), trained.num_classes))]
