"""From the config to Composer's algorithms, and to the loader's transforms."""

from __future__ import annotations

from collections.abc import Callable

from composer.core import Algorithm
from PIL.Image import Image

from algorithms import (
    augmix,
    blurpool,
    channels_last,
    colout,
    distillation,
    ema,
    fixres,
    gradient_clipping,
    label_smoothing,
    mix,
    progressive_resizing,
    randaugment,
    sam,
    squeeze_excite,
    stochastic_depth,
    swa,
)
from algorithms.composer_library import build_library
from algorithms.config import AlgorithmsConfig


def build_algorithms(
    config: AlgorithmsConfig, total_batches: int, epochs: int, teacher: distillation.Teacher | None = None
) -> list[Algorithm]:
    """Composer's algorithms of the techniques that are on, in the order in which they run.

    Without a `teacher`, distillation is left out.

    Raises:
        ValueError: Composer refuses a value, or `swa` does not fit into the run.
    """
    mixes = config.mixup or config.cutmix
    smoothing = config.label_smoothing.smoothing if config.label_smoothing else 0.0
    built = [
        blurpool.build(config.blurpool) if config.blurpool else None,
        squeeze_excite.build(config.squeeze_excite) if config.squeeze_excite else None,
        stochastic_depth.build(config.stochastic_depth) if config.stochastic_depth else None,
        *build_library(config.composer),
        channels_last.build(config.channels_last) if config.channels_last else None,
        colout.build(config.colout) if config.colout else None,
        progressive_resizing.build(config.progressive_resizing) if config.progressive_resizing else None,
        fixres.build(config.fixres, epochs) if config.fixres else None,
        mix.build(config.mixup, config.cutmix, smoothing),
        label_smoothing.build(config.label_smoothing) if config.label_smoothing and not mixes else None,
        distillation.build(config.distillation, teacher) if config.distillation and teacher else None,
        gradient_clipping.build(config.gradient_clipping) if config.gradient_clipping else None,
        ema.build(config.ema, total_batches) if config.ema else None,
        swa.build(config.swa, epochs) if config.swa else None,
        sam.build(config.sam) if config.sam else None,
    ]
    return [algorithm for algorithm in built if algorithm is not None]


def build_image_transforms(config: AlgorithmsConfig) -> list[Callable[[Image], Image]]:
    """The loader's transforms of each cropped training image, in this order; they draw from the global RNGs."""
    transforms = [
        randaugment.image_transform(config.randaugment) if config.randaugment else None,
        augmix.image_transform(config.augmix) if config.augmix else None,
        colout.image_transform(config.colout) if config.colout else None,
    ]
    return [transform for transform in transforms if transform is not None]
