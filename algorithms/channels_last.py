"""ChannelsLast: the memory format that tensor cores work in."""

from __future__ import annotations

from composer.algorithms import ChannelsLast

from algorithms.config import ChannelsLastConfig


def build(_: ChannelsLastConfig) -> ChannelsLast:
    """Composer's algorithm."""
    return ChannelsLast()
