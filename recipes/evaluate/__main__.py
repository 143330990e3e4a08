"""`python -m recipes.evaluate YAML [key=value ...]`: top-1 and top-5 of a checkpoint on a folder of images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.cli import command_parser, run_command, yaml_and_overrides
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.load import load_config

if TYPE_CHECKING:
    from recipes.evaluate.count import Evaluation

EXAMPLES = """examples:
  %(prog)s yamls/demo.yaml
      the run's newest checkpoint on its own data
  %(prog)s yamls/p3.yaml --data /data/imagenet-v2 \\
      --sizes 224 256 288 --crop-ratios 0.875 1.0 --flip --save figures.json
  %(prog)s yamls/p3.yaml --weights raw \\
      --checkpoint s3://bucket/runs/p3 --csv classes.csv
  composer -n 8 -m recipes.evaluate yamls/p3.yaml
      the images shared among eight GPUs

Each image counts once, whatever the batch size and the number of processes.
The network is the one that the checkpoint was trained as; the YAML says where
the run, its data and the device are. --flip averages the logits of an image
and of its mirror image, as FFCV's ImageNet figures do."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = command_parser(
        "evaluate", "Top-1 and top-5 of a checkpoint on a folder of images, at any sizes and\ncrop ratios.", EXAMPLES
    )
    command.add_argument("words", nargs="*", metavar="YAML [key=value ...]", help="the config, and keys that differ")
    add_checkpoint_arguments(command)
    command.add_argument(
        "--data", metavar="FOLDER", help="class folders, or a folder with val/ (default: the YAML's data.path)"
    )
    command.add_argument("--sizes", nargs="+", type=int, metavar="PX", help="image sizes (default: eval.sizes)")
    command.add_argument(
        "--crop-ratios",
        nargs="+",
        type=float,
        metavar="X",
        help="share of the resized short side that is kept, in (0, 1] (default: eval.crop_ratio)",
    )
    command.add_argument("--flip", action="store_true", help="average the logits with those of the mirror image")
    command.add_argument("--per-class", action="store_true", help="show each class too")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the figures of each class to this file")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--save", type=Path, metavar="FILE", help="write the JSON to this file (composer prints lines of its own)"
    )
    return command


def add_checkpoint_arguments(command: argparse.ArgumentParser) -> None:
    """`--checkpoint` and `--weights`, of every command that loads one."""
    command.add_argument(
        "--checkpoint",
        metavar="PATH|s3://...",
        help="a checkpoint's file, the folder that holds it, or another project's state dict for the YAML's network "
        "(default: the run's newest)",
    )
    command.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="EMA's moving average or the trained weights (default: the average where there is one)",
    )


def settings(given: argparse.Namespace, config: RunConfig) -> list[tuple[int, float]]:
    """Every (size in pixels, crop ratio) to evaluate at, in order.

    Raises:
        InputError: One of them is out of range.
    """
    sizes, ratios = given.sizes or config.eval.sizes, given.crop_ratios or [config.eval.crop_ratio]
    wrong = [f"--sizes: got {size}; allowed: 8 to 4096" for size in sizes if not 8 <= size <= 4096]
    wrong += [f"--crop-ratios: got {ratio}; allowed: above 0, at most 1" for ratio in ratios if not 0 < ratio <= 1]
    if wrong:
        raise InputError(*wrong)
    return [(size, ratio) for size in dict.fromkeys(sizes) for ratio in dict.fromkeys(ratios)]


def evaluate(given: argparse.Namespace, config: RunConfig) -> tuple[Evaluation, bool]:
    """Do what the command line asks for.

    Returns:
        The figures, and whether this process is the one that reports them.
    """
    # Only now: importing torch and Composer takes seconds, and a wrong command line is told before.
    from composer.utils import dist

    from data.open import open_evaluation
    from recipes.config import at_size, seconds
    from recipes.evaluate.count import evaluation
    from recipes.run import start_processes
    from recipes.trained import load_network, say_skipped, usable

    config = usable(config)
    start_processes(config)
    trained = load_network(config, given.checkpoint, given.weights)
    say_skipped(trained)
    data = given.data or config.data.path
    source = open_evaluation(data, config.data.cache_folder, trained.classes)
    found = evaluation(
        trained,
        source,
        data=data,
        settings=settings(given, config),
        flip=given.flip,
        device=config.device,
        precision=config.precision,
        device_batch_size=lambda size: at_size(config.eval.device_batch_size, size),
        workers=config.data.workers,
        prefetch_factor=config.data.prefetch_factor,
        limit=None if config.data.timeout is None else seconds(config.data.timeout),
    )
    return found, dist.get_global_rank() == 0


def main() -> int:
    """Read the command line and evaluate; the exit status."""
    command = parser()
    given = command.parse_intermixed_args(sys.argv[1:])
    path, overrides = yaml_and_overrides(command, given.words)
    config = load_config(path, overrides)
    settings(given, config)
    for flag, file in (("--csv", given.csv), ("--save", given.save)):
        if file is not None and not file.parent.is_dir():
            raise InputError(f"{flag}: {file.parent} is no folder")
    found, reports = evaluate(given, config)
    if reports:
        from recipes.evaluate.show import as_csv, as_json, print_tables
        from recipes.watch.files import replace_text

        text = as_json(found, per_class=given.per_class)
        if given.csv is not None:
            replace_text(given.csv, as_csv(found))
        if given.save is not None:
            replace_text(given.save, text + "\n")
        if given.json:
            print(text)
        else:
            print_tables(found, per_class=given.per_class)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
