"""How long a run of ResNet-50 takes from SIGTERM to its exit, with its state in the bucket.

`python -m benchmarks.stop_time [--rounds 3]`: `yamls/demo.yaml` with `model.name=resnet50`, whose state with momentum
and EMA is about 300 MB, with a real S3 server on this machine. Each round starts or resumes the run, sends SIGTERM to
all its processes after a few steps, and checks status 75 and the bucket.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.laboratory import REMOTE, Laboratory, digits, laboratory, poll, stop
from benchmarks.measure import machine, options

RECIPE = ("model.name=resnet50", "device_batch_size=8", "checkpoints.interval=1ep", "loggers.interval=1")


def time_to_stop(place: Laboratory, known: str | None) -> tuple[float, str]:
    """Seconds from SIGTERM to the exit, and the checkpoint in the bucket at that time."""
    process, output = place.start("stopped", REMOTE, *RECIPE, threads=2)
    lines = place.disk / "stopped" / "metrics.jsonl"
    before = len(lines.read_text().splitlines()) if lines.exists() else 0
    poll(lambda: lines.exists() and len(lines.read_text().splitlines()) > before + 2, process, output)
    began = time.perf_counter()
    stop(process, output)
    seconds, newest = time.perf_counter() - began, place.newest("stopped")
    if newest in (None, known):
        raise RuntimeError(f"nothing new is in the bucket:\n{output.read_text()}")
    return seconds, newest


def main() -> None:
    rounds = options(__doc__, rounds=3).rounds
    times, newest = [], None
    with tempfile.TemporaryDirectory() as scratch, laboratory(Path(scratch), digits(Path(scratch))) as place:
        for _ in range(rounds):
            seconds, newest = time_to_stop(place, newest)
            times.append(seconds)
            size = (place.disk / "stopped" / "checkpoints" / f"{newest}.safetensors").stat().st_size / 1e6
            print(f"{newest}: {seconds:.1f} s, {size:.0f} MB", flush=True)
    print(f"longest {max(times):.1f} s (at most 25), n = {rounds}, {machine()}")


if __name__ == "__main__":
    main()
