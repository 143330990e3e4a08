"""The program as it is started: several processes, signals, exit statuses; test_two_nodes.py has several nodes."""

import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress

import pytest

from entrypoint import main
from recipes.cli import run_command
from recipes.find_lr import __main__ as find_lr
from tests.support import LIMIT, ROOT, end, launcher, output_of, run_here, run_two, start, wait_for
from tests.support import summary_of as summary

RECIPE = """
run_name: processes
device: cpu
max_duration: 3ep
global_batch_size: 8
model: {name: timm/resnet10t, sync_batchnorm: true}
optimizer: {lr: 0.01}
data: {path: IMAGES, train_size: 32, workers: 1}
eval: {sizes: [32]}
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
    return tmp_path_factory.mktemp("runs")


def losses(runs, name):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def two(recipe, runs):
    """A run of two processes on one node."""
    run_two([*ENTRY, str(recipe), f"runs_folder={runs}", "run_name=two"])
    return summary(runs, "two")


@pytest.fixture(scope="module")
def one(recipe, runs):
    """The same run with one process."""
    assert run_here(recipe, f"runs_folder={runs}", "run_name=one") == 0
    return summary(runs, "one")


def test_two_processes_train_like_one(one, two, runs):
    assert (one["batches"], one["samples"]) == (two["batches"], two["samples"]) == (9, 72)
    assert one["config_digest"] == two["config_digest"]
    # The same sums in another order: rounding at first, which training then amplifies.
    assert losses(runs, "two")[:3] == pytest.approx(losses(runs, "one")[:3], rel=2e-5)
    assert losses(runs, "two") == pytest.approx(losses(runs, "one"), rel=5e-3)
    # Every evaluation image counts once, though nine are not divisible by two processes.
    assert two["top1"] * 9 == pytest.approx(round(two["top1"] * 9), abs=1e-3)


def test_a_run_stopped_with_two_processes_resumes_with_one(one, two, runs, recipe):
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


def test_sigterm_while_it_exits_does_not_replace_its_status(one, runs, recipe):
    process = start([*ENTRY, str(recipe), f"runs_folder={runs}", "run_name=one"])
    wait_for(lambda: "one is finished" in output_of(process), process)
    while process.poll() is None:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


def test_a_signal_ends_a_run_that_still_waits_for_its_bucket(recipe, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(LIMIT)
        keys = {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "something",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        keys |= {"S3_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        words = [*ENTRY, str(recipe), f"runs_folder={tmp_path}", "checkpoints.folder=s3://bucket/runs"]
        process = start(words, **keys)
        _waiting = silent.accept()
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        status, output = end(process)
    assert (status, time.monotonic() - began < 10) == (75, True), output
    assert output.endswith("interrupted (SIGTERM) before the first step; run the same command again\n")


LATE_FIRST = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from entrypoint import main
from recipes.cli import run_command

if os.environ["LOCAL_RANK"] == "0":
    time.sleep(3)
sys.exit(run_command(main))
"""


def test_the_first_process_reports_a_wrong_config_even_if_it_finds_it_last(recipe, tmp_path):
    program = tmp_path / "late.py"
    program.write_text(LATE_FIRST)
    status, output = end(start([*launcher(2), str(program), str(recipe), "modle.name=x", "max_duration=3"]))
    assert (status, "Traceback" in output) == (2, False)
    (line,) = (line for line in output.splitlines() if "modle" in line)
    assert "did you mean" in line
    assert sum(line.startswith("'max_duration=3'") for line in output.splitlines()) == 1


def test_a_run_folder_that_cannot_be_used_is_one_line(recipe, tmp_path):
    (tmp_path / "processes" / "config.yaml").mkdir(parents=True)
    status, output = end(start([*launcher(2), *ENTRY, str(recipe), f"runs_folder={tmp_path}"]))
    assert (status, "Traceback" in output) == (2, False), output
    assert output.count("config.yaml: not a regular file; move it away") == 1


def test_a_launchers_leftover_environment_is_one_line(recipe, runs, monkeypatch, capsys):
    for name in ("LOCAL_RANK", "RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    words = [str(recipe), f"runs_folder={runs}", "run_name=left"]
    for command, found in ((main, "2"), (find_lr.main, "two")):
        monkeypatch.setenv("WORLD_SIZE", found)
        monkeypatch.setattr(sys, "argv", [*ENTRY, *words])
        assert run_command(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("WORLD_SIZE: ")
        assert "unset WORLD_SIZE" in line
    assert not (runs / "left").exists()
