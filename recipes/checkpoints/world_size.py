"""Names of EMA's averages, which Composer takes from the model as DDP wraps it: kept unwrapped in checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from composer import State
from composer.algorithms import EMA
from torch.nn.parallel import DistributedDataParallel

_PREFIX = "module."
_STORES = ("named_parameters_dict", "named_buffers_dict")


def without_wrapper(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A training state with EMA's averages under the names that the model has in a run of one process.

    Under DDP they are saved as `module.module.*`; a run of one process would look for `module.*`, find none, and go on
    without the average and without a word (composer/algorithms/ema/ema.py).

    Args:
        state_dict: Of `State.state_dict()`; left as it is.
    """
    return {**state_dict, "algorithms": [(name, _unwrapped(item)) for name, item in state_dict["algorithms"]]}


def _unwrapped(algorithm: dict[str, Any]) -> dict[str, Any]:
    averages = algorithm.get("ema_model")
    if not isinstance(averages, dict):
        return algorithm
    doubled = _PREFIX * 2
    return {
        **algorithm,
        "ema_model": {
            store: {
                name.removeprefix(_PREFIX) if name.startswith(doubled) else name: tensor
                for name, tensor in averages[store].items()
            }
            for store in _STORES
        },
    }


def fit_averages(state: State) -> None:
    """After loading and wrapping: rename EMA's averages to the model's names, and move them to its device.

    Raises:
        ValueError: An average has no counterpart in the model.
    """
    wrapped = isinstance(state.model, DistributedDataParallel)
    buffers: dict[str, torch.Tensor] = dict(state.model.named_buffers())
    names = {*dict(state.model.named_parameters()), *buffers}
    for algorithm in state.algorithms:
        if not isinstance(algorithm, EMA) or not algorithm.ema_started:
            continue
        assert algorithm.ema_model is not None  # it has started
        for store in _STORES:
            averages = getattr(algorithm.ema_model, store)
            if wrapped and not names >= averages.keys():
                averages = {_PREFIX + name: tensor for name, tensor in averages.items()}
                setattr(algorithm.ema_model, store, averages)
            if unknown := sorted(averages.keys() - names):
                raise ValueError(f"the checkpoint's moving average has {unknown[:3]}, which the model lacks")
        algorithm.ema_model.move_params_to_device(destination_model=state.model)
