import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, kstest
from torchvision.transforms.v2 import functional as F

from data import color
from data.color import ColorJitter, adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, color_jitter


def tensor(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def level_difference(ours, theirs):
    return np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy().astype(int))


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.4, 2.0])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adjust_brightness, F.adjust_brightness),
        (adjust_contrast, F.adjust_contrast),
        (adjust_saturation, F.adjust_saturation),
    ],
)
def test_colour_adjustments_are_torchvisions(photo, ours, theirs, factor):
    image = photo(50, 60, seed=3)
    on_pillow = np.asarray(theirs(Image.fromarray(image), factor)).astype(int)
    assert np.abs(ours(image, factor) - on_pillow).max() <= 1
    on_tensors = level_difference(ours(image, factor), theirs(tensor(image), factor))  # they truncate twice
    assert on_tensors.max() <= 2
    assert on_tensors.mean() <= 1


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.02, 0.3, 0.5])
def test_hue_is_torchvisions(photo, shift):
    image = np.concatenate([photo(50, 60, seed=3), np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)])
    difference = level_difference(adjust_hue(image, shift), F.adjust_hue(tensor(image), shift))
    assert difference.mean() < 1
    assert np.quantile(difference, 0.999) <= 1


def test_jitter_draws_torchvisions_factors_in_any_order(photo, monkeypatch):
    called = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(color, f"adjust_{name}", lambda image, f, name=name: called.append((name, f)) or image)
    jitter, rng = ColorJitter(1.0, 0.4, 1.5, 0.2, 0.1), np.random.default_rng(0)
    for _ in range(2000):
        color_jitter(photo(4, 4), jitter, rng)
    bounds = {"brightness": (0.6, 1.4), "contrast": (0.0, 2.5), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in bounds.items():
        factors = [factor for what, factor in called if what == name]
        assert len(factors) == 2000
        assert kstest(factors, "uniform", (low, high - low)).pvalue > 0.001
    first = [sum(name == what for name, _ in called[::4]) for what in bounds]
    assert chisquare(first).pvalue > 0.001


def test_what_jitter_leaves_at_zero_stays(photo):
    image = photo(20, 20)
    assert np.array_equal(color_jitter(image, ColorJitter(1.0, 0, 0, 0, 0), np.random.default_rng(0)), image)
