"""How fast a dataset is loaded: images per second, per CPU-second, and where the time goes.

    python -m benchmarks.loader DIR [--size 128 176 224] [--workers 4] [--against torchvision] [--json]
    python -m benchmarks.loader IMAGES --photos [--ffcv 160 256] [--images 2000] [--rounds 3] [--workers 2]

With --photos, IMAGES is a folder of photos, flat or in folders. They become an ImageFolder of links and two prepared
datasets of 160 and 256 px, of JPEGs and of raw pixels, in a temporary folder, and all are compared with torchvision's
ImageFolder on the originals. With --ffcv, also with FFCV (https://github.com/libffcv/ffcv), which must be installed: it
gets the raw dataset's pictures at these resolutions, as raw pixels and as JPEGs of quality 90.

CPU-seconds are those of the loader's workers and of this process together, from one epoch's first request to its last
batch; unlike wall time, they depend little on what else the machine does. Loaders are measured alternately, and each
one's first epoch is not counted, so files are cached in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
import psutil
from torch.utils.data import DataLoader, Subset

from benchmarks.measure import link_photos, machine, prepare_all
from data import source as sources
from data.augment import choose_crop
from data.config import AugmentConfig, EpochPlan
from data.decode import Picture
from data.errors import DataError
from data.loader import sample_rng, train_loader
from data.open import open_split_pair
from data.sampler import PositionSampler
from data.shards import CROP_RATIO, ShardSource
from data.source import Source
from data.text import escape, guard

PLAIN = AugmentConfig()
"""RandomResizedCrop and the flip."""
NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
STEPS = ("read", "decode", "resize", "batch", "floor")
BATCH = 128


class Rate(NamedTuple):
    """The cost of loading an epoch."""

    images: int
    wall_seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        return self.images / self.wall_seconds

    @property
    def per_cpu_second(self) -> float:
        return self.images / self.cpu_seconds


def ours(source: Source, size: int, images: int, workers: int) -> DataLoader[Any]:
    """Our training loader over a source, repeated up to `images`, with RandomResizedCrop and the flip."""
    return plain_loader(sources.Subset(source, np.arange(images) % len(source)), size, BATCH, workers, 4)


def plain_loader(source: Source, size: int, batch_size: int, workers: int, prefetch_factor: int) -> DataLoader[Any]:
    """Our training loader over each image of a source once, with RandomResizedCrop and the flip."""
    sampler = PositionSampler(len(source), [EpochPlan(size, "random", batch_size)], 0, 0, 1)
    process = {"seed": 0, "workers": workers, "prefetch_factor": prefetch_factor, "pin_memory": False}
    return train_loader(source, sampler, augment=PLAIN, **NORMAL, image_transforms=(), eval_crop_ratio=0.875, **process)


def torchvisions(folder: str, size: int, images: int, workers: int) -> DataLoader[Any]:
    """ImageFolder of torchvision with RandomResizedCrop, flip and ToTensor, repeated up to `images`."""
    from torchvision import datasets, transforms

    parts = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = datasets.ImageFolder(folder, transforms.Compose(parts))
    return DataLoader(
        Subset(dataset, (np.arange(images) % len(dataset)).tolist()),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
    )


def ffcvs(source: ShardSource, resolution: str, folder: str, size: int, images: int, workers: int) -> dict[str, Any]:
    """FFCV's loaders of a source's pictures at a resolution, as raw pixels and as JPEGs, repeated up to `images`."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from ffcv.writer import DatasetWriter

    loaders, read = {}, source.resolutions[resolution].read
    for name, mode in (("raw", "raw"), ("jpeg", "jpg")):
        path = Path(folder) / f"{resolution}.{mode}"
        if not path.exists():
            pictures = [(Picture(read(index)).decode(1), int(label)) for index, label in enumerate(source.labels)]
            fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=90), "label": IntField()}
            DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(pictures)
        image = [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip(), ToTensor()]
        loaders[f"ffcv_{name}_{resolution}"] = Loader(
            str(path),
            BATCH,
            num_workers=max(1, workers),
            os_cache=True,
            order=OrderOption.RANDOM,
            indices=(np.arange(images) % len(source)).tolist(),
            pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
        )
    return loaders


def measure(loader: Any, epoch: int) -> Rate:
    """Load an epoch; the workers must have been started by an earlier one."""
    if isinstance(sampler := getattr(loader, "batch_sampler", None), PositionSampler):
        sampler.set_epoch(epoch)
    iterator = getattr(loader, "_iterator", None)
    processes = [psutil.Process(), *(psutil.Process(worker.pid) for worker in getattr(iterator, "_workers", ()))]
    before, start, images = _cpu(processes), time.perf_counter(), 0
    for batch in loader:
        images += len(batch[1])
    wall = time.perf_counter() - start
    return Rate(images, wall, max(_cpu(processes) - before, 0.01))  # the clock's resolution


def _cpu(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def median(rates: Sequence[Rate], what: str) -> float:
    """The median over the rounds of a property of `Rate`."""
    return float(np.median([getattr(rate, what) for rate in rates]))


def split(source: Source, size: int, images: int) -> dict[str, float]:
    """Milliseconds per image that each step takes in one process, and `bytes` read per image.

    `resize` includes the crop and the flip, `batch` is copying into it, and `floor` decodes nothing but the DC
    coefficients: a lower bound for any decoder that reads the whole image.
    """
    indices = np.random.default_rng(0).integers(0, len(source), images).tolist()
    took = dict.fromkeys(STEPS, 0.0)
    out, read, total = np.empty((size, size, 3), np.uint8), source.reader(size, indices), 0

    def timed(step: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time_ns()
        result = work(*arguments)
        took[step] += (time.process_time_ns() - start) / 1e6 / images
        return result

    def decode(data: bytes, rng: np.random.Generator) -> np.ndarray:
        picture = Picture(data)
        return picture.decode_box(*choose_crop(picture.height, picture.width, size, PLAIN, rng))

    for index in indices:
        data = timed("read", read, index)
        total += len(data)
        crop = timed("decode", decode, data, sample_rng(0, 0, index, stream=0))
        image = timed("resize", lambda crop: cv2.flip(cv2.resize(crop, (size, size)), 1), crop)
        timed("batch", np.copyto, out, image)
        timed("floor", lambda data: Picture(data).decode(8), data)
    return took | {"bytes": total / images}


def benchmark(
    ours_of: Mapping[str, Source],
    folder: str | None,
    sizes: Sequence[int],
    workers: int,
    images: int,
    rounds: int,
    ffcv: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per size: rates of our loader on each source and of torchvision's on `folder`; the split of our time.

    `ffcv`: also FFCV's rates on the source `raw`, at these resolutions that suffice, with a folder for its files.
    """
    for size in sizes:
        loaders: dict[str, Any] = {name: ours(source, size, images, workers) for name, source in ours_of.items()}
        if folder is not None:
            loaders["torchvision"] = torchvisions(folder, size, images, workers)
        for resolution, scratch in (ffcv or {}).items():
            if int(resolution) * CROP_RATIO >= size:
                loaders |= ffcvs(cast(ShardSource, ours_of["raw"]), resolution, scratch, size, images, workers)
        rates: dict[str, list[Rate]] = {name: [] for name in loaders}
        for epoch in range(rounds + 1):
            for name, loader in loaders.items():
                rates[name].append(measure(loader, epoch))
        row: dict[str, Any] = {"size": size, "workers": workers}
        for name, found in rates.items():
            row |= {f"{name}_images_{of}": round(median(found[1:], of), 1) for of in ("per_second", "per_cpu_second")}
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
    for key in dict.fromkeys(key for row in rows for key in row):
        for what in (what for what in LABELS if key.endswith(what)):
            name = key.removesuffix(what).rstrip("_")
            label = LABELS[what] if name in ("", "ours") else f"{LABELS[what]}, {name}"
            form = ".3f" if "ms_" in key else ",.0f"
            lines.append((label, *(format(row[key], form) if key in row else "-" for row in rows)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])] for first, *cells in lines]
    return "\n".join(map("  ".join, padded))


@contextmanager
def photos(images: Path) -> Iterator[tuple[dict[str, Source], str]]:
    """The sources made of a folder of photos, and the folder that torchvision reads."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("originals", "prepared", "raw")}
        link_photos(images, folders["originals"])
        for name, layout in (("prepared", "mds"), ("raw", "raw")):
            prepare_all(folders["originals"], folders[name], ["160", "256"], layout=layout)
        ours_of = {name: open_split_pair(str(folder), "")[0] for name, folder in folders.items()}
        yield ours_of, f"{folders['originals']}/train"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.loader", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("path", metavar="DIR", help="the dataset, as data.path; a folder of class folders for --against")
    add("--size", type=int, nargs="+", default=[128, 176, 224], help="image sizes in pixels (default: 128 176 224)")
    add("--workers", type=int, default=4, help="loader processes (default: %(default)s)")
    add("--images", type=int, default=4000, help="per epoch; the dataset is repeated up to that (default: %(default)s)")
    add("--rounds", type=int, default=3, help="measured epochs (default: %(default)s)")
    add("--against", choices=["torchvision"], help="also measure that, alternately")
    add("--photos", action="store_true", help="DIR is a folder of photos: compare loaders and formats on it")
    add("--ffcv", nargs="+", choices=["160", "256"], default=[], help="with --photos: FFCV too, at these resolutions")
    add("--cache-folder", default="cache", help="for s3:// (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.ffcv and not (options.photos and find_spec("ffcv")):
        parser.error(
            "--ffcv: needs --photos, and the package ffcv 1.0.2, which pip builds with Debian's libopencv-dev "
            "and libturbojpeg0-dev"
        )
    try:
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            if options.photos:
                ours_of, folder = stack.enter_context(photos(Path(options.path)))
            else:
                ours_of = {"ours": open_split_pair(options.path, options.cache_folder)[0]}
                folder = f"{options.path}/train" if options.against else None
            counts = options.workers, options.images, options.rounds
            rows = list(benchmark(ours_of, folder, options.size, *counts, dict.fromkeys(options.ffcv, scratch)))
    except (DataError, FileNotFoundError) as error:
        print(escape(error), file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    if options.photos and not options.json:
        print(f"{machine()}, {options.images} images per epoch, median of {options.rounds} rounds")
    return 0


if __name__ == "__main__":
    guard()
    raise SystemExit(main())
