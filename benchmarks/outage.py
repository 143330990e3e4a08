"""A bucket that fails in the middle of a run: does training continue, how fast, and is the last state uploaded?

`python -m benchmarks.outage [--seconds 60] [--fault refuse]`: the demo's recipe with a small model, a checkpoint
every ten batches, through a TCP proxy in front of a real S3 server that refuses, hangs, resets or answers 503 for that
many seconds. The same run without an outage must end with the same weights.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.laboratory import REMOTE, digits, finish, laboratory, poll
from benchmarks.measure import machine, options
from tests.s3 import Proxy

RECIPE = ("model.name=timm/resnet10t", "data.workers=1", "eval.interval=99", "checkpoints.interval=10ba")


def rates(metrics: Path, begun: float, ended: float) -> tuple[float, float]:
    """Images per second in training during an outage and outside it; its times are the run's `wall_seconds`."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    points = [(line["wall_seconds"], line["samples"]) for line in lines if "train/loss" in line]
    inside, outside = [0.0, 0.0], [0.0, 0.0]  # images, seconds
    for (since, before), (until, after) in itertools.pairwise(points):
        place = inside if begun <= since and until <= ended else outside
        place[0] += after - before
        place[1] += until - since
    return inside[0] / max(inside[1], 1e-9), outside[0] / max(outside[1], 1e-9)


def wall(metrics: Path) -> float:
    """The current time of the run's clock."""
    return json.loads(metrics.read_text().splitlines()[-1])["wall_seconds"]


def main() -> int:
    given = options(__doc__, seconds=60.0, fault=("refuse", "hang", "reset", "503"), epochs=12)
    recipe = (*RECIPE, f"max_duration={given.epochs}ep")
    with tempfile.TemporaryDirectory() as scratch, laboratory(Path(scratch), digits(Path(scratch))) as place:
        finish(*place.start("quiet", *recipe))
        proxy = Proxy(place.server.port)
        place.endpoint = proxy.endpoint
        process, output = place.start("hit", REMOTE, *recipe)
        poll(lambda: "uploaded" in output.read_text(), process, output)
        metrics = place.disk / "hit" / "metrics.jsonl"
        begun = wall(metrics)
        proxy.set(given.fault)
        deadline = time.monotonic() + given.seconds
        poll(lambda: time.monotonic() >= deadline, process, output)
        ended = wall(metrics)
        proxy.set(None)
        finish(process, output)
        inside, outside = rates(metrics, begun, ended)
        same = place.summary("hit")["weights_sha256"] == place.summary("quiet")["weights_sha256"]
        arrived = place.newest("hit")
        proxy.close()
    print(f"{given.fault} for {given.seconds:.0f} s: {inside:.0f} images/s during it, {outside:.0f} otherwise")
    print(f"weights {'same' if same else 'DIFFER'}; in the bucket at the end: {arrived}; {machine()}")
    return 0 if same and arrived == f"ep{given.epochs:03d}-ba{given.epochs * 47:06d}" else 1


if __name__ == "__main__":
    sys.exit(main())
