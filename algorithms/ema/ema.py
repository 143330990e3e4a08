"""Composer's EMA, with names that do not depend on how many processes train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from composer.algorithms import EMA
from composer.core import Event, State
from composer.loggers import Logger
from torch import Tensor


def bare(name: str) -> str:
    """A parameter's name without the `module.` that each wrapper (Composer's model, DDP) puts before it."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def renamed(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The same tensors under the names that equal theirs up to wrappers.

    Raises:
        ValueError: A tensor's name is not among them, so it would never be used.
    """
    by_bare_name = {bare(name): name for name in names}
    strange = [name for name in tensors if bare(name) not in by_bare_name]
    if strange:
        raise ValueError(f"ema: the average holds {strange[0]}, which the model has not")
    return {by_bare_name[bare(name)]: tensor for name, tensor in tensors.items()}


class PortableEMA(EMA):
    """Composer's EMA, which matches weights by names that DDP changes (`module.module.*` instead of `module.*`).

    Unmatched names are passed over upstream, so a run that goes on with another number of processes would evaluate
    weights that were never averaged.
    """

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Take over the model's names when a fit, evaluation or prediction starts, then do what Composer does."""
        if event in self.move_device_events:
            average: Any = self.ema_model
            average.named_parameters_dict = renamed(
                average.named_parameters_dict, (name for name, _ in state.model.named_parameters())
            )
            average.named_buffers_dict = renamed(
                average.named_buffers_dict, (name for name, _ in state.model.named_buffers())
            )
        super().apply(event, state, logger)
