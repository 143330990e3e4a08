"""Stochastic depth: residual blocks that are skipped at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from algorithms.technique import Fraction, PositiveFraction, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm


class StochasticDepthConfig(Technique):
    """Skip residual blocks at random while training (Huang et al. 2016), by Composer's `StochasticDepth`."""

    target_layer_name: Literal["ResNetBottleneck"] = "ResNetBottleneck"
    """The block to skip; Composer knows torchvision's `Bottleneck` only."""
    stochastic_method: Literal["block", "sample"] = "block"
    """Skip a block for the whole batch, or for single images."""
    drop_rate: PositiveFraction = 0.2
    """Probability of skipping; with `linear`, that of the last block."""
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
        """Composer's algorithm with these fields."""
        from algorithms.stochastic_depth.stochastic_depth import ResumableStochasticDepth

        return ResumableStochasticDepth(**self.model_dump())
