import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from recipes.ablate import Outcome, PlannedRun, choose_variants, conflicts, make_plan, techniques
from recipes.ablate.compare import (
    accuracy_table,
    compare,
    cost_table,
    describe,
    effect_table,
    pareto,
    pooled_std,
    write,
)
from recipes.load import load_config
from recipes.output import show
from recipes.resolved import config_digest, resolved
from recipes.results import Results
from tests.recipes.test_results import leave
from tests.support import ROOT

DEMO, P3 = ROOT / "yamls" / "demo.yaml", ROOT / "yamls" / "p3.yaml"


def planned(path, *overrides, seeds=(0,), only=(), processes=1):
    return make_plan(path, overrides, seeds=seeds, only=only, processes=processes)


@pytest.mark.parametrize("path", [DEMO, P3], ids=lambda path: path.stem)
def test_each_technique_is_taken_away_once_and_stands_alone_once(path, tmp_path):
    plan = planned(path, f"runs_folder={tmp_path}", seeds=(0, 1))
    names = techniques(plan.recipe.algorithms)
    assert {"blurpool", "mixup", "cutmix", "ema", "fixres"} <= set(names)
    by_name = {run.variant.name: run.config.algorithms for run in plan.runs if run.seed == 0}
    assert len(plan.runs) == 2 * len(by_name) == 2 * (2 * len(names) + 2)
    assert by_name["recipe"] == plan.recipe.algorithms
    assert techniques(by_name["baseline"]) == ()
    for name in names:
        assert techniques(by_name[f"without-{name}"]) == tuple(other for other in names if other != name)
        assert techniques(by_name[f"with-{name}"]) == (name,)
        assert getattr(by_name[f"with-{name}"], name) == getattr(plan.recipe.algorithms, name)
    assert len({run.digest for run in plan.runs}) == len(plan.runs) == len({run.folder for run in plan.runs})
    # Nothing else differs from the recipe.
    changed = ("algorithms", "seed", "run_name", "runs_folder", "loggers")
    same = {key: getattr(plan.recipe, key) for key in changed}
    assert all(run.config.model_copy(update=same) == plan.recipe for run in plan.runs)
    assert not list(tmp_path.iterdir())


def ran(top1, seconds, curve=(), size=32):
    """A finished run."""
    summary = {
        "finished": True,
        "wall_seconds": seconds,
        "images_per_second": 1000 / seconds,
        "eval_by_size": {str(size): {"top1": top1}, "16": {"top1": top1 / 2}},
        "versions": {"device": "cpu"},
    }
    names = ("epoch", "wall_seconds", f"eval/{size}/top1")
    return Results(None, summary, dict(zip(names, np.array(curve, float).reshape(-1, 3).T, strict=True)), ())


COORDINATE = st.integers(0, 6).map(float) | st.floats(0, 10)


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=12))
def test_the_front_is_what_no_other_point_beats(points):
    kept = pareto(points)
    assert kept <= set(points)
    for cost, gain in points:
        rivals = [other for other in points if other[0] <= cost and other[1] >= gain and other != (cost, gain)]
        assert ((cost, gain) in kept) == (not rivals)


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=5))
def test_seed_noise_pools_the_squares_about_each_mean(groups):
    squares = sum((value - sum(group) / len(group)) ** 2 for group in groups for value in group)
    freedom = sum(len(group) - 1 for group in groups)
    expected = None if not freedom else pytest.approx((squares / freedom) ** 0.5, abs=1e-12)
    assert pooled_std(groups) == expected


@pytest.fixture
def results():
    """Of a recipe with a, b and c over two seeds: one run without a failed, and some were not reached."""
    variants = choose_variants(["a", "b", "c"])
    recipe, without_a, without_b, _, baseline, with_a, _, _ = variants
    runs = {
        recipe: {0: ran(0.90, 20.0, [(1, 10, 0.5), (2, 20, 0.90)]), 1: ran(0.92, 22.0, [(1, 11, 0.6), (2, 22, 0.92)])},
        without_a: {1: ran(0.80, 18.0, [(1, 9, 0.70), (2, 18, 0.71)])},
        without_b: {0: ran(0.70, 30.0), 1: ran(0.80, 30.0)},
        baseline: {0: ran(0.70, 10.0, [(1, 5, 0.4), (2, 10, 0.7)]), 1: ran(0.74, 10.0, [(1, 5, 0.4), (2, 10, 0.74)])},
        with_a: {0: ran(0.71, 12.0), 1: ran(0.79, 12.0)},
    }
    outcomes = [
        Outcome(PlannedRun(variant, seed, None, ""), runs.get(variant, {}).get(seed))
        for variant in variants
        for seed in (0, 1)
    ]
    outcomes[2] = outcomes[2]._replace(failure="boom")
    assert outcomes[2].planned[:2] == (without_a, 0)
    return compare(variants, outcomes, (16, 32), 32, None)


def test_every_figure_is_compared_with_the_baseline(results):
    row = {row.variant.name: row.figures for row in results.rows}
    assert results.target == pytest.approx(0.72)
    assert row["recipe"]["top1"] == pytest.approx(0.91)
    assert (row["recipe"]["top1_min"], row["recipe"]["top1_max"]) == (0.90, 0.92)
    assert row["recipe"]["top1_16px"] == pytest.approx(0.455)
    reached = {name: (row[name]["epochs_to_target"], row[name]["seconds_to_target"]) for name in row}
    # The mean curve goes from 55 % after 10.5 s to 91 % after 21 s.
    assert reached["recipe"] == pytest.approx((1 + 17 / 36, 10.5 + 10.5 * 17 / 36), abs=1e-6)
    # By default the target is where the baseline's mean curve ends.
    assert reached["baseline"] == pytest.approx((2, 10), abs=1e-6)
    assert np.isnan(reached["without-a"]).all()
    assert (row["without-a"]["failed"], row["without-a"]["not_run"]) == (1, 0)
    assert (row["with-b"]["failed"], row["with-b"]["not_run"]) == (0, 2)
    assert {name for name in row if row[name]["on_pareto_front"]} == {"baseline", "with-a", "without-a", "recipe"}
    cells = {cells[0]: tuple(cells) for cells in cost_table(results).rows}
    assert cells["recipe"] == ("recipe", "21.0 s", "2.10x", "48", "0.48x", "15.5 s", "1.5", "1.55x")
    assert cells["with b"][1:] == ("-",) * 7
    assert cells["without a"][5:] == ("never", "-", "-")
    assert cells["without b"][5:] == ("-", "-", "-")
    cells = {cells[0]: tuple(cells) for cells in accuracy_table(results, [16, 32]).rows}
    assert cells["recipe"] == ("recipe", "2", "45.50 ± 0.71", "91.00 ± 1.41", "+19.00", "*")
    assert cells["without a"] == ("without a", "1", "40.00", "80.00", "+8.00", "* 1 failed")
    assert cells["with b"] == ("with b", "0", "-", "-", "-", "2 not run")
    # Effects are paired by seed.
    a, b, c = results.effects
    assert a.alone.top1 == pytest.approx([0.01, 0.05])
    assert a.in_recipe == (pytest.approx([0.12]), pytest.approx(22 / 18)), "seed 1 only"
    assert b.alone == ([], pytest.approx(np.nan, nan_ok=True))
    assert b.in_recipe.top1 == pytest.approx([0.2, 0.12])
    assert (c.alone.top1, c.in_recipe.top1) == ([], [])
    assert effect_table(results).rows[0] == ("a", "+3.00 ± 2.83", "1.20x", "+12.00", "1.22x")


def test_the_terminal_needs_80_columns_and_the_files_hold_everything(tmp_path, monkeypatch, capsys):
    plan = planned(DEMO, f"runs_folder={tmp_path}", seeds=(0, 1))
    # Every run but the first, which failed, finished.
    outcomes = [Outcome(plan.runs[0], None, "exit status 1: boom | <b>; see console.txt")]
    for run in plan.runs[1:]:
        outcomes.append(Outcome(run, ran(0.5 + 0.02 * len(run.variant.on) + 0.01 * run.seed, 60.0, size=36)))
        outcomes[-1].run.summary["eval_by_size"]["32"] = {"top1": 0.4}
    found = compare(plan.variants, outcomes, (32, 36), 36, None)
    monkeypatch.setenv("COLUMNS", "80")
    show(describe(plan, outcomes, found, [32, 36]))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    [headers] = [line for line in lines if line.startswith("technique ")]
    assert re.split(" {3,}", headers.strip()) == ["technique", "alone: top-1", "time", "in the recipe: top-1", "time"]
    # One line per variant and table: nothing is folded.
    assert sum(line.startswith("without progressive_resizing ") for line in lines) == 2
    assert "boom | <b>" in out
    plan.folder.mkdir()
    files = write(plan, outcomes, found, "ablate 'eval.sizes=[32, 36]'")
    assert sorted(path.name for path in plan.folder.iterdir()) == sorted(files)
    assert set(files) == {"table.md", "table.csv", "accuracy.png", "ablation.html"}
    assert (plan.folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    html = (plan.folder / "ablation.html").read_text()
    assert "boom | &lt;b&gt;" in html
    assert html.count("<svg") == 2
    assert "src=" not in html
    assert "| * 1 failed |" in (plan.folder / "table.md").read_text()


def test_a_finished_run_counts_and_one_of_another_config_is_refused(tmp_path):
    here = [DEMO, f"runs_folder={tmp_path}"]
    run = planned(*here, only=["baseline"]).runs[0]
    assert run.state == "new"
    run.folder.parent.mkdir()
    summary = {"finished": False, "config_digest": run.digest, "eval_by_size": {}}
    leave(run.folder, summary, [])
    (run.folder / "config.yaml").write_text(resolved(run.config))
    assert run.state == "begun"
    assert conflicts(run, 1) == []
    summary |= {"finished": True, "eval_by_size": {"32": {}, "36": {}}}
    (run.folder / "summary.json").write_text(json.dumps(summary))
    assert planned(*here, only=["baseline"]).runs[0].state == "finished"
    with pytest.raises(InputError, match=r"optimizer.lr: here 0.1, there 0.05"):
        planned(*here, "optimizer.lr=0.1", only=["baseline"])
    assert planned(*here, "precision=auto", only=["baseline"]).runs[0].state == "finished"
    with pytest.raises(InputError, match=r"another number of processes"):
        planned(*here, only=["baseline"], processes=2)
    with pytest.raises(InputError, match=r"finished without evaluation at 40 px"):
        planned(*here, "eval.sizes=[32, 40]", only=["baseline"])
    # The hash of the weights that it started from is known to the run only.
    weights = planned(*here, "run_name=other", "model.weights=a.pth", only=["baseline"]).runs[0]
    there = weights.config.started_from("0" * 64)
    weights.folder.parent.mkdir()
    leave(weights.folder, summary | {"config_digest": config_digest(there)}, [])
    (weights.folder / "config.yaml").write_text(resolved(there))
    assert conflicts(weights, 1) == []
    with pytest.raises(InputError, match=r'model.weights: here "b.pth", there "a.pth"\)'):
        planned(*here, "run_name=other", "model.weights=b.pth", only=["baseline"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no YAML file given"),
        ([str(DEMO), "--only", "mixupp"], "--only: mixupp is not a variant or a technique; allowed: recipe, "),
        ([str(DEMO), "--target", "97"], "--target: got 97; allowed: a share"),
        ([str(DEMO), "--size", "33"], "--size: got 33; allowed: one of eval.sizes, 32, 36"),
        ([str(DEMO), "--processes", "0"], "--processes: got 0"),
        ([str(DEMO), "--seeds", "x"], "--seeds: invalid int value: 'x'"),
        ([str(DEMO), "--seeds", "-1"], "seed: got -1"),
        ([str(DEMO), "seed=3"], "from --seeds"),
        ([str(DEMO), "resume=x.safetensors"], "resume: the runs of an ablation start from scratch"),
        ([str(DEMO), "checkpoints.folder=s3://bucket/x"], "checkpoints.folder: each run needs a folder of its own"),
        ([str(DEMO), "optimizer.lr=fast"], "optimizer.lr: got 'fast'"),
        ([str(DEMO), "algorithms=off"], "algorithms"),
    ],
    ids=lambda value: "_".join(value[-2:])[-30:] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(words, said, refused, tmp_path):
    elsewhere = [f"runs_folder={tmp_path}"] if words else []  # what the reader has run does not matter
    assert said in refused("ablate", *words[:1], *elsewhere, *words[1:])


def test_what_the_command_line_changes_is_in_every_run_and_its_config_reads_back(tmp_path):
    words = (f"runs_folder={tmp_path}", "algorithms.mixup=off", "algorithms.composer.CutOut={length: 0.5}")
    plan = planned(DEMO, *words)
    assert {"without-composer.CutOut", "with-composer.CutOut"} <= {variant.name for variant in plan.variants}
    path = tmp_path / "config.yaml"
    for run in plan.runs:
        assert techniques(run.config.algorithms) == run.variant.on
        assert "mixup" not in run.variant.on
        path.write_text(resolved(run.config))
        assert load_config(path) == run.config
    with pytest.raises(InputError, match="no technique is on"):
        planned(DEMO, *(f"algorithms.{name}=off" for name in techniques(load_config(DEMO).algorithms)))
