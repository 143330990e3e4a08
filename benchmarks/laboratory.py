"""Shared by the benchmarks of saving and resuming: a real S3 server, a disk, and runs started as by a user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.s3 import ADMIN, Server, running

ROOT = Path(__file__).resolve().parent.parent
REMOTE = "checkpoints.folder=s3://bucket/runs/{run_name}"
"""The override that sends checkpoints to the server."""


class Laboratory:
    """Starts runs of `yamls/demo.yaml` with an S3 server, whose bucket is `bucket`.

    Args:
        server: The server.
        endpoint: The address that the runs use; the server's own, or a proxy's.
        data: An ImageFolder.
        disk: Where the runs' folders go.
    """

    def __init__(self, server: Server, data: Path, disk: Path) -> None:
        self.server, self.data, self.disk = server, data, disk
        self.endpoint = server.endpoint
        disk.mkdir()

    def start(self, name: str, *overrides: str, processes: int = 1, threads: int = 1) -> tuple[subprocess.Popen, Path]:
        """Begin or resume a run, in its own session.

        Returns:
            The process, and the file with its output.
        """
        launcher = [sys.executable]
        if processes > 1:
            launcher = [str(Path(sys.executable).parent / "composer"), "-n", str(processes)]
        command = [*launcher, str(ROOT / "entrypoint.py"), str(ROOT / "yamls" / "demo.yaml"), f"run_name={name}"]
        command += [f"runs_folder={self.disk}", f"data.path={self.data}", *overrides]
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": ADMIN[0],
            "AWS_SECRET_ACCESS_KEY": ADMIN[1],
            "AWS_DEFAULT_REGION": "us-east-1",
            "S3_ENDPOINT_URL": self.endpoint,
            "OMP_NUM_THREADS": str(threads),
        }
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
        keys = {Path(item["Key"]).name for item in answer.get("Contents", ())}
        return max(
            (key[:-5] for key in keys if key.endswith(".json") and f"{key[:-5]}.safetensors" in keys), default=None
        )


@contextmanager
def laboratory(scratch: Path, data: Path) -> Iterator[Laboratory]:
    """A server and a disk, empty: a deleted object stays on a server's disk for a quarter of an hour."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, running(Path(folder) / "s3") as server:
        server.client().create_bucket(Bucket="bucket")
        yield Laboratory(server, data, Path(folder) / "runs")


def digits(scratch: Path) -> Path:
    """The demo's images, written below `scratch`."""
    data = scratch / "digits"
    subprocess.run([sys.executable, "-m", "data.demo", str(data)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return data


def finish(process: subprocess.Popen, output: Path, status: int = 0) -> None:
    """Wait for the end.

    Raises:
        RuntimeError: The exit status is different.
    """
    if process.wait(900) != status:
        raise RuntimeError(f"status {process.returncode}:\n{output.read_text()[-3000:]}")


def kill(process: subprocess.Popen) -> None:
    """End all processes of a run at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def poll(condition: Any, process: subprocess.Popen, output: Path, pause: float = 0.02) -> Any:
    """Poll until a condition is true, and return its value.

    Raises:
        RuntimeError: The run ended before that.
    """
    while not (found := condition()):
        if process.poll() is not None:
            raise RuntimeError(f"status {process.returncode}:\n{output.read_text()[-3000:]}")
        time.sleep(pause)
    return found
