"""AugMix: a mixture of several chains of augmentations."""

from __future__ import annotations

from composer.algorithms import AugmentAndMixTransform

from algorithms.config import AugMixConfig


def image_transform(config: AugMixConfig) -> AugmentAndMixTransform:
    """Composer's transform of one image."""
    return AugmentAndMixTransform(**config.model_dump())
