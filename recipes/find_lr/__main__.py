"""`python -m recipes.find_lr YAML [key=value ...]`: which learning rate to train with, measured on the run itself."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable

from recipes.cli import command_parser, run_command, yaml_and_overrides
from recipes.errors import InputError
from recipes.find_lr.curve import Ramp
from recipes.find_lr.trial import trial_config
from recipes.load import load_config

DESCRIPTION = """Raise the learning rate from step to step, watch the loss, and suggest a rate for the run.

The test trains fresh models with the run's own loader, model, loss, optimizer and techniques (mixing, label smoothing,
SAM, ...), at one image size, and throws them away. Left out: progressive resizing and FixRes, because there is one size;
EMA and SWA, because an average does not change what is trained. Results go to RUNS_FOLDER/RUN_NAME/find_lr/: lr.html,
lr.png, lr.csv (the curves), lr.json."""
EXAMPLES = """examples:
  python -m recipes.find_lr yamls/demo.yaml
  python -m recipes.find_lr yamls/p3.yaml data.path=/data/imagenet --batch-size 256 --runs 5
  composer -n 8 -m recipes.find_lr yamls/p3.yaml data.path=/data/imagenet

The rate is for --batch-size images a step over all devices. The lines to paste hold that number as optimizer.lr_batch_size,
or keep the YAML's own, and training scales the rate linearly to the batch that it has."""


def _number(kind: Callable[[str], float], low: float, high: float, *, open_low: bool = False) -> Callable[[str], float]:
    """A reader for argparse that allows low <= x <= high, or low < x with `open_low`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value if open_low else low <= value) or not value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {what} {'above' if open_low else 'from'} {low} to {high}"
            )
        return value

    return read


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("find_lr", DESCRIPTION, EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="YAML [key=value ...]", help="the config, and keys that differ")
    whole, real = (
        (lambda low, high: _number(int, low, high)),
        (lambda low, high: _number(float, low, high, open_low=True)),
    )
    parser.add_argument("--runs", type=whole(1, 100), default=3, help="with seeds seed, seed + 1, ... (default: 3)")
    parser.add_argument("--steps", type=whole(20, 100_000), default=100, help="of each run (default: 100)")
    parser.add_argument("--start-lr", type=real(0, 1e6), default=1e-5, metavar="X", help="first rate (default: 1e-5)")
    parser.add_argument("--end-lr", type=real(0, 1e6), default=10.0, metavar="X", help="last rate (default: 10)")
    parser.add_argument(
        "--batch-size",
        type=whole(1, 10**7),
        metavar="N",
        help="images a step, all devices together (default: the run's)",
    )
    parser.add_argument(
        "--size", type=whole(8, 4096), metavar="PX", help="side of the images (default: that of the run's most epochs)"
    )
    parser.add_argument(
        "--smoothing",
        type=_number(float, 0.0, 0.999),
        default=0.9,
        metavar="X",
        help="share of the average loss that a step keeps (default: 0.9)",
    )
    parser.add_argument(
        "--divergence",
        type=real(1, 1e6),
        default=4.0,
        metavar="X",
        help="stop where the smoothed loss is so many times its lowest (default: 4)",
    )
    return parser


def main() -> int:
    """Read the command line, test, write; the exit status, 1 where nothing can be suggested."""
    parser = arguments()
    given = parser.parse_intermixed_args(sys.argv[1:])
    path, overrides = yaml_and_overrides(parser, given.words)
    if given.start_lr >= given.end_lr:
        raise InputError(f"--start-lr: {given.start_lr:g} is not below --end-lr {given.end_lr:g}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = load_config(path, overrides)
    trial = trial_config(path, overrides, size=given.size, batch_size=given.batch_size, world_size=world_size)
    ramp = Ramp(given.start_lr, given.end_lr, given.steps, given.smoothing, given.divergence)
    # Only now: importing torch and Composer takes seconds, and the errors above need neither.
    from recipes.find_lr.run import run

    return run(config, trial, ramp, runs=given.runs, command=_command())


def _command() -> str:
    return shlex.join(["python", "-m", "recipes.find_lr", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run_command(main))
