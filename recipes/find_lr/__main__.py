"""`python -m recipes.find_lr YAML [key=value ...]`: which learning rate to train with, measured on the run itself."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable

from recipes.cli import command_parser, require_launched, run_command, yaml_and_overrides
from recipes.errors import InputError
from recipes.load import load_config

DESCRIPTION = """Raise the learning rate from step to step, watch the loss, and suggest a rate
for the run.

The test trains fresh models with the run's own loader, model, loss, optimizer
and techniques (mixing, label smoothing, SAM, ...) at one image size, and throws
them away. Progressive resizing, FixRes, EMA and SWA are left out. Results go to
RUNS_FOLDER/RUN_NAME/find_lr/: lr.html, lr.png, lr.csv (the curves), lr.json."""
EXAMPLES = """examples:
  python -m recipes.find_lr yamls/demo.yaml
  python -m recipes.find_lr yamls/p3.yaml --batch-size 256 --runs 5
  composer -n 8 -m recipes.find_lr yamls/p3.yaml data.path=/data/imagenet

The test's rates are for --batch-size images a step over all devices. The lines
to paste hold that number as optimizer.lr_batch_size, or the YAML's own and the
rate for that; training scales it linearly to its own batch."""


def within(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """A reader for argparse: an int or a float from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")
        return value

    return read


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("find_lr", DESCRIPTION, EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="YAML [key=value ...]", help="the config, and keys that differ")

    def option(name: str, kind: Callable[[str], float], low: float, high: float, default: object, text: str) -> None:
        metavar = "N" if kind is int else "X"
        parser.add_argument(name, type=within(kind, low, high), default=default, metavar=metavar, help=text)

    option("--runs", int, 1, 100, 3, "runs, with the seeds from the config's on (default: 3)")
    option("--steps", int, 20, 10_000, 100, "steps of each run (default: 100)")
    option("--start-lr", float, 1e-12, 1e6, 1e-5, "rate of the first step (default: 1e-5)")
    option("--end-lr", float, 1e-12, 1e6, 10.0, "rate of the last step (default: 10)")
    option("--batch-size", int, 1, 10**7, None, "images a step, all devices together (default: the run's)")
    option("--size", int, 8, 4096, None, "side of the images in pixels (default: the run's in most epochs)")
    option(
        "--smoothing", float, 0.0, 0.999, None, "share of the average loss that a step keeps (default: 1 - 5 / steps)"
    )
    option("--divergence", float, 1.01, 1e6, 4.0, "stop at so many times the lowest smoothed loss (default: 4)")
    return parser


def main() -> int:
    """Read the command line, test, write; the exit status, 1 where nothing can be suggested."""
    parser = arguments()
    given = parser.parse_intermixed_args(sys.argv[1:])
    path, overrides = yaml_and_overrides(parser, given.words)
    if given.start_lr >= given.end_lr:
        raise InputError(f"--start-lr: {given.start_lr:g} is not below --end-lr {given.end_lr:g}")
    config = load_config(path, overrides)
    # Only now: importing torch and Composer takes seconds, and the errors above need neither.
    from recipes.find_lr.curve import Ramp
    from recipes.find_lr.run import run
    from recipes.find_lr.trial import trial_config

    require_launched()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    trial = trial_config(path, overrides, size=given.size, batch_size=given.batch_size, world_size=world_size)
    # The average remembers a twentieth of the ramp, so that a longer ramp smooths over the same range of rates.
    smoothing = 1 - 5 / given.steps if given.smoothing is None else given.smoothing
    ramp = Ramp(given.start_lr, given.end_lr, given.steps, smoothing, given.divergence)
    return run(config, trial, ramp, runs=given.runs, command=_command())


def _command() -> str:
    return shlex.join(["python", "-m", "recipes.find_lr", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run_command(main))
