"""What tests share: tiny images on disk, and a run of the whole program in this process."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def write_images(folder, classes=3, train=8, val=3, size=40, seed=0):
    """JPEGs of noise on a ground that tells the class, as PATH/{train,val}/CLASS/IMAGE."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (size, size + 8, 3)) + np.eye(3)[label % 3] * 130
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An ImageFolder of 24 training and 9 validation images in 3 classes."""
    return write_images(tmp_path_factory.mktemp("images") / "dataset")


@pytest.fixture
def train(tmp_path, images):
    """Run a YAML with overrides in this process: `train(path, "key=value", ...) -> (status, summary)`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    forced = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")

    def train(path, *overrides):
        from recipes.load import load_config
        from recipes.run import run

        config = load_config(path, [f"runs_folder={tmp_path}", f"data.path={images}", *overrides])
        status = run(config)
        return status, json.loads((tmp_path / config.run_name / "summary.json").read_text())

    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if forced is None:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
