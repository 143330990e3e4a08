"""From a picture to a training or an evaluation image: crop, resize, flip and the plain augmentations.

Every function is a pure function of its arguments: whatever is random is drawn from the `numpy.random.Generator` that
is handed in. Images are RGB, uint8 of shape (H, W, 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data.color import ColorJitter, color_jitter
from data.crop import Range, crop_draws, crop_on_grid, reduction_for
from data.decode import Picture
from data.erasing import RandomErasing, random_erasing


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with a width drawn uniformly from `sigma` pixels."""

    probability: float
    sigma: Range


@dataclass(frozen=True)
class Augment:
    """What happens to a training image.

    Attributes:
        area: share of the picture's area that the crop covers.
        aspect_ratio: width over height of the crop.
        flip: probability of a horizontal flip.
        color_jitter: brightness, contrast, saturation and hue, or None.
        gaussian_blur: or None.
        random_erasing: or None.
        mean: mean of each channel of the dataset's images in [0, 1].
        std: standard deviation of each channel.
    """

    area: Range
    aspect_ratio: Range
    flip: float
    color_jitter: ColorJitter | None
    gaussian_blur: GaussianBlur | None
    random_erasing: RandomErasing | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, mean: tuple[float, float, float], std: tuple[float, float, float], **fields: Any) -> Augment:
        """Build from plain values, such as a config's fields: `Augment.of(mean, std, **config.model_dump())`.

        Raises:
            TypeError: a field is missing or unknown.
        """
        parts = {"color_jitter": ColorJitter, "gaussian_blur": GaussianBlur, "random_erasing": RandomErasing}
        for name, part in parts.items():
            if isinstance(fields.get(name), Mapping):
                fields[name] = part(**fields[name])
        return cls(mean=mean, std=std, **fields)


def train_picture(data: bytes, size: int, augment: Augment, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Decode, cut and resize a training image, and flip half of them; see `finish` for the rest.

    The picture is decoded at the smallest scale at which the crop still has `size` pixels each way, and the crop is
    drawn on that scale's grid; the rest of the way, less than a factor of two, is bilinear.

    Args:
        data: an encoded image.
        size: side of the result in pixels.
        augment: `area`, `aspect_ratio` and `flip` are used.
        rng: where the crop and the flip are drawn.

    Returns:
        RGB, uint8 of shape (size, size, 3).

    Raises:
        BadImage: the image cannot be decoded.
    """
    picture = Picture(data)
    draws = crop_draws(rng)
    where = partial(crop_on_grid, picture.height, picture.width, area=augment.area, aspect_ratio=augment.aspect_ratio)
    box = where(1, draws=draws)
    reduction = reduction_for(box, size)
    top, left, height, width = box if reduction == 1 else where(reduction, draws=draws)
    pixels, first = picture.decode_rows(reduction, top, top + height)
    crop = pixels[top - first : top - first + height, left : left + width]
    image = np.asarray(cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR), np.uint8)
    return flip(image) if rng.random() < augment.flip else image


def center_picture(
    data: bytes, size: int, crop_ratio: float, augment: Augment, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A training image with the evaluation's crop, as FixRes trains on in the end: `eval_picture` and the flip.

    Args:
        data: an encoded image.
        size: side of the result in pixels.
        crop_ratio: as in `eval_picture`.
        augment: `flip` is used.
        rng: where the flip is drawn.

    Returns:
        RGB, uint8 of shape (size, size, 3).

    Raises:
        BadImage: the image cannot be decoded.
    """
    image = eval_picture(data, size, crop_ratio)
    return flip(image) if rng.random() < augment.flip else image


def eval_picture(data: bytes, size: int, crop_ratio: float) -> NDArray[np.uint8]:
    """An evaluation image: decoded in full, short side resized to floor(size / crop_ratio), centre cropped.

    Resizing is torchvision's antialiased bilinear (`transforms.v2.Resize`), cropping its CenterCrop. Of a picture more
    than four times as long as wide only the middle is resized, which may shift the result by a pixel.

    Args:
        data: an encoded image.
        size: side of the result in pixels.
        crop_ratio: share of the resized short side that is kept, in (0, 1].

    Returns:
        RGB, uint8 of shape (size, size, 3).

    Raises:
        BadImage: the image cannot be decoded.
    """
    pixels = _middle(Picture(data).decode(1))
    height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    resized = max(size, math.floor(size / crop_ratio + 1e-9))
    shape = (resized, int(resized * long / short)) if height <= width else (int(resized * long / short), resized)
    if shape != (height, width):
        # A batch of one in channels_last memory: torch's fast path for uint8, the same arithmetic as Pillow's.
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
        pixels = F.interpolate(tensor, shape, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _middle(pixels: NDArray[np.uint8], longest: int = 4) -> NDArray[np.uint8]:
    """Cut a very long picture down to `longest` times its short side, lest resizing it fill the memory."""
    for axis in (0, 1):
        extra = pixels.shape[axis] - longest * pixels.shape[1 - axis]
        if extra > 0:
            pixels = pixels.take(range(extra // 2, pixels.shape[axis] - extra + extra // 2), axis=axis)
    return pixels


def flip(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Left for right."""
    return np.asarray(cv2.flip(image, 1), np.uint8)


def finish(image: NDArray[np.uint8], augment: Augment, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Colour jitter, blur and erasing, in this order, each where `augment` has it.

    Args:
        image: RGB, uint8 of shape (H, W, 3).
        augment: what to do.
        rng: where everything is drawn.

    Returns:
        The same shape and type; the argument may have been written to.
    """
    jitter, blur, erasing = augment.color_jitter, augment.gaussian_blur, augment.random_erasing
    if jitter is not None and rng.random() < jitter.probability:
        image = color_jitter(image, jitter, rng)
    if blur is not None and rng.random() < blur.probability:
        image = gaussian_blur(image, rng.uniform(*blur.sigma))
    if erasing is not None and rng.random() < erasing.probability:
        image = random_erasing(image, erasing, augment.mean, augment.std, rng)
    return image


def gaussian_blur(image: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Blur by a Gaussian of `sigma` pixels, over three of them each way; the border is mirrored."""
    side = kernel_size(sigma)
    return np.asarray(cv2.GaussianBlur(image, (side, side), sigma), np.uint8)


def kernel_size(sigma: float) -> int:
    """Odd side in pixels of the window that holds three standard deviations each way."""
    return 2 * math.ceil(3 * sigma) + 1
