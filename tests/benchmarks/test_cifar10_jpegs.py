"""The ImageFolder that the CIFAR-10 benchmarks train on."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.cifar10_jpegs import write_jpegs


def test_the_first_images_of_each_class_in_order(tmp_path):
    grey = [(Image.fromarray(np.full((32, 32, 3), 10 * n, np.uint8)), n % 3) for n in range(12)]
    assert write_jpegs(iter(grey), ["cat", "dog", "truck"], 2, tmp_path / "train") == 6
    found = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.jpg")}
    assert sorted(found) == [f"train/{name}/000{n}.jpg" for name in ("cat", "dog", "truck") for n in (0, 1)]
    means = {name: round(np.asarray(Image.open(path)).mean() / 10) for name, path in found.items()}
    assert [means[f"train/dog/000{n}.jpg"] for n in (0, 1)] == [1, 4]
    with pytest.raises(FileExistsError):
        write_jpegs(grey, ["cat"], 2, tmp_path / "train")
