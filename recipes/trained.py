"""A trained network out of a checkpoint, and all that says what it is: the loader of evaluate, predict and export."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
import torch
from composer.utils import dist, get_device
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from algorithms.config import AlgorithmsConfig
from data.listing import class_folders
from data.text import escape
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
from recipes.watch.fingerprint import bare_name, weights_sha256

Weights = Literal["ema", "raw"]
Tensors = dict[str, Tensor]
FOREIGN = (".pt", ".pth", ".bin", ".tar", ".safetensors")


class Content(NamedTuple):
    """What is taken from a checkpoint."""

    manifest: Manifest | None
    """None: the weights are another project's, which say no more."""
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
        return () if self.content.manifest is None else self.content.manifest.classes


class _Figures(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    top1: float
    top5: float
    loss: float


class _Summary(BaseModel):
    """What is used of a summary.json, which may be anybody's."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    weights_sha256: str
    eval_by_size: dict[Annotated[str, Field(pattern="^[0-9]{1,5}$")], _Figures] = {}
    wall_seconds: float = 0.0
    images_per_second: float | None = None
    versions: dict[str, str | None] = {}


def load_network(config: RunConfig, checkpoint: str | None, weights: Weights | None) -> Trained:
    """The network of a run's checkpoint, or the config's network with the weights of another project.

    Args:
        config: Says which run, and where its checkpoints lie.
        checkpoint: As in `load_checkpoint`; or a state dict, in a local file whose name ends with one of `FOREIGN`.
        weights: As in `load_trained`.

    Raises:
        InputError: There is no such checkpoint, it cannot be loaded, or it does not fit.
    """
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.suffix in FOREIGN and not is_stem(path.stem) and path.is_file():
        return _load_foreign(path, config, weights)
    places = Places.of(config.checkpoints.folder, config.runs_folder, config.run_name)
    return load_trained(places, config.run_name, checkpoint, weights)


def _load_foreign(path: Path, config: RunConfig, weights: Weights | None) -> Trained:
    """Another project's weights, in the plain network of their name or the one with the config's techniques."""
    if weights == "ema":
        raise InputError(f"--weights: {path} is a plain state dict, which holds no moving average beside it")
    tensors = on_first(lambda: _read_foreign(path))
    num_classes = config.model.num_classes or _outputs(str(path), tensors)
    plain = config.model_copy(update={"algorithms": AlgorithmsConfig()})
    for used in (config, plain):
        network = operated_network(used.model.name, num_classes, used.algorithms)
        if network.state_dict().keys() == tensors.keys():
            break
    _fill(network, tensors, str(path), used.model.name)
    return Trained(
        Content(None, str(path), (), "raw", tensors, weights_sha256(tensors), None), network, used, num_classes
    )


def _read_foreign(path: Path) -> Tensors:
    """The tensors of a state dict, weights only: nothing in the file is run."""
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load(path.read_bytes())
        else:
            torch.serialization.clear_safe_globals()  # no type that some library has allowed
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch raises about ten kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: cannot be loaded as weights only: {reason}") from None
    for key in ("state_dict", "model"):  # as timm and torchvision's reference save them
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError(f"{path}: is not a state dict of tensors")
    return {bare_name(str(name)): tensor for name, tensor in found.items()}


def _network(config: RunConfig, num_classes: int, content: Content) -> nn.Module:
    """The network that a checkpoint's config describes; memory is taken for it only where its weights fit.

    Raises:
        InputError: They do not, or there is no such network.
    """
    name = config.model.name
    try:
        with torch.device("meta"):
            outline = operated_network(name, num_classes, config.algorithms)
    except NotImplementedError:  # a few networks compute with their first weights
        outline = None
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{content.location}: {name} of {num_classes} outputs cannot be built: {reason}") from None
    if outline is not None:
        _load(outline, content.tensors, content.location, name, assign=True)
    return operated_network(name, num_classes, config.algorithms)


def _fill(network: nn.Module, tensors: Tensors, location: str, name: str) -> None:
    _load(network, tensors, location, name)
    for_inference(network)
    network.eval()


def _load(network: nn.Module, tensors: Tensors, location: str, name: str, *, assign: bool = False) -> None:
    try:
        network.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).partition("\n")[2].split())[:300]
        raise InputError(f"{location}: its weights do not fit {name}: {reason}") from None


def load_trained(places: Places, run_name: str, checkpoint: str | None, weights: Weights | None) -> Trained:
    """Load a network; every process calls it and gets the same weights, which the first one reads.

    The architecture is that of the checkpoint's own config, whatever the YAML at hand says.

    Args:
        places: Where the run's checkpoints lie.
        run_name: The run's name.
        checkpoint: As in `load_checkpoint`; None: the newest of the run.
        weights: EMA's average or the trained ones; None: the average where there is one, as the run evaluates.

    Raises:
        InputError: There is no such checkpoint, it is damaged, or it lacks these weights.
    """
    content, manifest = on_first(lambda: _content(places, run_name, checkpoint, weights))
    config = run_config(manifest, content.location)
    num_classes = config.model.num_classes or len(manifest.classes) or _outputs(content.location, content.tensors)
    network = _network(config, num_classes, content)
    _fill(network, content.tensors, content.location, config.model.name)
    return Trained(content, network, config, num_classes)


def _content(
    places: Places, run_name: str, checkpoint: str | None, weights: Weights | None
) -> tuple[Content, Manifest]:
    taken = load_checkpoint(places, run_name, checkpoint)
    chosen, tensors = choose(taken.state, weights, taken.location)
    digest = weights_sha256(tensors)
    summary = _summary(taken, places, digest)
    return Content(taken.manifest, taken.location, taken.skipped, chosen, tensors, digest, summary), taken.manifest


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
    model = {bare_name(name): tensor for name, tensor in state["model"].items()}
    average = _average(state, location)
    if weights == "ema" and average is None:
        raise InputError(f"--weights: {location} holds no moving average (algorithms.ema was off, or had not begun)")
    if weights == "raw" or average is None:
        return "raw", model
    return "ema", {name: average.get(name, tensor) for name, tensor in model.items()}


def _average(state: Mapping[str, Any], location: str) -> Tensors | None:
    for _, algorithm in state["algorithms"]:
        if isinstance(algorithm.get("ema_model"), Mapping) and algorithm.get("ema_started"):
            stores = algorithm["ema_model"].values()
            if not all(map(is_tensors, stores)):
                raise InputError(f"{location}: its moving average is malformed")
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


def _outputs(location: str, tensors: Tensors) -> int:
    """Outputs of the last linear layer, by its weight: of a file that does not hold its classes."""
    linear = [tensor.shape[0] for tensor in tensors.values() if tensor.ndim == 2]
    if not linear:
        raise InputError(f"{location}: holds no linear layer that would tell the number of classes")
    return linear[-1]


def _summary(taken: Found, places: Places, sha256: str) -> dict[str, Any] | None:
    """summary.json of the checkpoint's run, where it stands for these weights: told by their fingerprint."""
    for read in _summaries(taken, places):
        try:
            text = read()
            if _Summary.model_validate_json(text).weights_sha256 == sha256:
                return parse_summary(text)
        except (OSError, StoreError, ValueError):
            continue
    return None


def _summaries(taken: Found, places: Places) -> list[Any]:
    store = taken.store
    folders = [places.run_folder, *([store.folder.parent] if isinstance(store, LocalStore) else [])]
    found = [partial(LocalStore(folder).read, SUMMARY) for folder in folders]
    return [*found, *([lambda: store.below(LOGS).read(SUMMARY)] if isinstance(store, S3Store) else [])]


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
        print(*map(escape, trained.content.skipped), sep="\n", file=sys.stderr)


def labels(trained: Trained, data_path: str) -> list[str]:
    """What each output is called, in order.

    Args:
        trained: The network.
        data_path: The run's dataset, whose class folders tell where an older checkpoint does not.
    """
    known = list(trained.classes)
    if not known:
        train = Path(data_path) / "train"
        folders = [escape(name) for name in class_folders(train)] if train.is_dir() else []
        known = folders if len(folders) == trained.num_classes else []
    return [*known, *(f"output {index}" for index in range(len(known), trained.num_classes))]
