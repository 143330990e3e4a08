"""Squeeze-and-Excitation: channel attention after wide convolutions."""

from __future__ import annotations

import warnings

from composer.algorithms import SqueezeExcite, SqueezeExciteConv2d
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils.module_surgery import count_module_instances

from algorithms.config import SqueezeExciteConfig


class CheckedSqueezeExcite(SqueezeExcite):
    """Composer's algorithm, which warns if it changes nothing, as its `BlurPool` does."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Put the blocks in."""
        super().apply(event, state, logger)
        if count_module_instances(state.model, SqueezeExciteConv2d) == 0:
            text = f"squeeze_excite: no convolution has {self.min_channels} channels (min_channels)"
            warnings.warn(NoEffectWarning(text), stacklevel=2)


def build(config: SqueezeExciteConfig) -> SqueezeExcite:
    """The algorithm with these fields."""
    return CheckedSqueezeExcite(**config.model_dump())
