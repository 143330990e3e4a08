"""Where a training image is cut from its picture."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from data.decode import REDUCTIONS

Range = tuple[float, float]


class Box(NamedTuple):
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_box(height: int, width: int, area: Range, aspect_ratio: Range, rng: np.random.Generator) -> Box:
    """Where RandomResizedCrop cuts: torchvision's `RandomResizedCrop.get_params`, with its distribution.

    Ten tries at a share of the area, drawn uniformly, and an aspect ratio, drawn uniformly in its logarithm; where none
    fits in the picture, the largest centred crop with an allowed aspect ratio.

    Args:
        height: of the picture in pixels.
        width: of the picture in pixels.
        area: smallest and largest share of the picture's area, in (0, 1].
        aspect_ratio: smallest and largest width over height.
        rng: where the numbers are drawn.
    """
    return crop_on_grid(height, width, 1, area, aspect_ratio, crop_draws(rng))


def crop_draws(rng: np.random.Generator) -> list[float]:
    """All that a crop may need, in [0, 1): ten areas and ratios, then top and left; one call, as calls are dear."""
    draws: list[float] = rng.random(22).tolist()
    return draws


def crop_on_grid(height: int, width: int, reduction: int, area: Range, aspect_ratio: Range, draws: list[float]) -> Box:
    """`crop_box` from its random numbers, on the grid of a picture decoded at scale 1 / reduction.

    Size and place are drawn on that grid, so nothing is rounded afterwards; whether a try fits is decided at full
    scale, so every reduction of a picture is cut in the same way.
    """
    rows, columns = -(-height // reduction), -(-width // reduction)
    log_low, log_high = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
    for attempt in range(0, 20, 2):
        pixels = height * width * (area[0] + (area[1] - area[0]) * draws[attempt])
        ratio = math.exp(log_low + (log_high - log_low) * draws[attempt + 1])
        w, h = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
        if 0 < round(w) <= width and 0 < round(h) <= height:
            w, h = (min(max(1, round(side / reduction)), most) for side, most in ((w, columns), (h, rows)))
            return Box(int(draws[20] * (rows - h + 1)), int(draws[21] * (columns - w + 1)), h, w)
    w, h = columns, rows
    if width / height < aspect_ratio[0]:
        h = min(rows, max(1, round(columns / aspect_ratio[0])))
    elif width / height > aspect_ratio[1]:
        w = min(columns, max(1, round(rows * aspect_ratio[1])))
    return Box((rows - h) // 2, (columns - w) // 2, h, w)


def reduction_for(box: Box, size: int) -> int:
    """The strongest of the reductions 8, 4, 2 and 1 at which a crop still has `size` pixels each way."""
    shorter = min(box.height, box.width)
    return next((reduction for reduction in REDUCTIONS if shorter >= size * reduction), 1)
