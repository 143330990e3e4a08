"""A run that is interrupted and resumes with another number of processes: same samples, schedule and averages?

`python -m benchmarks.world_size [--processes 8 4 1]`: the demo's recipe without mixing (whose draws depend on the
process), FP32, BatchNorm over all processes, one global batch size. The run is stopped after one step with each number
of processes but the last; losses, learning rates and the evaluation of EMA's average are compared with those of a run
with one process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.laboratory import Laboratory, digits, finish, laboratory, poll, stop
from benchmarks.measure import options

RECIPE = (
    "max_duration=2ep",
    "data.train_samples=320",
    "data.workers=1",
    "model.name=timm/resnet10t",
    "model.sync_batchnorm=true",
    "device_batch_size=null",
    "global_batch_size=32",
    "algorithms.mixup=off",
    "algorithms.cutmix=off",
    "algorithms.ema.half_life=5ba",
    "algorithms.ema.update_interval=1ba",
    "loggers.interval=1",
)


def steps(place: Laboratory, name: str) -> list[dict[str, float]]:
    """The figures of each step so far."""
    path = place.disk / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if "train/loss" in line and line.endswith("}")]


def changing(place: Laboratory, processes: list[int]) -> None:
    """Train with each number of processes in turn."""
    for count in processes[:-1]:
        before = len(steps(place, "changing"))
        process, output = place.start("changing", *RECIPE, processes=count)
        poll(lambda before=before: len(steps(place, "changing")) > before, process, output)
        stop(process, output)
    finish(*place.start("changing", *RECIPE, processes=processes[-1]))


def main() -> int:
    processes = options(__doc__, processes=[8, 4, 1]).processes
    with tempfile.TemporaryDirectory() as scratch, laboratory(Path(scratch), digits(Path(scratch))) as place:
        finish(*place.start("one", *RECIPE))
        changing(place, processes)
        one, other = steps(place, "one"), steps(place, "changing")
        ends = [place.summary(name) for name in ("one", "changing")]
    for left, right in zip(one, other, strict=True):
        print(
            f"step {left['batch']:3.0f}: loss {left['train/loss']:.6f} {right['train/loss']:.6f}, "
            f"lr {left['train/lr']:.6f} {right['train/lr']:.6f}, samples {left['samples']} {right['samples']}"
        )
    for end in ends:
        sizes = ", ".join(f"{size} px loss {at['loss']:.6f}" for size, at in end["eval_by_size"].items())
        print(f"EMA's average: {sizes}; resumed from {[Path(name).name for name in end['resumed_from']]}")
    worst = max(abs(a["train/loss"] / b["train/loss"] - 1) for a, b in zip(one, other, strict=True))
    same = all((a["train/lr"], a["samples"]) == (b["train/lr"], b["samples"]) for a, b in zip(one, other, strict=True))
    print(f"{' -> '.join(map(str, processes))}: losses differ by {worst:.1e} at most; rates and samples same: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
