"""RandAugment: a chain of random augmentations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from algorithms import PositiveInt, Technique

if TYPE_CHECKING:
    from PIL.Image import Image


class RandAugmentConfig(Technique):
    """Apply a chain of random augmentations to each image (Cubuk et al. 2020), by Composer's `RandAugmentTransform`."""

    severity: Annotated[int, Field(ge=1, le=10)] = 9
    """Strength of the augmentations, 1 to 10 (M in the paper)."""
    depth: PositiveInt = 2
    """Augmentations in the chain (N in the paper)."""
    augmentation_set: Literal["all", "safe", "original"] = "all"
    """`safe` leaves out what ImageNet-C tests; `original` has the colour operations of the AugMix authors' code."""

    def image_transform(self) -> Callable[[Image], Image]:
        """Composer's transform of one image."""
        from composer.algorithms import RandAugmentTransform

        return RandAugmentTransform(**self.model_dump())
