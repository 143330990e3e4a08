"""The program as it is started: several processes, signals, exit statuses; test_two_nodes.py has several nodes."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.support import ROOT, end, launcher, run_here, start, wait_for
from tests.support import summary_of as summary

RECIPE = """
run_name: processes
device: cpu
max_duration: 3ep
global_batch_size: 8
model: {name: resnet18, sync_batchnorm: true}
optimizer: {lr: 0.05}
data: {path: IMAGES, train_size: 32, workers: 1}
eval: {sizes: [32]}
checkpoints: {interval: 2ba, keep: 9}
loggers: {progress_bar: false, tensorboard: false, interval: 1}
algorithms:
  label_smoothing: {}
  ema: {half_life: 3ba}
  fixres: {size: 40, train: classifier}
"""
ENTRY = [str(ROOT / "entrypoint.py")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, images):
    """A YAML without random mixing, so that any number of processes computes the same."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.replace("IMAGES", str(images)))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where this module's runs go."""
    return tmp_path_factory.mktemp("runs")


def losses(runs, name):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def two(recipe, runs):
    """The run of two processes on one node, once for all tests."""
    status, output = end(start([*launcher(2), *ENTRY, str(recipe), f"runs_folder={runs}", "run_name=two"]))
    assert status == 0, output
    return summary(runs, "two")


@pytest.fixture(scope="module")
def one(recipe, runs):
    """The run of one process that nobody touched."""
    assert run_here(recipe, f"runs_folder={runs}", "run_name=one") == 0
    return summary(runs, "one")


def test_two_processes_train_as_one_does(one, two, runs):
    assert (one["batches"], one["samples"]) == (two["batches"], two["samples"]) == (9, 72)
    assert one["config_digest"] == two["config_digest"]
    # The same sums in another order: rounding at first, which training then amplifies.
    assert losses(runs, "two")[:3] == pytest.approx(losses(runs, "one")[:3], rel=2e-5)
    assert losses(runs, "two") == pytest.approx(losses(runs, "one"), rel=5e-3)
    # Every evaluation image counts once, though nine are not divisible by two processes.
    assert two["top1"] * 9 == pytest.approx(round(two["top1"] * 9), abs=1e-3)


def test_killed_and_stopped_it_goes_on_to_the_same_weights(one, runs, recipe):
    command = [sys.executable, *ENTRY, str(recipe), f"runs_folder={runs}", "run_name=hit"]
    saved = runs / "hit" / "checkpoints"
    process = start(command)
    wait_for((saved / "ep000-ba000002.json").exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    assert end(process)[0] == -signal.SIGKILL
    # As far as it may have come before it was hit: keep the first two steps only.
    for file in saved.iterdir():
        if not file.name.startswith("ep000-ba000002"):
            file.unlink()
    process = start(command)
    wait_for((saved / "ep001-ba000004.json").exists, process)
    os.killpg(process.pid, signal.SIGTERM)  # the loader's workers too, as scancel does
    status, output = end(process)
    assert status in (75, 0), output  # 0: it was quicker than the signal
    assert status == 0 or "saved" in output.splitlines()[-1]
    assert run_here(*command[2:]) == 0
    hit = summary(runs, "hit")
    assert hit["weights_sha256"] == one["weights_sha256"]
    assert len(hit["resumed_from"]) >= 1


def test_stopped_with_two_processes_it_goes_on_with_one(one, two, runs, recipe):
    job = [*ENTRY, str(recipe), f"runs_folder={runs}", "run_name=shrinks"]
    process = start([*launcher(2), *job])
    metrics = runs / "shrinks" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and "train/loss" in metrics.read_text(), process)  # its first step is done
    os.killpg(process.pid, signal.SIGTERM)
    status, output = end(process)
    assert status == 75, output
    assert run_here(*job[1:]) == 0
    shrinks = summary(runs, "shrinks")
    (resumed_from,) = shrinks["resumed_from"]
    stopped_at = int(re.search(r"-ba(\d+)\.safetensors$", resumed_from)[1])
    assert (shrinks["batches"], shrinks["samples"]) == (one["batches"], one["samples"])
    # The same samples and rates; sums in another order. The evaluation is of EMA's average, which carried over.
    assert losses(runs, "shrinks")[:stopped_at] == losses(runs, "two")[:stopped_at]
    assert losses(runs, "shrinks")[:3] == pytest.approx(losses(runs, "one")[:3], rel=2e-5)
    assert losses(runs, "shrinks") == pytest.approx(losses(runs, "one"), rel=5e-3)
    loss = shrinks["eval_by_size"]["32"]["loss"]
    assert loss == pytest.approx(one["eval_by_size"]["32"]["loss"], rel=5e-3)


LATE_FIRST = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from recipes.cli import run_command
from recipes.errors import InputError

def main():
    if os.environ["LOCAL_RANK"] == "0":
        time.sleep(3)
    raise InputError("wrong")

sys.exit(run_command(main))
"""


def test_the_first_process_says_what_is_wrong_even_when_it_is_last_to_find_it(tmp_path):
    program = tmp_path / "late.py"
    program.write_text(LATE_FIRST)
    status, output = end(start([*launcher(2), str(program)]))
    assert (status, output.splitlines().count("wrong")) == (2, 1)


def test_a_wrong_config_is_status_2_of_the_launcher_too(recipe, runs):
    status, output = end(start([*launcher(2), *ENTRY, str(recipe), "modle.name=x", "max_duration=3"]))
    assert status == 2
    assert "Traceback" not in output
    assert [line for line in output.splitlines() if "modle" in line and "did you mean" in line]
    assert [line for line in output.splitlines() if line.startswith("'max_duration=3'")]


@pytest.mark.parametrize(
    ("program", "left"),
    [
        (ENTRY, {"WORLD_SIZE": "2"}),
        (["-m", "recipes.find_lr"], {"WORLD_SIZE": "two"}),
    ],
)
def test_what_a_launcher_left_in_the_environment_is_one_line(recipe, runs, program, left):
    launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    command = [sys.executable, *program, str(recipe), f"runs_folder={runs}", "run_name=left"]
    done = subprocess.run(command, cwd=ROOT, env=environment | left, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.split(":")[0]) == (2, "WORLD_SIZE")
    assert "unset WORLD_SIZE" in line
    assert not (runs / "left").exists()
