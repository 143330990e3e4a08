"""Squeeze-and-Excitation: channel attention after wide convolutions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from algorithms import PositiveFloat, PositiveInt, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger


class SqueezeExciteConfig(Technique):
    """A Squeeze-and-Excitation block (Hu et al. 2018) after each wide convolution, by Composer's `SqueezeExcite`."""

    latent_channels: PositiveFloat = 64.0
    """Channels of the block's hidden layer; below 1: a share of the convolution's output channels."""
    min_channels: PositiveInt = 128
    """Only convolutions with at least this many input and output channels get a block."""

    def build(self) -> Algorithm:
        """Composer's algorithm with these fields, which warns if it changes nothing, as its `BlurPool` does."""
        from composer.algorithms import SqueezeExcite, SqueezeExciteConv2d
        from composer.algorithms.warnings import NoEffectWarning
        from composer.utils.module_surgery import count_module_instances

        class CheckedSqueezeExcite(SqueezeExcite):
            def apply(self, event: Event, state: State, logger: Logger) -> None:
                super().apply(event, state, logger)
                if count_module_instances(state.model, SqueezeExciteConv2d) == 0:
                    text = f"squeeze_excite: no convolution has {self.min_channels} channels (min_channels)"
                    warnings.warn(NoEffectWarning(text), stacklevel=2)

        return CheckedSqueezeExcite(**self.model_dump())
