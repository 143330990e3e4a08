"""Shared by the benchmarks of saving and resuming: a real S3 server, a disk, and runs started as by a user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from data.demo import write_digits
from tests.s3 import ADMIN, Server, running

REMOTE = "checkpoints.folder=s3://bucket/runs/{run_name}"
"""The override that sends checkpoints to the server."""


class Laboratory:
    """Starts runs of `yamls/demo.yaml` on an ImageFolder, with an S3 server, whose bucket is `bucket`."""

    def __init__(self, server: Server, data: Path, disk: Path) -> None:
        self.server, self.data, self.disk = server, data, disk
        self.endpoint = server.endpoint  # may be replaced by a proxy's
        disk.mkdir()

    def start(self, name: str, *overrides: str, processes: int = 1, threads: int = 1) -> tuple[subprocess.Popen, Path]:
        """Begin or resume a run, in its own session; the process, and the file with its output."""
        launcher = [sys.executable]
        if processes > 1:
            launcher = [str(Path(sys.executable).parent / "composer"), "-n", str(processes)]
        command = [*launcher, str(ROOT / "entrypoint.py"), str(ROOT / "yamls" / "demo.yaml"), f"run_name={name}"]
        command += [f"runs_folder={self.disk}", f"data.path={self.data}", *overrides]
        environment = os.environ | credentials(self.endpoint) | {"OMP_NUM_THREADS": str(threads)}
        output = self.disk.parent / f"{name}.{time.monotonic_ns()}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        return process, output

    def summary(self, name: str) -> dict[str, Any]:
        """A run's summary.json."""
        return json.loads((self.disk / name / "summary.json").read_text())

    def newest(self, name: str) -> str | None:
        """The newest complete checkpoint of a run in the bucket."""
        answer = self.server.client().list_objects_v2(Bucket="bucket", Prefix=f"runs/{name}/ep")
        keys = [Path(item["Key"]) for item in answer.get("Contents", ())]
        manifests, states = ({key.stem for key in keys if key.suffix == end} for end in (".json", ".safetensors"))
        return max(manifests & states, default=None)


def credentials(endpoint: str) -> dict[str, str]:
    """The environment of a client of the server."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "S3_ENDPOINT_URL")
    return dict(zip(names, (*ADMIN, "us-east-1", endpoint), strict=True))


@contextmanager
def laboratory(scratch: Path, data: Path) -> Iterator[Laboratory]:
    """A server and a disk, empty: a deleted object stays on a server's disk for a quarter of an hour."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, running(Path(folder) / "s3") as server:
        server.client().create_bucket(Bucket="bucket")
        yield Laboratory(server, data, Path(folder) / "runs")


def digits(scratch: Path) -> Path:
    """The demo's images, written below `scratch`."""
    return write_digits(scratch / "digits", 32)


def finish(process: subprocess.Popen, output: Path, status: int = 0) -> None:
    """Wait for the end; another status is a RuntimeError."""
    if process.wait(900) != status:
        raise RuntimeError(f"status {process.returncode}:\n{output.read_text()[-3000:]}")


def kill(process: subprocess.Popen) -> None:
    """End all processes of a run at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop(process: subprocess.Popen, output: Path) -> None:
    """Ask all processes of a run to stop, and wait until it is saved."""
    os.killpg(process.pid, signal.SIGTERM)
    finish(process, output, 75)


def poll(condition: Callable[[], bool], process: subprocess.Popen, output: Path, pause: float = 0.02) -> None:
    """Wait until a condition is true; RuntimeError if the run ends before that."""
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"status {process.returncode}:\n{output.read_text()[-3000:]}")
        time.sleep(pause)
