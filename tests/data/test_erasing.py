import cv2
import numpy as np
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from data.erasing import RandomErasing, random_erasing


def erased(image, **fields):
    fields = {
        "probability": 1.0,
        "area": (0.1, 0.3),
        "aspect_ratio": (0.3, 10 / 3),
        "count": 1,
        "fill": "mean",
    } | fields
    rng = fields.pop("rng")
    return random_erasing(image, RandomErasing(**fields), (0.5, 0.4, 0.3), (0.1, 0.1, 0.1), rng)


def test_erased_rectangles_have_torchvisions_distribution():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    theirs, ours = [], []
    transform = v2.RandomErasing(1.0, (0.1, 0.3), (0.3, 10 / 3))
    for _ in range(1500):
        params = transform.make_params([torch.empty(3, 60, 80)])
        theirs.append((params["i"], params["j"], params["h"], params["w"]))
        mask = (erased(np.zeros((60, 80, 3), np.uint8), rng=rng) > 0).all(axis=2)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        ours.append((rows[0], columns[0], len(rows), len(columns)))
        assert mask.sum() == len(rows) * len(columns)
    for column in range(4):
        assert ks_2samp(np.array(ours)[:, column], np.array(theirs)[:, column]).pvalue > 0.001


def test_many_rectangles_share_the_area():
    rng = np.random.default_rng(0)
    shares, pieces = [], []
    for _ in range(200):
        mask = erased(np.zeros((64, 64, 3), np.uint8), rng=rng, count=8, area=(0.2, 0.2))[..., 0] > 0
        shares.append(mask.mean())
        pieces.append(cv2.connectedComponents(mask.astype(np.uint8))[0] - 1)
    assert 0.16 < np.mean(shares) < 0.2  # they may overlap
    assert np.median(pieces) >= 5


def test_rectangles_are_filled_with_the_mean_or_with_noise():
    grey = np.zeros((100, 100, 3), np.uint8)
    mean = erased(grey.copy(), rng=np.random.default_rng(0))
    assert {tuple(colour) for colour in mean.reshape(-1, 3).tolist()} == {(0, 0, 0), (128, 102, 76)}
    noise = erased(grey.copy(), rng=np.random.default_rng(0), fill="noise", area=(0.5, 0.5))
    values = noise[noise.any(axis=2)]
    assert np.abs(values.mean(axis=0) - 255 * np.array([0.5, 0.4, 0.3])).max() < 3
    assert np.abs(values.std(axis=0) - 25.5).max() < 3


def test_erasing_leaves_a_read_only_image_alone(photo):
    image = photo(30, 30)
    image.flags.writeable = False
    before = image.copy()
    assert not np.array_equal(erased(image, rng=np.random.default_rng(0)), image)
    assert np.array_equal(image, before)
