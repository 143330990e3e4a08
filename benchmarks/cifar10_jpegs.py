"""CIFAR-10 as the ImageFolder of JPEG files that yamls/cifar10.yaml and the accuracy benchmarks train on.

    python -m benchmarks.cifar10_jpegs datasets/cifar10 [--download datasets] [--train 2000] [--val 500]

torchvision downloads the archive (170 MB). The first --train images of each class in the archive's order become
DIR/train/CLASS/NNNN.jpg, the first --val of the test set DIR/val/CLASS/NNNN.jpg, at Pillow's usual quality of 75.
"""

from __future__ import annotations

from collections import Counter

from torchvision.datasets import CIFAR10

from benchmarks.measure import options


def main() -> None:
    given = options(__doc__, "DIR", download="datasets", train=2000, val=500)
    for split, per_class in (("train", given.train), ("val", given.val)):
        folder = given.dir / split
        if folder.exists():
            raise SystemExit(f"{folder}: already exists")
        try:
            images = CIFAR10(given.download, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise SystemExit(f"{given.download}: the archive is not available: {error}") from None
        for name in images.classes:
            (folder / name).mkdir(parents=True)
        written: Counter[int] = Counter()
        for image, label in images:
            if written[label] < per_class:
                image.save(folder / images.classes[label] / f"{written[label]:04}.jpg", quality=75)
                written[label] += 1
        print(f"{folder}: {written.total()} images")


if __name__ == "__main__":
    main()
