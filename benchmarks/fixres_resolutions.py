"""What the FixRes stage gains: accuracy over test resolution, before and after it, as plotted in the paper.

    python -m benchmarks.fixres_resolutions yamls/tiny-imagenet.yaml data.path=IMAGES [key=value ...]
        --seeds 0 1 2 --output DIR [--sizes 32 40 48 56 64 72 80 96]

Three curves: the weights before the stage, after it, and at the end of the same run without it (whose last epochs train
like the earlier ones), because the last epochs also anneal the learning rate. Touvron et al. 2019, figure 2 and table
2, compare the first two; with `algorithms.fixres.train=classifier` the stage trains what theirs does. Runs are
`recipe-seedN` and `without-fixres-seedN`. Finished runs are not repeated, and a `recipe-seedN` that
benchmarks.time_to_accuracy wrote to the same DIR is used if `checkpoints.keep` spared the state at the stage's start.
DIR gets fixres.json, fixres.md and fixres.png.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.measure import markdown, spread
from benchmarks.time_to_accuracy import parser_of_runs, run
from data.errors import InputError
from recipes.cli import run_command
from recipes.load import load_config
from recipes.output import chart, save

Curve = dict[int, float]
"""Top-1 in percent by test size in pixels."""
KINDS = ("before", "without", "after")
LABELS = {"before": "before the stage", "without": "at the end, without a stage", "after": "after the stage"}


def evaluate(words: Sequence[str], name: str, sizes: Sequence[int], checkpoint: Path | None, place: Path) -> Curve:
    """A run's accuracy at each size, with its newest checkpoint or the given one."""
    if not place.exists():
        chosen = ["--checkpoint", str(checkpoint)] if checkpoint else []
        flags = ["--sizes", *map(str, sizes), *chosen, "--save", str(place)]
        run(["-m", "recipes.evaluate", *words, f"run_name={name}", *flags])
    entries = json.loads(place.read_text())["results"]
    return {entry["size"]: 100 * entry["top1"] for entry in entries}


def table(curves: dict[str, list[Curve]], sizes: Sequence[int]) -> str:
    """Markdown: means over the seeds, a row per curve and a column per size; then the gains, seed by seed."""
    means = {kind: [fmean(curve[size] for curve in curves[kind]) for size in sizes] for kind in KINDS}
    rows = [[LABELS[kind], *(f"{mean:.2f}" for mean in means[kind])] for kind in KINDS]
    for kind in ("before", "without"):
        pairs = list(zip(curves["after"], curves[kind], strict=True))
        cells = [spread([after[size] - other[size] for after, other in pairs], "+.2f") for size in sizes]
        rows.append([f"gain over “{LABELS[kind]}”", *(cell.replace("± +", "± ") for cell in cells)])
    return markdown(["top-1 (%), mean of the seeds", *(f"{size} px" for size in sizes)], *rows)


def draw(curves: dict[str, list[Curve]], sizes: Sequence[int], marks: dict[str, int], path: Path) -> None:
    """Mean accuracy over test size, with the range over the seeds."""
    with chart() as figure:
        axes = figure.subplots()
        for kind, color in zip(KINDS, ("#d95f02", "#7570b3", "#1b6ca8"), strict=True):
            columns = [[curve[size] for curve in curves[kind]] for size in sizes]
            axes.plot(sizes, [fmean(column) for column in columns], "o-", color=color, label=LABELS[kind])
            axes.fill_between(sizes, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2)
        for text, size in marks.items():
            axes.axvline(size, color="grey", linewidth=1, linestyle=":")
            axes.annotate(text, (size, axes.get_ylim()[0]), xytext=(3, 4), textcoords="offset points", color="grey")
        axes.set(xlabel="test resolution (px)", ylabel="top-1 (%), mean and range of the seeds")
        axes.legend(loc="lower right")
        save(figure, path)


def main() -> int:
    parser = parser_of_runs(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 40, 48, 56, 64, 72, 80, 96], metavar="PX")
    options = parser.parse_intermixed_args()
    folder = options.output.resolve()
    words = [options.yaml, *options.overrides, f"runs_folder={folder}"]
    config = load_config(Path(options.yaml), words[1:])
    fixres = config.algorithms.fixres
    if fixres is None:
        raise InputError(f"{options.yaml}: has no algorithms.fixres")
    border = fixres.start_epoch(config.epochs)
    kept = f"checkpoints.keep={max(config.checkpoints.keep, config.epochs - border + 1)}"
    curves: dict[str, list[Curve]] = {kind: [] for kind in KINDS}
    for seed in options.seeds:
        recipe, without = f"recipe-seed{seed}", f"without-fixres-seed{seed}"
        run(["entrypoint.py", *words, f"run_name={recipe}", f"seed={seed}", kept])
        run(["entrypoint.py", *words, "algorithms.fixres=off", f"run_name={without}", f"seed={seed}"])
        before = next((folder / recipe / "checkpoints").glob(f"ep{border:03}-*.safetensors"), None)
        if before is None:
            raise InputError(f"{folder / recipe}: has no checkpoint of epoch {border}; delete the run, or set {kept}")
        for kind, name, checkpoint in (("before", recipe, before), ("without", without, None), ("after", recipe, None)):
            place = folder / name / f"resolutions-{kind}.json"
            curves[kind].append(evaluate(words, name, options.sizes, checkpoint, place))
    (folder / "fixres.json").write_text(json.dumps({"seeds": options.seeds, "top1": curves}, indent=1) + "\n")
    (folder / "fixres.md").write_text(table(curves, options.sizes) + "\n")
    draw(curves, options.sizes, {"trained": config.data.train_size, "FixRes": fixres.size}, folder / "fixres.png")
    print(table(curves, options.sizes))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
