"""Random erasing and CoarseDropout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.crop import Range


@dataclass(frozen=True)
class RandomErasing:
    """Paint over `count` rectangles (Zhong et al. 2017, algorithm 1; timm's `data/random_erasing.py`).

    Attributes:
        probability: of erasing anything in an image.
        area: share of the image that is erased, drawn uniformly and shared by the rectangles.
        aspect_ratio: height over width of a rectangle, drawn uniformly in its logarithm.
        count: rectangles per image; above one it is CoarseDropout.
        fill: `mean`, the dataset's mean colour; `noise`, a normal distribution per value with its mean and deviation.
    """

    probability: float
    area: Range
    aspect_ratio: Range
    count: int
    fill: str


def random_erasing(
    image: NDArray[np.uint8],
    erasing: RandomErasing,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Paint over rectangles, in place; see `RandomErasing`.

    Args:
        image: RGB, uint8 of shape (H, W, 3).
        erasing: how many, how large, with what.
        mean: the dataset's mean per channel in [0, 1].
        std: the dataset's standard deviation per channel in [0, 1].
        rng: where everything is drawn.

    Returns:
        `image` itself, written to; a copy where it is read-only.
    """
    image = image if image.flags.writeable else image.copy()
    height, width = image.shape[:2]
    log_low, log_high = math.log(erasing.aspect_ratio[0]), math.log(erasing.aspect_ratio[1])
    for _ in range(erasing.count):
        for _ in range(10):
            area = rng.uniform(*erasing.area) * height * width / erasing.count
            ratio = math.exp(rng.uniform(log_low, log_high))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                colour = np.array(mean)
                if erasing.fill == "noise":
                    colour = colour + np.array(std) * rng.standard_normal((h, w, 3))
                image[top : top + h, left : left + w] = np.rint(np.clip(255 * colour, 0, 255))
                break
    return image
