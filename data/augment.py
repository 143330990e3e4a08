"""From a picture to a training or an evaluation image, and on the device from a batch to the model's input.

Functions of one image are pure: randomness is drawn from the given `numpy.random.Generator`. Images are RGB, uint8 of
shape (H, W, 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data.config import AugmentConfig, ColorJitterConfig, RandomErasingConfig
from data.decode import REDUCTIONS, Encoded, Picture
from data.jpeg import Box

Image = NDArray[np.uint8]
Color = tuple[float, float, float]  # a value for each of R, G and B

_GREY = (0.299, 0.587, 0.114)  # weights of R, G and B in the luma (ITU-R BT.601), as in Pillow and OpenCV


def train_picture(
    data: Encoded, size: int, augment: AugmentConfig, rng: np.random.Generator, out: Image | None = None
) -> Image:
    """Decode, crop and resize a training image, in `out` if that has the shape, and maybe flip it into a new one.

    The picture is decoded at the smallest scale at which the crop still has `size` pixels each way, and the crop is
    drawn on the grid of that scale; the remaining reduction, by less than a factor of two, is bilinear. BadImage: the
    image cannot be decoded.
    """
    picture = Picture(data)
    crop = picture.decode_box(*choose_crop(picture.height, picture.width, size, augment, rng))
    image = np.asarray(cv2.resize(crop, (size, size), out, interpolation=cv2.INTER_LINEAR), np.uint8)
    return maybe_flip(image, augment, rng)


def choose_crop(
    height: int, width: int, size: int, augment: AugmentConfig, rng: np.random.Generator
) -> tuple[int, Box]:
    """The reduction at which to decode a training picture, and the crop on the grid of that scale."""
    draws: list[float] = rng.random(22).tolist()  # everything a crop may need, in one call because calls are expensive
    box = crop_on_grid(height, width, 1, augment, draws)
    shorter = min(box.height, box.width)
    reduction = next((reduction for reduction in REDUCTIONS if shorter >= size * reduction), 1)
    return reduction, box if reduction == 1 else crop_on_grid(height, width, reduction, augment, draws)


def crop_on_grid(height: int, width: int, reduction: int, augment: AugmentConfig, draws: Sequence[float]) -> Box:
    """The box of a RandomResizedCrop, with the distribution of torchvision's `RandomResizedCrop.get_params`.

    If none of ten tries fits into the picture, the box is the largest centred crop with an allowed aspect ratio. Size
    and position are drawn on the grid of a picture decoded at scale 1 / reduction, so nothing is rounded afterwards;
    whether a try fits is decided at full scale (`height` and `width`), so every reduction is cropped in the same way.
    `draws` are random numbers in [0, 1): ten areas and ratios in alternation, then top and left.
    """
    (area_low, area_high), (ratio_low, ratio_high) = augment.area, augment.aspect_ratio
    rows, columns = -(-height // reduction), -(-width // reduction)
    log_low, log_high = math.log(ratio_low), math.log(ratio_high)
    for attempt in range(0, 20, 2):
        pixels = height * width * (area_low + (area_high - area_low) * draws[attempt])
        ratio = math.exp(log_low + (log_high - log_low) * draws[attempt + 1])
        w, h = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
        if 0 < round(w) <= width and 0 < round(h) <= height:
            w, h = (min(max(1, round(side / reduction)), most) for side, most in ((w, columns), (h, rows)))
            return Box(int(draws[20] * (rows - h + 1)), int(draws[21] * (columns - w + 1)), h, w)
    w, h = columns, rows
    if width / height < ratio_low:
        h = min(rows, max(1, round(columns / ratio_low)))
    elif width / height > ratio_high:
        w = min(columns, max(1, round(rows * ratio_high)))
    return Box((rows - h) // 2, (columns - w) // 2, h, w)


def maybe_flip(image: Image, augment: AugmentConfig, rng: np.random.Generator) -> Image:
    """Flip horizontally with the probability `augment.flip`."""
    return np.asarray(cv2.flip(image, 1), np.uint8) if rng.random() < augment.flip else image


def eval_picture(data: Encoded, size: int, crop_ratio: float) -> Image:
    """An evaluation image: decoded in full, short side resized to floor(size / crop_ratio), centre cropped.

    Resizing is torchvision's antialiased bilinear (`transforms.v2.Resize`), cropping its CenterCrop. For a picture more
    than four times as long as wide, only the middle is resized, which may shift the result by a pixel. BadImage: the
    image cannot be decoded.
    """
    pixels = Picture(data).decode(1)
    for axis in (0, 1):  # resizing all of a very long picture could exhaust memory
        longest = 4 * pixels.shape[1 - axis]
        first = max(pixels.shape[axis] - longest, 0) // 2
        pixels = pixels[first : first + longest] if axis == 0 else pixels[:, first : first + longest]
    pixels = np.require(pixels, requirements=["C", "W"])  # torch needs it writable
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


def apply_color_and_erasing(
    image: Image, augment: AugmentConfig, mean: Color, std: Color, rng: np.random.Generator
) -> Image:
    """Apply colour jitter, blur and erasing, in this order, each if `augment` has it; `image` may be modified."""
    if (jitter := augment.color_jitter) and rng.random() < jitter.probability:
        image = color_jitter(image, jitter, rng)
    if (blur := augment.gaussian_blur) and rng.random() < blur.probability:
        image = gaussian_blur(image, rng.uniform(*blur.sigma))
    if (erasing := augment.random_erasing) and rng.random() < erasing.probability:
        image = random_erasing(image, erasing, mean, std, rng)
    return image


def color_jitter(image: Image, jitter: ColorJitterConfig, rng: np.random.Generator) -> Image:
    """Change brightness, contrast, saturation and hue by random factors, in random order, except those set to 0."""
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


def adjust_brightness(image: Image, factor: float) -> Image:
    """Blend with black: 0 is black, 1 leaves the image as it is."""
    return _blend_with(image, 0.0, factor)


def adjust_contrast(image: Image, factor: float) -> Image:
    """Blend with the mean grey: 0 is flat grey, 1 leaves the image as it is."""
    return _blend_with(image, float(np.dot(cv2.mean(image)[:3], _GREY)), factor)


def _blend_with(image: Image, grey: float, factor: float) -> Image:
    """The mix factor * image + (1 - factor) * grey, rounded and clipped, by table."""
    table = np.clip(np.rint(np.arange(256) * factor + (1 - factor) * grey), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table), np.uint8)


def adjust_saturation(image: Image, factor: float) -> Image:
    """Blend with the grey image: 0 is grey, 1 leaves the image as it is."""
    matrix = factor * np.eye(3) + (1 - factor) * np.array([_GREY] * 3)
    return np.asarray(cv2.transform(image, matrix), np.uint8)


def adjust_hue(image: Image, shift: float) -> Image:
    """Rotate the hue by a share of the full circle, in [-0.5, 0.5]."""
    hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + 360 * shift) % 360
    return np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)


def gaussian_blur(image: Image, sigma: float) -> Image:
    """Blur with a Gaussian of `sigma` pixels, cut off at three sigma; the border is mirrored."""
    side = 2 * math.ceil(3 * sigma) + 1
    return np.asarray(cv2.GaussianBlur(image, (side, side), sigma), np.uint8)


def random_erasing(
    image: Image, erasing: RandomErasingConfig, mean: Color, std: Color, rng: np.random.Generator
) -> Image:
    """Paint over rectangles, in place, or in a copy if the image is read-only (Zhong et al. 2017, algorithm 1).

    The fill values are those of timm's `data/random_erasing.py`; `mean` and `std` are the dataset's, in [0, 1].
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
                color = np.array(mean)
                if erasing.fill == "noise":
                    color = color + np.array(std) * rng.standard_normal((h, w, 3))
                image[top : top + h, left : left + w] = np.rint(np.clip(255 * color, 0, 255))
                break
    return image


class Normalise:
    """A batch transform for Composer's `DataSpec(microbatch_transforms=...)`: uint8 travels in a quarter of the bytes.

    `mean` and `std` are those of each channel (R, G, B) of images in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._offset = torch.tensor(mean, dtype=torch.float32).mul(255).view(1, -1, 1, 1)
        self._scale = torch.tensor(std, dtype=torch.float32).mul(255).reciprocal().view(1, -1, 1, 1)

    def __call__(self, batch: Any) -> tuple[torch.Tensor, Any]:
        """From uint8 (N, C, H, W) to (x / 255 - mean) / std, float32 in channels_last memory, on the batch's device."""
        images, labels = batch
        # A copy to the device waits for it: only once.
        self._offset, self._scale = self._offset.to(images.device), self._scale.to(images.device)
        images = images.to(dtype=torch.float32, memory_format=torch.channels_last)
        return images.sub_(self._offset).mul_(self._scale), labels
