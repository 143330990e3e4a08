"""How long a resume takes at the start of an epoch and late in it: from the command to the first new batch.

`python -m benchmarks.resume_cost [--batches 10 10000] [--rounds 5]`: one epoch of 2 images per batch over hard links to
digits. One run trains through it and saves a checkpoint at each of `--batches`; then it is started from each in turn,
on a copy of the disk, and timed until metrics.jsonl has a batch after the checkpoint. Prints the ratio of medians, last
over first, which would reveal if earlier batches were decoded again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.laboratory import Laboratory, digits, kill, laboratory, poll, stop
from benchmarks.measure import alternate, machine, options, show_ratio

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


def stop_at(place: Laboratory, batch: int) -> Path:
    """Train until the checkpoint of a batch, and stop; a copy of the disk with this checkpoint only."""
    process, output = place.start("run", *RECIPE, f"checkpoints.interval={batch}ba", "loggers.interval=1000")
    manifest = place.disk / "run" / "checkpoints" / f"ep000-ba{batch:06d}.json"
    poll(manifest.exists, process, output)
    stop(process, output)
    for file in manifest.parent.iterdir():
        if not file.name.startswith(manifest.stem):
            file.unlink()
    return Path(shutil.copytree(place.disk / "run", place.disk.parent / f"run.{batch}"))


def time_to_next(place: Laboratory, kept: Path, batch: int) -> float:
    """Seconds from the command to the first batch after a checkpoint, for a run on a copy of the disk."""
    folder = place.disk / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    began = time.perf_counter()
    process, output = place.start("run", *RECIPE, "checkpoints.interval=1ep", "loggers.interval=1")
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


def main() -> None:
    given = options(__doc__, batches=[10, 10000], rounds=5)
    batches = sorted(given.batches)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = many(digits(scratch), scratch / "many", 2 * (batches[-1] + 200))
        with laboratory(scratch, data) as place:
            kept = {batch: stop_at(place, batch) for batch in batches}
            sides = {f"batch {batch}": partial(time_to_next, place, kept[batch], batch) for batch in batches}
            times = alternate(sides, given.rounds)
    ratio = show_ratio(times, f"batch {batches[-1]}", f"batch {batches[0]}")
    print(f"ratio of medians {ratio:.3f}, n = {given.rounds}, {machine()}")


if __name__ == "__main__":
    main()
