"""Composer's StochasticDepth, made to resume exactly."""

from __future__ import annotations

from composer.algorithms import StochasticDepth
from composer.algorithms.stochastic_depth.stochastic_depth import _STOCHASTIC_LAYER_MAPPING, _update_drop_rate
from composer.core import Event, State
from composer.loggers import Logger


class ResumableStochasticDepth(StochasticDepth):
    """Composer's, with two repairs that a resume needs.

    A block that was skipped in every step so far has no momentum, and torch cannot load an optimizer's state in which
    some parameters are missing: every parameter gets an entry, with the `None` that SGD takes for "no momentum yet".
    And upstream stops updating the probabilities one batch before the warm-up's end, so they never reach `drop_rate`;
    a run that resumes after the warm-up would have `drop_rate`, and go another way.
    """

    def match(self, event: Event, state: State) -> bool:
        """Where Composer's matches, and when surgery is done and no checkpoint is loaded yet."""
        return event == Event.BEFORE_LOAD or super().match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what Composer does, and repair."""
        if event == Event.BEFORE_LOAD:
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:
                    for param in group["params"]:
                        optimizer.state[param].setdefault("momentum_buffer", None)
            return
        super().apply(event, state, logger)
        if event == Event.BATCH_START and self._warm(state):
            block, _ = _STOCHASTIC_LAYER_MAPPING[self.target_layer_name]
            _update_drop_rate(state.model, block, self.drop_rate, self.drop_distribution, self.num_stochastic_layers)

    def _warm(self, state: State) -> bool:
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and elapsed >= self.drop_warmup
