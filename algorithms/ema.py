"""EMA: evaluate an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from composer.algorithms import EMA
from composer.core import Event, State
from composer.loggers import Logger
from torch import Tensor, nn

from algorithms import bare_name
from algorithms.config import EMAConfig


def in_batches(time: str, total_batches: int) -> str:
    """Convert a share of the run (`0.003dur`) to batches (`27ba`), at least one; other units stay."""
    if not time.endswith("dur"):
        return time
    return f"{max(1, round(float(time.removesuffix('dur')) * total_batches))}ba"


def _renamed(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The same tensors under the given names, which may differ by wrappers' prefixes.

    Raises:
        ValueError: A tensor's name is not among `names`, so it would never be used.
    """
    by_bare_name = {bare_name(name): name for name in names}
    if unknown := [name for name in tensors if bare_name(name) not in by_bare_name]:
        raise ValueError(f"ema: the moving average has {unknown[0]}, which the model lacks")
    return {by_bare_name[bare_name(name)]: tensor for name, tensor in tensors.items()}


@torch.no_grad()
def average(averages: list[Tensor], values: list[Tensor], smoothing: float) -> None:
    """Set each average to `smoothing * average + (1 - smoothing) * value`, in place, a few kernels for all of them.

    A pair has one shape and type, and all floats are best of one type, on one device: torch then needs no loop. The
    result is Composer's `compute_ema`'s, bit for bit, which has four kernels for each tensor.
    """
    kept = torch._foreach_mul(averages, smoothing)
    torch._foreach_add_(kept, torch._foreach_mul(values, 1.0 - smoothing))
    torch._foreach_copy_(averages, kept)  # whole numbers, BatchNorm's counts, are rounded towards zero


class PortableEMA(EMA):
    """Composer's algorithm, updated by `average`, and independent of the number of processes.

    DDP changes the names of weights (`module.module.*` instead of `module.*`). Composer ignores an average whose name
    it does not find, so a run resumed with another number of processes would evaluate weights that were never averaged.
    Here, checkpoints use the names of a single process, and loaded averages get the model's names.
    """

    def state_dict(self) -> dict[str, Any]:
        """Composer's state, with the names of a single process."""
        state = super().state_dict()
        for store, tensors in state["ema_model"].items():
            state["ema_model"][store] = {f"module.{bare_name(name)}": tensor for name, tensor in tensors.items()}
        return state

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what Composer's does, after renaming a loaded average."""
        if event == self.update_event:
            self._update(state.model)
            return
        if event in self.move_device_events:  # fit, evaluation or prediction starts
            average: Any = self.ema_model
            parameters, buffers = dict(state.model.named_parameters()), dict(state.model.named_buffers())
            average.named_parameters_dict = _renamed(average.named_parameters_dict, parameters)
            average.named_buffers_dict = _renamed(average.named_buffers_dict, buffers)
        super().apply(event, state, logger)

    def _update(self, model: nn.Module) -> None:
        kept: Any = self.ema_model
        averages: dict[str, Tensor] = kept.named_parameters_dict | kept.named_buffers_dict
        values = dict(chain(model.named_parameters(), model.named_buffers()))
        for floats in (True, False):
            names = [name for name in averages if averages[name].is_floating_point() == floats]
            if names:
                average([averages[name] for name in names], [values[name] for name in names], self.smoothing)


def build(config: EMAConfig, total_batches: int) -> EMA:
    """The algorithm, with shares of the run in batches."""
    return PortableEMA(
        half_life=None if config.half_life is None else in_batches(config.half_life, total_batches),
        smoothing=config.smoothing,
        ema_start=f"{config.start}dur",
        update_interval=in_batches(config.update_interval, total_batches),
    )
