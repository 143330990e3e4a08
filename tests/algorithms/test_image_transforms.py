"""RandAugment and AugMix, which run in the loader."""

import numpy as np
import pytest
from composer.algorithms.augmix import augmix_image
from composer.algorithms.randaugment import randaugment_image
from composer.algorithms.utils import augmentation_sets
from PIL import Image

from algorithms.config import AlgorithmsConfig


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def transform(config):
    (only,) = AlgorithmsConfig.model_validate(config).image_transforms()
    return only


@pytest.mark.parametrize("chosen", ["all", "safe", "original"])
def test_randaugment_is_composers(chosen):
    ours = transform({"randaugment": {"severity": 7, "depth": 3, "augmentation_set": chosen}})
    for seed in range(5):
        np.random.seed(seed)
        expected = randaugment_image(picture(), severity=7, depth=3, augmentation_set=augmentation_sets[chosen])
        np.random.seed(seed)
        assert np.array_equal(np.asarray(ours(picture())), np.asarray(expected))


@pytest.mark.parametrize("depth", [-1, 2])
def test_augmix_is_composers(depth):
    ours = transform({"augmix": {"severity": 5, "depth": depth, "width": 2, "alpha": 0.7}})
    for seed in range(5):
        np.random.seed(seed)
        expected = augmix_image(
            picture(), severity=5, depth=depth, width=2, alpha=0.7, augmentation_set=augmentation_sets["all"]
        )
        np.random.seed(seed)
        assert np.array_equal(np.asarray(ours(picture())), np.asarray(expected))
