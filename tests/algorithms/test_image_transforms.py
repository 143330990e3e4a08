"""RandAugment and AugMix, which run in the loader."""

import numpy as np
import pytest
from composer.algorithms.augmix import augmix_image
from composer.algorithms.randaugment import randaugment_image
from composer.algorithms.utils import augmentation_sets
from PIL import Image

from algorithms.build import build_image_transforms
from algorithms.config import AlgorithmsConfig

CASES = [("randaugment", {"severity": 7, "depth": 3, "augmentation_set": kind}) for kind in augmentation_sets]
CASES += [("augmix", {"severity": 5, "depth": depth, "width": 2, "alpha": 0.7}) for depth in (-1, 2)]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_the_pictures_are_composers(name, fields):
    (ours,) = build_image_transforms(AlgorithmsConfig.model_validate({name: fields}))
    theirs = {"randaugment": randaugment_image, "augmix": augmix_image}[name]
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    operations = augmentation_sets[fields.get("augmentation_set", "all")]
    for seed in range(5):
        np.random.seed(seed)
        expected = theirs(Image.fromarray(pixels), **fields | {"augmentation_set": operations})
        np.random.seed(seed)
        assert np.array_equal(np.asarray(ours(Image.fromarray(pixels))), np.asarray(expected))
