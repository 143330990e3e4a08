"""Composer's SWA, with names that do not depend on how many processes train."""

from __future__ import annotations

from composer.algorithms import SWA
from composer.core import Event, State
from composer.loggers import Logger
from torch.nn.parallel import DistributedDataParallel


class PortableSWA(SWA):
    """Composer's SWA, which sees the model without DDP around it.

    Upstream makes the average of the bare model when the Trainer is built, and of the wrapped one when the averaging
    begins, so the names in a checkpoint of several processes are not those of the average that is to load them.
    """

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what Composer does, on the bare model."""
        wrapped = state.model
        if isinstance(wrapped, DistributedDataParallel):
            state.model = wrapped.module
        try:
            super().apply(event, state, logger)
        finally:
            state.model = wrapped
