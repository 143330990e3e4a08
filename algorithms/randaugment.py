"""RandAugment: a chain of random augmentations."""

from __future__ import annotations

from collections.abc import Callable

from composer.algorithms import RandAugmentTransform
from PIL.Image import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.auto_augment import rand_augment_transform

from algorithms.config import RandAugmentConfig


class TimmRandAugment:
    """timm's RandAugment by its form, such as `rand-m7-mstd0.5-inc1`, with the settings of timm's own training.

    Those depend on the image's size (timm/data/transforms_factory.py, `transforms_imagenet_train`).
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self._by_side: dict[int, Callable[[Image], Image]] = {}

    def __call__(self, image: Image) -> Image:
        """Augment one image; draws from the generators of Python and NumPy."""
        side = min(image.size)
        if side not in self._by_side:
            fill = tuple(min(255, round(255 * value)) for value in IMAGENET_DEFAULT_MEAN)
            settings = {"translate_const": int(side * 0.45), "img_mean": fill}
            self._by_side[side] = rand_augment_transform(self.form, settings)
        return self._by_side[side](image)


def image_transform(config: RandAugmentConfig) -> Callable[[Image], Image]:
    """The transform of one image, Composer's or timm's."""
    return TimmRandAugment(config.timm) if config.timm else RandAugmentTransform(**config.model_dump(exclude={"timm"}))
