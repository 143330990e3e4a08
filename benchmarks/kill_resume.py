"""Kill runs at random moments and resume them from S3 alone: do they end with the weights of the run nobody touched?

`python -m benchmarks.kill_resume [--runs 50] [--processes 1] [--seed 0]` starts a real S3 server (SeaweedFS) on this
machine, trains the demo's recipe on scanned digits once undisturbed, and then `--runs` times with one or two SIGKILLs
at random moments, each followed by a resume on an emptied disk. A run counts as right if its `weights_sha256` is the
undisturbed one's, its last resume went on from the newest complete checkpoint in the bucket, and its curves hold each
batch once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.s3 import ADMIN, Server, running

ROOT = Path(__file__).resolve().parent.parent
RECIPE = (
    "max_duration=3ep",
    "data.train_samples=160",
    "data.workers=2",
    "model.name=timm/resnet10t",
    "loggers.interval=1",
)
INTERVAL = ("checkpoints.interval=2ba", "checkpoints.keep=2", "checkpoints.keep_remote=2")
SAVES = 7
"""A kill follows one of the first so many saves of a process, or its start."""
RESUMED = re.compile(r"goes on from (\S+)/(ep\d+-ba\d+)\.pt")


class Outcome(NamedTuple):
    """What became of one run."""

    right: bool
    kills: int
    during: str
    note: str


class Runner:
    """Starts the recipe under one name at a time, on a disk of its own.

    Args:
        server: The S3 server; its bucket is `bucket`.
        data: An ImageFolder.
        disk: Scratch space.
        processes: 1, or as many as Composer's launcher shall start.
    """

    def __init__(self, server: Server, data: Path, disk: Path, processes: int) -> None:
        self.server, self.data, self.disk, self.processes = server, data, disk, processes
        self.environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": ADMIN[0],
            "AWS_SECRET_ACCESS_KEY": ADMIN[1],
            "AWS_DEFAULT_REGION": "us-east-1",
            "S3_ENDPOINT_URL": server.endpoint,
            "OMP_NUM_THREADS": "1",  # two threads on busy cores spin, and the model is tiny
        }
        disk.mkdir()

    def start(self, name: str, *overrides: str) -> tuple[subprocess.Popen, Path]:
        """Begin or go on with a run, in a session of its own; its output goes to a file."""
        batch = ("device_batch_size=null", "global_batch_size=32") if self.processes > 1 else ()
        script = [str(ROOT / "entrypoint.py"), str(ROOT / "yamls" / "demo.yaml"), f"run_name={name}"]
        launcher = [sys.executable]
        if self.processes > 1:
            launcher = [str(Path(sys.executable).parent / "composer"), "-n", str(self.processes)]
        command = [
            *launcher,
            *script,
            f"runs_folder={self.disk}",
            f"data.path={self.data}",
            *RECIPE,
            *batch,
            *overrides,
        ]
        output = self.disk.parent / f"{name}.{time.monotonic_ns()}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        return process, output

    def sha(self, name: str) -> str:
        """Digest of the final weights, from the run's summary."""
        return json.loads((self.disk / name / "summary.json").read_text())["weights_sha256"]

    def curves_whole(self, name: str) -> bool:
        """Whether metrics.jsonl and the TensorBoard events hold the loss of each batch once, in order."""
        folder = self.disk / name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        batches = [line["batch"] for line in lines if "train/loss" in line]
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        steps = [event.step for event in events.Scalars("train/loss")]
        whole = list(range(1, json.loads((folder / "summary.json").read_text())["batches"] + 1))
        return batches == steps == whole

    def newest(self, name: str) -> str | None:
        """The newest complete checkpoint of a run in the bucket."""
        answer = self.server.client().list_objects_v2(Bucket="bucket", Prefix=f"runs/{name}/ep")
        keys = {Path(item["Key"]).name for item in answer.get("Contents", ())}
        return max((key[:-5] for key in keys if key.endswith(".json") and f"{key[:-5]}.pt" in keys), default=None)


def finish(process: subprocess.Popen, output: Path) -> None:
    """Wait for the end.

    Raises:
        RuntimeError: It was not a good one.
    """
    if process.wait(900) != 0:
        raise RuntimeError(f"status {process.returncode}:\n{output.read_text()[-3000:]}")


def kill(process: subprocess.Popen) -> None:
    """End all processes of a run at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def strike(process: subprocess.Popen, output: Path, rng: random.Random) -> bool:
    """Kill a run a random moment after its start or after a random one of its saves; False if it ended before."""
    saves, delay = rng.randrange(SAVES), rng.uniform(0.0, 1.5)
    while process.poll() is None:
        text = output.read_text()
        if (" starts" in text or " goes on from" in text) and text.count("saved checkpoint") >= saves:
            time.sleep(delay)
            if process.poll() is None:
                kill(process)
                return True
        time.sleep(0.02)
    return False


def disturbed(runner: Runner, name: str, reference: str, rng: random.Random) -> Outcome:
    """One run with one or two kills, each time resumed from the bucket alone."""
    overrides = ("checkpoints.folder=s3://bucket/runs/{run_name}", *INTERVAL)
    kills, during = rng.choice([1, 1, 2]), []
    expected = None
    for _ in range(kills):
        process, output = runner.start(name, *overrides)
        if not strike(process, output, rng):
            break
        during.append((output.read_text().splitlines() or ["starting"])[-1][:60])
        shutil.rmtree(runner.disk / name, ignore_errors=True)
        expected = runner.newest(name)
    process, output = runner.start(name, *overrides)
    finish(process, output)
    resumed = RESUMED.search(output.read_text())
    taken = resumed.group(2) if resumed else None
    same, whole = runner.sha(name) == reference, runner.curves_whole(name)
    right = same and whole and (taken == expected or expected is None)
    note = (
        f"weights {'same' if same else 'DIFFER'}, curves {'whole' if whole else 'NOT whole'}, went on from {taken}, "
        f"newest was {expected}"
    )
    return Outcome(right, len(during), " / ".join(during), note)


@contextmanager
def laboratory(scratch: Path, data: Path, processes: int) -> Iterator[Runner]:
    """A server and a disk for one run: a deleted object stays on the server's disk for a quarter of an hour."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, running(Path(folder) / "s3") as server:
        server.client().create_bucket(Bucket="bucket")
        yield Runner(server, data, Path(folder) / "runs", processes)


def campaign(runs: int, processes: int, seed: int, scratch: Path) -> list[Outcome]:
    """`runs` disturbed runs against one that nobody touched."""
    data = scratch / "digits"
    subprocess.run([sys.executable, "-m", "data.demo", str(data)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with laboratory(scratch, data, processes) as runner:
        finish(*runner.start("reference"))
        reference = runner.sha("reference")
    outcomes = []
    for number in range(runs):
        with laboratory(scratch, data, processes) as runner:
            outcome = disturbed(runner, f"run{number}", reference, random.Random(f"{seed} {number}"))
        outcomes.append(outcome)
        print(
            f"{number + 1:3} {'right' if outcome.right else 'WRONG'}  killed {outcome.kills}x: {outcome.during}\n"
            f"           {outcome.note}",
            flush=True,
        )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = campaign(options.runs, options.processes, options.seed, Path(scratch))
    right = sum(outcome.right for outcome in outcomes)
    print(
        f"{right} of {len(outcomes)} right, {sum(outcome.kills for outcome in outcomes)} kills, "
        f"{options.processes} process(es), {os.cpu_count()} cores"
    )
    return 0 if right == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
