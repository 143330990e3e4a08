"""How fast a dataset is loaded: images per second, per CPU-second, and where the time goes.

    python -m data.benchmark DIR [--size 128 176 224] [--workers 4] [--against torchvision] [--json]

CPU-seconds are those of the loader's workers and of this process together, from one epoch's first request to its last
batch; the wall time depends on what else the machine does, they do far less. Bytes are hot: the first epoch is not
counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Subset

from data import source as sources
from data.augment import Augment
from data.crop import crop_draws, crop_on_grid, reduction_for
from data.decode import Picture
from data.epoch_plan import EpochPlan
from data.errors import DataError
from data.loader import sample_rng, train_loader
from data.sampler import PositionSampler
from data.source import Source, open_split_pair
from data.text import escape, guard

AREA, ASPECT_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
PLAIN = Augment.of(
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
    area=AREA,
    aspect_ratio=ASPECT_RATIO,
    flip=0.5,
    color_jitter=None,
    gaussian_blur=None,
    random_erasing=None,
)


class Rate(NamedTuple):
    """What loading an epoch took."""

    images: int
    wall_seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        """Images per second of wall time."""
        return self.images / self.wall_seconds

    @property
    def per_cpu_second(self) -> float:
        """Images per second that the workers and this process computed."""
        return self.images / self.cpu_seconds


def ours(source: Source, size: int, images: int, workers: int, batch_size: int) -> DataLoader[Any]:
    """Our training loader over a source, repeated up to `images`, with RandomResizedCrop and the flip."""
    repeated = sources.Subset(source, np.arange(images) % len(source))
    sampler = PositionSampler(images, [EpochPlan(size, "random", batch_size)], 0, 0, 1)
    return train_loader(
        repeated,
        sampler,
        augment=PLAIN,
        image_transforms=(),
        eval_crop_ratio=0.875,
        seed=0,
        workers=workers,
        prefetch_factor=4,
        pin_memory=False,
    )


def torchvisions(folder: str, size: int, images: int, workers: int, batch_size: int) -> DataLoader[Any]:
    """ImageFolder of torchvision with RandomResizedCrop, flip and ToTensor, repeated up to `images`."""
    from torchvision import datasets, transforms

    parts = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = datasets.ImageFolder(folder, transforms.Compose(parts))
    return DataLoader(
        Subset(dataset, (np.arange(images) % len(dataset)).tolist()),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
    )


def measure(loader: DataLoader[Any], epoch: int) -> Rate:
    """Load an epoch; the workers must have been started by an earlier one."""
    if isinstance(loader.batch_sampler, PositionSampler):
        loader.batch_sampler.set_epoch(epoch)
    iterator = getattr(loader, "_iterator", None)
    processes = [psutil.Process(), *(psutil.Process(worker.pid) for worker in getattr(iterator, "_workers", ()))]
    before, start, images = _cpu(processes), time.perf_counter(), 0
    for batch in loader:
        images += len(batch[1])
    wall = time.perf_counter() - start
    return Rate(images, wall, max(_cpu(processes) - before, _TICK))


_TICK = 0.01
"""Seconds between two readings of the clock of CPU time, at least."""


def _cpu(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def compare(loaders: dict[str, DataLoader[Any]], rounds: int) -> dict[str, list[Rate]]:
    """Measure several loaders in turns, after one epoch each that is not counted."""
    found: dict[str, list[Rate]] = {name: [] for name in loaders}
    for epoch in range(rounds + 1):
        for name, loader in loaders.items():
            rate = measure(loader, epoch)
            if epoch:
                found[name].append(rate)
    return found


def median(rates: Sequence[Rate], what: str) -> float:
    """The median over the rounds of a property of `Rate`."""
    return float(np.median([getattr(rate, what) for rate in rates]))


def split(source: Source, size: int, images: int) -> dict[str, float]:
    """Milliseconds per image that each step takes in one process, and the bytes that are read per image.

    Returns:
        `read`, `decode`, `resize` (crop and flip with it), `batch` (copying into it), and `floor`: decoding nothing but
        the DC coefficients, below which no decoder gets that reads the whole image; `bytes`.
    """
    indices = np.random.default_rng(0).integers(0, len(source), images).tolist()
    took = dict.fromkeys(("read", "decode", "resize", "batch", "floor"), 0.0)
    out, read, total = np.empty((size, size, 3), np.uint8), source.reader(size, indices), 0

    def timed(step: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time_ns()
        result = work(*arguments)
        took[step] += (time.process_time_ns() - start) / 1e6
        return result

    def decode(data: bytes, rng: np.random.Generator) -> NDArray[np.uint8]:
        picture, draws = Picture(data), crop_draws(rng)
        shape = picture.height, picture.width
        reduction = reduction_for(crop_on_grid(*shape, 1, AREA, ASPECT_RATIO, draws), size)
        top, left, height, width = crop_on_grid(*shape, reduction, AREA, ASPECT_RATIO, draws)
        pixels, first = picture.decode_rows(reduction, top, top + height)
        return pixels[top - first : top - first + height, left : left + width]

    for index in indices:
        data = timed("read", read, index)
        total += len(data)
        crop = timed("decode", decode, data, sample_rng(0, 0, index, stream=0))
        image = timed("resize", lambda crop: cv2.flip(cv2.resize(crop, (size, size)), 1), crop)
        timed("batch", np.copyto, out, image)
        timed("floor", lambda data: Picture(data).decode(8), data)
    return {step: milliseconds / images for step, milliseconds in took.items()} | {"bytes": total / images}


def benchmark(
    path: str, sizes: Sequence[int], workers: int, images: int, against: str | None, cache: str
) -> list[dict[str, Any]]:
    """One row per size: rates, the split of the time, and torchvision's rates where asked for."""
    train, _ = open_split_pair(path, cache)
    rows = []
    for size in sizes:
        loaders = {"ours": ours(train, size, images, workers, 128)}
        if against == "torchvision":
            loaders["torchvision"] = torchvisions(f"{path}/train", size, images, workers, 128)
        rates = compare(loaders, rounds=3)
        row: dict[str, Any] = {"size": size, "workers": workers}
        for name, found in rates.items():
            row[f"{name}_images_per_second"] = round(median(found, "per_second"), 1)
            row[f"{name}_images_per_cpu_second"] = round(median(found, "per_cpu_second"), 1)
        rows.append(
            row | {f"ms_{step}": round(value, 4) for step, value in split(train, size, min(images, 500)).items()}
        )
        rows[-1]["bytes_per_image"] = round(rows[-1].pop("ms_bytes"))
    return rows


LABELS = {
    "ours_images_per_second": "images/s",
    "ours_images_per_cpu_second": "images per CPU-second",
    "torchvision_images_per_second": "images/s, torchvision",
    "torchvision_images_per_cpu_second": "images per CPU-second, torchvision",
    "ms_read": "ms an image, in one process, to read it",
    "ms_decode": "... to decode the crop",
    "ms_resize": "... to resize and flip it",
    "ms_batch": "... to copy it into the batch",
    "ms_floor": "the floor: ms to decode only the DC terms",
    "bytes_per_image": "bytes an image",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What `benchmark` found, a column per image size."""
    lines = [(f"workers: {rows[0]['workers']}", *(f"{row['size']} px" for row in rows))]
    for key, label in LABELS.items():
        if key in rows[0]:
            form = "{:.3f}" if key.startswith("ms_") else "{:,.0f}"
            lines.append((label, *(form.format(row[key]) for row in rows)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.benchmark", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "path", metavar="DIR", help="the dataset, as data.path; a folder of class folders for --against"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", default=[128, 176, 224], help="of the images, in pixels (default: 128 176 224)"
    )
    parser.add_argument("--workers", type=int, default=4, help="loader processes (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=4000, help="per epoch; the dataset is repeated up to that (default: %(default)s)"
    )
    parser.add_argument("--against", choices=["torchvision"], help="measure that too, in turns")
    parser.add_argument("--cache-folder", default="cache", help="for s3:// (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        rows = benchmark(
            options.path, options.size, options.workers, options.images, options.against, options.cache_folder
        )
    except (DataError, FileNotFoundError) as error:
        print(escape(error), file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    guard()
    raise SystemExit(main())
