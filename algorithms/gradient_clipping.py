"""Gradient clipping."""

from __future__ import annotations

from composer.algorithms import GradientClipping

from algorithms.config import GradientClippingConfig


def build(config: GradientClippingConfig) -> GradientClipping:
    """Composer's algorithm with these fields."""
    return GradientClipping(clipping_type=config.type, clipping_threshold=config.threshold)
