"""What the benchmark makes of runs' curves; the runs themselves take an hour."""

import json

import pytest

from benchmarks.time_to_accuracy import Curve, baseline_overrides, compare, draw, read_curve, table
from recipes.load import load_config
from recipes.results import Evaluation
from tests.support import ROOT


def a_curve(seed, *points, evaluation=10.0):
    """(epoch, training seconds, top1)...; each evaluation takes `evaluation` seconds more of the whole."""
    trained = tuple(Evaluation(*point) for point in points)
    whole = (entry._replace(wall_seconds=entry.wall_seconds + i * evaluation) for i, entry in enumerate(trained, 1))
    return Curve(seed, trained, tuple(whole))


BASELINE = [a_curve(0, (5, 50, 0.4), (10, 100, 0.58)), a_curve(1, (5, 52, 0.4), (10, 104, 0.62))]


def test_the_time_is_that_to_the_baselines_mean_end():
    recipe = [a_curve(0, (5, 30, 0.5), (6, 40, 0.7)), a_curve(1, (5, 30, 0.59))]
    found = compare(BASELINE, recipe)
    assert found["target_top1"] == pytest.approx(0.6)
    assert found["trained"]["baseline_seconds"] == pytest.approx(102)
    assert found["trained"]["recipe_seconds"] == [pytest.approx(35), None], "linear between evaluations; never"
    assert found["trained"]["recipe_epochs"] == [pytest.approx(5.5), None]
    assert found["trained"]["ratios"] == [pytest.approx(35 / 102), None]
    assert found["whole"]["ratios"] == [pytest.approx(50 / 122), None], "with one and a half evaluations, and with two"


def test_a_seed_that_never_arrives_is_reported(tmp_path):
    curves = {"baseline": BASELINE, "recipe": [a_curve(0, (5, 30, 0.65)), a_curve(1, (5, 30, 0.59))]}
    found = compare(curves["baseline"], curves["recipe"])
    baseline, recipe = table(found, curves).splitlines()[2:]
    assert baseline == "| baseline | 60.00 ± 2.83 | 10.0 | 102 | 1 | 1 |"
    assert (
        recipe
        == "| recipe | 62.00 ± 4.24 | 5.0 (1 of 2 never) | 30 (1 of 2 never) | "
        + " | ".join(f"{ratio:.3f} (1 of 2 never)" for ratio in (30 / 102, 40 / 122))
        + " |"
    )
    draw(found, curves, tmp_path / "accuracy.png", {"baseline": 64, "recipe": 48})
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_training_time_is_a_runs_own_without_evaluation(tmp_path):
    line = {"batch": 9, "epoch": 3, "wall_seconds": 50.0, "eval/64/top1": 0.5, "time/train_seconds": 30.0}
    line |= {"time/loader_wait_seconds": 4.0, "time/checkpointing_seconds": 2.0, "time/eval_seconds": 14.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "summary.json").write_text("{}")
    curve = read_curve(tmp_path, 7, 64)
    assert curve == Curve(7, (Evaluation(3, 36.0, 0.5),), (Evaluation(3, 50.0, 0.5),))


@pytest.mark.parametrize("name", ["cifar10", "p3"])
def test_the_baseline_is_the_recipe_without_a_technique(name):
    yaml = ROOT / "yamls" / f"{name}.yaml"
    recipe, config = load_config(yaml), load_config(yaml, baseline_overrides(yaml, [], 24))
    assert not any(value for key, value in config.algorithms if key != "composer")
    assert (config.epochs, config.data.train_size) == (24, recipe.eval.sizes[-1])
    assert config.optimizer == recipe.optimizer
    assert config.scheduler == recipe.scheduler
    assert config.data.augment == recipe.data.augment
    assert config.device_batch_size == recipe.device_batch_size
