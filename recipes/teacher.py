"""The teacher of `algorithms.distillation`: a library's network, or one trained with this recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import timm
import torch
from torch import nn

from algorithms.distillation import Teacher
from data.errors import InputError
from data.text import first_line
from recipes.config import RunConfig
from recipes.model import build_network
from recipes.processes import on_first
from recipes.trained import load_trained
from recipes.watch.summary import weights_sha256
from recipes.weights import downloaded

KEY = "algorithms.distillation.teacher"


def load_teacher(config: RunConfig, classes: Sequence[str], sizes: Iterable[int]) -> Teacher | None:
    """The teacher of a run, on the CPU; None if it has none. Every process calls this.

    `classes` are class folders in label order; `sizes` the image sizes in pixels of the run's stages.

    Raises:
        InputError: There is no such network, its classes are others, or it does not accept images of one of the sizes.
    """
    if config.algorithms.distillation is None:
        return None
    source, num_classes = config.algorithms.distillation.teacher, config.model.num_classes or len(classes)
    if source.startswith("timm/"):
        network, sha256, mean, std = _of_timm(source)
        known: Sequence[str] = ()
    else:
        found = load_trained(config, source, key=KEY)
        network, sha256, known = found.network, found.weights_sha256, found.classes
        mean, std = found.config.data.mean, found.config.data.std
    if known and tuple(known) != tuple(classes):
        raise InputError(f"{KEY}: {source} was trained on other classes than those of data.path")
    teacher = Teacher(network, config.data.mean, config.data.std, mean, std, sha256)
    for size in sorted(set(sizes)):
        try:
            with torch.no_grad():
                outputs = teacher(torch.zeros(1, 3, size, size)).shape[1]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(f"{KEY}: {source} does not accept images of {size} px: {first_line(error)}") from None
        if outputs != num_classes:
            raise InputError(f"{KEY}: {source} has {outputs} outputs; allowed: {num_classes}, as the run's network")
    return teacher


def _of_timm(name: str) -> tuple[nn.Module, str, tuple[float, ...], tuple[float, ...]]:
    """A network of timm with its own weights, which process 0 downloads; their SHA-256; mean and std of its images."""
    tensors = on_first(partial(downloaded, "timm", name, KEY))
    settings = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    assert settings is not None, "it has weights"
    network = build_network(name, settings.num_classes)
    network.load_state_dict(tensors)
    return network, weights_sha256(tensors), settings.mean, settings.std
