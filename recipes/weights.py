"""Weights from elsewhere: state dicts and checkpoints, read as data only, and a run that starts from them."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from composer import Callback, Logger, State
from torch import Tensor, nn

from algorithms import bare_name
from algorithms.fixres import classifier
from data.errors import InputError
from data.files import is_remote, read_path, read_regular
from data.text import first_line
from recipes.checkpoints.find import Found, load_named
from recipes.checkpoints.format import is_tensors
from recipes.checkpoints.manifest import Manifest, is_stem
from recipes.checkpoints.store import retry
from recipes.config import ModelConfig, RunConfig, seconds
from recipes.processes import on_first
from recipes.watch.summary import weights_sha256

log = logging.getLogger(__name__)

Weights = Literal["ema", "raw"]
Tensors = dict[str, Tensor]
FOREIGN = (".pt", ".pth", ".bin", ".tar", ".safetensors")  # suffixes of another project's state dict
KEY = "model.weights"
SHOWN = 8  # how many tensors a line names
_WRAPPED = re.compile(r"(\.(conv|batchnorm))+(?=\.[^.]+$|\.se\.)")
_BLURS = (".blur_filter", ".filt2d")  # the constant kernels of BlurPool's layers
_COUNTER = "num_batches_tracked"  # of BatchNorm; files of before PyTorch 0.4.1 lack it, as do some of other libraries


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Weights, on the CPU, and where they come from."""

    location: str  # for display
    tensors: Tensors  # by bare name
    sha256: str  # `weights_sha256` of the tensors
    weights: Weights = "raw"
    manifest: Manifest | None = None  # of the checkpoint; None: the weights of another project or of a library

    @property
    def classes(self) -> tuple[str, ...]:
        """Class folders in label order; empty: not known."""
        return () if self.manifest is None else self.manifest.classes


def is_state_dict(source: str) -> bool:
    """Whether an existing file or an address is a state dict, and not a checkpoint of ours or a folder with some."""
    ours = is_stem(Path(source).name.split(".")[0])
    return not ours and (source.endswith(FOREIGN) if is_remote(source) else Path(source).is_file())


def read_state_dict(path: str) -> Start:
    """A state dict from a file or `s3://...`; no code in it is run. InputError: it is none."""
    try:
        data = read_path(path) if is_remote(path) else read_regular(path, sys.maxsize)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    try:
        if path.endswith(".safetensors"):
            found: Any = safetensors.torch.load(data)
        else:
            torch.serialization.clear_safe_globals()  # drop the types that some library has allowed
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises about ten different exceptions
        # torch's first lines advise to load it as code; of what is no pickle it says, at best, a number.
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0] or first_line(error)
        reason = "not a pickle" if isinstance(error, LookupError) else reason
        written = "as torch.save or safetensors writes them"
        raise InputError(f"{path}: cannot be loaded as weights only, {written}: {reason[:200]}") from None
    for key in ("state_dict", "model"):  # as timm and torchvision's reference scripts save them
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    tensors = [*found.values()] if isinstance(found, dict) else []
    dense = (isinstance(one, Tensor) and one.layout == torch.strided for one in tensors)
    if not tensors or not all(dense) or any(one.is_quantized or one.is_meta for one in tensors):
        raise InputError(f"{path}: is not a state dict of tensors")
    named_tensors = {bare_name(str(name)): tensor for name, tensor in found.items()}
    return Start(path, named_tensors, weights_sha256(named_tensors))


def choose(found: Found, weights: Weights | None) -> Start:
    """The trained weights of a checkpoint, stored as `model`, or EMA's average, stored in EMA's state.

    With None, the average if there is one.
    """
    state, location, average = found.state, found.location, Tensors()
    tensors = {bare_name(name): tensor for name, tensor in state["model"].items()}
    for _, algorithm in state["algorithms"]:
        if isinstance(algorithm.get("ema_model"), Mapping) and algorithm.get("ema_started"):
            stores = algorithm["ema_model"].values()
            if not all(map(is_tensors, stores)):
                raise InputError(f"{location}: its moving average is malformed")
            average = {bare_name(name): tensor for store in stores for name, tensor in store.items()}
    if weights == "ema" and not average:
        raise InputError(f"--weights: {location} holds no moving average (algorithms.ema was off or had not started)")
    if weights == "raw" or not average:
        return Start(location, tensors, weights_sha256(tensors), "raw", found.manifest)
    tensors = {name: average.get(name, tensor) for name, tensor in tensors.items()}
    return Start(location, tensors, weights_sha256(tensors), "ema", found.manifest)


# --- starting from them ---------------------------------------------------------------------------------------------


LIBRARIES = ("timm", "torchvision")


def read_start(config: RunConfig) -> Start | None:
    """The weights that `model.weights` names, read by process 0 for all; None if it names none.

    InputError: there are none, they cannot be read, or have another hash than `model.weights_sha256`.
    """
    return None if config.model.weights is None else on_first(partial(_read, config, config.model.weights))


def _read(config: RunConfig, source: str) -> Start:
    if source in LIBRARIES:
        tensors = downloaded(source, config.model.name, KEY)
        start = Start(f"{source}'s weights of {config.model.name}", tensors, weights_sha256(tensors))
    elif not is_remote(source) and not Path(source).exists():
        allowed = f"{', '.join(FOREIGN)}, a run's folder or checkpoint, s3://..., {', '.join(LIBRARIES)}"
        raise InputError(f"{KEY}: {source} does not exist; allowed: {allowed}")
    elif is_state_dict(source):
        start = read_state_dict(source)
    else:
        start = choose(retry(lambda: load_named(source, KEY), seconds(config.checkpoints.patience)), None)
    expected = config.model.weights_sha256
    if expected not in (None, start.sha256):
        raise InputError(
            f"{KEY}_sha256: {start.location} has {start.sha256}, not {expected}; allowed: its hash, or null"
        )
    return start


def downloaded(library: str, name: str, key: str) -> Tensors:
    """A library's own pretrained weights of a network, which may be the other library's of the same name.

    InputError, with the user's `key`: there are none, or they cannot be loaded.
    """
    short = name.removeprefix("timm/")
    try:
        if library == "timm":
            import timm

            if timm.models.is_model_pretrained(short):
                return dict(timm.create_model(short, pretrained=True).state_dict())
            raise ValueError("there are none")
        import torchvision.models

        weights = torchvision.models.get_model_weights(short).DEFAULT
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except Exception as error:  # of urllib, requests, huggingface_hub or torch, or ValueError for an unknown name
        raise InputError(f"{key}: {library}'s weights of {short} cannot be loaded: {first_line(error)[:200]}") from None


def plain_name(name: str) -> str:
    """A tensor's name in the network before surgery, which wraps a convolution as `conv`, a BatchNorm as `batchnorm`.

    `layer2.0.conv2.conv.weight` of BlurPool's or squeeze-and-excite's layer is `layer2.0.conv2.weight`. In a network
    that has layers with these names of its own, names become shorter but stay distinct.
    """
    return _WRAPPED.sub("", bare_name(name))


def fill(network: nn.Module, start: Start, model: ModelConfig, classes: Sequence[str]) -> list[str]:
    """Copy weights into a network, before or after surgery, and say what is not as in the source, one line each.

    The classifier keeps its own values if the source's has another number of outputs, or is known to be for other
    `classes` (class folders in label order). The constant tensors of BlurPool's layers need no counterpart.

    InputError: anything else does not fit or, without `model.weights_strict`, nothing fits.
    """
    state = network.state_dict()
    own = {plain_name(key): tensor for key, tensor in state.items() if not key.endswith(_BLURS)}
    theirs = {plain_name(key): tensor for key, tensor in start.tensors.items() if not key.endswith(_BLURS)}
    lines, new = _new_classifier(network, own, theirs, start, classes, model.num_classes or len(classes))
    both = own.keys() & theirs.keys() - new
    reshaped = sorted(key for key in both if own[key].shape != theirs[key].shape)
    wrong = {
        "of other shapes": [f"{key} {tuple(theirs[key].shape)}, here {tuple(own[key].shape)}" for key in reshaped],
        f"only in {model.name}": [key for key in own.keys() - theirs.keys() if not key.endswith(_COUNTER)],
        "only in the weights": [*(theirs.keys() - own.keys())],
    }
    unfit = [f"  {len(keys)} {what}: {_listed(sorted(keys))}" for what, keys in wrong.items() if keys]
    fitting = both.difference(reshaped)
    if not fitting or (unfit and model.weights_strict):
        otherwise = f", or {KEY}_strict=false to load what fits" if fitting else ""
        allowed = f"allowed: weights of this network{otherwise}"
        raise InputError(f"{KEY}: {start.location} does not fit {model.name}; {allowed}; tensors", *unfit)
    with torch.no_grad():
        for key in fitting:
            own[key].copy_(theirs[key])
    lines += [f"{KEY}: {start.location} does not fit {model.name} in full; tensors", *unfit] if unfit else []
    theirs_blur, own_blur = (any(key.endswith(_BLURS) for key in keys) for keys in (start.tensors, state))
    if theirs_blur != own_blur:
        has = "has BlurPool and this network has not" if theirs_blur else "has no BlurPool and this network has"
        lines.append(f"{KEY}: {start.location} {has}, so its logits differ before training")
    return lines


def _new_classifier(
    network: nn.Module, own: Tensors, theirs: Tensors, start: Start, classes: Sequence[str], num_classes: int
) -> tuple[list[str], set[str]]:
    """A line if the classifier is not loaded, because it is for other classes, and the names of its tensors."""
    pairs = {key: (own[key].shape, theirs[key].shape) for key in own.keys() & theirs.keys()}
    heads = {
        key: there[0]
        for key, (here, there) in pairs.items()
        if here[:1] == (num_classes,) != there[:1] and here[1:] == there[1:]
    }
    if heads:
        why = f"{num_classes} classes, not the {max(heads.values())} of {start.location}"
        return [f"{KEY}: a new classifier for {why}"], set(heads)
    if start.classes and start.classes != tuple(classes):
        with suppress(ValueError):  # no linear layer
            parts = [*classifier(network).parameters()]
            names = {plain_name(key) for key, one in network.named_parameters() if any(one is part for part in parts)}
            return [f"{KEY}: a new classifier, since {start.location} was trained on other classes"], names
    return [], set()


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(key[:120] for key in keys[:SHOWN]) + more


class StartFrom(Callback):
    """Fills the network when Composer would load a checkpoint: after surgery, before it is wrapped for processes."""

    def __init__(self, start: Start, model: ModelConfig, classes: Sequence[str]) -> None:
        self._start, self._model, self._classes = start, model, classes

    def before_load(self, state: State, logger: Logger) -> None:
        """Fill, and say what is new."""
        lines = fill(state.model.get_submodule("module"), self._start, self._model, self._classes)
        log.info("starting from %s, weights_sha256 %s", self._start.location, self._start.sha256)
        for line in lines:
            log.warning("%s", line)
