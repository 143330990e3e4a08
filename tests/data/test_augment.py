import math
from io import BytesIO
from operator import itemgetter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, ks_2samp, kstest
from timm.data import create_transform
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data import augment
from data.augment import (
    Box,
    Normalise,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_color_and_erasing,
    choose_crop,
    color_jitter,
    crop_on_grid,
    eval_picture,
    gaussian_blur,
    maybe_flip,
    random_erasing,
    train_picture,
)
from data.config import AugmentConfig, ColorJitterConfig, GaussianBlurConfig, RandomErasingConfig
from data.decode import Picture
from tests.data.conftest import encode, make_photo

PLAIN = AugmentConfig(flip=0.0)
WHOLE = {"area": (1.0, 1.0), "aspect_ratio": (1.0, 1.0)}
MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.1, 0.1)


def tensor(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def level_difference(ours, theirs):
    return np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy().astype(int))


def require_inside(box, shape):
    assert min(box.height, box.width) >= 1
    assert 0 <= box.top <= shape[0] - box.height
    assert 0 <= box.left <= shape[1] - box.width


def draws(seed):
    return np.random.default_rng(seed).random(22).tolist()


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (120, 900), (24, 24)])
def test_crop_boxes_have_torchvisions_distribution(shape):
    torch.manual_seed(0)
    picture = torch.empty(3, *shape)
    transform = v2.RandomResizedCrop(10, scale=PLAIN.area, ratio=PLAIN.aspect_ratio)
    theirs = np.array([list(transform.make_params([picture]).values()) for _ in range(4000)])
    ours = np.array([crop_on_grid(*shape, 1, PLAIN, draws(seed)) for seed in range(4000)])
    measures = [*(itemgetter(column) for column in range(4)), lambda b: b[2] * b[3], lambda b: b[2] / b[3]]
    for measure in (*measures, lambda b: b[0] + b[2]):
        assert ks_2samp(measure(ours.T), measure(theirs.T)).pvalue > 0.001


ODD = [(1, 1), (1, 400), (400, 1), (5, 2000), (2000, 7)]  # in which no try fits, or one box only


@pytest.mark.parametrize("shape", ODD)
def test_odd_pictures_are_cropped_as_torchvision_does(shape):
    theirs = v2.RandomResizedCrop(10, scale=(1.0, 1.0), ratio=PLAIN.aspect_ratio).make_params([torch.empty(3, *shape)])
    ours = crop_on_grid(*shape, 1, AugmentConfig(area=(1.0, 1.0)), draws(0))
    assert ours == Box(theirs["top"], theirs["left"], theirs["height"], theirs["width"])


@pytest.mark.parametrize("shape", [*ODD, (3, 2)])
def test_odd_pictures_are_cropped_inside(shape):
    for seed in range(50):
        require_inside(crop_on_grid(*shape, 1, PLAIN, draws(seed)), shape)


@pytest.mark.parametrize("shape", [(800, 641), (77, 300), (30, 900), (9, 9)])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_the_crop_on_a_scaled_grid_is_the_crop_at_full_scale(shape, reduction):
    for seed in range(300):
        whole = np.array(crop_on_grid(*shape, 1, PLAIN, draws(seed)))
        scaled = crop_on_grid(*shape, reduction, PLAIN, draws(seed))
        assert np.abs(whole / reduction - scaled).max() <= 2
        require_inside(scaled, [-(-side // reduction) for side in shape])


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_training_picture_is_its_crop_of_the_whole_picture(size):
    """Against Pillow: full decode, antialiased resize of the same box."""
    ratios, reductions = [], set()
    for seed in range(12):
        height, width = 300 + 7 * seed, 420
        data = encode(make_photo(height, width, seed))
        ours = train_picture(data, size, PLAIN, np.random.default_rng(seed))
        reduction, (top, left, h, w) = choose_crop(height, width, size, PLAIN, np.random.default_rng(seed))
        reductions.add(reduction)
        corners = (left, top, min(left + w, width / reduction), min(top + h, height / reduction))
        box = [reduction * side for side in corners]
        whole = Image.fromarray(Picture(data).decode(1))
        theirs = np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, box=box)).astype(float)
        ratios.append(10 * math.log10(255**2 / np.mean((ours - theirs) ** 2)))
    assert np.median(ratios) > 35
    assert len(reductions) > 1 or size == 128


def test_pictures_of_any_shape_have_the_size_asked_for():
    for shape in ((1, 1), (1, 300), (300, 1), (9, 9), (1000, 3)):
        for kind in ("JPEG", "PNG"):
            data = encode(make_photo(*shape), kind)
            for size in (8, 33):
                assert train_picture(data, size, PLAIN, np.random.default_rng(0)).shape == (size, size, 3)
                assert eval_picture(data, size, 0.875).shape == (size, size, 3)


def test_half_of_the_pictures_are_flipped():
    data = encode(make_photo(40, 40))
    straight, turned = (
        train_picture(data, 40, AugmentConfig(**WHOLE, flip=flip), np.random.default_rng(0)) for flip in (0.0, 1.0)
    )
    assert np.array_equal(turned, straight[:, ::-1])
    rng = np.random.default_rng(0)
    flipped = sum(not np.array_equal(maybe_flip(straight, AugmentConfig(), rng), straight) for _ in range(400))
    assert chisquare([flipped, 400 - flipped]).pvalue > 0.001


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (1200, 900), (224, 300), (97, 380)])
@pytest.mark.parametrize(("size", "ratio"), [(224, 0.875), (288, 1.0)])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_evaluation_of_a_jpeg_is_timms_and_torchvisions(shape, size, ratio, subsampling):
    """The whole way from the file's bytes, which Pillow decodes for them, with what they evaluate ResNet-50 with."""
    data = encode(make_photo(*shape, seed=shape[0]), quality=90, subsampling=subsampling)
    ours = eval_picture(data, size, ratio).astype(float)
    nothing = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    timms = create_transform(size, is_training=False, interpolation="bilinear", crop_pct=ratio, **nothing)
    torchvisions = ResNet50_Weights.IMAGENET1K_V1.transforms(crop_size=size, resize_size=int(size / ratio), **nothing)
    with Image.open(BytesIO(data)) as picture:
        for theirs in (timms(picture), torchvisions(picture)):
            difference = np.abs(ours - theirs.mul(255).permute(1, 2, 0).numpy())
            assert difference.mean() < 0.1
            assert difference.max() < 1.01


def test_colour_and_blur_are_torchvisions():
    image = make_photo(50, 60, seed=3)
    for ours in (adjust_brightness, adjust_contrast, adjust_saturation):
        theirs = getattr(F, ours.__name__)
        for factor in (0.0, 0.3, 1.0, 1.4, 2.0):
            on_pillow = np.asarray(theirs(Image.fromarray(image), factor)).astype(int)
            assert np.abs(ours(image, factor) - on_pillow).max() <= 1
            on_tensors = level_difference(ours(image, factor), theirs(tensor(image), factor))  # they truncate twice
            assert on_tensors.max() <= 2
            assert on_tensors.mean() <= 1
    for sigma in (0.1, 0.5, 1.0, 2.0):
        theirs = F.gaussian_blur(tensor(image), [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)
        assert level_difference(gaussian_blur(image, sigma), theirs).max() <= 1
    image = np.concatenate([image, np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)])
    for shift in (-0.5, -0.1, 0.0, 0.02, 0.3, 0.5):
        difference = level_difference(adjust_hue(image, shift), F.adjust_hue(tensor(image), shift))
        assert difference.mean() < 1
        assert np.quantile(difference, 0.999) <= 1


def test_jitter_draws_torchvisions_factors_in_any_order(monkeypatch):
    called = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(augment, f"adjust_{name}", lambda image, f, name=name: called.append((name, f)) or image)
    jitter, rng = ColorJitterConfig(contrast=1.5, saturation=0.2, hue=0.1), np.random.default_rng(0)
    for _ in range(2000):
        color_jitter(make_photo(4, 4), jitter, rng)
    bounds = {"brightness": (0.6, 1.4), "contrast": (0.0, 2.5), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in bounds.items():
        factors = [factor for what, factor in called if what == name]
        assert len(factors) == 2000
        assert kstest(factors, "uniform", (low, high - low)).pvalue > 0.001
    first = [sum(name == what for name, _ in called[::4]) for what in bounds]
    assert chisquare(first).pvalue > 0.001


def erased(image, rng, **fields):
    return random_erasing(image, RandomErasingConfig(**{"area": (0.1, 0.3)} | fields), MEAN, STD, rng)


def test_erased_rectangles_have_torchvisions_distribution():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    theirs, ours = [], []
    transform = v2.RandomErasing(1.0, (0.1, 0.3), (0.3, 10 / 3))
    for _ in range(1500):
        params = transform.make_params([torch.empty(3, 60, 80)])
        theirs.append((params["i"], params["j"], params["h"], params["w"]))
        mask = (erased(np.zeros((60, 80, 3), np.uint8), rng) > 0).all(axis=2)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        ours.append((rows[0], columns[0], len(rows), len(columns)))
        assert mask.sum() == len(rows) * len(columns)
    for column in range(4):
        assert ks_2samp(np.array(ours)[:, column], np.array(theirs)[:, column]).pvalue > 0.001


def test_rectangles_are_filled_with_the_mean_or_with_noise():
    grey = np.zeros((100, 100, 3), np.uint8)
    mean = erased(grey.copy(), np.random.default_rng(0))
    assert {tuple(colour) for colour in mean.reshape(-1, 3).tolist()} == {(0, 0, 0), (128, 102, 76)}
    noise = erased(grey.copy(), np.random.default_rng(0), fill="noise", area=(0.5, 0.5))
    values = noise[noise.any(axis=2)]
    assert np.abs(values.mean(axis=0) - 255 * np.array(MEAN)).max() < 3
    assert np.abs(values.std(axis=0) - 25.5).max() < 3


def test_each_augmentation_happens_as_often_as_asked():
    image = make_photo(24, 24)
    for probability in (0.0, 0.3, 1.0):
        parts = {
            "color_jitter": ColorJitterConfig(probability=probability, brightness=0.9, hue=0.4),
            "gaussian_blur": GaussianBlurConfig(probability=probability, sigma=(1.0, 2.0)),
            "random_erasing": RandomErasingConfig(probability=probability, area=(0.2, 0.3), fill="noise"),
        }
        for name, part in parts.items():
            rng, chosen = np.random.default_rng(0), AugmentConfig(**{name: part})
            changed = sum(
                not np.array_equal(apply_color_and_erasing(image.copy(), chosen, MEAN, STD, rng), image)
                for _ in range(300)
            )
            assert abs(changed - 300 * probability) <= 4 * math.sqrt(300 * probability * (1 - probability))


def test_normalise_is_torchvisions():
    images = torch.randint(0, 256, (5, 3, 7, 9), dtype=torch.uint8).to(memory_format=torch.channels_last)
    before, labels = images.clone(), torch.arange(5)
    out, same = Normalise(MEAN, STD)([images, labels])
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.normalize(F.to_dtype(images, torch.float32, scale=True), MEAN, STD))
    assert same is labels
    assert torch.equal(images, before)
