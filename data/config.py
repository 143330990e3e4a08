"""The loader's settings: the augmentation fields of the YAML, and the parameters of an epoch's batches.

Nothing here imports torch or OpenCV, so that a config is read and a run planned in milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Crop = Literal["random", "center"]


class EpochPlan(NamedTuple):
    """The parameters of one epoch's batches."""

    size: int  # side of the images in pixels
    crop: Crop  # `random`: RandomResizedCrop; `center`: the test-time resize and centre crop
    global_batch_size: int  # maximum number of images per step over all devices


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the first number, {value[0]}, must not exceed the second, {value[1]}")
    return value


Fraction = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=0)]
_PositiveFraction = Annotated[float, Field(gt=0, le=1)]
_PositiveFloat = Annotated[float, Field(gt=0)]
AreaRange = Annotated[tuple[_PositiveFraction, _PositiveFraction], AfterValidator(_ordered)]
PositiveRange = Annotated[tuple[_PositiveFloat, _PositiveFloat], AfterValidator(_ordered)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ColorJitterConfig(_Part):
    """torchvision's ColorJitter: the factor of each is drawn from [max(0, 1 - x), 1 + x], hue's shift from [-x, x]."""

    probability: Fraction = 1.0
    brightness: Spread = 0.4
    contrast: Spread = 0.4
    saturation: Spread = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class GaussianBlurConfig(_Part):
    """Gaussian blur with a random width."""

    probability: Fraction = 0.1
    sigma: PositiveRange = (0.1, 2.0)
    """Standard deviation in pixels of the training size, drawn uniformly."""


class RandomErasingConfig(_Part):
    """Random erasing, or CoarseDropout where `count` is above one (Zhong et al. 2017; timm's RandomErasing)."""

    probability: Fraction = 0.25
    area: AreaRange = (0.02, 1 / 3)
    """Share of the image that the rectangles cover together, if they do not overlap."""
    aspect_ratio: PositiveRange = (0.3, 10 / 3)
    """Height over width of a rectangle."""
    count: Annotated[int, Field(ge=1)] = 1
    """Rectangles per image."""
    fill: Literal["mean", "noise"] = "mean"
    """The dataset's mean colour, or values drawn from a normal distribution with its mean and deviation."""


class AugmentConfig(_Part):
    """Basic augmentation in the loader; techniques from papers are under `algorithms`."""

    area: AreaRange = (0.08, 1.0)
    """RandomResizedCrop: share of the image's area that the crop covers."""
    aspect_ratio: PositiveRange = (3 / 4, 4 / 3)
    """RandomResizedCrop: width over height of the crop."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Copies of an image in a batch, each augmented differently (Hoffer et al. 2020); an epoch has fewer images."""
    color_jitter: ColorJitterConfig | None = None
    gaussian_blur: GaussianBlurConfig | None = None
    random_erasing: RandomErasingConfig | None = None
