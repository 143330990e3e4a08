"""A whole plan, as plain values for the terminal, the page and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from recipes.config import RunConfig
from recipes.plan.compute import (
    Evaluation,
    Stage,
    Work,
    equivalents,
    evaluation_equivalents,
    evaluation_of,
    highest_rate,
    plan_stages,
    saving,
)
from recipes.plan.tables import MachineConfig, PriceConfig
from recipes.plan.throughput import Throughput, evaluation_seconds, images_per_second, training_seconds
from recipes.schedule import epoch_plan, peak_lr

HOUR = 3600.0


class Images(NamedTuple):
    """How many there are, and how that is known."""

    train: int
    val: int
    source: str


class StageCost(NamedTuple):
    """What a stage takes; rates and hours are None where no throughput is known."""

    stage: Stage
    equivalents: float
    images_per_second: float | None
    """That the devices take, and the loader must give."""
    hours: float | None
    memory_gb: float | None
    """Of one device, at most; None: not computed."""


class Bill(NamedTuple):
    """The run's price at one rate."""

    kind: str
    """`on demand` or `spot`."""
    price: PriceConfig
    dollars: float


class Plan(NamedTuple):
    """All that is told."""

    run_name: str
    epochs: int
    images: Images
    hardware: str
    machine_name: str | None
    machine: MachineConfig | None
    machines: tuple[str, ...]
    """The names that prices.yaml has."""
    devices: int
    work: str
    """How compute is scaled: by area or by the network's FLOPs."""
    stages: tuple[StageCost, ...]
    peak_lr: float
    """The schedule's highest learning rate ..."""
    peak_epoch: int
    """... the epoch in which it comes, counted from 0 ..."""
    peak_momentum: float
    """... and the momentum there."""
    momentum: float
    """The optimizer's own, of a schedule that leaves it alone."""
    equivalents: float
    saving: float
    """Against as many plain epochs at 224 px."""
    saving_by_size: float
    """Likewise, by the images' sizes alone: without SAM's second passes and the like."""
    train_size: int
    saving_at_train_size: float
    evaluation: Evaluation
    evaluation_equivalents: float
    throughput: Throughput | None
    evaluation_hours: float | None
    checkpoint_hours: float | None
    hours: float | None
    bills: tuple[Bill, ...]
    device_memory_gb: float | None


def dollars(hours: float, usd_per_hour: float) -> float:
    """What so many hours cost."""
    return hours * usd_per_hour


def bills(machine: MachineConfig | None, hours: float | None) -> tuple[Bill, ...]:
    """The prices that are known, for so many hours."""
    if machine is None or hours is None:
        return ()
    kinds = {"on demand": machine.on_demand, "spot": machine.spot}
    return tuple(
        Bill(kind, price, dollars(hours, price.usd_per_hour)) for kind, price in kinds.items() if price is not None
    )


def make_plan(
    config: RunConfig,
    *,
    images: Images,
    hardware: str,
    machine_name: str | None,
    machine: MachineConfig | None,
    machines: Sequence[str],
    devices: int,
    throughput: Throughput | None,
    work: Work,
    work_name: str,
    memory_gb: Mapping[Stage, float],
) -> Plan:
    """Put a plan together.

    Args:
        config: The run.
        images: Of the dataset.
        hardware: In words.
        machine_name: Its name in prices.yaml, if it has one ...
        machine: ... and what stands there.
        machines: All names that stand there.
        devices: Processes of the run.
        throughput: What is known of it.
        work: Compute by image size.
        work_name: What `work` counts.
        memory_gb: Memory of one device by stage, where it was computed.

    Raises:
        InputError: `global_batch_size` does not divide by the number of devices.
    """
    samples = images.train
    stages = plan_stages(config, samples, devices)
    evaluation = evaluation_of(config, images.val)
    peak_epoch, peak = highest_rate(config, samples, devices)
    costs = tuple(_stage_cost(stage, samples, throughput, work, memory_gb.get(stage)) for stage in stages)
    evaluating = None if throughput is None else evaluation_seconds(throughput, evaluation, work) / HOUR
    saving_time = None if throughput is None else throughput.checkpoint_seconds
    checkpoints = None if saving_time is None else config.epochs * saving_time / HOUR
    hours = None if evaluating is None else _hours(costs) + evaluating + (checkpoints or 0.0)
    return Plan(
        run_name=config.run_name,
        epochs=config.epochs,
        images=images,
        hardware=hardware,
        machine_name=machine_name,
        machine=machine,
        machines=tuple(machines),
        devices=devices,
        work=work_name,
        stages=costs,
        peak_lr=peak_lr(config, epoch_plan(config, devices)),
        peak_epoch=peak_epoch,
        peak_momentum=config.optimizer.momentum if peak.momentum is None else peak.momentum,
        momentum=config.optimizer.momentum,
        equivalents=sum(cost.equivalents for cost in costs),
        saving=saving(stages, work),
        saving_by_size=saving([stage._replace(cost=1.0) for stage in stages], work),
        train_size=config.data.train_size,
        saving_at_train_size=saving(stages, work, config.data.train_size),
        evaluation=evaluation,
        evaluation_equivalents=evaluation_equivalents(evaluation, samples, work),
        throughput=throughput,
        evaluation_hours=evaluating,
        checkpoint_hours=checkpoints,
        hours=hours,
        bills=bills(machine, hours),
        device_memory_gb=config.device_memory_gb or (machine.device_memory_gb if machine else None),
    )


def _hours(costs: Sequence[StageCost]) -> float:
    return sum(cost.hours for cost in costs if cost.hours is not None)


def _stage_cost(
    stage: Stage, samples: int, throughput: Throughput | None, work: Work, memory_gb: float | None
) -> StageCost:
    if throughput is None:
        return StageCost(stage, equivalents(stage, work), None, None, memory_gb)
    return StageCost(
        stage,
        equivalents(stage, work),
        images_per_second(throughput, stage.size, stage.cost, work),
        training_seconds(throughput, stage, samples, work) / HOUR,
        memory_gb,
    )


def as_json(plan: Plan) -> dict[str, object]:
    """The plan as plain data, units in the names."""
    machine = plan.machine
    return {
        "run_name": plan.run_name,
        "epochs": plan.epochs,
        "images": plan.images._asdict(),
        "hardware": plan.hardware,
        "machine": plan.machine_name,
        "machine_note": machine.note if machine else None,
        "devices": plan.devices,
        "compute_scaled_by": plan.work,
        "peak_lr": plan.peak_lr,
        "peak_epoch": plan.peak_epoch,
        "peak_momentum": plan.peak_momentum,
        "stages": [_stage_json(cost) for cost in plan.stages],
        "epochs_at_224px": plan.equivalents,
        "saving_against_224px": plan.saving,
        "saving_by_size_alone": plan.saving_by_size,
        "train_size": plan.train_size,
        "saving_against_train_size": plan.saving_at_train_size,
        "evaluation": {**plan.evaluation._asdict(), "epochs_at_224px": plan.evaluation_equivalents},
        "throughput": None
        if plan.throughput is None
        else {
            "images_per_second_by_size": plan.throughput.at,
            "source": plan.throughput.source,
            "factors": [dict(zip(("name", "factor", "source"), part, strict=True)) for part in plan.throughput.factors],
        },
        "evaluation_hours": plan.evaluation_hours,
        "checkpoint_hours": plan.checkpoint_hours,
        "hours": plan.hours,
        "device_memory_gb": plan.device_memory_gb,
        "costs": [
            {"kind": bill.kind, "dollars": bill.dollars, "price": bill.price.model_dump()} for bill in plan.bills
        ],
    }


def _stage_json(cost: StageCost) -> dict[str, object]:
    stage = cost.stage
    return {
        **stage._asdict(),
        "first": stage.first._asdict(),
        "last": stage.last._asdict(),
        "epochs_at_224px": cost.equivalents,
        "images_per_second": cost.images_per_second,
        "hours": cost.hours,
        "memory_gb": cost.memory_gb,
    }
