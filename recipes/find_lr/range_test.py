"""The range test: the run's own Trainer and pipeline, with a learning rate that rises from step to step."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from composer import Callback, Logger, State
from composer.utils import dist, reproducibility
from tqdm import tqdm

from data.sampler import PositionSampler
from data.source import Source
from data.stage import stage_dataset
from recipes.config import OneCycleConfig, RunConfig
from recipes.find_lr import ENDS, Curve, End, Ramp, curve_of, end_of
from recipes.load import load_config
from recipes.preflight import prepare_run
from recipes.processes import start_processes
from recipes.run import open_data
from recipes.schedule import epoch_plan, global_batch_size
from recipes.step import mean_loss
from recipes.trainer import build_algorithms, build_trainer
from recipes.weights import Start, StartFrom, read_start

OFF = ("progressive_resizing", "fixres", "distillation", "ema", "swa")
"""Techniques that a test leaves out: it uses one size, weight averages do not change the training, and a teacher's loss
rises with the rate as the labels' does."""


def trial_config(
    path: Path, overrides: Sequence[str], size: int | None, batch_size: int | None, world_size: int
) -> RunConfig:
    """The config that a range test trains with.

    It is the run's own, at one image size with random crops, with the momentum at the schedule's highest rate, and
    without the techniques in `OFF`. Nothing is resumed, and torch.compile, which changes no loss, is off. Without a
    `size`, it is that of most epochs; without a `batch_size` (over all devices), it is the run's at that size.
    InputError: the config is wrong.
    """
    config = load_config(path, overrides)
    if size is None:
        sizes = [entry.size for entry in epoch_plan(config, world_size)]
        size = max(sizes, key=sizes.count)  # the first one if several have equally many epochs
    images = global_batch_size(config, size, world_size) if batch_size is None else batch_size
    schedule = config.scheduler
    changes = [f"algorithms.{name}=off" for name in OFF]
    changes += [f"data.train_size={size}", "device_batch_size=null", f"global_batch_size={images}"]
    if isinstance(schedule, OneCycleConfig):  # whose momentum is `base_momentum` at the highest rate
        changes += [f"scheduler.max_momentum={schedule.base_momentum}"]
    else:
        changes += ["scheduler={name: constant}"]
    changes += ["compile=false", "resume=null", "autoresume=false"]
    return load_config(path, [*overrides, *changes])


class RisingRate(Callback):
    """Sets each step's rate, records its loss, and ends training when the test stops."""

    def __init__(self, ramp: Ramp, bar: tqdm[NoReturn]) -> None:
        self.ramp, self.bar, self.lrs = ramp, bar, ramp.lrs()
        self.losses: list[float] = []
        self.end: End | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Runs before every step, after the recipe's own schedule."""
        rate = float(self.lrs[len(self.losses)])
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate
            # DecoupledSGDW scales its decay by lr / initial_lr, which is 1 at a run's highest rate; timm has the other.
            group |= {key: rate for key in ("initial_lr", "max_lr_snapshot") if group.get(key) is not None}

    def batch_end(self, state: State, logger: Logger) -> None:
        """The loss is the mean over all processes, so all of them stop together."""
        rate, loss = self.lrs[len(self.losses)], mean_loss(state)
        self.losses.append(loss)
        self.bar.set_postfix_str(f"lr {rate:.2g}, loss {loss:.3g}", refresh=False)
        self.bar.update()
        self.end = end_of(self.losses, self.ramp)
        if self.end is not None:
            state.stop_training()


def _range_test(
    config: RunConfig, start: Start | None, train: Source, val: Source, ramp: Ramp, bar: tqdm[NoReturn]
) -> Curve:
    """Train a fresh model, or from `start`, with a rising rate, and discard it.

    It has no side effects: it has its own model and optimizer, restores the generators of Python, NumPy and torch, and
    writes no file. Two tests with the same config give the same bits.
    """
    rank, world_size = dist.get_global_rank(), dist.get_world_size()
    epochs = -(-ramp.steps // -(-len(train) // epoch_plan(config, world_size)[0].global_batch_size))
    config = config.model_copy(update={"max_duration": f"{epochs}ep"})
    plan, repeats = epoch_plan(config, world_size), config.data.augment.repeats
    sampler = PositionSampler(len(train), plan, config.seed, rank, world_size, repeats)
    rising = RisingRate(ramp, bar)
    with ExitStack() as stack:
        stack.callback(reproducibility.load_rng_state, reproducibility.get_rng_state())
        algorithms = build_algorithms(config, [sampler.batches(epoch) for epoch in range(epochs)])
        callbacks = [rising] if start is None else [rising, StartFrom(start, config.model, train.classes)]
        trainer = build_trainer(
            config, train=train, val=val, sampler=sampler, algorithms=algorithms, callbacks=callbacks, loggers=[]
        )
        stack.callback(trainer.close)
        trainer.state.evaluators = []  # no evaluation after the end of training
        trainer.fit()
    assert rising.end is not None
    return curve_of(rising.losses, ramp, config.seed, rising.end)


def run_tests(trial: RunConfig, ramp: Ramp, runs: int) -> list[Curve]:
    """Run the test with consecutive seeds, starting at the config's.

    InputError: the config or the data cannot be used; nothing was trained.
    """
    warnings.filterwarnings("ignore", message="No batches were trained")
    start_processes(trial)
    world_size, leader = dist.get_world_size(), dist.get_global_rank() == 0
    trial, train, val, _ = prepare_run(trial, world_size, lambda: open_data(trial))
    data, first = trial.data, dist.get_local_rank() == 0
    stage_dataset(data.path, data.cache_folder, data.cache_gb, first=data.stage_first, leader=first)
    start, curves = read_start(trial), list[Curve]()
    bar: tqdm[NoReturn]
    with tqdm(total=runs * ramp.steps, unit="step", disable=None if leader else True) as bar:
        for number in range(runs):
            bar.set_description(f"run {number + 1}/{runs}")
            seeded = trial.model_copy(update={"seed": (trial.seed + number) % 2**32})
            curve = _range_test(seeded, start, train, val, ramp, bar)
            curves.append(curve)
            bar.update((number + 1) * ramp.steps - bar.n)
            if leader:
                reached = f"{len(curve.lrs)} steps up to {curve.lrs[-1]:.3g}, {ENDS[curve.end]}"
                bar.write(f"run {number + 1}, seed {curve.seed}: {reached}", file=sys.stderr)
    return curves
