"""A run whose loader gives nothing any more: it ends, with its state saved, and leaves no process behind."""

import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from tests.support import ROOT, end, launcher, run_here, start, wait_for
from tests.support import summary_of as summary

RECIPE = """
run_name: hangs
device: cpu
max_duration: 3ep
global_batch_size: 4
model: {name: timm/test_resnet}
optimizer: {lr: 0.05}
data: {path: IMAGES, train_size: 32, workers: 1, timeout: 3s, prefetch_factor: 1}
eval: {sizes: [32], device_batch_size: 2}
checkpoints: {interval: 100ba}
loggers: {progress_bar: false, tensorboard: false, interval: 1}
algorithms:
  ema: {half_life: 3ba}
  mixup: {}
"""
BATCHES = 18
HANGING = str(ROOT / "tests" / "hanging.py")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.replace("IMAGES", str(images)))
    return path


@pytest.fixture(scope="module")
def untouched(recipe, tmp_path_factory):
    """The weights of a run of one process without a hang."""
    return finish(recipe, tmp_path_factory.mktemp("untouched"))


def finish(recipe, runs):
    """Train on to the end."""
    assert run_here(recipe, f"runs_folder={runs}") == 0
    return summary(runs, "hangs")["weights_sha256"]


@pytest.fixture
def run(recipe, tmp_path, monkeypatch):
    """Start the program; after `hang(text, at)`, the `at`-th read of an image with the text in its path never ends."""
    switch = tmp_path / "switch"

    def go(*overrides, processes=1, rank=0):
        monkeypatch.setenv("HANG_RANK", str(rank))
        before = [] if processes == 1 else launcher(processes)
        job = [HANGING, str(switch), str(recipe), f"runs_folder={tmp_path / 'runs'}"]
        process = start([*before, *job, *overrides])
        started.append(process)
        return process

    def hang(text, at=1):
        switch.write_text(text)
        monkeypatch.setenv("HANG_AT", str(at))

    started = []
    yield SimpleNamespace(
        go=go, hang=hang, hangs=switch.with_suffix(".hangs"), runs=tmp_path / "runs", folder=tmp_path / "runs" / "hangs"
    )
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def batches(run):
    file = run.folder / "metrics.jsonl"
    return file.read_text().count("train/loss") if file.exists() else 0


def workers_of(process):
    """Its loader's; torch's own helpers have no such command line."""
    return [child for child in psutil.Process(process.pid).children() if child.cmdline()[:1] == [sys.executable]]


def require_saved(run, recipe, untouched, process, *, says):
    """Status 75 in time, nothing left behind, and the run goes on to the weights of an untouched one, if given."""
    family = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    status, output = end(process)
    assert status == 75, output
    assert time.monotonic() - began < 30.0 or not says.startswith("SIG")  # what is promised of a signal
    assert says in output
    ours = [line for line in re.findall(r"Traceback.*\n(.*)", output) if "composer/cli/launcher.py" not in line]
    assert not ours, output  # the launcher's own is how it answers a signal, see docs/troubleshooting.md
    assert "saved in" in output
    _gone, left = psutil.wait_procs(family, timeout=5)
    assert not left
    saved = sorted(path.stem for path in (run.folder / "checkpoints").glob("*.json"))
    done = batches(run)
    assert saved[-1].endswith(f"ba{done:06d}")
    assert done < BATCHES
    if untouched is not None:
        assert finish(recipe, run.runs) == untouched
    return saved[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_went_away_ends_the_run_after_data_timeout_and_the_file_is_named(run, recipe, untouched, workers):
    run.hang("train/class1/3.jpg", at=2)
    process = run.go(f"data.workers={workers}")
    wait_for(run.hangs.exists, process)
    require_saved(run, recipe, untouched, process, says="class1/3.jpg")


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_ends_it_too(run, recipe, untouched, workers, number):
    run.hang("train/class1/3.jpg", at=2)
    process = run.go(f"data.workers={workers}", "data.timeout=null")
    wait_for(run.hangs.exists, process)
    os.killpg(process.pid, number)  # the workers too, as a terminal and Slurm do
    require_saved(run, recipe, untouched, process, says=signal.Signals(number).name)


@pytest.mark.parametrize("asked", [True, False])
def test_a_stopped_worker(run, recipe, untouched, asked):
    run.hang("train/class1/3.jpg", at=2)
    process = run.go("data.workers=2", *(["data.timeout=null"] if asked else []))
    wait_for(run.hangs.exists, process)
    for worker in workers_of(process):
        worker.suspend()
    if asked:
        process.send_signal(signal.SIGTERM)
    require_saved(run, recipe, untouched, process, says="SIGTERM" if asked else "has delivered nothing for")


def test_a_killed_worker(run, recipe, untouched):
    run.hang("train/class1/3.jpg", at=2)
    process = run.go("data.timeout=null")
    wait_for(run.hangs.exists, process)
    (worker,) = workers_of(process)
    worker.kill()
    require_saved(run, recipe, untouched, process, says="class1/3.jpg")


def test_during_an_evaluation(run, recipe, untouched):
    run.hang("val/class2/1.jpg")
    process = run.go()
    saved = require_saved(run, recipe, untouched, process, says="val/class2/1.jpg")
    assert saved == "ep000-ba000006"


def test_before_the_first_step(run, recipe, untouched):
    run.hang("train")
    status, output = end(run.go())
    assert status == 75, output
    assert "train/class" in output
    assert output.endswith("before the first step; run the same command to start again\n")
    assert not list((run.folder / "checkpoints").glob("ep*"))
    assert finish(recipe, run.runs) == untouched


@pytest.mark.parametrize(("text", "at", "rank"), [("train/class1", 7, 0), ("val/class2/1.jpg", 1, 1)])
def test_the_other_process_ends_too(run, recipe, text, at, rank):
    run.hang(text, at)
    process = run.go(processes=2, rank=rank)
    wait_for(run.hangs.exists, process)
    require_saved(run, recipe, None, process, says=text)


def test_evaluate_says_what_hangs(run, recipe, tmp_path):
    assert run_here(recipe, f"runs_folder={run.runs}", "max_duration=1ep") == 0
    run.hang("val/class2/1.jpg")
    code = (
        "import runpy, sys, entrypoint; import recipes.evaluate as command; entrypoint.main = command.main; "
        f"runpy.run_path({HANGING!r}, run_name='__main__')"
    )
    job = ["-c", code, str(tmp_path / "switch"), str(recipe), f"runs_folder={run.runs}", "max_duration=1ep"]
    status, output = end(start(job))
    assert status == 1
    assert "val/class2/1.jpg" in output.splitlines()[-1]
    assert "Traceback" not in output


STUBBORN = """
import multiprocessing, os, sys, time
from recipes.cli import run_command

class Stubborn(multiprocessing.Process):
    def kill(self): pass  # as one that waits for a device
    terminate = kill

def main():
    Stubborn(target=time.sleep, args=(3600,), daemon=True).start()
    print(multiprocessing.active_children()[0].pid, flush=True)
    if sys.argv[1] == "error":
        raise ValueError("a bug")
    return int(sys.argv[1])

sys.exit(run_command(main))
"""


@pytest.mark.parametrize(("how", "status"), [("75", 75), ("0", 0), ("error", 1)])
def test_a_worker_that_no_signal_ends_does_not_keep_a_command(how, status):
    found, output = end(start(["-c", STUBBORN, how]))
    os.kill(int(output.splitlines()[0]), signal.SIGKILL)
    assert found == status
    assert ("ValueError: a bug" in output) == (how == "error")
