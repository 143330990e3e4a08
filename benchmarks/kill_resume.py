"""Kill runs at random moments and resume them from S3 alone: do they end with an uninterrupted run's weights?

`python -m benchmarks.kill_resume [--runs 50] [--processes 1] [--seed 0]` starts a real S3 server (SeaweedFS) on this
machine, trains the demo's recipe on scanned digits once without interruption, and then `--runs` times with one or two
SIGKILLs at random moments, each followed by a resume on an emptied disk. A run counts as right if its `weights_sha256`
is that of the uninterrupted run, its last resume used the newest complete checkpoint in the bucket, and its curves hold
each batch once.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.laboratory import REMOTE, Laboratory, digits, finish, kill, laboratory
from benchmarks.measure import machine, options

RECIPE = (
    "max_duration=3ep",
    "data.train_samples=160",
    "data.workers=2",
    "model.name=timm/resnet10t",
    "loggers.interval=1",
)
INTERVAL = ("checkpoints.interval=2ba", "checkpoints.keep=2", "checkpoints.keep_remote=2")
SAVES = 7
"""A kill follows one of a process's first saves, at most this many, or its start."""
RESUMED = re.compile(r"resumes from (\S+)/(ep\d+-ba\d+)\.safetensors")


class Outcome(NamedTuple):
    """The result of one run."""

    right: bool
    kills: int
    note: str


def curves_whole(folder: Path) -> bool:
    """Whether metrics.jsonl and the TensorBoard events of a run hold the loss of each batch once, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    batches = [line["batch"] for line in lines if "train/loss" in line]
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    return batches == steps == list(range(1, json.loads((folder / "summary.json").read_text())["batches"] + 1))


def strike(process: subprocess.Popen, output: Path, rng: random.Random) -> bool:
    """Kill a run a random moment after its start or after a random one of its saves; False if it ended before."""
    saves, delay = rng.randrange(SAVES), rng.uniform(0.0, 1.5)
    while process.poll() is None:
        text = output.read_text()
        if (" starts" in text or " resumes from" in text) and text.count("saved checkpoint") >= saves:
            time.sleep(delay)
            if process.poll() is None:
                kill(process)
                return True
        time.sleep(0.02)
    return False


def disturbed(place: Laboratory, name: str, processes: int, reference: str, rng: random.Random) -> Outcome:
    """One run with one or two kills, each time resumed from the bucket alone."""
    start = partial(place.start, name, REMOTE, *INTERVAL, *recipe(processes), processes=processes)
    during, expected = [], None
    for _ in range(rng.choice([1, 1, 2])):
        process, output = start()
        if not strike(process, output, rng):
            break
        during.append((output.read_text().splitlines() or ["starting"])[-1][:60])
        shutil.rmtree(place.disk / name, ignore_errors=True)
        expected = place.newest(name)
    else:
        process, output = start()
    finish(process, output)  # even if a run ended before its second kill
    said = output.read_text()
    resumed = RESUMED.search(said)
    # A kill may come when the last state is in the bucket: then there is nothing left to train.
    taken = resumed.group(2) if resumed else place.newest(name) if f"{name} is finished" in said else None
    same = place.summary(name)["weights_sha256"] == reference
    whole = curves_whole(place.disk / name)
    right = same and whole and (taken == expected or expected is None)
    note = (
        f"killed {len(during)}x: {' / '.join(during)}\n           weights {'same' if same else 'DIFFER'}, "
        f"curves {'whole' if whole else 'NOT whole'}, resumed from {taken}, newest was {expected}"
    )
    return Outcome(right, len(during), note if right else f"{note}; it said:\n{said}")


def recipe(processes: int) -> tuple[str, ...]:
    """The overrides; the batch is the same for any number of processes."""
    return (*RECIPE, "device_batch_size=null", "global_batch_size=32") if processes > 1 else RECIPE


def campaign(runs: int, processes: int, seed: int, scratch: Path) -> list[Outcome]:
    """`runs` killed runs against an uninterrupted one."""
    data = digits(scratch)
    with laboratory(scratch, data) as place:
        finish(*place.start("reference", *recipe(processes), processes=processes))
        reference = place.summary("reference")["weights_sha256"]
    outcomes = []
    for number in range(runs):
        with laboratory(scratch, data) as place:
            outcome = disturbed(place, f"run{number}", processes, reference, random.Random(f"{seed} {number}"))
        outcomes.append(outcome)
        print(f"{number + 1:3} {'right' if outcome.right else 'WRONG'}  {outcome.note}", flush=True)
    return outcomes


def main() -> int:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # each resume drops points, and it would say so
    given = options(__doc__, runs=50, processes=1, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = campaign(given.runs, given.processes, given.seed, Path(scratch))
    right, kills = sum(outcome.right for outcome in outcomes), sum(outcome.kills for outcome in outcomes)
    print(f"{right} of {len(outcomes)} right, {kills} kills, {given.processes} process(es), {machine()}")
    return 0 if right == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
