"""Gradient clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from algorithms import PositiveFloat, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm


class GradientClippingConfig(Technique):
    """Bound the gradients before the optimizer's step, by Composer's `GradientClipping`."""

    type: Literal["norm", "value", "adaptive"] = "norm"
    """Bound the norm of all gradients together, each element, or each unit's norm relative to that of its weights."""
    threshold: PositiveFloat
    """The bound; for `adaptive` the ratio of the gradient's norm to the weights' norm."""

    def build(self) -> Algorithm:
        """Composer's algorithm with these fields."""
        from composer.algorithms import GradientClipping

        return GradientClipping(clipping_type=self.type, clipping_threshold=self.threshold)
