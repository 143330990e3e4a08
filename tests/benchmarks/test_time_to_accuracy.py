"""What the benchmark makes of runs' curves; the runs themselves take an hour."""

import json
from pathlib import Path

import pytest

from benchmarks.time_to_accuracy import (
    REFERENCE,
    Side,
    compare,
    draw,
    read_curve,
    read_side,
    table,
    verdicts,
    without_techniques,
)
from recipes.load import load_config
from recipes.results import Evaluation
from tests.support import ROOT


def a_side(*curves, size=64):
    """Curves of (epoch, training seconds, top1)..."""
    return Side(size, [tuple(Evaluation(*point) for point in curve) for curve in curves])


REFERENCE_RUNS = a_side([(5, 50, 0.4), (10, 100, 0.58)], [(5, 52, 0.4), (10, 104, 0.62)])
PLAIN_RUNS = a_side([(3, 30, 0.3), (6, 60, 0.5)], [(3, 30, 0.3), (6, 60, 0.5)])


def a_run(folder, *lines):
    """A run's folder with a metrics.jsonl of (epoch, seconds of training, {size: top1})."""
    folder.mkdir(parents=True)
    entries = []
    for epoch, seconds, top1 in lines:
        phases = {"train": seconds, "loader_wait": 4.0, "checkpointing": 2.0, "evaluation": 14.0 * epoch}
        entry = {"batch": 3 * epoch, "epoch": epoch, "wall_seconds": sum(phases.values())}
        entry |= {f"time/{name}_seconds": value for name, value in phases.items()}
        entries.append(json.dumps(entry | {f"eval/{size}/top1": value for size, value in top1.items()}))
    (folder / "metrics.jsonl").write_text("\n".join(entries) + "\n")
    (folder / "summary.json").write_text("{}")
    return folder


def test_the_time_is_that_to_the_mean_end_of_the_targets_runs():
    recipe = a_side([(5, 30, 0.5), (6, 40, 0.7)], [(5, 30, 0.59)])
    found = compare(REFERENCE_RUNS, recipe)
    assert found["top1"] == pytest.approx(0.6)
    assert found["own"] == {"epochs": pytest.approx(10), "seconds": pytest.approx(102)}
    assert found["seconds"] == [pytest.approx(35), None], "linear between evaluations; never"
    assert found["epochs"] == [pytest.approx(5.5), None]
    assert found["ratios"] == [pytest.approx(35 / 102), None]


def test_a_run_that_never_reaches_a_target_is_reported(tmp_path):
    sides = {
        "reference": REFERENCE_RUNS,
        "plain": PLAIN_RUNS,
        "recipe": a_side([(5, 30, 0.65)], [(5, 30, 0.59)], size=80),
    }
    _, _, reference, plain, recipe = (line.strip("| ").split(" | ") for line in table(sides).splitlines())
    assert reference[:5] == ["reference", "10", "102 ± 3", "64 px", "60.00 ± 2.83"]
    assert reference[5:] == ["1: 10.0 epochs, 102 s", "1.278 ± 0.025: 7.5 ± 0.4 epochs, 77 ± 2 s"]
    assert plain[3:] == ["64 px", "50.00 ± 0.00", "never", "1: 6.0 epochs, 60 s"]
    assert recipe[3:5] == ["80 px", "62.00 ± 4.24"]
    assert recipe[5:] == [
        "0.294 (1 of 2 never): 5.0 epochs, 30 s",
        "0.500 ± 0.000: 5.0 ± 0.0 epochs, 30 ± 0 s",
    ]
    missed, met = verdicts(sides)
    assert missed == "reference's accuracy in at most 0.35 of its time: 0.294 (1 of 2 never), not met"
    assert met == "plain's accuracy in at most 0.7 of its time: 0.500 ± 0.000, met"
    draw(sides, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_training_time_is_a_runs_own_without_evaluation(tmp_path):
    assert read_curve(a_run(tmp_path / "run", (3, 30.0, {64: 0.5})), 64) == (Evaluation(3, 36.0, 0.5),)


def test_a_side_is_tested_at_the_size_at_which_its_runs_end_highest(tmp_path):
    runs = [
        a_run(tmp_path / "0", (1, 10.0, {64: 0.3, 80: 0.1}), (2, 20.0, {64: 0.5, 80: 0.55})),
        a_run(tmp_path / "1", (1, 10.0, {64: 0.3, 80: 0.1}), (2, 20.0, {64: 0.5, 80: 0.40})),
    ]
    side = read_side(runs, [64, 80])
    assert (side.size, side.final) == (64, pytest.approx(0.5)), "by the mean, not by the best run"


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet", "p3"])
def test_the_plain_side_is_the_recipe_without_a_technique(name):
    yaml = ROOT / "yamls" / f"{name}.yaml"
    recipe, config = load_config(yaml), load_config(yaml, without_techniques(yaml, []))
    assert not any(value for key, value in config.algorithms if key != "composer")
    assert config.model_copy(update={"algorithms": recipe.algorithms}) == recipe


def test_the_reference_is_torchvisions():
    yaml = Path(ROOT / "yamls" / "tiny-imagenet.yaml")
    config = load_config(yaml, [*without_techniques(yaml, []), *REFERENCE])
    ours, theirs = config.data.augment, load_config(ROOT / "yamls" / "medium.yaml").data.augment
    assert ours == theirs, "medium.yaml sets none, so these are RandomResizedCrop's defaults and a flip of one half"
    assert (config.optimizer.momentum, config.optimizer.weight_decay, config.optimizer.nesterov) == (0.9, 1e-4, False)
    assert (config.scheduler.name, config.data.train_size) == ("cosine", 64)
    assert config.eval.crop_ratio == 224 / 256
