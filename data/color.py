"""Colour jitter, as torchvision's ColorJitter does it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_GREY = (0.299, 0.587, 0.114)
"""Luma of R, G and B (ITU-R BT.601), as Pillow and OpenCV weigh them."""


@dataclass(frozen=True)
class ColorJitter:
    """The factor of each is drawn from [max(0, 1 - x), 1 + x], hue's shift from [-x, x] of a full turn."""

    probability: float
    brightness: float
    contrast: float
    saturation: float
    hue: float


def color_jitter(image: NDArray[np.uint8], jitter: ColorJitter, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Change brightness, contrast, saturation and hue by random factors, in random order.

    Args:
        image: RGB, uint8 of shape (H, W, 3).
        jitter: the ranges of the factors; what is 0 is left out.
        rng: where order and factors are drawn.

    Returns:
        The same shape and type.
    """
    steps = (
        (adjust_brightness, jitter.brightness, 1.0),
        (adjust_contrast, jitter.contrast, 1.0),
        (adjust_saturation, jitter.saturation, 1.0),
        (adjust_hue, jitter.hue, 0.0),
    )
    factors = rng.uniform(-1, 1, len(steps))
    for step in rng.permutation(len(steps)):
        adjust, spread, neutral = steps[step]
        if spread:
            low = max(0.0, neutral - spread) if neutral else -spread
            image = adjust(image, low + (neutral + spread - low) * (factors[step] + 1) / 2)
    return image


def adjust_brightness(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Blend with black: 0 is black, 1 leaves the image as it is."""
    return _blend_with(image, 0.0, factor)


def adjust_contrast(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Blend with the mean grey: 0 is flat grey, 1 leaves the image as it is."""
    mean = float(np.dot(cv2.mean(image)[:3], _GREY))
    return _blend_with(image, mean, factor)


def adjust_saturation(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Blend with the grey image: 0 is grey, 1 leaves the image as it is."""
    matrix = factor * np.eye(3) + (1 - factor) * np.array([_GREY] * 3)
    return np.asarray(cv2.transform(image, matrix), np.uint8)


def adjust_hue(image: NDArray[np.uint8], shift: float) -> NDArray[np.uint8]:
    """Turn the hue by a share of the full circle, in [-0.5, 0.5]."""
    hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + 360 * shift) % 360
    return np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)


def _blend_with(image: NDArray[np.uint8], grey: float, factor: float) -> NDArray[np.uint8]:
    """The mix factor * image + (1 - factor) * grey, rounded and clipped, by table."""
    table = np.clip(np.rint(np.arange(256) * factor + (1 - factor) * grey), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table), np.uint8)
