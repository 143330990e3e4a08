"""Plain helpers that tests share; the fixtures stand in conftest.py."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import Picture

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""


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


def decode(data):
    """The whole picture in RGB, uint8 (H, W, 3)."""
    return Picture(data).decode(1)


@contextmanager
def process_as_before() -> Iterator[None]:
    """Signal handlers, which a run sets for its whole process, are put back after."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
