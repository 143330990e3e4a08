"""SWA: finish with an average of the weights."""

from __future__ import annotations

from composer.algorithms import SWA
from composer.core import Event, State
from composer.loggers import Logger
from torch.nn.parallel import DistributedDataParallel

from algorithms.config import SWAConfig


class PortableSWA(SWA):
    """Composer's algorithm on the model without the DDP wrapper.

    Composer creates the average from the bare model when the Trainer is built, and from the wrapped one when averaging
    begins, so the names in a checkpoint of several processes differ from those of the average that loads it.
    """

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what Composer's does, on the bare model."""
        model = state.model
        if isinstance(model, DistributedDataParallel):
            state.model = model.module
        try:
            super().apply(event, state, logger)
        finally:
            state.model = model


def build(config: SWAConfig, epochs: int) -> SWA:
    """The algorithm, with times in whole epochs; ValueError if the run has fewer than 3."""
    if epochs < 3:
        raise ValueError(f"swa: needs a run of at least 3 epochs, got {epochs}")
    end = max(min(round(config.end * epochs), epochs - 1), 2)
    start = max(min(round(config.start * epochs), end - 1), 1)
    return PortableSWA(swa_start=f"{start}ep", swa_end=f"{end}ep", update_interval=config.update_interval)
