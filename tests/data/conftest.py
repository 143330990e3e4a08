"""Pictures that look like photos to a resampling filter, folders of them, and prepared datasets."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare import Settings, prepare

SETTINGS = Settings("mds", ("28", "36"), ("original",), 90, 10)
SHARD = "train/36/00002/shard.00000.mds"
"""One of those of `prepared`."""


def make_photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """RGB noise with a photo's spectrum (amplitude falls with frequency), uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = np.fft.fft2(rng.standard_normal((height, width))) / frequency**1.5
        plane = np.fft.ifft2(spectrum).real
        planes.append(plane)
    photo = np.stack([planes[0], 0.8 * planes[0] + 0.3 * planes[1], 0.7 * planes[0] + 0.4 * planes[2]], axis=-1)
    return np.clip(128 + 50 * (photo - photo.mean()) / max(photo.std(), 1e-6), 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    stream = BytesIO()
    image.save(stream, kind, **({"quality": 92} if kind == "JPEG" else {}) | options)
    return stream.getvalue()


def write_folder(path: Path, classes: dict[str, int], side: int = 40) -> Path:
    """PATH/CLASS/0000.jpg ..., as many as asked for."""
    for label, (name, count) in enumerate(classes.items()):
        (path / name).mkdir(parents=True)
        for index in range(count):
            photo = make_photo(side + index % 5, side + label, seed=100 * label + index)
            (path / name / f"{index:04}.jpg").write_bytes(encode(photo))
    return path


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    """60 images of 3 classes, 40 px; not to be written to."""
    return write_folder(tmp_path_factory.mktemp("small") / "train", {"ant": 25, "bee": 20, "cat": 15})


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """45 training and 10 validation images of 2 classes; not to be written to."""
    path = tmp_path_factory.mktemp("images")
    write_folder(path / "train", {"ant": 25, "bee": 20}, side=34)
    write_folder(path / "val", {"ant": 5, "bee": 5})
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, folder) -> Path:
    """`folder` as shards of 10 JPEGs; not to be written to."""
    target = tmp_path_factory.mktemp("prepared") / "set"
    assert prepare(str(folder), str(target), SETTINGS, 1, print)
    return target
