"""ChannelsLast: the memory format that tensor cores work in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from algorithms import Technique

if TYPE_CHECKING:
    from composer.core import Algorithm


class ChannelsLastConfig(Technique):
    """Keep the weights in NHWC memory order, by Composer's `ChannelsLast`; it has no fields."""

    def build(self) -> Algorithm:
        """Composer's algorithm."""
        from composer.algorithms import ChannelsLast

        return ChannelsLast()
