"""Stochastic depth: skip residual blocks at random."""

from __future__ import annotations

from composer.algorithms import StochasticDepth
from composer.algorithms.stochastic_depth.stochastic_depth import _STOCHASTIC_LAYER_MAPPING, _update_drop_rate
from composer.core import Event, State
from composer.loggers import Logger

from algorithms.config import StochasticDepthConfig


class ResumableStochasticDepth(StochasticDepth):
    """Composer's algorithm, with two fixes that resuming needs."""

    def match(self, event: Event, state: State) -> bool:
        """Composer's events, and before a checkpoint is loaded."""
        return event == Event.BEFORE_LOAD or super().match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Give the optimizer its entries, or do what Composer's does."""
        if event == Event.BEFORE_LOAD:
            # A block that was skipped in every step so far has no momentum, and torch cannot load an optimizer
            # state that lacks parameters. So each parameter gets an entry; None is SGD's "no momentum yet".
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:
                    for param in group["params"]:
                        optimizer.state[param].setdefault("momentum_buffer", None)
            return
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
