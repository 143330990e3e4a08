"""SWA: finish with an average of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from algorithms import Fraction, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger


class SWAConfig(Technique):
    """Near the end, replace the weights by their average so far (Izmailov et al. 2018), by Composer's `SWA`."""

    start: Fraction = 0.7
    """Share of the run before averaging begins."""
    end: Fraction = 0.97
    """Share of the run after which the average replaces the weights; at least one epoch is left for BatchNorm."""
    update_interval: Annotated[str, Field(pattern=r"^[1-9][0-9]*(ba|ep)$")] = "1ep"
    """Time between two updates: epochs (`1ep`) or batches (`100ba`)."""

    @model_validator(mode="after")
    def _ordered(self) -> SWAConfig:
        if self.start >= self.end:
            raise ValueError(f"start must come before end, got {self.start} and {self.end}")
        return self

    def build(self, epochs: int) -> Algorithm:
        """Composer's algorithm, with times in whole epochs, on the model without the DDP wrapper.

        Composer creates the average from the bare model when the Trainer is built, and from the wrapped one when
        averaging begins, so the names in a checkpoint of several processes differ from those of the average that loads
        it.

        Raises:
            ValueError: The run has fewer than 3 epochs.
        """
        from composer.algorithms import SWA
        from torch.nn.parallel import DistributedDataParallel

        if epochs < 3:
            raise ValueError(f"swa: needs a run of at least 3 epochs, got {epochs}")
        end = max(min(round(self.end * epochs), epochs - 1), 2)
        start = max(min(round(self.start * epochs), end - 1), 1)

        class PortableSWA(SWA):
            def apply(self, event: Event, state: State, logger: Logger) -> None:
                model = state.model
                if isinstance(model, DistributedDataParallel):
                    state.model = model.module
                try:
                    super().apply(event, state, logger)
                finally:
                    state.model = model

        return PortableSWA(swa_start=f"{start}ep", swa_end=f"{end}ep", update_interval=self.update_interval)
