"""Plain helpers that tests share; the fixtures stand in conftest.py."""

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import Picture

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""


def write_images(folder, classes=3, train=8, val=3, size=40, seed=0):
    """JPEGs of noise on a ground that tells the class, as PATH/{train,val}/CLASS/IMAGE."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (size, size + 8, 3)) + np.eye(3)[label % 3] * 130
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.jpg", quality=90)
    return folder


def decode(data):
    """The whole picture in RGB, uint8 (H, W, 3)."""
    return Picture(data).decode(1)


@contextmanager
def process_as_before() -> Iterator[None]:
    """Signal handlers, which a run sets for its whole process, are put back after."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


LAUNCHER = ["-m", "composer.cli.launcher"]
LIMIT = 240.0


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launcher(processes):
    """Composer's launcher on a free port; the program and its arguments follow."""
    return [*LAUNCHER, "-n", str(processes), "--master_port", str(free_port())]


class Process:
    """`python WORDS` in a session of its own, forked from a process that has imported what takes seconds (warm.py)."""

    def __init__(self, words, environment, out, err):
        self.returncode, self.out = None, out
        self._answers, theirs = socket.socketpair()
        with Path(os.devnull).open() as nothing, theirs:
            files = [file.fileno() for file in (nothing, out, err, theirs)]
            socket.send_fds(_warm(), [json.dumps([list(map(str, words)), environment]).encode()], files)
        self.pid = self._answer()

    def wait(self, timeout=LIMIT):
        """The exit status; TimeoutError."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            self.returncode = self._answer()
        return self.returncode

    def _answer(self):
        return int.from_bytes(self._answers.recv(8, socket.MSG_WAITALL), "big", signed=True)

    def poll(self):
        return self.wait() if self.returncode is not None or select.select([self._answers], [], [], 0)[0] else None

    def send_signal(self, number):
        os.kill(self.pid, number)


@functools.cache
def _warm():
    """The way to the process that forks, which ends when this one does."""
    ours, theirs = socket.socketpair()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, str(ROOT / "tests" / "warm.py"), str(theirs.fileno())]
    with theirs:
        subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
    return ours


def start(words, **environment):
    """A process whose output `end` returns."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process object lives
    return Process(words, inherited | {"OMP_NUM_THREADS": "1"} | environment, output, output)


def end(process):
    """Wait for a process; its status and what it printed."""
    try:
        status = process.wait()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    return status, output_of(process)


def output_of(process):
    process.out.seek(0)
    return process.out.read()


def start_two(words, **environment):
    """Two processes, as Composer's launcher would start them."""
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    together |= {"MASTER_PORT": str(free_port())} | environment
    return [start(words, **together, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def run_two(words, **environment):
    """Two processes to their end; what they printed."""
    outcomes = [end(process) for process in start_two(words, **environment)]
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    return "".join(output for _, output in outcomes)


def wait_for(condition, process=None, limit=LIMIT):
    """Poll until the condition holds, as long as the process lives."""
    deadline = time.monotonic() + limit
    while not condition():
        assert process is None or process.poll() is None, output_of(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def upload(server, folder):
    """A folder's files, as `set/...` in a new bucket `bucket`."""
    client = server.client()
    client.create_bucket(Bucket="bucket")
    for file in folder.rglob("*"):
        if file.is_file():
            client.put_object(Bucket="bucket", Key=f"set/{file.relative_to(folder)}", Body=file.read_bytes())


def summary_of(runs, name):
    return json.loads((runs / name / "summary.json").read_text())


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads."""
    import torch  # here, for the tests that do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_here(recipe, *overrides):
    """Train in this process, which saves the seconds that another's imports take; the exit status."""
    from recipes.load import load_config
    from recipes.run import run

    with one_thread(), process_as_before():
        return run(load_config(recipe, overrides))
