"""Composer's SqueezeExcite, which says so when it found nothing to change."""

from __future__ import annotations

import warnings

from composer.algorithms import SqueezeExcite, SqueezeExciteConv2d
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils.module_surgery import count_module_instances


class CheckedSqueezeExcite(SqueezeExcite):
    """Composer's, with the warning that its BlurPool has too."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Insert the blocks, and warn where there are none."""
        super().apply(event, state, logger)
        if count_module_instances(state.model, SqueezeExciteConv2d) == 0:
            warnings.warn(
                NoEffectWarning(f"squeeze_excite: no convolution has {self.min_channels} channels (min_channels)"),
                stacklevel=2,
            )
