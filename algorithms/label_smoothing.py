"""Label smoothing: softer targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from algorithms import Technique

if TYPE_CHECKING:
    from composer.core import Algorithm


class LabelSmoothingConfig(Technique):
    """Shrink the targets towards the uniform distribution (Szegedy et al. 2016), by Composer's `LabelSmoothing`."""

    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the target that is spread evenly over all classes."""

    def build(self) -> Algorithm:
        """Composer's algorithm with these fields."""
        from composer.algorithms import LabelSmoothing

        return LabelSmoothing(smoothing=self.smoothing)
