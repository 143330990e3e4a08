"""`python -m recipes.find_lr YAML [key=value ...]`: measure which learning rate to train with."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from data.errors import InputError
from data.files import replace_text, writing
from recipes import output
from recipes.cli import command_parser, quick_imports, require_launched, run_command, yaml_and_overrides
from recipes.config import RunConfig
from recipes.find_lr import CHOSEN, ENDS, METHODS, Curve, Ramp, Suggestion, still_falling, suggestions
from recipes.load import load_config
from recipes.output import ABSENT, COLORS, DIM, Table, chart, svg
from recipes.results import to_json
from recipes.schedule import epoch_plan, peak_lr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DESCRIPTION = """Raise the learning rate from step to step, watch the loss, and suggest a rate
for the run.

The test trains fresh models with the run's own loader, model, loss, optimizer
and techniques (mixing, label smoothing, SAM, ...) at one image size, and then
discards them. Progressive resizing, FixRes, EMA and SWA are left out. Results
go to RUNS_FOLDER/RUN_NAME/find_lr/: lr.html, lr.png, lr.csv (the curves) and
lr.json."""
EXAMPLES = """examples:
  python -m recipes.find_lr yamls/demo.yaml
  python -m recipes.find_lr yamls/p3.yaml --batch-size 256 --runs 5
  composer -n 8 -m recipes.find_lr yamls/p3.yaml data.path=/data/imagenet

The rates are for --batch-size images per step over all devices. The lines to
paste contain that number as optimizer.lr_batch_size; if the YAML sets one, it
stays and the rate is converted. Training scales the rate linearly to its batch."""
NOTHING = (
    "No suggestion: too few steps before the loss rose, or a loss that never fell. "
    "Try a lower --start-lr, more --steps, or a higher --end-lr."
)
DEVICES = (1, 2, 4, 8, 16)  # numbers of devices for which the rate is shown


def _parse_arguments() -> argparse.Namespace:
    parser = command_parser("find_lr", DESCRIPTION, EXAMPLES)

    def option(name: str, kind: Callable[[str], float], low: float, high: float, default: object, text: str) -> None:
        def read(text: str) -> float:
            try:
                value = kind(text)
            except ValueError:
                value = float("nan")
            if not low <= value <= high:
                what = "a whole number" if kind is int else "a number"
                raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")
            return value

        shown = "PX" if name == "--size" else "N" if kind is int else "X"
        parser.add_argument(name, type=read, default=default, metavar=shown, help=text)

    option("--runs", int, 1, 100, 3, "number of runs, with consecutive seeds from the config's (default: 3)")
    option("--steps", int, 20, 10_000, 100, "steps of each run (default: 100)")
    option("--start-lr", float, 1e-12, 1e6, 1e-5, "rate of the first step (default: 1e-5)")
    option("--end-lr", float, 1e-12, 1e6, 10.0, "rate of the last step (default: 10)")
    option("--batch-size", int, 1, 10**7, None, "images per step over all devices (default: the run's)")
    option("--size", int, 8, 4096, None, "side of the images in pixels (default: the run's in most epochs)")
    text = "share of the average loss that a step keeps (default: 1 - 5 / steps)"
    option("--smoothing", float, 0.0, 0.999, None, text)
    option("--divergence", float, 1.01, 1e6, 4.0, "stop at this multiple of the lowest smoothed loss (default: 4)")
    given = parser.parse_intermixed_args(sys.argv[1:])
    given.yaml, given.overrides = yaml_and_overrides(parser, given.words)
    if given.start_lr >= given.end_lr:
        raise InputError(f"--start-lr: {given.start_lr:g} is not below --end-lr {given.end_lr:g}")
    return given


def propose(config: RunConfig, rate: float, batch_size: int) -> dict[str, Any]:
    """The keys of `optimizer` that give `rate` at `batch_size` images per step, and scale linearly with other sizes.

    The rate is rounded to two significant digits: its spread is rarely below ten percent.
    """
    reference = config.optimizer.lr_batch_size or batch_size
    return {"lr": float(f"{rate * reference / batch_size:.2g}"), "lr_batch_size": reference}


def present_lr(config: RunConfig, batch_size: int) -> float:
    """The config's highest rate at `batch_size` images per step; the same for all sizes without `lr_batch_size`."""
    return config.optimizer.lr * batch_size / (config.optimizer.lr_batch_size or batch_size)


def peaks(config: RunConfig, proposal: dict[str, Any]) -> list[tuple[int, int, float]]:
    """The highest rate of the run with the proposal, for each number of devices in `DEVICES` that is possible.

    Each is (devices, images per step over all of them in the stage with the most epochs, rate).
    """
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=proposal)})
    found = []
    for devices in DEVICES:
        with suppress(InputError):  # a global batch that is not divisible by them
            lr = peak_lr(config, epoch_plan(config, devices))
            found.append((devices, round(lr / proposal["lr"] * proposal["lr_batch_size"]), lr))
    return found


def _draw(axes: Axes, result: dict[str, Any], curves: Sequence[Curve]) -> None:
    """Draw the loss over the rate, with the present and the proposed rate."""
    from matplotlib.ticker import NullFormatter

    for index, curve in enumerate(curves):
        axes.plot(curve.lrs, curve.losses, ".", color=COLORS[0], alpha=0.25, markersize=4, markeredgewidth=0)
        label = "smoothed training loss, one line per run" if index == 0 else None
        axes.plot(curve.lrs, curve.smoothed, color=COLORS[0], alpha=0.8, label=label)
    losses = np.concatenate([curve.losses for curve in curves])
    first = [float(curve.losses[0]) for curve in curves if np.isfinite(curve.losses[0])]
    if first:  # cut the chart above the first values: beyond them the loss has diverged
        top, bottom = 1.25 * max(first), float(losses[np.isfinite(losses)].min())
        axes.set_ylim(bottom - 0.05 * (top - bottom), top)
    low, high = result["ramp"]["start_lr"], max(curve.lrs.max() for curve in curves)
    present, chosen = result["present_lr"], result["suggestions"].get(CHOSEN)
    if low <= present <= high:
        axes.axvline(present, color=DIM, linestyle=":", label=f"now in the config: {present:.2g}")
    if chosen is not None:
        proposed = chosen["geometric_mean"]
        axes.axvline(proposed, color=COLORS[1], label=f"proposed: {proposed:.2g}")
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    images = result["global_batch_size"]
    axes.set(xlim=(low, high), ylabel="loss", xlabel=f"learning rate (at {images} images per step, log scale)")
    axes.legend(loc="lower left")


def _describe(
    result: dict[str, Any], curves: Sequence[Curve], found: dict[str, Suggestion], highest: Sequence[Sequence[float]]
) -> output.Content:
    """The suggestions and the lines to paste, in 80 columns."""
    proposal = result["optimizer"]
    if proposal is None:
        return {"Result": [NOTHING]}
    headers, rows = ("method", "geom. mean", "median", "mean", "spread", "lowest", "highest"), []
    for method in METHODS:
        if (one := found.get(method)) is None:
            rows.append([method, *[ABSENT] * 6])
            continue
        name = method + (f" ({len(one.rates)} of {len(one.per_run)})" if None in one.per_run else "")
        means = (f"{mean:.2g}" for mean in (one.geometric_mean, one.median, one.mean))
        spread = f"x{one.spread:.2f}" if len(one.rates) > 1 else ABSENT
        rows.append([name, *means, spread, f"{min(one.rates):.2g}", f"{max(one.rates):.2g}"])
    note = (
        f"Rates at {result['global_batch_size']} images of {result['image_size']} px per step. Spread: geometric "
        "standard deviation over the runs, a factor. A dash: no run had what the method looks for."
    )
    falling = sum(still_falling(curve, result["ramp"]["steps"]) for curve in curves)
    warning = (
        f"In {falling} of {len(curves)} runs the loss was still falling at the last rate, "
        f"{result['ramp']['end_lr']:g}: higher rates may be better; try a higher --end-lr."
    )
    rates = [(devices, images, f"{lr:.3g}") for devices, images, lr in highest]
    return {
        "Suggestions": [Table(headers, rows, range(1, 7)), note],
        "Result": [
            f"For the YAML ({CHOSEN}, geometric mean of the runs; the config has {result['present_lr']:.3g} now):",
            output.Code(yaml.safe_dump({"optimizer": proposal}, sort_keys=False).rstrip()),
            "or on the command line:",
            output.Code(" ".join(f"optimizer.{key}={value}" for key, value in proposal.items())),
            *([warning] if falling else []),
            "The schedule's highest rate is then, by linear scaling:",
            Table(("devices", "images per step", "highest rate"), rates, range(3)),
        ],
    }


def main() -> int:
    """Run the test, write the files and print what to paste; returns the exit status, 1 if there is no suggestion."""
    given = _parse_arguments()
    config = load_config(given.yaml, given.overrides)
    with quick_imports():  # only now: it takes seconds, and the errors above need none of it
        from recipes.find_lr.range_test import run_tests, trial_config
        from recipes.trainer import device_name
        from recipes.watch.summary import versions

    require_launched()
    devices, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    trial = trial_config(given.yaml, given.overrides, given.size, given.batch_size, devices)
    # The average covers a twentieth of the ramp, so a longer ramp smooths over the same range of rates.
    smoothing = 1 - 5 / given.steps if given.smoothing is None else given.smoothing
    ramp = Ramp(given.start_lr, given.end_lr, given.steps, smoothing, given.divergence)
    curves = run_tests(trial, ramp, given.runs)
    if rank != 0:
        return 0
    images, found = epoch_plan(trial, devices)[0].global_batch_size, suggestions(curves, ramp.steps)
    proposal = propose(config, found[CHOSEN].geometric_mean, images) if CHOSEN in found else None
    highest = peaks(config, proposal) if proposal else []
    result = {
        "run_name": config.run_name,
        "image_size": trial.data.train_size,
        "global_batch_size": images,
        "devices": devices,
        "ramp": ramp._asdict(),
        "runs": [{"seed": curve.seed, "steps": len(curve.lrs), "end": curve.end} for curve in curves],
        "present_lr": present_lr(config, images),
        "suggestions": {method: suggestion._asdict() for method, suggestion in found.items()},
        "chosen": CHOSEN if proposal else None,
        "optimizer": proposal,
        "peak_lr_by_devices": {str(count): lr for count, _, lr in highest},
        "command": shlex.join(["python", "-m", "recipes.find_lr", *sys.argv[1:]]),
        "versions": versions(device_name(config.device)),
    }
    folder = Path(config.runs_folder) / config.run_name / "find_lr"
    content = _describe(result, curves, found, highest)
    output.show(content)
    sys.stdout.flush()
    with writing(folder):
        _write_files(result, curves, content, folder)
    print(f"\nplot: {folder / 'lr.png'}\npage: {folder / 'lr.html'}\ncurves: {folder / 'lr.csv'}")
    return 0 if proposal else 1


def _write_files(result: dict[str, Any], curves: Sequence[Curve], content: output.Content, folder: Path) -> None:
    """Write lr.csv, lr.png, lr.html and lr.json; each is replaced as a whole."""
    alt = "Training loss against the learning rate on a logarithmic scale"
    with chart() as drawn:
        _draw(drawn.subplots(), result, curves)
        output.save(drawn, folder / "lr.png")
        plot = output.Chart(svg(drawn, alt), "Points are single batches. Each step's loss is that before the update.")
    runs = [(curve.seed, len(curve.lrs), f"{curve.lrs[-1]:.3g}", ENDS[curve.end]) for curve in curves]
    versions = [(name, value or ABSENT) for name, value in result["versions"].items()]
    page: output.Content = {
        "Result": content["Result"],
        "Curves": [plot],
        **content,
        "Runs": [Table(("seed", "steps", "last rate", "end"), runs, range(3))],
        "Command and versions": [output.Code(result["command"]), Table(("what", "version"), versions)],
    }
    subtitle = (
        f"{result['run_name']}: {len(runs)} runs of up to {result['ramp']['steps']} steps, "
        f"{result['global_batch_size']} images of {result['image_size']} px per step on {result['devices']} device(s)"
    )
    points = (
        (run, curve.seed, step, *map(float, point))
        for run, curve in enumerate(curves)
        for step, point in enumerate(zip(curve.lrs, curve.losses, curve.smoothed, strict=True))
    )
    replace_text(folder / "lr.csv", output.csv_text(("run", "seed", "step", "lr", "loss", "smoothed_loss"), points))
    replace_text(folder / "lr.html", output.render_page("Learning-rate range test", subtitle, content=page))
    replace_text(folder / "lr.json", to_json(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
