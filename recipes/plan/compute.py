"""The stages of a run and their compute, from the config alone.

Compute is counted in epoch-equivalents: one is a forward and a backward pass over the training set at 224 px. The
forward pass is a third of a step, since the backward pass computes gradients of the weights and of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from algorithms.fixres import start_epoch
from data.epoch_plan import Crop, EpochPlan
from recipes.config import RunConfig
from recipes.schedule import Rate, epoch_plan, peak_lr, rate_function, step_at

REFERENCE_SIZE = 224
"""Side in pixels of the images that an epoch-equivalent is counted in."""
FORWARD = 1 / 3
"""Share of a training step that its forward pass is."""

Work = Callable[[int], float]
"""Compute of a pass over one image of so many pixels a side, over that at 224 px."""


class Stage(NamedTuple):
    """A stretch of epochs in which the network sees one size, with one batch size and one cost of a step."""

    first_epoch: int
    """Counted from 0."""
    epochs: int
    loader_size: int
    """Side in pixels of what the loader makes ..."""
    size: int
    """... and of what the network sees, which differs for `progressive_resizing` with `where: batch`."""
    crop: Crop
    global_batch_size: int
    cost: float
    """Compute of a step over that of one forward and backward pass over all parameters."""
    steps: int
    first: Rate
    """Learning rate and momentum of the stage's first step ..."""
    last: Rate
    """... and of its last."""


class Evaluation(NamedTuple):
    """All evaluations of a run."""

    times: int
    sizes: tuple[int, ...]
    """In pixels."""
    images: int
    """Of the validation set."""


def by_area(size: int) -> float:
    """Compute as the area of the image: exact for convolutions, where no feature map's size is rounded."""
    return (size / REFERENCE_SIZE) ** 2


def network_size(config: RunConfig, epoch: int, loader_size: int) -> int:
    """Side in pixels of what the network sees in an epoch (counted from 0).

    With `where: batch` it is Composer's doing (algorithms/progressive_resizing.py): the size follows the share of the
    run that is done, in whole epochs since the run's length is given in epochs, and is rounded down once more where a
    batch is scaled by a factor.
    """
    resizing = config.algorithms.progressive_resizing
    if resizing is None or resizing.where == "loader":
        return loader_size
    pinned = resizing.size_at(epoch / config.epochs, loader_size)
    return math.floor(loader_size * (pinned / loader_size))


def step_cost(config: RunConfig, epoch: int) -> float:
    """Compute of a step in an epoch over that of one forward and backward pass.

    SAM makes both passes again every `interval` steps; activation checkpointing the forward pass every time; FixRes on
    the classifier has next to no backward pass. Averages of weights, mixing and label smoothing are not counted.
    """
    fixres, sam = config.algorithms.fixres, config.algorithms.sam
    cost = 1.0 + (FORWARD if config.model.activation_checkpointing else 0.0)
    if fixres is not None and fixres.train == "classifier" and epoch >= start_epoch(fixres.start, config.epochs):
        cost = FORWARD
    return cost * (1.0 if sam is None else 1.0 + 1.0 / sam.interval)


def batches_per_epoch(plan: Sequence[EpochPlan], samples: int) -> list[int]:
    """Steps of each epoch, as the sampler cuts it."""
    return [-(-samples // entry.global_batch_size) for entry in plan]


def schedule_of(config: RunConfig, plan: Sequence[EpochPlan], samples: int) -> Callable[[int, int], Rate]:
    """(epoch, batch) -> learning rate and momentum: what the Trainer's callback sets (optimizer.py)."""
    batches = batches_per_epoch(plan, samples)
    total, rate = sum(batches), rate_function(config.scheduler, peak_lr(config, plan))
    return lambda epoch, batch: rate(step_at(epoch, batch, batches[epoch], len(batches), total), total)


def plan_stages(config: RunConfig, samples: int, devices: int) -> list[Stage]:
    """The stages in order.

    Args:
        config: The run.
        samples: Training images.
        devices: Processes that share each batch.

    Raises:
        InputError: `global_batch_size` does not divide by the number of devices.
    """
    plan = epoch_plan(config, devices)
    batches, rate_at = batches_per_epoch(plan, samples), schedule_of(config, plan, samples)
    found: list[Stage] = []
    for epoch, (entry, steps) in enumerate(zip(plan, batches, strict=True)):
        size, cost = network_size(config, epoch, entry.size), step_cost(config, epoch)
        first, last = rate_at(epoch, 0), rate_at(epoch, steps - 1)
        stage = Stage(epoch, 1, entry.size, size, entry.crop, entry.global_batch_size, cost, steps, first, last)
        if found and _kind(found[-1]) == _kind(stage):
            before = found.pop()
            stage = before._replace(epochs=before.epochs + 1, steps=before.steps + steps, last=last)
        found.append(stage)
    return found


def highest_rate(config: RunConfig, samples: int, devices: int) -> tuple[int, Rate]:
    """Where the learning rate is highest: the epoch (counted from 0), and the rate and momentum there.

    Looked for at 20 steps of each epoch, which are enough for a schedule whose warm-up takes epochs.

    Args:
        config: The run.
        samples: Training images.
        devices: Processes that share each batch.
    """
    plan = epoch_plan(config, devices)
    batches, rate_at = batches_per_epoch(plan, samples), schedule_of(config, plan, samples)
    found = [(epoch, rate_at(epoch, steps * part // 20)) for epoch, steps in enumerate(batches) for part in range(20)]
    return max(found, key=lambda entry: entry[1].lr)


def _kind(stage: Stage) -> tuple[object, ...]:
    return stage.loader_size, stage.size, stage.crop, stage.global_batch_size, stage.cost


def equivalents(stage: Stage, work: Work) -> float:
    """Compute of a stage in epochs at 224 px."""
    return stage.epochs * stage.cost * work(stage.size)


def saving(stages: Sequence[Stage], work: Work, size: int = REFERENCE_SIZE) -> float:
    """Share of the compute saved against as many plain epochs at one size; below 0 where the run costs more.

    Args:
        stages: The run's; with a cost of 1 each, it is what the sizes alone save.
        work: Compute by image size.
        size: Of the plain run, in pixels.
    """
    plain = sum(stage.epochs for stage in stages) * work(size)
    return 1.0 - sum(equivalents(stage, work) for stage in stages) / plain


def evaluation_of(config: RunConfig, images: int) -> Evaluation:
    """How often a run evaluates: after every `eval.interval`-th epoch and after the last."""
    times = config.epochs // config.eval.interval + (config.epochs % config.eval.interval > 0)
    return Evaluation(times, config.eval.sizes, images)


def evaluation_equivalents(evaluation: Evaluation, samples: int, work: Work) -> float:
    """Compute of all evaluations, which are forward passes, in training epochs of `samples` images at 224 px."""
    passes = sum(work(size) for size in evaluation.sizes)
    return evaluation.times * evaluation.images / samples * FORWARD * passes
