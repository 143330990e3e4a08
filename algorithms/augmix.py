"""AugMix: a mixture of several chains of augmentations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from algorithms import PositiveFloat, PositiveInt, Technique

if TYPE_CHECKING:
    from PIL.Image import Image


class AugMixConfig(Technique):
    """Mix each image with chains of random augmentations of it (Hendrycks et al. 2020), by Composer's AugMix."""

    severity: Annotated[int, Field(ge=1, le=10)] = 3
    """Strength of the augmentations, 1 to 10."""
    depth: Literal[-1] | PositiveInt = -1
    """Augmentations in a chain; -1: drawn from 1, 2 and 3."""
    width: PositiveInt = 3
    """Number of chains."""
    alpha: PositiveFloat = 1.0
    """Parameter of the Dirichlet and Beta distributions of the weights."""
    augmentation_set: Literal["all", "safe", "original"] = "all"
    """`safe` leaves out what ImageNet-C tests; `original` has the colour operations of the paper's code."""

    def image_transform(self) -> Callable[[Image], Image]:
        """Composer's transform of one image."""
        from composer.algorithms import AugmentAndMixTransform

        return AugmentAndMixTransform(**self.model_dump())
