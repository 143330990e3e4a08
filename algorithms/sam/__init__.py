"""SAM: sharpness-aware minimization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from algorithms.technique import PositiveInt, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm


class SAMConfig(Technique):
    """Step along the gradient of the worst point nearby (Foret et al. 2021), every `interval` batches."""

    rho: Annotated[float, Field(gt=0)] = 0.05
    """Radius of the neighbourhood, in the L2 norm of all weights."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-12
    """Added to the gradient's norm, against division by zero."""
    interval: PositiveInt = 1
    """Batches from one such step to the next; each costs a second forward and backward pass."""

    def build(self) -> Algorithm:
        """Our algorithm around Composer's SAM optimizer."""
        from algorithms.sam.sam import SAM

        return SAM(**self.model_dump())
