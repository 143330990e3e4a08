"""What each epoch trains on, and each step's learning rate and momentum: pure functions of the config.

The step that a rate is computed for is (epochs done / epochs of the run) * steps of the run, a fraction. So a change of
the batch size between two stages never makes the rate jump, and an interrupted run sees the same rates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data.config import EpochPlan
from data.errors import InputError
from recipes.config import CosineConfig, OneCycleConfig, RunConfig, SchedulerConfig, StepConfig, at_size


def image_size(config: RunConfig, epoch: int) -> int:
    """Side in pixels of the training images that the loader makes in an epoch (counted from 0)."""
    fixres, resizing = config.algorithms.fixres, config.algorithms.progressive_resizing
    if fixres is not None and epoch >= fixres.start_epoch(config.epochs):
        return fixres.size
    if resizing is None or resizing.where == "batch":
        return config.data.train_size
    # The middle of the epoch, so that a stage begins at the nearest epoch.
    return resizing.size_at((epoch + 0.5) / config.epochs, config.data.train_size)


def global_batch_size(config: RunConfig, size: int, world_size: int) -> int:
    """Images per optimizer step over all devices at an image size; InputError: not divisible by their number."""
    if config.device_batch_size is not None:
        return at_size(config.device_batch_size, size) * world_size
    assert config.global_batch_size is not None  # a config has one of the two
    images = at_size(config.global_batch_size, size)
    if images % world_size:
        raise InputError(
            f"global_batch_size: {images} images at {size} px are not divisible by {world_size} processes; "
            f"allowed: a multiple of {world_size}"
        )
    return images


def epoch_plan(config: RunConfig, world_size: int) -> tuple[EpochPlan, ...]:
    """Image size, crop and global batch size of each epoch; InputError: a global batch cannot be divided."""
    sizes = [image_size(config, epoch) for epoch in range(config.epochs)]
    images = {size: global_batch_size(config, size, world_size) for size in dict.fromkeys(sizes)}
    fixres = config.algorithms.fixres
    center = fixres.start_epoch(config.epochs) if fixres is not None else config.epochs
    return tuple(
        EpochPlan(size, "center" if epoch >= center else "random", images[size]) for epoch, size in enumerate(sizes)
    )


class Rate(NamedTuple):
    """Learning rate and momentum of one step."""

    lr: float
    momentum: float | None  # None: the optimizer's own stays


def _cosine_between(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * fraction) + 1.0)


def _linear_between(start: float, end: float, fraction: float) -> float:
    return (end - start) * fraction + start


def one_cycle(step: float, total_steps: float, lr: float, config: OneCycleConfig) -> Rate:
    """One-Cycle policy: the rate rises to `lr` and falls to almost zero, the momentum does the opposite.

    Equal to `torch.optim.lr_scheduler.OneCycleLR` (two phases) at whole steps; the paper is Smith & Topin 2018,
    "Super-Convergence", section 4. `step` counts the steps done, in [0, total_steps - 1], and may be fractional; `lr`
    is reached at warmup * total_steps - 1.
    """
    between = _cosine_between if config.anneal == "cos" else _linear_between
    first, low, high = lr / config.div_factor, config.base_momentum, config.max_momentum
    # torch counts phases by the index of their last step. A run too short for a warm-up step starts at the peak.
    peak, last = config.warmup * total_steps - 1.0, total_steps - 1.0
    if step < peak:
        fraction = step / peak
        return Rate(between(first, lr, fraction), between(high, low, fraction))
    peak = max(peak, 0.0)
    fraction = min((step - peak) / (last - peak), 1.0) if last > peak else 1.0
    return Rate(between(lr, first / config.final_div_factor, fraction), between(low, high, fraction))


def cosine(step: float, total_steps: float, lr: float, config: CosineConfig) -> Rate:
    """Linear warm-up from lr * first_lr_ratio, then a half cosine to lr * final_lr_ratio.

    With the defaults Composer's `CosineAnnealingWithWarmupScheduler` (optim/scheduler.py) at the same fraction of the
    run; with `overlap`, timm's `CosineLRScheduler` at whole epochs. `step` counts the steps done, in [0, total_steps],
    and may be fractional.
    """
    progress = min(step / total_steps, 1.0)
    if progress < config.warmup:
        first = lr * config.first_lr_ratio
        return Rate(first + (lr - first) * progress / config.warmup, None)
    begin = 0.0 if config.overlap else config.warmup
    fraction = (progress - begin) / (1.0 - begin)
    return Rate(_cosine_between(lr, lr * config.final_lr_ratio, fraction), None)


def step_at(epoch: int, batch: int, batches: int, epochs: int, total_steps: int) -> float:
    """The position (epoch, batch) as a step of a run whose epochs all have equally many steps, in [0, total_steps].

    `batches` counts those of the current epoch, `total_steps` those of all `epochs`.
    """
    return (epoch * batches + batch) * total_steps / (batches * epochs)


def peak_lr(config: RunConfig, plan: Sequence[EpochPlan]) -> float:
    """The schedule's highest learning rate: `optimizer.lr`, scaled linearly if `lr_batch_size` is set.

    One factor, that of the global batch size with the most epochs, applies to the whole run, so the rate does not jump
    when a stage changes the batch size (linear scaling: Goyal et al. 2017, section 2.1).
    """
    if config.optimizer.lr_batch_size is None:
        return config.optimizer.lr
    ((main, _),) = Counter(entry.global_batch_size for entry in plan).most_common(1)
    return config.optimizer.lr * main / config.optimizer.lr_batch_size


def rate_function(scheduler: SchedulerConfig, lr: float) -> Callable[[float, float], Rate]:
    """The schedule with the highest rate `lr`, as a function of (step, total steps)."""
    if isinstance(scheduler, OneCycleConfig):
        return lambda step, total_steps: one_cycle(step, total_steps, lr, scheduler)
    if isinstance(scheduler, CosineConfig):
        return lambda step, total_steps: cosine(step, total_steps, lr, scheduler)
    if isinstance(scheduler, StepConfig):
        # 1e-9: a share such as 1/3 is rounded, and a change must not come a step late.
        return lambda step, total: Rate(lr * scheduler.factor ** int(step / total / scheduler.interval + 1e-9), None)
    return lambda step, total_steps: Rate(lr, None)
