"""RandAugment: a chain of random augmentations."""

from __future__ import annotations

from composer.algorithms import RandAugmentTransform

from algorithms.config import RandAugmentConfig


def image_transform(config: RandAugmentConfig) -> RandAugmentTransform:
    """Composer's transform of one image."""
    return RandAugmentTransform(**config.model_dump())
