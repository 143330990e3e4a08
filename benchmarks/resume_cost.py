"""How long a resume takes at the start of an epoch and late in it: from the command to the first new batch.

`python -m benchmarks.resume_cost [--batches 10 10000] [--rounds 5]`: one epoch of 2 images per batch over hard links to
digits. One run trains through it and saves a checkpoint at each of `--batches`; then it is started from each in turn,
on a copy of the disk, and timed until metrics.jsonl has a batch after the checkpoint. Prints the ratio of medians, last
over first, which would reveal if earlier batches were decoded again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.laboratory import Laboratory, digits, finish, kill, laboratory, poll

RECIPE = (
    "max_duration=1ep",
    "device_batch_size=2",
    "model.name=timm/test_resnet",
    "data.workers=1",
    "algorithms.fixres=off",
    "algorithms.progressive_resizing=off",
    "checkpoints.keep=99",
    "loggers.tensorboard=false",
)


def many(digits_folder: Path, folder: Path, images: int) -> Path:
    """An ImageFolder of at least that many training images, hard links to the digits."""
    shutil.copytree(digits_folder / "val", folder / "val")
    sources = sorted((digits_folder / "train").rglob("*.jpg"))
    for number in range(max(images, len(sources))):
        source = sources[number % len(sources)]
        link = folder / "train" / source.parent.name / f"{number:07d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, link)
    return folder


def stop_at(place: Laboratory, name: str, batch: int) -> None:
    """Train until the checkpoint of a batch, and stop."""
    process, output = place.start(name, *RECIPE, f"checkpoints.interval={batch}ba", "loggers.interval=1000")
    manifest = place.disk / name / "checkpoints" / f"ep000-ba{batch:06d}.json"
    poll(manifest.exists, process, output)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process, output, 75)
    for file in manifest.parent.iterdir():
        if not file.name.startswith(manifest.stem):
            file.unlink()


def time_to_next(place: Laboratory, name: str, batch: int) -> float:
    """Seconds from the command to the first batch after a checkpoint, for a run on a copy of the disk."""
    kept, folder = place.disk.parent / f"{name}.{batch}", place.disk / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    began = time.perf_counter()
    process, output = place.start(name, *RECIPE, "checkpoints.interval=1ep", "loggers.interval=1")
    poll(lambda: _last_batch(folder / "metrics.jsonl") > batch, process, output, 0.005)
    seconds = time.perf_counter() - began
    kill(process)
    if f"-ba{batch:06}.safetensors" not in output.read_text():
        raise RuntimeError(f"it did not resume from batch {batch}:\n{output.read_text()}")
    return seconds


def _last_batch(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return json.loads(lines[-1])["batch"] if lines else 0
    except ValueError:
        return 0  # half a line, still being written


def measure(batches: Sequence[int], rounds: int, scratch: Path) -> dict[int, list[float]]:
    """Seconds of each resume, by batch."""
    data = many(digits(scratch), scratch / "many", 2 * (batches[-1] + 200))
    with laboratory(scratch, data) as place:
        for batch in batches:
            stop_at(place, "run", batch)
            shutil.copytree(place.disk / "run", place.disk.parent / f"run.{batch}")
        times: dict[int, list[float]] = {batch: [] for batch in batches}
        for _ in range(rounds):
            for batch in batches:
                times[batch].append(time_to_next(place, "run", batch))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[10, 10000])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        times = measure(sorted(options.batches), options.rounds, Path(scratch))
    for batch, seconds in times.items():
        print(f"batch {batch:6}  median {statistics.median(seconds):.2f} s  {min(seconds):.2f} to {max(seconds):.2f} s")
    first, last = (statistics.median(times[batch]) for batch in (min(times), max(times)))
    print(f"ratio of medians {last / first:.3f}, n = {options.rounds}, {os.cpu_count()} cores, CPU")


if __name__ == "__main__":
    sys.exit(main())
