"""ColOut: drop random rows and columns of the images."""

from __future__ import annotations

from collections.abc import Callable

from composer.algorithms import ColOut, ColOutTransform
from PIL.Image import Image

from algorithms.config import ColOutConfig


def build(config: ColOutConfig) -> ColOut | None:
    """Composer's algorithm on batches; None with `batch: false`."""
    return ColOut(p_row=config.p_row, p_col=config.p_col, batch=True, resize_target=False) if config.batch else None


def image_transform(config: ColOutConfig) -> Callable[[Image], Image] | None:
    """Composer's transform of one image; None with `batch: true`."""
    if config.batch:
        return None
    # It returns the type it is given, image or tensor, although its annotation does not say so.
    return ColOutTransform(p_row=config.p_row, p_col=config.p_col, resize_target=False)  # type: ignore[return-value]
