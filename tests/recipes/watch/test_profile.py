import gzip
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from recipes.checkpoints.interrupt import Interrupted
from recipes.watch import figures
from recipes.watch.profile import seconds_by_part, trace_starts

RECIPE = """
run_name: {name}
max_duration: 4ep
device: cpu
device_batch_size: 4
model: {{name: timm/test_resnet}}
data: {{path: x, workers: 0, train_size: 32}}
eval: {{sizes: [32], device_batch_size: 8, interval: 4}}
loggers: {{interval: 1, tensorboard: false, progress_bar: false}}
algorithms:
  mixup: {{}}
  label_smoothing: {{}}
  ema: {{half_life: 4ba}}
  progressive_resizing: {{initial_scale: 0.5, delay_fraction: 0.5, finetune_fraction: 0.5, size_increment: 8}}
"""
PHASES = [f"event/{name}" for name in ("dataloader", "batch", "train_batch", "forward", "loss", "backward")]


@pytest.fixture
def recipe(tmp_path):
    def write(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(name=name))
        return path

    return write


def events_of(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_profiled_run_ends_with_the_same_weights_and_shows_where_its_steps_go(train, recipe, tmp_path, monkeypatch):
    (status, plain), (again, profiled) = train(recipe("plain")), train(recipe("profiled"), "profile=true")
    assert status == again == 0
    assert profiled["weights_sha256"] == plain["weights_sha256"] is not None
    assert profiled["config_digest"] == plain["config_digest"]
    assert not (tmp_path / "plain" / "profile").exists()
    look_at_profile(tmp_path / "profiled" / "profile")
    for first, second in (("true", "true"), ("false", "true")):
        interrupted_and_resumed(train, recipe, tmp_path, monkeypatch, first, second, plain["weights_sha256"])


def look_at_profile(folder):
    # Twelve steps at each size: the profiler starts as soon as four are left, and the first of those is not traced.
    for size, batch in ((16, 12), (32, 24)):
        events = events_of(folder / f"{size}px.pt.trace.json.gz")
        marks = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        for phase in PHASES:
            assert marks.count(phase) == 3, phase
        assert any(name.startswith("algorithm/Mix/") for name in marks)
        assert any(event.get("cat") == "cpu_op" and event["name"] == "aten::convolution" for event in events)
        (forward, *_) = (event for event in events if event["name"] == "event/forward" and event["ph"] == "X")
        inside = [
            event
            for event in events
            if event["name"] == "aten::convolution" and 0 <= event["ts"] - forward["ts"] < forward["dur"]
        ]
        assert inside, "operators lie inside the marks, on one clock"
        found = json.loads((folder / f"{size}px.json").read_text())
        assert (found["size"], found["images"], found["steps"], found["batch"]) == (size, 4, 3, batch)
        assert sum(found["shares"].values()) == pytest.approx(found["seconds"], rel=1e-6)
        assert min(found["shares"].values()) >= 0
        largest = sorted(found["shares"], key=found["shares"].get)[-5:]
        assert {"forward pass", "backward pass"} & set(largest)
        assert {"algorithm Mix", "algorithm PortableEMA"} <= set(found["shares"])
        assert found["plain_step_seconds"] > 0
        shares = [share for _, share, _ in found["operators"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1
        assert (folder / f"{size}px.pt.trace.json.gz").stat().st_size < 2e6
    page = (folder / "summary.md").read_text()
    assert "| ms of a step | 16 px | share | 32 px | share |" in page
    assert "| all |" in page
    assert "- 16 px: 3 steps of 4 images a device up to batch 12" in page


def interrupted_and_resumed(train, recipe, tmp_path, monkeypatch, first, second, weights):
    name = f"part-{first}-{second}"

    def die_at_15(self, state, logger, real=figures.Figures.batch_end):
        real(self, state, logger)
        if int(state.timestamp.batch) == 15:
            raise Interrupted("stop", 75)

    with monkeypatch.context() as patch:
        patch.setattr(figures.Figures, "batch_end", die_at_15)
        status, summary = train(recipe(name), f"profile={first}", "checkpoints.interval=7ba")
    assert (status, summary["finished"]) == (75, False)
    folder = tmp_path / name / "profile"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*")} if first == "true" else {}
    assert bool(before) == (first == "true")
    status, summary = train(recipe(name), f"profile={second}", "checkpoints.interval=7ba")
    assert (status, summary["finished"]) == (0, True)
    assert ["ep002-ba000014" in name for name in summary["resumed_from"]] == [True]  # inside the third epoch
    assert summary["weights_sha256"] == weights
    if first == "true":  # its trace is left alone
        assert (folder / "16px.json").stat().st_mtime_ns == before["16px.json"]
    if second == "true":
        assert (folder / "32px.pt.trace.json.gz").exists()
        assert "32 px" in (folder / "summary.md").read_text()


def test_a_folder_that_cannot_be_written_does_not_stop_the_training(train, recipe, tmp_path, caplog):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "profile").write_text("a file")
    status, result = train(recipe("blocked"), "profile=true", "max_duration=3ep")
    assert (status, result["finished"]) == (0, True)
    assert (tmp_path / "blocked" / "profile").read_text() == "a file"
    assert "the profile cannot be written" in (tmp_path / "blocked" / "log.txt").read_text()


def test_time_counts_to_the_innermost_mark_that_is_a_part():
    with (
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as traced,
        record_function("event/epoch"),
        record_function("event/batch"),
        record_function("event/train_batch"),
    ):
        for mark in ("event/backward", "algorithm/MixUp/event/before_forward"):
            with record_function(mark):
                torch.ones(100).sum()
    (all_,) = (event.cpu_time_total / 1e6 for event in traced.events() if event.name == "event/batch")
    parts = seconds_by_part(traced, 1.0)
    assert parts["figures, checkpoints, the rest"] == pytest.approx(1 - all_)
    named = ["optimizer", "to the device, normalisation, gradients to zero", "backward pass"]
    named.append("algorithm MixUp")
    assert sum(parts[name] for name in named) == pytest.approx(all_)
    assert min(parts[name] for name in named) > 0 == parts["forward pass"]


def test_where_traces_begin():
    plan = [(16, 30), (16, 30), (32, 6), (32, 6), (48, 3), (48, 3), (16, 30)]
    assert trace_starts(plan, 0, 0) == {16: (0, 10), 32: (3, 2)}, "48 px has too few steps in an epoch"
    assert trace_starts(plan, 0, 18) == {16: (1, 0), 32: (3, 2)}, "not in two epochs"
    assert trace_starts(plan, 3, 2) == {32: (3, 2), 16: (6, 10)}
    assert trace_starts(plan, 3, 3) == {16: (6, 10)}
