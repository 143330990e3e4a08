"""What a run takes, computed from its config and plain values: stages, compute, time and price.

Compute is counted in epochs at 224 px: one is a forward and a backward pass over the training set at that size. The
forward pass is a third of it, since the backward pass computes gradients of the weights and of the inputs. Only the
functions that take a network need torch, which takes seconds to import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from algorithms.fixres import start_epoch
from data.config import Crop, EpochPlan
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.plan.throughput import FORWARD, REFERENCE_SIZE, MachineConfig, PriceConfig, PricesConfig, Throughput, Work
from recipes.schedule import Rate, epoch_plan, peak_lr, rate_function, step_at

if TYPE_CHECKING:
    from torch import nn


class Images(NamedTuple):
    """Number of images, and where it comes from."""

    train: int
    val: int
    source: str


class Inputs(NamedTuple):
    """What a plan is made from."""

    config: RunConfig
    images: Images
    devices: int
    hardware: str  # in words
    prices: PricesConfig
    machine_name: str | None = None  # of the price list
    throughput: Throughput | None = None  # None: unknown

    @property
    def machine(self) -> MachineConfig | None:
        """The machine's entry in the price list."""
        return None if self.machine_name is None else self.prices.machines[self.machine_name]


class Stage(NamedTuple):
    """Consecutive epochs with one image size, one batch size and one cost of a step."""

    first_epoch: int  # counted from 0
    epochs: int
    loader_size: int  # side in pixels of the loader's images ...
    size: int  # ... and of those that the network sees, which differ with `progressive_resizing.where: batch`
    crop: Crop
    global_batch_size: int
    cost: float  # compute of a step over that of one forward and backward pass over all parameters
    steps: int
    first: Rate  # of the first step ...
    last: Rate  # ... and of the last
    epochs_at_224px: float
    images_per_second: float | None  # what the devices train, and the loader must supply; None: unknown
    hours: float | None
    memory_gb: float | None  # of one device, in GB (1e9 bytes); None: not computed


class Evaluation(NamedTuple):
    """All evaluations of a run."""

    times: int
    sizes: tuple[int, ...]
    images: int
    epochs_at_224px: float  # of training


class Cost(NamedTuple):
    """Price of the run."""

    kind: str  # `on demand` or `spot`
    dollars: float
    price: PriceConfig


class Plan(NamedTuple):
    """The result; the fields are those of --json. The savings are shares of the compute, and may be negative."""

    run_name: str
    epochs: int
    images: Images
    hardware: str
    machine: str | None
    machine_note: str | None
    devices: int
    compute_scaled_by: str  # `area` of the images, or `FLOPs` of the network
    peak_lr: float  # the schedule's highest learning rate ...
    peak_epoch: int  # ... the epoch in which it is reached, counted from 0 ...
    peak_momentum: float  # ... and the momentum there
    stages: tuple[Stage, ...]
    epochs_at_224px: float
    saving_against_224px: float  # against as many epochs at 224 px with one forward and backward pass a step
    saving_by_size_alone: float  # without the second passes of SAM and the like
    train_size: int
    saving_against_train_size: float
    evaluation: Evaluation
    throughput: Throughput | None
    evaluation_hours: float | None
    checkpoint_hours: float | None
    hours: float | None
    device_memory_gb: float | None
    costs: tuple[Cost, ...]


def by_area(size: int) -> float:
    """Compute as the area of the image: exact for convolutions, where no feature map's size is rounded."""
    return (size / REFERENCE_SIZE) ** 2


def network_size(config: RunConfig, epoch: int, loader_size: int) -> int:
    """Side in pixels of what the network sees in an epoch (counted from 0).

    With `where: batch` Composer resizes (algorithms/progressive_resizing.py): the size follows the share of the epochs
    that are complete, and is rounded down once more where a batch is scaled by a factor.
    """
    resizing = config.algorithms.progressive_resizing
    if resizing is None or resizing.where == "loader":
        return loader_size
    return math.floor(loader_size * (resizing.size_at(epoch / config.epochs, loader_size) / loader_size))


def step_cost(config: RunConfig, epoch: int) -> float:
    """Compute of a step in an epoch (counted from 0) over that of one forward and backward pass.

    SAM repeats both passes every `interval` steps, activation checkpointing the forward pass; FixRes on the classifier
    has almost no backward pass. Averages of weights, mixing and label smoothing are not counted.
    """
    fixres, sam = config.algorithms.fixres, config.algorithms.sam
    cost = 1.0 + (FORWARD if config.model.activation_checkpointing else 0.0)
    if fixres is not None and fixres.train == "classifier" and epoch >= start_epoch(fixres.start, config.epochs):
        cost = FORWARD
    return cost * (1.0 if sam is None else 1.0 + 1.0 / sam.interval)


def schedule_of(
    config: RunConfig, epochs: Sequence[EpochPlan], samples: int
) -> tuple[list[int], Callable[[int, int], Rate]]:
    """Steps of each epoch, and (epoch, batch) -> learning rate and momentum, as recipes/trainer.py sets them."""
    steps = [math.ceil(samples / entry.global_batch_size) for entry in epochs]
    total, rate = sum(steps), rate_function(config.scheduler, peak_lr(config, epochs))
    return steps, lambda epoch, batch: rate(step_at(epoch, batch, steps[epoch], len(steps), total), total)


def make_plan(inputs: Inputs, work: Work = by_area, memory_gb: Callable[[Stage], float] | None = None) -> Plan:
    """Compute a plan.

    Args:
        inputs: What is known of the run.
        work: Compute by image size.
        memory_gb: Memory of one device in a stage, in GB; None: not computed.

    Raises:
        InputError: `global_batch_size` does not divide by the number of devices.
    """
    config, images, machine, throughput = inputs.config, inputs.images, inputs.machine, inputs.throughput
    epochs = epoch_plan(config, inputs.devices)
    steps, rate_at = schedule_of(config, epochs, images.train)

    def kind(epoch: int) -> tuple[EpochPlan, int, float]:
        return epochs[epoch], network_size(config, epoch, epochs[epoch].size), step_cost(config, epoch)

    stages = []
    for (entry, size, cost), group in groupby(range(config.epochs), kind):
        members = list(group)
        speed = None if throughput is None else throughput.rate(size, cost, work)
        stage = Stage(
            first_epoch=members[0],
            epochs=len(members),
            loader_size=entry.size,
            size=size,
            crop=entry.crop,
            global_batch_size=entry.global_batch_size,
            cost=cost,
            steps=sum(steps[epoch] for epoch in members),
            first=rate_at(members[0], 0),
            last=rate_at(members[-1], steps[members[-1]] - 1),
            epochs_at_224px=len(members) * cost * work(size),
            images_per_second=speed,
            hours=None if speed is None else len(members) * images.train / speed / 3600,
            memory_gb=None,
        )
        stages.append(stage if memory_gb is None else stage._replace(memory_gb=memory_gb(stage)))

    # 20 steps of each epoch are enough to find the peak of a schedule whose warm-up takes epochs.
    points = ((e, rate_at(e, count * part // 20)) for e, count in enumerate(steps) for part in range(20))
    peak_epoch, peak = max(points, key=lambda point: point[1].lr)
    compute, times, sizes = (
        sum(stage.epochs_at_224px for stage in stages),
        -(-config.epochs // config.eval.interval),
        config.eval.sizes,
    )
    evaluation_hours = checkpoint_hours = hours = None
    if throughput is not None:
        if throughput.evaluation_seconds is None:
            seconds = sum(times * images.val / throughput.rate(size, FORWARD, work) for size in sizes)
        else:
            seconds = times * throughput.evaluation_seconds
        evaluation_hours = seconds / 3600
        if throughput.checkpoint_seconds is not None:
            checkpoint_hours = config.epochs * throughput.checkpoint_seconds / 3600
        hours = sum(stage.hours or 0.0 for stage in stages) + evaluation_hours + (checkpoint_hours or 0.0)
    prices = {"on demand": machine.on_demand, "spot": machine.spot} if machine else {}
    return Plan(
        run_name=config.run_name,
        epochs=config.epochs,
        images=images,
        hardware=inputs.hardware,
        machine=inputs.machine_name,
        machine_note=machine.note if machine else None,
        devices=inputs.devices,
        compute_scaled_by="area" if work is by_area else "FLOPs",
        peak_lr=peak_lr(config, epochs),
        peak_epoch=peak_epoch,
        peak_momentum=config.optimizer.momentum if peak.momentum is None else peak.momentum,
        stages=tuple(stages),
        epochs_at_224px=compute,
        saving_against_224px=1.0 - compute / config.epochs,
        saving_by_size_alone=1.0 - sum(stage.epochs * work(stage.size) for stage in stages) / config.epochs,
        train_size=config.data.train_size,
        saving_against_train_size=1.0 - compute / (config.epochs * work(config.data.train_size)),
        evaluation=Evaluation(
            times, sizes, images.val, times * images.val / images.train * FORWARD * sum(map(work, sizes))
        ),
        throughput=throughput,
        evaluation_hours=evaluation_hours,
        checkpoint_hours=checkpoint_hours,
        hours=hours,
        device_memory_gb=config.device_memory_gb or (machine.device_memory_gb if machine else None),
        costs=tuple(
            Cost(kind, hours * price.usd_per_hour, price)
            for kind, price in prices.items()
            if price is not None and hours is not None
        ),
    )


def as_json(value: Any) -> Any:
    """A plan, or a part of it, as plain values; tuples with names become dictionaries."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if hasattr(value, "_asdict"):
        hidden = ("whole_step", "evaluation_seconds", "checkpoint_seconds")  # the plan's hours contain them
        return {name: as_json(item) for name, item in value._asdict().items() if name not in hidden}
    return [as_json(item) for item in value] if isinstance(value, tuple) else value


def by_flops(network: nn.Module) -> Work:
    """Compute as FLOPs of a forward pass over those at 224 px; the network is on the meta device."""
    reference = flops(network, REFERENCE_SIZE)
    return cache(lambda size: flops(network, size) / reference)


def flops(network: nn.Module, size: int) -> int:
    """Floating-point operations of a forward pass over one image: convolutions and matrix products, as torch counts.

    Args:
        network: On the meta device; maps (N, 3, size, size) to logits.
        size: Side of the image in pixels.

    Raises:
        InputError: The network does not accept images of this size.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            network.eval()(torch.empty(1, 3, size, size, device="meta"))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model.name: the network does not accept images of {size} px: {reason}") from None
    return counter.get_total_flops()


def device_memory(network: nn.Module, config: RunConfig, devices: int) -> Callable[[Stage], float]:
    """Memory in GB that one device needs in a stage (recipes/preflight.py); the network is on the meta device."""
    from recipes.preflight import pass_images, step_memory

    def memory_gb(stage: Stage) -> float:
        images = pass_images(config, EpochPlan(stage.loader_size, stage.crop, stage.global_batch_size), devices)
        fixed, per_image = step_memory(network, config, devices, stage.size, stage.crop == "center")
        return (fixed + per_image * images) / 1e9

    return memory_gb
