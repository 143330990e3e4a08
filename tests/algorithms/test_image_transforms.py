"""RandAugment and AugMix, which run in the loader."""

import random

import numpy as np
import pytest
from composer.algorithms.augmix import augmix_image
from composer.algorithms.randaugment import randaugment_image
from composer.algorithms.utils import augmentation_sets
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment

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


def test_timms_randaugment_is_that_of_its_training():
    form = "rand-m7-mstd0.5-inc1"
    (ours,) = build_image_transforms(AlgorithmsConfig.model_validate({"randaugment": {"timm": form}}))
    theirs = create_transform(32, is_training=True, auto_augment=form, interpolation="random").transforms
    (theirs,) = (transform for transform in theirs if isinstance(transform, RandAugment))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pictures = []
    for transform in (ours, theirs):
        random.seed(5)
        np.random.seed(5)
        pictures.append(np.stack([np.asarray(transform(picture)) for _ in range(20)]))
    assert np.array_equal(*pictures)


def test_a_form_that_timm_does_not_know_is_refused():
    with pytest.raises(ValueError, match="timm"):
        AlgorithmsConfig.model_validate({"randaugment": {"timm": "rand-x7"}})
