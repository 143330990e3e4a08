"""What of a config a range test runs with, and what its result is in the config's terms. No torch, no Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from recipes.config import OneCycleConfig, RunConfig
from recipes.errors import InputError
from recipes.load import load_config
from recipes.schedule import epoch_plan, global_batch_size, peak_lr

OFF = ("progressive_resizing", "fixres", "ema", "swa")
"""Techniques that a test leaves out: it stays at one size, and averages do not change what is trained."""
DEVICES = (1, 2, 4, 8, 16)
"""Numbers of devices for which the rate is shown."""
DIGITS = 2
"""Significant digits of a suggested rate; its spread is rarely below ten percent."""


def main_size(config: RunConfig, world_size: int) -> int:
    """The image size that most epochs train at; the first of those with equally many."""
    epochs: dict[int, int] = {}
    for entry in epoch_plan(config, world_size):
        epochs[entry.size] = epochs.get(entry.size, 0) + 1
    return max(epochs, key=lambda size: epochs[size])


def trial_config(
    path: Path, overrides: Sequence[str], *, size: int | None, batch_size: int | None, world_size: int
) -> RunConfig:
    """The config that a range test trains with.

    It is the run's own, at one image size with random crops and with the momentum that the schedule has where its rate
    is highest, without `OFF`. Nothing is resumed, and torch.compile, which changes no loss, is off.

    Args:
        path: The run's YAML.
        overrides: `key.path=value`.
        size: Side of the images in pixels; None: that of most epochs.
        batch_size: Images per step over all devices; None: the run's at that size.
        world_size: Number of processes.

    Raises:
        InputError: The config is wrong, or the batch does not divide by the processes.
    """
    config = load_config(path, overrides)
    if batch_size is not None and batch_size % world_size:
        raise InputError(
            f"--batch-size: {batch_size} images do not divide by {world_size} processes; "
            f"allowed: a multiple of {world_size}"
        )
    size = main_size(config, world_size) if size is None else size
    images = global_batch_size(config, size, world_size) if batch_size is None else batch_size
    schedule = config.scheduler
    momentum = schedule.base_momentum if isinstance(schedule, OneCycleConfig) else config.optimizer.momentum
    changes = [
        *(f"algorithms.{name}=off" for name in OFF),
        f"data.train_size={size}",
        "device_batch_size=null",
        f"global_batch_size={images}",
        "scheduler={name: constant}",
        f"optimizer.momentum={momentum}",
        "compile=false",
        "resume=null",
        "autoresume=false",
    ]
    return load_config(path, [*overrides, *changes])


class Pasted(NamedTuple):
    """A rate as the YAML says it."""

    lr: float
    """`optimizer.lr`, to `DIGITS` significant digits."""
    lr_batch_size: int
    """`optimizer.lr_batch_size`."""

    @property
    def yaml(self) -> str:
        """The lines to paste, as a user's editor wants them."""
        return f"optimizer:\n  lr: {self.lr}\n  lr_batch_size: {self.lr_batch_size}"

    @property
    def overrides(self) -> str:
        """The same for a command line."""
        return f"optimizer.lr={self.lr} optimizer.lr_batch_size={self.lr_batch_size}"


def pasted(config: RunConfig, rate: float, batch_size: int) -> Pasted:
    """What to write so that `batch_size` images a step train at `rate`, and other batches in proportion.

    Args:
        config: The run's; its `optimizer.lr_batch_size` is kept where it has one.
        rate: Suggested by a test.
        batch_size: Images per step of that test, over all devices.
    """
    reference = config.optimizer.lr_batch_size or batch_size
    return Pasted(float(f"{rate * reference / batch_size:.{DIGITS}g}"), reference)


class Peak(NamedTuple):
    """What the schedule's highest rate becomes on some machine."""

    devices: int
    images: int
    """Per step over all devices, in the stage with most epochs."""
    lr: float


def present_lr(config: RunConfig, batch_size: int) -> float:
    """The config's highest rate, for `batch_size` images a step.

    Where the config does not scale its rate, that is `optimizer.lr` at any batch.
    """
    reference = config.optimizer.lr_batch_size or batch_size
    return config.optimizer.lr * batch_size / reference


def peaks(config: RunConfig, line: Pasted) -> list[Peak]:
    """The highest rate of a run with `line` in its YAML, for each number of devices on which it could run."""
    optimizer = config.optimizer.model_copy(update=line._asdict())
    config = config.model_copy(update={"optimizer": optimizer})
    found = []
    for devices in DEVICES:
        try:
            plan = epoch_plan(config, devices)
        except InputError:  # a global batch that does not divide by so many
            continue
        lr = peak_lr(config, plan)
        found.append(Peak(devices, round(lr / line.lr * line.lr_batch_size), lr))
    return found
