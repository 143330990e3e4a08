"""Stochastic depth: skip residual blocks at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from algorithms import Fraction, PositiveFraction, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm, State
    from composer.loggers import Logger


class StochasticDepthConfig(Technique):
    """Skip residual blocks at random while training (Huang et al. 2016), by Composer's `StochasticDepth`."""

    target_layer_name: Literal["ResNetBottleneck"] = "ResNetBottleneck"
    """The block to skip; Composer supports only torchvision's `Bottleneck`."""
    stochastic_method: Literal["block", "sample"] = "block"
    """Skip a block for the whole batch, or for single images."""
    drop_rate: PositiveFraction = 0.2
    """Probability of skipping a block; with `linear`, that of the last block."""
    drop_distribution: Literal["linear", "uniform"] = "linear"
    """Let the probability grow linearly with depth, or be the same in all blocks."""
    drop_warmup: Fraction = 0.0
    """Share of the run in which the probability rises from zero; `block` only."""

    @model_validator(mode="after")
    def _warmup_of_blocks(self) -> StochasticDepthConfig:
        if self.stochastic_method == "sample" and self.drop_warmup > 0:
            raise ValueError("drop_warmup: Composer has a warm-up for stochastic_method: block only; allowed: 0")
        return self

    def build(self) -> Algorithm:
        """Composer's algorithm with these fields, and two fixes that resuming needs."""
        from composer.algorithms import StochasticDepth
        from composer.algorithms.stochastic_depth.stochastic_depth import _STOCHASTIC_LAYER_MAPPING, _update_drop_rate
        from composer.core import Event

        class ResumableStochasticDepth(StochasticDepth):
            def match(self, event: Event, state: State) -> bool:
                return event == Event.BEFORE_LOAD or super().match(event, state)

            def apply(self, event: Event, state: State, logger: Logger) -> None:
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

        return ResumableStochasticDepth(**self.model_dump())
