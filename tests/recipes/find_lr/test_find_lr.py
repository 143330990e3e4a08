"""The command on real runs: what it leaves, what it does not touch, several processes, wrong input."""

import csv
import json
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from recipes.find_lr.__main__ import peaks, present_lr, propose
from recipes.load import load_config
from recipes.schedule import epoch_plan, peak_lr
from tests.support import end, start_two

RECIPE = """
run_name: tiny
device: cpu
max_duration: 4ep
device_batch_size: {40: 8, 48: 4}
model: {name: timm/test_resnet}
optimizer: {lr: 0.05}
data: {path: IMAGES, train_size: 40, workers: 0}
eval: {sizes: [40]}
loggers: {progress_bar: false, tensorboard: false}
algorithms:
  channels_last: {}
  mixup: {alpha: 0.2}
  cutmix: {alpha: 1.0}
  label_smoothing: {}
  ema: {half_life: 3ba}
  fixres: {size: 48}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.replace("IMAGES", str(images)))
    return path


@pytest.fixture
def find_lr(command, recipe, tmp_path):
    """The command on the recipe: (status, stdout, stderr)."""
    return partial(command, "find_lr", recipe, f"runs_folder={tmp_path}")


def read(folder):
    """The curves of lr.csv by run: {"0": [{"lr": ..., "loss": ...}, ...]}."""
    runs = {}
    with (folder / "lr.csv").open() as file:
        for row in csv.DictReader(file):
            runs.setdefault(row["run"], []).append({key: float(value) for key, value in row.items()})
    return runs


def test_a_new_user_gets_a_line_to_paste_and_four_files(find_lr, tmp_path):
    status, out, err = find_lr("--runs", "2", "--steps", "40", "--start-lr", "1e-4", "--end-lr", "20")
    folder = tmp_path / "tiny" / "find_lr"
    assert sorted(path.name for path in folder.iterdir()) == ["lr.csv", "lr.html", "lr.json", "lr.png"]
    left = json.loads((folder / "lr.json").read_text())
    assert status == (0 if left["chosen"] else 1)
    assert max(map(len, out.splitlines()[:-3])) <= 80, "all but the three paths"
    assert [line.split(":")[0] for line in err.splitlines()] == ["run 1, seed 17", "run 2, seed 18"]
    runs = read(folder)
    assert [runs[run][0]["seed"] for run in ("0", "1")] == [17, 18]
    for run in runs.values():
        np.testing.assert_allclose([row["lr"] for row in run], np.geomspace(1e-4, 20, 40)[: len(run)])
    assert runs["0"][0]["loss"] != runs["1"][0]["loss"], "other seeds, other networks"
    assert (left["image_size"], left["global_batch_size"]) == (40, 8)
    assert (folder / "lr.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "lr.html").read_text()
    assert "<svg" in page
    assert not re.search(r'(src|href)="https?:', page)
    if left["chosen"]:
        lines = out[out.index("optimizer:") :].split("\n\n")[0]
        assert yaml.safe_load(lines) == {"optimizer": left["optimizer"]}
        assert lines in page


def test_a_ramp_that_stops_too_early_says_so(find_lr, tmp_path):
    said = "still falling at the last rate, 0.01: higher rates may be better"
    status, out, _ = find_lr(
        "--runs", "1", "--steps", "60", "--start-lr", "1e-3", "--end-lr", "1e-2", "--smoothing", "0.98"
    )
    assert (status, said in " ".join(out.split())) == (0, True)
    assert said in (tmp_path / "tiny" / "find_lr" / "lr.html").read_text()


def files(folder):
    """Content of every file of a run, but for the test's own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "find_lr" not in path.parts]
    return {path: path.read_bytes() for path in paths}


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_a_run_is_as_if_the_test_had_not_been_and_two_tests_give_the_same_bits(find_lr, train, recipe, tmp_path):
    plain = train(recipe, "run_name=plain", "max_duration=2ep")[1]
    same = ("--runs", "1", "--steps", "20", "max_duration=2ep")
    find_lr(*same)
    curves = (tmp_path / "tiny" / "find_lr" / "lr.csv").read_bytes()
    status, tested = train(recipe, "max_duration=2ep")
    assert (status, tested["weights_sha256"]) == (0, plain["weights_sha256"])
    left = files(tmp_path / "tiny")
    assert any(path.parent.name == "checkpoints" for path in left)
    torch.manual_seed(5)  # a state that no test begins or ends with by itself
    before = generators()
    find_lr(*same)
    assert generators() == before
    assert files(tmp_path / "tiny") == left, "checkpoints, summary and figures of the finished run"
    assert (tmp_path / "tiny" / "find_lr" / "lr.csv").read_bytes() == curves
    status, out, _ = find_lr(*same, "--divergence", "1.01", "--smoothing", "0")
    assert (status, "No suggestion" in out) == (1, True)


@pytest.mark.parametrize(("reference", "devices"), [(None, 4), (8, 1), (2048, 4)])
def test_the_line_trains_at_the_rate_that_was_tested(recipe, reference, devices):
    """At the tested batch it is the suggested rate, at others in proportion, by what training itself computes."""
    overrides = [f"optimizer.lr_batch_size={'null' if reference is None else reference}"]
    config = load_config(recipe, overrides)
    line = propose(config, 0.123, batch_size=8)
    assert line["lr_batch_size"] == (reference or 8)
    after = load_config(recipe, [*overrides, *(f"optimizer.{key}={value}" for key, value in line.items())])
    assert peak_lr(after, epoch_plan(after, devices)) == pytest.approx(0.123 * devices, rel=0.05)
    found = {count: rest for count, *rest in peaks(config, line)}
    assert found[devices] == [8 * devices, pytest.approx(peak_lr(after, epoch_plan(after, devices)))]
    assert present_lr(config, 16) == pytest.approx(0.05 if reference is None else 0.05 * 16 / reference)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--runs", "0"], "--runs: '0' is not a whole number from 1 to 100"),
        (["--steps", "3"], "--steps: '3' is not a whole number from 20"),
        (["--start-lr", "nan"], "--start-lr: 'nan' is not a number"),
        (["--smoothing", "1"], "--smoothing: '1' is not a number from 0 to 0.999"),
        (["--start-lr", "1", "--end-lr", "0.5"], "--start-lr: 1 is not below --end-lr 0.5"),
        (["optimiser.lr=1"], "optimiser"),
        (["model.name=resnt50"], "resnt50"),
        (["data.path=nowhere"], "nowhere"),
        (["device_microbatch_size=4", "--batch-size", "6"], "device_microbatch_size: 4 does not divide"),
        (["other.yaml"], "one YAML file at a time"),
    ],
)
def test_wrong_input_is_a_line_and_status_2(refused, recipe, arguments, said, tmp_path):
    assert said in refused("find_lr", recipe, f"runs_folder={tmp_path}", *arguments)
    assert not (tmp_path / "tiny").exists()


def test_two_processes_see_the_curve_of_one_with_the_same_global_batch(find_lr, tmp_path, recipe):
    # Without mixing, whose draws belong to a process, and with statistics over all: the same sums in another order.
    same = ["algorithms.mixup=off", "algorithms.cutmix=off", "model={name: resnet18, sync_batchnorm: true}"]
    flags = ["--batch-size", "8", "--steps", "20", "--runs", "1", "--start-lr", "1e-4", "--end-lr", "1"]
    job = ["-m", "recipes.find_lr", str(recipe), f"runs_folder={tmp_path}", "run_name=two", *same, *flags]
    processes = start_two(job)
    assert find_lr("run_name=one", *same, *flags)[0] in (0, 1)
    for status, output in map(end, processes):
        assert status in (0, 1), output
    two, one = (read(Path(tmp_path, name, "find_lr"))["0"] for name in ("two", "one"))
    assert json.loads((tmp_path / "two" / "find_lr" / "lr.json").read_text())["devices"] == 2
    assert len(two) == len(one)
    assert [row["lr"] for row in two] == [row["lr"] for row in one]
    # Above 0.1 the run diverges, and with it the rounding of the two orders of summing.
    stable = sum(row["lr"] < 0.1 for row in one)
    assert stable >= 15
    assert [row["loss"] for row in two[:stable]] == pytest.approx([row["loss"] for row in one[:stable]], rel=1e-5)
