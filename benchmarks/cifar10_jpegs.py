"""CIFAR-10 as the ImageFolder of JPEG files that yamls/cifar10.yaml and the accuracy benchmarks train on.

    python -m benchmarks.cifar10_jpegs datasets/cifar10 [--download datasets] [--train 2000] [--val 500]

torchvision downloads the archive (170 MB). The first --train images of each class in the archive's order become
DIR/train/CLASS/NNNN.jpg, the first --val of the test set DIR/val/CLASS/NNNN.jpg, at Pillow's usual quality of 75.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR10


def write_jpegs(pairs: Iterable[tuple[Image.Image, int]], classes: Sequence[str], per_class: int, folder: Path) -> int:
    """Write the first `per_class` images of each class, in order; returns their number.

    Raises:
        FileExistsError: The folder already exists.
    """
    for name in classes:
        (folder / name).mkdir(parents=True)
    written: Counter[int] = Counter()
    for image, label in pairs:
        if written[label] < per_class:
            image.save(folder / classes[label] / f"{written[label]:04}.jpg", quality=75)
            written[label] += 1
    return written.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--download", type=Path, default=Path("datasets"), metavar="DIR", help="where the archive goes")
    parser.add_argument("--train", type=int, default=2000, help="training images per class, of 5,000")
    parser.add_argument("--val", type=int, default=500, help="validation images per class, of 1,000")
    options = parser.parse_args()
    for split, per_class in (("train", options.train), ("val", options.val)):
        if (options.folder / split).exists():
            raise SystemExit(f"{options.folder / split}: already exists")
        try:
            images = CIFAR10(str(options.download), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise SystemExit(f"{options.download}: the archive is not available: {error}") from None
        count = write_jpegs(images, images.classes, per_class, options.folder / split)
        print(f"{options.folder / split}: {count} images")


if __name__ == "__main__":
    main()
