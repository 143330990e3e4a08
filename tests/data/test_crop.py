import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from data.crop import Box, crop_box, crop_on_grid, reduction_for

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (64, 64), (120, 900), (24, 24)])
def test_crop_boxes_have_torchvisions_distribution(shape):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    picture = torch.empty(3, *shape)
    transform = v2.RandomResizedCrop(10, scale=AREA, ratio=RATIO)
    theirs = np.array([list(transform.make_params([picture]).values()) for _ in range(4000)])
    ours = np.array([crop_box(*shape, AREA, RATIO, rng) for _ in range(4000)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 0.001
    assert ks_2samp(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]).pvalue > 0.001
    assert ks_2samp(ours[:, 0] + ours[:, 2], theirs[:, 0] + theirs[:, 2]).pvalue > 0.001


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1), (5, 2000), (2000, 7), (3, 2)])
def test_odd_pictures_are_cropped_inside_as_torchvision_does(shape):
    theirs = v2.RandomResizedCrop(10, scale=(1.0, 1.0), ratio=RATIO).make_params([torch.empty(3, *shape)])
    ours = crop_box(*shape, (1.0, 1.0), RATIO, np.random.default_rng(0))
    assert ours == Box(theirs["top"], theirs["left"], theirs["height"], theirs["width"])
    for seed in range(50):
        top, left, height, width = crop_box(*shape, AREA, RATIO, np.random.default_rng(seed))
        assert height >= 1
        assert width >= 1
        assert 0 <= top <= shape[0] - height
        assert 0 <= left <= shape[1] - width


def test_the_strongest_reduction_that_covers_is_taken():
    for side, size, expected in (
        (223, 224, 1),
        (447, 224, 1),
        (448, 224, 2),
        (895, 224, 2),
        (896, 224, 4),
        (9999, 8, 8),
    ):
        assert reduction_for(Box(0, 0, side, side), size) == expected
        assert reduction_for(Box(0, 0, 10_000, side), size) == expected


@pytest.mark.parametrize("shape", [(800, 641), (77, 300), (30, 900), (9, 9)])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_the_crop_on_a_scaled_grid_is_the_crop_at_full_scale(shape, reduction):
    grid = [-(-side // reduction) for side in shape]
    for seed in range(300):
        draws = np.random.default_rng(seed).random(22).tolist()
        whole = np.array(crop_on_grid(*shape, 1, AREA, RATIO, draws))
        scaled = crop_on_grid(*shape, reduction, AREA, RATIO, draws)
        assert np.abs(whole / reduction - scaled).max() <= 2
        assert min(scaled.height, scaled.width) >= 1
        assert 0 <= scaled.top <= grid[0] - scaled.height
        assert 0 <= scaled.left <= grid[1] - scaled.width
