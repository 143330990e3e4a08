"""How fast a dataset is loaded: images per second, per CPU-second, and where the time goes.

    python -m benchmarks.loader DIR [--size 128 176 224] [--workers 4] [--against torchvision] [--json]
    python -m benchmarks.loader IMAGES --photos [--images 2000] [--rounds 3] [--workers 2]

With --photos, IMAGES is a folder of photos, flat or in folders. They become an ImageFolder of links and a prepared
dataset of 160 and 256 px in a temporary folder, and both are compared with torchvision's ImageFolder on the originals.

CPU-seconds are those of the loader's workers and of this process together, from one epoch's first request to its last
batch; unlike wall time, they depend little on what else the machine does. Loaders are measured alternately, and each
one's first epoch is not counted, so files are cached in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil
from torch.utils.data import DataLoader, Subset

from data import source as sources
from data.augment import choose_crop
from data.config import AugmentConfig, EpochPlan
from data.decode import Picture
from data.errors import DataError
from data.imagefolder import EXTENSIONS
from data.loader import sample_rng, train_loader
from data.prepare import Settings, prepare
from data.sampler import PositionSampler
from data.source import Source, open_split_pair
from data.text import escape, guard

PLAIN = AugmentConfig()
"""RandomResizedCrop and the flip."""
NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
STEPS = ("read", "decode", "resize", "batch", "floor")
BATCH = 128
_TICK = 0.01
"""Minimum number of seconds between two readings of the CPU time."""


class Rate(NamedTuple):
    """The cost of loading an epoch."""

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
    return plain_loader(repeated, size, batch_size, workers, prefetch_factor=4)


def plain_loader(source: Source, size: int, batch_size: int, workers: int, prefetch_factor: int) -> DataLoader[Any]:
    """Our training loader over each image of a source once, with RandomResizedCrop and the flip."""
    return train_loader(
        source,
        PositionSampler(len(source), [EpochPlan(size, "random", batch_size)], 0, 0, 1),
        augment=PLAIN,
        **NORMAL,
        image_transforms=(),
        eval_crop_ratio=0.875,
        seed=0,
        workers=workers,
        prefetch_factor=prefetch_factor,
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


def _cpu(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def median(rates: Sequence[Rate], what: str) -> float:
    """The median over the rounds of a property of `Rate`."""
    return float(np.median([getattr(rate, what) for rate in rates]))


def split(source: Source, size: int, images: int) -> dict[str, float]:
    """Milliseconds per image that each step takes in one process, and the bytes that are read per image.

    Returns:
        `read`, `decode`, `resize` (crop and flip with it), `batch` (copying into it), and `floor`: decoding nothing but
        the DC coefficients, a lower bound for any decoder that reads the whole image; `bytes`.
    """
    indices = np.random.default_rng(0).integers(0, len(source), images).tolist()
    took = dict.fromkeys(STEPS, 0.0)
    out, read, total = np.empty((size, size, 3), np.uint8), source.reader(size, indices), 0

    def timed(step: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time_ns()
        result = work(*arguments)
        took[step] += (time.process_time_ns() - start) / 1e6
        return result

    def decode(data: bytes, rng: np.random.Generator) -> np.ndarray:
        picture = Picture(data)
        reduction, (top, left, height, width) = choose_crop(picture.height, picture.width, size, PLAIN, rng)
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
    ours_of: Mapping[str, Source], folder: str | None, sizes: Sequence[int], workers: int, images: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """One row per size: rates of our loader on each source and of torchvision's on `folder`; the split of our time."""
    for size in sizes:
        loaders = {name: ours(source, size, images, workers, BATCH) for name, source in ours_of.items()}
        if folder is not None:
            loaders["torchvision"] = torchvisions(folder, size, images, workers, BATCH)
        rates: dict[str, list[Rate]] = {name: [] for name in loaders}
        for epoch in range(rounds + 1):
            for name, loader in loaders.items():
                rates[name].append(measure(loader, epoch))
        row: dict[str, Any] = {"size": size, "workers": workers}
        for name, found in rates.items():
            for what in ("per_second", "per_cpu_second"):
                row[f"{name}_images_{what}"] = round(median(found[1:], what), 1)
        for name, source in ours_of.items():
            of = "" if len(ours_of) == 1 else f"{name}_"
            took = split(source, size, min(images, 500))
            row |= {f"{of}ms_{step}": round(took[step], 4) for step in STEPS}
            row[f"{of}bytes_per_image"] = round(took["bytes"])
        yield row


LABELS = {
    "images_per_second": "images/s",
    "images_per_cpu_second": "images per CPU-second",
    "ms_read": "ms per image, in one process, to read it",
    "ms_decode": "... to decode the crop",
    "ms_resize": "... to resize and flip it",
    "ms_batch": "... to copy it into the batch",
    "ms_floor": "lower bound: ms to decode only the DC terms",
    "bytes_per_image": "bytes per image",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results of `benchmark`, a column per image size."""
    lines = [(f"workers: {rows[0]['workers']}", *(f"{row['size']} px" for row in rows))]
    for key in rows[0]:
        what = next((what for what in LABELS if key.endswith(what)), None)
        if what is not None:
            name = key[: -len(what)].rstrip("_")
            form = "{:.3f}" if what.startswith("ms_") else "{:,.0f}"
            label = LABELS[what] if name in ("", "ours") else f"{LABELS[what]}, {name}"
            lines.append((label, *(form.format(row[key]) for row in rows)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


@contextmanager
def photos(images: Path) -> Iterator[tuple[dict[str, Source], str]]:
    """The sources made of a folder of photos, and the folder that torchvision reads."""
    with tempfile.TemporaryDirectory() as scratch:
        originals, prepared = f"{scratch}/originals", f"{scratch}/prepared"
        files = sorted(path for path in images.rglob("*") if path.name.lower().endswith(EXTENSIONS))
        for number, file in enumerate(files):
            for part in ("train", "val") if number < 4 else ("train",):
                place = Path(originals) / part / f"class{number % 2}"
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number:05}{file.suffix}").symlink_to(file.resolve())
        settings = Settings("mds", ("160", "256"), ("original",), 90)
        if not prepare(originals, prepared, settings, os.cpu_count() or 1, lambda _: None):
            raise DataError("the prepared images do not read back correctly")
        ours_of = {"originals": open_split_pair(originals, "")[0], "prepared": open_split_pair(prepared, "")[0]}
        yield ours_of, f"{originals}/train"


@contextmanager
def dataset(path: str, cache: str, against: str | None) -> Iterator[tuple[dict[str, Source], str | None]]:
    """The training images of a dataset, and the folder for torchvision, if requested."""
    yield {"ours": open_split_pair(path, cache)[0]}, f"{path}/train" if against == "torchvision" else None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "path", metavar="DIR", help="the dataset, as data.path; a folder of class folders for --against"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", default=[128, 176, 224], help="image sizes in pixels (default: 128 176 224)"
    )
    parser.add_argument("--workers", type=int, default=4, help="loader processes (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=4000, help="per epoch; the dataset is repeated up to that (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured epochs (default: %(default)s)")
    parser.add_argument("--against", choices=["torchvision"], help="also measure that, alternately")
    parser.add_argument("--photos", action="store_true", help="DIR is a folder of photos: compare three loaders on it")
    parser.add_argument("--cache-folder", default="cache", help="for s3:// (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    chosen = (
        photos(Path(options.path)) if options.photos else dataset(options.path, options.cache_folder, options.against)
    )
    try:
        with chosen as (ours_of, folder):
            rows = list(benchmark(ours_of, folder, options.size, options.workers, options.images, options.rounds))
    except (DataError, FileNotFoundError) as error:
        print(escape(error), file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    if options.photos and not options.json:
        machine = platform.processor() or platform.machine()
        print(
            f"{machine}, {os.cpu_count()} cores, {options.images} images per epoch, median of {options.rounds} rounds"
        )
    return 0


if __name__ == "__main__":
    guard()
    raise SystemExit(main())
