"""`python -m recipes.ablate YAML [key=value ...]`: what each technique of a recipe is worth."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from recipes.ablate.plan import Plan, listing, make_plan, preflight, state
from recipes.ablate.runs import Outcome, Stop, locked, outcomes_of, work
from recipes.checkpoints.interrupt import EXIT_INTERRUPTED
from recipes.cli import command_parser, run_command, yaml_and_overrides
from recipes.errors import InputError

DESCRIPTION = """Train the recipe, the recipe without each technique, the baseline with none,
and the baseline with each technique alone, and compare them: accuracy, time,
images/s, time to an accuracy. Runs that are finished are not repeated, so an
ablation that was interrupted (Ctrl-C, SIGTERM: status 75) goes on with the
same command. A run that fails does not stop the others; status 1 at the end
says so."""
EXAMPLES = """examples:
  %(prog)s yamls/demo.yaml --list
  %(prog)s yamls/demo.yaml model.name=timm/resnet10t \\
      max_duration=6ep data.train_samples=600 eval.interval=1
  %(prog)s yamls/p3.yaml max_duration=16ep \\
      checkpoints.keep=1 --processes 8 --seeds 0 1 2 --only ema without-mixup

Of T techniques and S seeds there are S * (2 T + 2) runs. Results and runs lie
in RUNS_FOLDER/RUN_NAME-ablate."""


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line.

    Raises:
        InputError: The arguments make no sense.
    """
    parser = command_parser("ablate", DESCRIPTION, EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="YAML [key=value ...]", help="the recipe, and keys that differ")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="one run of each variant each (default: 0 1)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="these variants (recipe, without-X, baseline, with-X), or a technique X for both of its; what they are "
        "compared with comes along (default: all)",
    )
    parser.add_argument(
        "--target", type=float, metavar="TOP1", help="in (0, 1], to time (default: the baseline's mean at its end)"
    )
    parser.add_argument(
        "--size", type=int, metavar="PX", help="of eval.sizes, at which to compare (default: the last of them)"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each run, as composer -n N")
    parser.add_argument("--list", action="store_true", help="show the runs and how far they are, and exit")
    given = parser.parse_intermixed_args(list(argv))
    if given.target is not None and not 0 < given.target <= 1:
        parser.error(f"--target: got {given.target:g}; allowed: a share above 0 and at most 1, such as 0.97")
    if given.processes < 1:
        parser.error(f"--processes: got {given.processes}; allowed: at least 1")
    given.seeds = list(dict.fromkeys(given.seeds))
    return parser, given


def main() -> int:
    """Read the command line, do the runs and show what they came to; the exit status."""
    parser, given = parse(sys.argv[1:])
    path, overrides = yaml_and_overrides(parser, given.words)
    plan = make_plan(path, overrides, seeds=given.seeds, only=given.only, processes=given.processes)
    sizes = plan.recipe.eval.sizes
    size = sizes[-1] if given.size is None else given.size
    if size not in sizes:
        raise InputError(f"--size: got {size}; allowed: one of eval.sizes, {', '.join(map(str, sizes))}")
    if given.list:
        print(listing(plan))
        return 0
    with locked(plan.folder) as lock, Stop().installed() as stop:
        todo = [run for run in plan.runs if state(run) != "finished"]
        if todo:
            tell(f"{len(todo)} of {len(plan.runs)} runs to do, in {plan.folder}; first they are all checked")
            preflight(todo, given.processes)
        outcomes = outcomes_of(plan, work(plan, stop, lock, tell))
        present(plan, outcomes, size, given.target)
    if stop.requested:
        tell("interrupted; the same command goes on")
        return EXIT_INTERRUPTED
    return 1 if any(outcome.failure for outcome in outcomes) else 0


def tell(line: str) -> None:
    """Say something on stderr, above the progress bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def present(plan: Plan, outcomes: Sequence[Outcome], size: int, target: float | None) -> None:
    """Write the results and print them; where no run is finished, the files of earlier runs are left alone."""
    from rich.console import Console

    from recipes.ablate.story import story_of
    from recipes.ablate.write import show, write

    story = story_of(plan, outcomes, size, target, ["python", "-m", "recipes.ablate", *sys.argv[1:]])
    files = write(story, plan.folder) if any(row.seeds for row in story.results.rows) else []
    show(story, Console(highlight=False))
    if not files:
        return
    # Piped together with stderr, this comes before what is said last.
    print(f"\n{files[0].parent}: {', '.join(file.name for file in files)}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
