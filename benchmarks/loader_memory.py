"""Additional memory of the loader's workers with a large dataset, compared with a small one.

    python -m benchmarks.loader_memory [--images 1280000] [--workers 8] [--scratch FOLDER]

It makes an ImageFolder of hard links to tiny JPEGs (about a minute and 1 GB of folders for 1.28 million) in a temporary
folder, opens it twice, so that the second start has an index, loads an epoch's first batches in all workers, and sums
their PSS (each shared page divided among its users), and that of the training process.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.loader import plain_loader
from benchmarks.measure import options
from data.open import open_split_pair

PER_CLASS = 1000
SMALL = 1000


def write(folder: Path, images: int) -> None:
    """FOLDER/{train,val}/CLASS/IMAGE, named as ImageNet's."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    classes = max(2, images // PER_CLASS)
    for label in range(classes):
        place = folder / "train" / f"n{label:08}"
        place.mkdir(parents=True)
        first = place / f"n{label:08}_0.JPEG"
        picture.save(first)
        for index in range(1, images // classes):
            (place / f"n{label:08}_{index}.JPEG").hardlink_to(first)
    place = folder / "val" / "n00000000"
    place.mkdir(parents=True)
    picture.save(place / "0.JPEG")


def measure(folder: Path, workers: int) -> dict[str, float]:
    """Seconds to open the dataset, and PSS in MB of the workers and of this process after 40 batches each."""
    start = time.perf_counter()
    train, _ = open_split_pair(str(folder), "")
    opened = time.perf_counter() - start
    loader = plain_loader(train, 32, 8, workers, prefetch_factor=2)
    iterator = iter(loader)
    for _ in itertools.islice(iterator, min(40 * workers, len(loader) - 2 * workers)):
        pass
    processes = [psutil.Process(worker.pid) for worker in iterator._workers]
    found = {
        "images": len(train),
        "open_seconds": round(opened, 3),
        "workers_pss_mb": round(sum(process.memory_full_info().pss for process in processes) / 1e6, 1),
        "trainer_pss_mb": round(psutil.Process().memory_full_info().pss / 1e6, 1),
    }
    found["together_pss_mb"] = round(found["workers_pss_mb"] + found["trainer_pss_mb"], 1)
    return found


def run(folder: Path, workers: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loader_memory", "--folder", str(folder), "--workers", str(workers)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    given = options(__doc__, images=1_280_000, workers=8, scratch=Path, folder=Path)
    if given.folder:  # measure only this dataset
        print(json.dumps(measure(given.folder, given.workers)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        for images in (SMALL, given.images):
            folder = Path(scratch) / str(images)
            write(folder, images)
            time.sleep(2.5)  # recent changes are not indexed
            rows += [{"start": start} | run(folder, given.workers) for start in ("first", "second")]
    for row in rows:
        print(json.dumps(row))
    for what in ("workers_pss_mb", "together_pss_mb"):
        print(f"{what}: {rows[3][what] - rows[1][what]:+.1f} MB (first start {rows[2][what] - rows[0][what]:+.1f})")


if __name__ == "__main__":
    main()
