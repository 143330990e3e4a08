import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from timm.data import create_transform
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data import augment
from data.augment import (
    Augment,
    GaussianBlur,
    center_picture,
    eval_picture,
    finish,
    gaussian_blur,
    kernel_size,
    train_picture,
)
from data.color import ColorJitter
from data.decode import Picture
from data.erasing import RandomErasing

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
PLAIN = Augment.of(
    (0.5, 0.4, 0.3),
    (0.2, 0.2, 0.2),
    area=AREA,
    aspect_ratio=RATIO,
    flip=0.0,
    color_jitter=None,
    gaussian_blur=None,
    random_erasing=None,
)


def having(**fields):
    return Augment(**{**PLAIN.__dict__, **fields})


def tensor(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def level_difference(ours, theirs):
    return np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy().astype(int))


def test_augment_is_built_from_a_configs_values():
    built = Augment.of(
        [0.5, 0.4, 0.3],
        [0.2, 0.2, 0.2],
        area=AREA,
        aspect_ratio=RATIO,
        flip=0.5,
        color_jitter={"probability": 1.0, "brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1},
        gaussian_blur={"probability": 0.1, "sigma": (0.1, 2.0)},
        random_erasing={"probability": 1.0, "area": (0.1, 0.2), "aspect_ratio": (0.3, 3.3), "count": 2, "fill": "mean"},
    )
    assert built.color_jitter == ColorJitter(1.0, 0.4, 0.3, 0.2, 0.1)
    assert built.gaussian_blur == GaussianBlur(0.1, (0.1, 2.0))
    assert built.random_erasing == RandomErasing(1.0, (0.1, 0.2), (0.3, 3.3), 2, "mean")
    with pytest.raises(TypeError, match="blur"):
        Augment.of((0.5,) * 3, (0.2,) * 3, blur=1)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_training_picture_is_its_crop_of_the_whole_picture(encode, photo, monkeypatch, size):
    """Against Pillow: full decode, antialiased resize of the same box."""
    drawn = []
    real = augment.crop_on_grid
    monkeypatch.setattr(augment, "crop_on_grid", lambda *a, **k: drawn.append((a[2], real(*a, **k))) or drawn[-1][1])
    ratios, reductions = [], set()
    for seed in range(12):
        height, width = 300 + 7 * seed, 420
        data = encode(photo(height, width, seed))
        ours = train_picture(data, size, PLAIN, np.random.default_rng(seed))
        reduction, (top, left, h, w) = drawn[-1]
        reductions.add(reduction)
        box = [
            reduction * side for side in (left, top, min(left + w, width / reduction), min(top + h, height / reduction))
        ]
        whole = Image.fromarray(Picture(data).decode(1))
        theirs = np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, box=box)).astype(float)
        ratios.append(10 * math.log10(255**2 / np.mean((ours - theirs) ** 2)))
    assert np.median(ratios) > 35
    assert len(reductions) > 1 or size == 128


def test_training_pictures_of_any_shape_have_the_size_asked_for(encode, photo):
    for shape in ((1, 1), (1, 300), (300, 1), (9, 9), (1000, 3)):
        for kind in ("JPEG", "PNG"):
            data = encode(photo(*shape), kind)
            for size in (8, 33):
                rng = np.random.default_rng(0)
                assert train_picture(data, size, PLAIN, rng).shape == (size, size, 3)
                assert eval_picture(data, size, 0.875).shape == (size, size, 3)


def test_half_of_the_pictures_are_flipped(encode, photo):
    data = encode(photo(40, 40))
    whole, always = (
        having(area=(1.0, 1.0), aspect_ratio=(1.0, 1.0)),
        having(area=(1.0, 1.0), aspect_ratio=(1.0, 1.0), flip=1.0),
    )
    straight = train_picture(data, 40, whole, np.random.default_rng(0))
    assert np.array_equal(train_picture(data, 40, always, np.random.default_rng(0)), straight[:, ::-1])
    sometimes, rng = having(flip=0.5), np.random.default_rng(0)
    middle = eval_picture(data, 40, 1.0)
    flipped = sum(not np.array_equal(center_picture(data, 40, 1.0, sometimes, rng), middle) for _ in range(400))
    assert chisquare([flipped, 400 - flipped]).pvalue > 0.001


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (200, 200), (224, 300), (100, 130), (97, 380)])
@pytest.mark.parametrize(("size", "ratio"), [(224, 0.875), (176, 0.875), (128, 1.0), (288, 0.95)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(encode, photo, shape, size, ratio):
    pixels = photo(*shape)
    ours = eval_picture(encode(pixels, "PNG"), size, ratio)
    theirs = v2.Compose([v2.Resize(int(size / ratio), antialias=True), v2.CenterCrop(size)])
    on_pillow = np.asarray(theirs(Image.fromarray(pixels))).astype(float)
    assert np.abs(ours - on_pillow).mean() < 0.1
    assert level_difference(ours, theirs(tensor(pixels))).max() <= 1


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (1200, 900), (224, 300), (100, 130), (97, 380)])
@pytest.mark.parametrize(("size", "ratio"), [(224, 0.875), (128, 0.875), (288, 1.0)])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_evaluation_of_a_jpeg_is_timms_and_torchvisions(encode, photo, shape, size, ratio, subsampling):
    """The whole way from the file's bytes, which Pillow decodes for them, with what they evaluate ResNet-50 with."""
    data = encode(photo(*shape, seed=shape[0]), quality=90, subsampling=subsampling)
    ours = eval_picture(data, size, ratio).astype(float)
    timms = create_transform(
        size, is_training=False, interpolation="bilinear", crop_pct=ratio, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    torchvisions = ResNet50_Weights.IMAGENET1K_V1.transforms(
        crop_size=size, resize_size=int(size / ratio), mean=(0.0,) * 3, std=(1.0,) * 3
    )
    with Image.open(BytesIO(data)) as picture:
        for theirs in (timms(picture), torchvisions(picture)):
            difference = np.abs(ours - theirs.mul(255).permute(1, 2, 0).numpy())
            assert difference.mean() < 0.1
            assert difference.max() < 1.01


def test_evaluation_decodes_in_full(encode, photo, monkeypatch):
    scales = []
    real = Picture.decode
    monkeypatch.setattr(Picture, "decode", lambda self, reduction: scales.append(reduction) or real(self, reduction))
    eval_picture(encode(photo(800, 800)), 32, 0.875)
    assert scales == [1]


def test_very_long_pictures_are_evaluated_in_little_memory(encode):
    for shape in ((8, 40_000), (40_000, 8)):
        data = encode(np.full((*shape, 3), 77, np.uint8), "PNG")
        assert (eval_picture(data, 224, 0.875) == 77).all()


def test_the_middle_of_a_long_picture_is_kept(encode, photo):
    pixels = photo(60, 700)
    ours = eval_picture(encode(pixels, "PNG"), 48, 0.8).astype(float)
    theirs = v2.Compose([v2.Resize(60), v2.CenterCrop(48)])(Image.fromarray(pixels))
    assert np.abs(ours - np.asarray(theirs)).mean() < 1


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions(photo, sigma):
    image = photo(40, 50)
    theirs = F.gaussian_blur(tensor(image), [kernel_size(sigma)] * 2, [sigma] * 2)
    assert level_difference(gaussian_blur(image, sigma), theirs).max() <= 1


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_each_augmentation_happens_as_often_as_asked(photo, probability):
    image = photo(24, 24)
    parts = {
        "color_jitter": ColorJitter(probability, 0.9, 0.9, 0.9, 0.4),
        "gaussian_blur": GaussianBlur(probability, (1.0, 2.0)),
        "random_erasing": RandomErasing(probability, (0.2, 0.3), (0.5, 2.0), 1, "noise"),
    }
    for name, part in parts.items():
        rng = np.random.default_rng(0)
        changed = sum(not np.array_equal(finish(image.copy(), having(**{name: part}), rng), image) for _ in range(300))
        assert abs(changed - 300 * probability) <= 4 * math.sqrt(300 * probability * (1 - probability))
