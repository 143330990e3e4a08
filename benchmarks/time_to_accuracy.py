"""How long the recipe takes to reach the final accuracy of two others: whole runs, several seeds, alternating.

    python -m benchmarks.time_to_accuracy yamls/tiny-imagenet.yaml data.path=IMAGES [key=value ...]
        --seeds 0 1 2 --output DIR [--reference-epochs 90] [--reference key=value ...]

Three sides, with the YAML's network, images and batch size at the training size:

- reference: torchvision's recipe for ResNet-50 (REFERENCE, below) at the training size, with the rate that
  `recipes.find_lr` proposes for it, and --reference over all that.
- plain: the YAML with every technique off: the training size throughout, everything else as in the recipe.
- recipe: the YAML.

Each side is tested at the one of `eval.sizes` at which its runs end highest. Time is that of training, waiting for the
loader and saving, without evaluation, since all sides are evaluated more often than necessary. A target is the mean of
a side's last evaluations over the seeds. Finished runs are not repeated: the same command resumes. DIR gets
results.json, table.md and accuracy.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from algorithms.config import AlgorithmsConfig
from benchmarks.measure import ROOT, commit, machine, markdown, spread
from recipes.cli import run_command
from recipes.load import load_config
from recipes.output import chart, save
from recipes.results import Evaluation, first_reached, mean_curve, read_results

# references/classification/train.py of torchvision 0.22, with its options for a cosine schedule after linear warm-up.
REFERENCE = (
    *("model.zero_init_residual=false", "loss.name=cross_entropy"),
    *("optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=false"),
    *("optimizer.weight_decay=1e-4", "optimizer.decay_norm_and_bias=true"),
    *("scheduler.name=cosine", "scheduler.warmup=0.05", "scheduler.final_lr_ratio=0.0"),
    "data.augment={area: [0.08, 1.0], aspect_ratio: [0.75, 1.3333333333333333], flip: 0.5}",
    "eval.crop_ratio=0.875",
)
ASKED = {"reference": 0.35, "plain": 0.70}
"""Largest share of a side's training time in which the recipe is to reach that side's final accuracy."""
SIDES = (*ASKED, "recipe")
Curve = tuple[Evaluation, ...]  # one run's accuracy over the seconds in which it trained


class Side(NamedTuple):
    """One side's runs, a curve per seed, all tested at the same image size in pixels."""

    size: int
    curves: list[Curve]

    @property
    def final(self) -> float:
        """Mean top-1 in [0, 1] at the end of the runs."""
        return fmean(curve[-1].top1 for curve in self.curves)


def read_curve(folder: Path, size: int) -> Curve:
    """A run's accuracy at an image size in pixels."""
    run = read_results(folder)
    metrics = run.metrics
    trained = np.sum([metrics[f"time/{phase}_seconds"] for phase in ("train", "loader_wait", "checkpointing")], axis=0)
    known = np.isfinite(trained)
    seconds = dict(zip(metrics["epoch"][known].tolist(), trained[known].tolist(), strict=True))
    return tuple(entry._replace(wall_seconds=seconds[entry.epoch]) for entry in run.evaluations(size))


def read_side(folders: Sequence[Path], sizes: Sequence[int]) -> Side:
    """Runs of one side at the image size in pixels at which they end highest."""
    return max((Side(size, [read_curve(folder, size) for folder in folders]) for size in sizes), key=lambda x: x.final)


def compare(target: Side, other: Side) -> dict[str, Any]:
    """How another side reaches the final accuracy of `target`; None for a run that never does."""
    own = first_reached(mean_curve(target.curves), target.final - 1e-9)
    assert own is not None, "a mean curve ends at the mean of the ends"
    found = [first_reached(curve, target.final) for curve in other.curves]
    return {
        "top1": target.final,
        "own": {"epochs": own.epoch, "seconds": own.wall_seconds},
        "epochs": [None if point is None else point.epoch for point in found],
        "seconds": [None if point is None else point.wall_seconds for point in found],
        "ratios": [None if point is None else point.wall_seconds / own.wall_seconds for point in found],
    }


def table(sides: dict[str, Side]) -> str:
    """Markdown: a row per side, with the share of each target's time in which it reaches that target."""
    head = ["side", "epochs", "training seconds", "tested at", "final top-1 (%)"]
    head += [f"share of {name}'s time to its {100 * sides[name].final:.2f} %" for name in ASKED]
    rows = []
    for name, side in sides.items():
        ends = [curve[-1] for curve in side.curves]
        seconds = spread([end.wall_seconds for end in ends], ".0f")
        top1 = spread([100 * end.top1 for end in ends], ".2f")
        shares = [share(compare(sides[target], side), own=name == target) for target in ASKED]
        rows.append([name, f"{ends[0].epoch:.0f}", seconds, f"{side.size} px", top1, *shares])
    return markdown(head, *rows)


def share(found: dict[str, Any], own: bool) -> str:
    """`0.31 ± 0.02: 5.1 ± 0.3 epochs, 80 ± 4 s`; that of the target's own mean curve is 1."""
    if own:
        return f"1: {found['own']['epochs']:.1f} epochs, {found['own']['seconds']:.0f} s"
    if not any(found["ratios"]):
        return "never"
    epochs, seconds = ([value for value in found[key] if value is not None] for key in ("epochs", "seconds"))
    return f"{spread(found['ratios'], '.3f')}: {spread(epochs, '.1f')} epochs, {spread(seconds, '.0f')} s"


def verdicts(sides: dict[str, Side]) -> list[str]:
    """What was asked of the recipe and what it reached, a line per target."""
    lines = []
    for name, asked in ASKED.items():
        ratios = compare(sides[name], sides["recipe"])["ratios"]
        met = None not in ratios and fmean(ratios) <= asked
        reached = spread(ratios, ".3f")
        lines.append(f"{name}'s accuracy in at most {asked} of its time: {reached}, {'met' if met else 'not met'}")
    return lines


def draw(sides: dict[str, Side], path: Path) -> None:
    """Accuracy over training time, a line per run."""
    with chart() as figure:
        axes = figure.subplots()
        for (name, side), color in zip(sides.items(), ("#d95f02", "#7570b3", "#1b6ca8"), strict=True):
            for number, curve in enumerate(side.curves):
                minutes, top1 = [entry.wall_seconds / 60 for entry in curve], [100 * entry.top1 for entry in curve]
                label = None if number else f"{name} at {side.size} px, n = {len(side.curves)}"
                axes.plot(minutes, top1, color=color, label=label, marker="o", markersize=3)
            axes.axhline(100 * side.final, color=color, linewidth=0.7, linestyle=":")
        axes.set(xlabel="training time (min, without evaluation)", ylabel="top-1 (%); dotted: mean at the end")
        axes.legend(loc="lower right")
        save(figure, path)


def run(command: Sequence[str]) -> None:
    """Run a command of this project, showing what it prints; SystemExit if it fails."""
    print("$ python " + " ".join(command), flush=True)
    if status := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise SystemExit(status)


def without_techniques(yaml: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides that turn every technique of the recipe off."""
    algorithms = load_config(yaml, overrides).algorithms
    on = (name for name in AlgorithmsConfig.model_fields if name != "composer" and getattr(algorithms, name))
    return [f"algorithms.{name}=off" for name in on]


def found_rate(yaml: str, overrides: Sequence[str], folder: Path) -> str:
    """The override with the rate that the range test proposes for a side, computed once, into `folder`."""
    place = folder / "find_lr" / "lr.json"
    if not place.exists():
        run(["-m", "recipes.find_lr", yaml, *overrides, f"run_name={folder.name}", "--start-lr", "1e-4"])
    return f"optimizer.lr={json.loads(place.read_text())['optimizer']['lr']}"


def parser_of_runs(doc: str | None) -> argparse.ArgumentParser:
    """A command line with a YAML, overrides, seeds, and a folder for the runs."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    return parser


def main() -> int:
    parser = parser_of_runs(__doc__)
    parser.add_argument("--reference-epochs", type=int, default=90)
    parser.add_argument(
        "--reference", nargs="*", default=[], metavar="key=value", help="overrides for the reference only"
    )
    options = parser.parse_intermixed_args()
    yaml, folder = options.yaml, options.output.resolve()
    shared = [*options.overrides, f"runs_folder={folder}"]
    plain = [*shared, *without_techniques(Path(yaml), shared)]
    reference = [*plain, *REFERENCE, f"max_duration={options.reference_epochs}ep"]
    rate = found_rate(yaml, [*reference, *options.reference], folder / "reference-lr")
    words = {"reference": [*reference, rate, *options.reference], "plain": plain, "recipe": shared}
    for turn, seed in enumerate(options.seeds):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            run(["entrypoint.py", yaml, *words[side], f"run_name={side}-seed{seed}", f"seed={seed}"])
    sides = {}
    for side in SIDES:
        sizes = load_config(Path(yaml), words[side]).eval.sizes
        sides[side] = read_side([folder / f"{side}-seed{seed}" for seed in options.seeds], sizes)
    text = table(sides) + "\n\n" + "\n".join(verdicts(sides))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else machine()
    about = {"machine": card, "torch": torch.__version__, "commit": commit(), "seeds": options.seeds, "words": words}
    reached = {target: {side: compare(sides[target], sides[side]) for side in SIDES} for target in ASKED}
    content = about | {"reached": reached, "sides": {name: side._asdict() for name, side in sides.items()}}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "table.md").write_text(text + "\n")
    draw(sides, folder / "accuracy.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
