"""All runs of a range test, from the data to the files."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from composer.utils import dist
from rich.console import Console
from tqdm import tqdm

from data.stage import bring
from recipes.config import RunConfig
from recipes.find_lr.curve import Curve, Ramp
from recipes.find_lr.range_test import range_test
from recipes.find_lr.suggest import choose, suggestions
from recipes.find_lr.trial import pasted, peaks, present_lr
from recipes.find_lr.write import ENDS, Result, show, write
from recipes.preflight import require_ready
from recipes.run import open_data, start_processes
from recipes.schedule import epoch_plan
from recipes.trainer import device_name
from recipes.watch.versions import versions

SEEDS = 2**32


def run(config: RunConfig, trial: RunConfig, ramp: Ramp, *, runs: int, command: str) -> int:
    """Test, write the files to RUNS_FOLDER/RUN_NAME/find_lr, and print what to paste.

    Args:
        config: The run that a rate is wanted for.
        trial: From `trial_config`.
        ramp: How the rate rises.
        runs: Number of runs, with the seeds from the config's on.
        command: As given, for the page.

    Returns:
        The exit status: 0, or 1 where nothing can be suggested; the curves are written all the same.

    Raises:
        InputError: The config or the data cannot be used; nothing was trained.
        DataError: Likewise.
    """
    warnings.filterwarnings("ignore", message="No batches were trained")
    start_processes(trial)
    world_size, leader = dist.get_world_size(), dist.get_global_rank() == 0
    train, val, _ = require_ready(trial, world_size, lambda: open_data(trial))
    where = trial.data
    bring(where.path, where.cache_folder, where.cache_gb, first=where.stage_first, leader=dist.get_local_rank() == 0)
    curves: list[Curve] = []
    with tqdm(total=runs * ramp.steps, unit="step", disable=None if leader else True) as bar:

        def on_step(lr: float, loss: float) -> None:
            bar.set_postfix_str(f"run {len(curves) + 1}/{runs}, lr {lr:.2g}, loss {loss:.3g}", refresh=False)
            bar.update()

        for number in range(runs):
            seeded = trial.model_copy(update={"seed": (trial.seed + number) % SEEDS})
            curve = range_test(seeded, train=train, val=val, ramp=ramp, on_step=on_step)
            curves.append(curve)
            bar.update((number + 1) * ramp.steps - bar.n)
            if leader:
                steps, last = len(curve.lrs), curve.lrs[-1]
                said = f"run {number + 1}, seed {curve.seed}: {steps} steps up to {last:.3g}, {ENDS[curve.end]}"
                bar.write(said, file=sys.stderr)
    if not leader:
        return 0
    result = _result(config, trial, ramp, curves, command)
    folder = Path(config.runs_folder) / config.run_name / "find_lr"
    write(result, folder)
    show(result, Console())
    print(f"\nplot: {folder / 'lr.png'}\npage: {folder / 'lr.html'}\ncurves: {folder / 'lr.csv'}")
    return 0 if result.chosen else 1


def _result(config: RunConfig, trial: RunConfig, ramp: Ramp, curves: list[Curve], command: str) -> Result:
    """What the curves say, in the terms of the config."""
    images = epoch_plan(trial, dist.get_world_size())[0].global_batch_size
    found = suggestions(curves, ramp.steps)
    chosen = choose(found)
    line = None if chosen is None else pasted(config, chosen.geometric_mean, images)
    return Result(
        run_name=config.run_name,
        size=trial.data.train_size,
        images=images,
        devices=dist.get_world_size(),
        present=present_lr(config, images),
        ramp=ramp,
        curves=tuple(curves),
        suggestions=tuple(found),
        chosen=chosen,
        line=line,
        peaks=() if line is None else tuple(peaks(config, line)),
        command=command,
        versions=versions(device_name(config.device)),
    )
