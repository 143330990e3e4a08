"""Stochastic depth: skip residual blocks at random."""

from __future__ import annotations

from composer.algorithms import StochasticDepth
from composer.algorithms.stochastic_depth.stochastic_depth import _STOCHASTIC_LAYER_MAPPING, _update_drop_rate
from composer.core import Event, State
from composer.loggers import Logger

from algorithms.config import StochasticDepthConfig


class ResumableStochasticDepth(StochasticDepth):
    """Composer's algorithm, with a fix that resuming needs."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """What Composer's does, and the full rate from the end of the warm-up on."""
        super().apply(event, state, logger)
        elapsed = state.get_elapsed_duration()
        if event == Event.BATCH_START and elapsed is not None and elapsed >= self.drop_warmup:
            # Composer stops updating one batch before the end of the warm-up, below `drop_rate`, while a run
            # resumed after the warm-up starts at `drop_rate`.
            block, _ = _STOCHASTIC_LAYER_MAPPING[self.target_layer_name]
            depth, distribution = self.num_stochastic_layers, self.drop_distribution
            _update_drop_rate(state.model, block, self.drop_rate, distribution, depth)


def build(config: StochasticDepthConfig) -> StochasticDepth:
    """The algorithm with these fields."""
    return ResumableStochasticDepth(**config.model_dump())
