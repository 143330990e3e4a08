"""How close a training picture is to Pillow's: full decode and antialiased resize of the same crop box.

    python -m benchmarks.picture_quality IMAGES [--size 128 176 224]

IMAGES: a folder of photos. Prints for each size the median PSNR in dB and the mean absolute difference in grey levels.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from benchmarks.loader import PLAIN
from benchmarks.measure import options, photos_below
from data.augment import choose_crop, train_picture
from data.decode import FORMATS, Picture
from data.loader import sample_rng


def pillows(data: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """The picture that `train_picture` makes from the same random numbers, computed with Pillow only, not flipped."""
    picture = Picture(data)
    reduction, crop = choose_crop(picture.height, picture.width, size, PLAIN, rng)
    top, left, height, width = (side * reduction for side in crop)
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box))


def differences(data: bytes, size: int, seed: int) -> tuple[float, float]:
    """(PSNR in dB, mean absolute difference in grey levels) of a picture against Pillow's."""
    ours = train_picture(data, size, PLAIN, sample_rng(seed, 0, 0, stream=0)).astype(np.float64)
    reference = pillows(data, size, sample_rng(seed, 0, 0, stream=0)).astype(np.float64)
    found = []
    for one in (ours, ours[:, ::-1]):
        squares = max(float(np.square(one - reference).mean()), 1e-9)
        found.append((10 * np.log10(255**2 / squares), float(np.abs(one - reference).mean())))
    return max(found)  # as it is, or flipped back


def main() -> None:
    given = options(__doc__, "IMAGES", size=[128, 176, 224])
    files = [file.read_bytes() for file in photos_below(given.images)]
    photos = [data for data in files if Picture(data).is_plain_upright_jpeg]
    print(f"{len(photos)} plain JPEGs")
    levels = []
    for size in given.size:
        found = np.array([differences(data, size, seed) for seed, data in enumerate(photos)])
        levels.append(found[:, 1].mean())
        print(f"{size} px: median PSNR {np.median(found[:, 0]):.1f} dB, mean difference {levels[-1]:.2f} levels")
    print(f"mean difference over the sizes {np.mean(levels):.2f} levels")


if __name__ == "__main__":
    main()
