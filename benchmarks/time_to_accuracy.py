"""How long the recipe takes to reach the baseline's final accuracy: whole runs, several seeds, alternating.

    python -m benchmarks.time_to_accuracy yamls/cifar10.yaml data.path=IMAGES [key=value ...]
        --baseline-epochs 10 --seeds 0 1 2 --output DIR [--baseline-lr X] [--baseline key=value ...]

The baseline is the YAML with every technique off: the plain network at full resolution (the last of `eval.sizes`), with
cross-entropy and the same optimizer, schedule, batch size, crops and flips, except for what --baseline sets: with
`--baseline data.augment.area=[0.08,1.0]` it has torchvision's default crops, and with `data.train_size=64
eval.sizes=[64]` it trains and is tested at 64 px, whatever the recipe's test size is. Its learning rate is found with
`recipes.find_lr` unless --baseline-lr sets it. The target is the mean over the seeds of the baseline's last evaluation.
Time is that of training, waiting for the loader and saving, without evaluation, since both sides are evaluated more
often than necessary; the wall time is given too. Finished runs are not repeated: the same command resumes. DIR gets
results.json, table.md and accuracy.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from algorithms.config import AlgorithmsConfig
from benchmarks.measure import ROOT, commit, markdown, spread
from recipes.load import load_config
from recipes.output import chart, save
from recipes.results import Evaluation, first_reached, mean_curve, read_results

SIDES = ("baseline", "recipe")


class Curve(NamedTuple):
    """One run's accuracy over its training time."""

    seed: int
    trained: tuple[Evaluation, ...]
    """Seconds without evaluation."""
    whole: tuple[Evaluation, ...]
    """Seconds with it."""


def read_curve(folder: Path, seed: int, size: int) -> Curve:
    """A finished run's accuracy at an image size in pixels."""
    run = read_results(folder)
    whole, metrics = run.evaluations(size), run.metrics
    trained = sum(metrics[f"time/{phase}_seconds"] for phase in ("train", "loader_wait", "checkpointing"))
    known = np.isfinite(trained)
    seconds = dict(zip(metrics["epoch"][known].tolist(), trained[known].tolist(), strict=True))
    return Curve(seed, tuple(entry._replace(wall_seconds=seconds[entry.epoch]) for entry in whole), whole)


def compare(baseline: Sequence[Curve], recipe: Sequence[Curve]) -> dict[str, Any]:
    """Target, times to it and their ratios; None where a run never reaches it."""
    target = fmean(curve.whole[-1].top1 for curve in baseline)
    found: dict[str, Any] = {"target_top1": target}
    for kind in ("trained", "whole"):
        reference = first_reached(mean_curve([getattr(curve, kind) for curve in baseline]), target - 1e-9)
        assert reference is not None, "a mean curve ends at the mean of the ends"
        times = [first_reached(getattr(curve, kind), target) for curve in recipe]
        found[kind] = {
            "baseline_seconds": reference.wall_seconds,
            "baseline_epochs": reference.epoch,
            "recipe_seconds": [None if time is None else time.wall_seconds for time in times],
            "recipe_epochs": [None if time is None else time.epoch for time in times],
            "ratios": [None if time is None else time.wall_seconds / reference.wall_seconds for time in times],
        }
    return found


def table(found: dict[str, Any], curves: dict[str, list[Curve]]) -> str:
    """Markdown, a row per side."""
    trained, whole = found["trained"], found["whole"]
    final = {side: spread([100 * curve.whole[-1].top1 for curve in curves[side]], ".2f") for side in SIDES}
    baseline = [f"{trained['baseline_epochs']:.1f}", f"{trained['baseline_seconds']:.0f}", "1", "1"]
    recipe = [spread(trained["recipe_epochs"], ".1f"), spread(trained["recipe_seconds"], ".0f")]
    ratios = [spread(kind["ratios"], ".3f") for kind in (trained, whole)]
    return markdown(
        ["side", "final top-1 (%)", "epochs to it", "training seconds to it", "of the baseline's", "with evaluation"],
        ["baseline", final["baseline"], *baseline],
        ["recipe", final["recipe"], *recipe, *ratios],
    )


def draw(found: dict[str, Any], curves: dict[str, list[Curve]], path: Path, sizes: dict[str, int]) -> None:
    """Accuracy over training time, a line per run; each side at its own test size in pixels."""
    with chart() as figure:
        axes = figure.subplots()
        for side, color, dashes in (("baseline", "#d95f02", "--"), ("recipe", "#1b6ca8", "-")):
            for number, curve in enumerate(curves[side]):
                minutes = [entry.wall_seconds / 60 for entry in curve.trained]
                top1 = [100 * entry.top1 for entry in curve.trained]
                label = f"{side} at {sizes[side]} px, {len(curves[side])} seeds" if number == 0 else None
                axes.plot(minutes, top1, dashes, color=color, label=label, marker="o", markersize=3)
        axes.axhline(100 * found["target_top1"], color="grey", linewidth=1, label="the baseline's end, mean")
        axes.set(xlabel="training time (min, without evaluation)", ylabel="top-1 (%)")
        axes.legend(loc="lower right")
        save(figure, path)


def run(command: Sequence[str]) -> None:
    """Run a command of this project, showing what it prints; SystemExit if it fails."""
    print("$ python " + " ".join(command), flush=True)
    if status := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise SystemExit(f"exit status {status}")


def baseline_overrides(yaml: Path, overrides: Sequence[str], epochs: int) -> list[str]:
    """The overrides that turn the recipe into the baseline."""
    config = load_config(yaml, overrides)
    on = [name for name in AlgorithmsConfig.model_fields if name != "composer" and getattr(config.algorithms, name)]
    off = [f"algorithms.{name}=off" for name in on]
    return [*off, f"max_duration={epochs}ep", f"data.train_size={config.eval.sizes[-1]}"]


def found_rate(yaml: str, overrides: Sequence[str], folder: Path) -> str:
    """The rate that the range test proposes for the baseline, computed once."""
    place = folder / "baseline-lr" / "find_lr" / "lr.json"
    if not place.exists():
        run(["-m", "recipes.find_lr", yaml, *overrides, "run_name=baseline-lr", "--start-lr", "1e-4"])
    return str(json.loads(place.read_text())["optimizer"]["lr"])


def parser_of_runs(doc: str | None) -> argparse.ArgumentParser:
    """A command line with a YAML, overrides, seeds, and a folder for the runs."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    return parser


def main() -> None:
    parser = parser_of_runs(__doc__)
    add = parser.add_argument
    add("--baseline-epochs", type=int, default=10)
    add("--baseline-lr", help="its highest rate (default: found with recipes.find_lr)")
    add("--baseline", nargs="*", default=[], metavar="key=value", help="overrides for the baseline only")
    options = parser.parse_intermixed_args()
    folder = options.output.resolve()
    shared = [*options.overrides, f"runs_folder={folder}"]
    plain = [*shared, *baseline_overrides(Path(options.yaml), shared, options.baseline_epochs), *options.baseline]
    rate = options.baseline_lr or found_rate(options.yaml, plain, folder)
    words = {"baseline": [*plain, f"optimizer.lr={rate}"], "recipe": shared}
    sizes = {side: load_config(Path(options.yaml), words[side]).eval.sizes[-1] for side in SIDES}
    curves: dict[str, list[Curve]] = {side: [] for side in SIDES}
    for turn, seed in enumerate(options.seeds):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            name = f"{side}-seed{seed}"
            run(["entrypoint.py", options.yaml, *words[side], f"run_name={name}", f"seed={seed}"])
            curves[side].append(read_curve(folder / name, seed, sizes[side]))
    found = compare(curves["baseline"], curves["recipe"])
    about = {"cores": os.cpu_count(), "machine": platform.machine(), "commit": commit(), "baseline_lr": rate}
    (folder / "results.json").write_text(json.dumps(found | about | {"seeds": options.seeds}, indent=1) + "\n")
    (folder / "table.md").write_text(table(found, curves) + "\n")
    draw(found, curves, folder / "accuracy.png", sizes)
    print(table(found, curves))


if __name__ == "__main__":
    main()
