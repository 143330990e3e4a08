"""What each epoch trains on: image size, crop and batch size, from the config alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

from algorithms.fixres import start_epoch
from data.epoch_plan import Crop, EpochPlan
from recipes.config import RunConfig, SchedulerConfig, at_size
from recipes.errors import InputError
from recipes.schedule import Rate, constant, cosine, one_cycle


class Stage(NamedTuple):
    """A stretch of epochs with one image size, crop and batch size."""

    first_epoch: int
    epochs: int
    plan: EpochPlan


def image_size(config: RunConfig, epoch: int) -> int:
    """Side in pixels of the training images that the loader makes in an epoch (counted from 0)."""
    fixres, resizing = config.algorithms.fixres, config.algorithms.progressive_resizing
    if fixres is not None and epoch >= start_epoch(fixres.start, config.epochs):
        return fixres.size
    if resizing is None or resizing.where == "batch":
        return config.data.train_size
    # The middle of the epoch, so that a stage's border falls on the nearest epoch.
    return resizing.size_at((epoch + 0.5) / config.epochs, config.data.train_size)


def global_batch_size(config: RunConfig, size: int, world_size: int) -> int:
    """Images per optimizer step over all devices at an image size.

    Raises:
        InputError: `global_batch_size` does not divide by the number of devices.
    """
    if config.device_batch_size is not None:
        return at_size(config.device_batch_size, size) * world_size
    assert config.global_batch_size is not None  # a config has one of the two
    images = at_size(config.global_batch_size, size)
    if images % world_size:
        raise InputError(
            f"global_batch_size: {images} images at {size} px do not divide by {world_size} processes; "
            f"allowed: a multiple of {world_size}"
        )
    return images


def epoch_plan(config: RunConfig, world_size: int) -> tuple[EpochPlan, ...]:
    """Image size, crop and global batch size of each epoch of the run."""
    plan = []
    for epoch in range(config.epochs):
        size = image_size(config, epoch)
        fixres = config.algorithms.fixres
        crop: Crop = "center" if fixres is not None and epoch >= start_epoch(fixres.start, config.epochs) else "random"
        plan.append(EpochPlan(size, crop, global_batch_size(config, size, world_size)))
    return tuple(plan)


def stages(plan: Sequence[EpochPlan]) -> tuple[Stage, ...]:
    """The epochs of a plan, those with equal size, crop and batch size put together."""
    result, epoch = [], 0
    for entry, members in groupby(plan):
        epochs = len(list(members))
        result.append(Stage(epoch, epochs, entry))
        epoch += epochs
    return tuple(result)


def peak_lr(config: RunConfig, plan: Sequence[EpochPlan]) -> float:
    """The schedule's highest learning rate: `optimizer.lr`, scaled linearly where `lr_batch_size` asks for it.

    The scale is one number for the whole run, that of the global batch size with most epochs, so the rate does not jump
    where a stage changes the batch size (linear scaling: Goyal et al. 2017, section 2.1).
    """
    if config.optimizer.lr_batch_size is None:
        return config.optimizer.lr
    epochs: dict[int, int] = {}
    for entry in plan:
        epochs[entry.global_batch_size] = epochs.get(entry.global_batch_size, 0) + 1
    main = max(epochs, key=lambda images: epochs[images])
    return config.optimizer.lr * main / config.optimizer.lr_batch_size


def rate_function(scheduler: SchedulerConfig, lr: float) -> Callable[[float, float], Rate]:
    """The schedule as a function of (step, total steps).

    Args:
        scheduler: The schedule's name and numbers.
        lr: Its highest learning rate.
    """
    functions: dict[str, Callable[..., Rate]] = {"one_cycle": one_cycle, "cosine": cosine, "constant": constant}
    return partial(functions[scheduler.name], lr=lr, **scheduler.model_dump(exclude={"name"}))
