"""What a run needs, computed from its config before it starts: stages, compute, time, price and memory.

Compute is counted in epochs at 224 px, each a forward and a backward pass over the training set at that size. The
forward pass is a third of that, since the backward pass computes gradients of the weights and of the inputs. Only the
functions that take a network need torch, which takes seconds to import.

Images per second are measured by a run or published in throughput.yaml; prices are those in prices.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import yaml
from pydantic import Field

from algorithms.config import PositiveFloat, PositiveInt
from data.config import EpochPlan
from data.errors import InputError
from data.text import first_line
from recipes.config import Part, RunConfig
from recipes.results import METRICS, Metrics, read_results
from recipes.schedule import Rate, epoch_plan, peak_lr, rate_function, step_at

if TYPE_CHECKING:
    from torch import nn

PRICES = Path(__file__).with_name("prices.yaml")
THROUGHPUT = Path(__file__).with_name("throughput.yaml")
REFERENCE_SIZE = 224  # image size in pixels of the unit of compute
FORWARD = 1 / 3  # share of a training step that is its forward pass
Work = Callable[[int], float]  # compute of a pass over one image of this size in pixels, relative to 224 px

_Text = Annotated[str, Field(min_length=1)]
_Day = Annotated[str, Field(pattern=r"^(after )?[0-9]{4}(-[0-9]{2}){0,2}$", examples=["2026-11-09", "after 2025-08"])]


class PriceConfig(Part):
    """Price of a machine."""

    usd_per_hour: Annotated[float, Field(ge=0)]
    region: _Text
    date: _Day  # a day, a month or a year, optionally with `after`
    source: _Text


class MachineConfig(Part):
    """A machine that can be rented."""

    device: _Text  # the name in throughput.yaml
    devices: PositiveInt
    vcpus: PositiveInt | None = None
    device_memory_gb: PositiveFloat | None = None  # usable memory of one device, in GB (1e9 bytes)
    note: _Text | None = None
    on_demand: PriceConfig | None = None
    spot: PriceConfig | None = None

    @property
    def prices(self) -> dict[str, PriceConfig | None]:
        """By kind."""
        return {"on demand": self.on_demand, "spot": self.spot}


class PricesConfig(Part):
    """prices.yaml."""

    machines: dict[str, MachineConfig]


class Throughput(NamedTuple):
    """Training images per second over all devices."""

    images_per_second_by_size: dict[int, float]  # by image size in pixels
    source: str
    factors: Sequence[dict[str, Any]] = ()  # techniques' name, factor and source; included in a published figure
    whole_step: bool = False  # the figures are for the run's own steps, including SAM's second passes and the like
    evaluation_seconds: float | None = None  # one evaluation, at all sizes; None: not measured
    checkpoint_seconds: float | None = None  # waiting for checkpoints, per epoch; None: not measured

    def rate(self, size: int, cost: float, work: Work) -> float:
        """Training images per second at a size, scaled from the nearest known one by compute.

        `cost` is the compute of a step relative to one forward and backward pass.
        """
        known = self.images_per_second_by_size
        near = min(known, key=lambda other: abs(math.log(other / size)))
        rate = known[near] * work(near) / work(size)
        return rate if self.whole_step else rate / cost


class Images(NamedTuple):
    """Number of images, and the source of that number."""

    train: int
    val: int
    source: str


def published(config: RunConfig, device: str, devices: int) -> Throughput | None:
    """The published figure for the run's model, precision and number of devices; None if there is none."""
    table, half = yaml.safe_load(THROUGHPUT.read_text(encoding="utf-8")), config.precision != "fp32"
    wanted = {"model": config.model.name, "device": device, "half": half}
    entries = {one["devices"]: one for one in table["published"] if wanted.items() <= one.items()}
    entry = entries.get(devices) or (entries.get(1) if devices == 8 else None)
    if entry is None:
        return None
    factors, known = [], table["factors"]
    if devices != entry["devices"]:
        factors.append({"name": "8 devices instead of 1"} | known["eight_devices"])
    blurring = "blurpool" if config.algorithms.channels_last else "blurpool_without_channels_last"
    for name, key in (("channels_last", "channels_last"), ("blurpool", blurring)):
        on = getattr(config.algorithms, name) is not None
        if half and on != entry[name]:
            with_it = known[key]["factor"]
            change = {"name": name, "factor": with_it} if on else {"name": f"no {name}", "factor": 1 / with_it}
            factors.append(change | {"source": known[key]["source"]})
    times = math.prod(factor["factor"] for factor in factors)
    rates = {size: rate * times for size, rate in entry["images_per_second"].items()}
    return Throughput(rates, f"published: {entry['source']}", factors)


def measured(run: Path) -> Throughput:
    """The throughput of a run, including waiting for the loader, from metrics.jsonl in its folder.

    InputError: There is no such file, or it holds too few values.
    """
    results, path = read_results(run), run / METRICS
    metrics, training = results.metrics, results.training
    if not path.is_file():
        raise InputError(f"{path}: cannot be read: no such file; allowed: the folder of a run")
    rates = _rates_by_size(training)
    if not rates:
        raise InputError(f"{path}: too few values of train/images_per_second; allowed: a run of 20 batches or more")
    names = ("epoch", "time/evaluation_seconds", "time/checkpointing_seconds")
    epochs, evaluation, checkpointing = (float(training[name][-1]) for name in names)
    evaluated = [np.isfinite(metrics[f"eval/{size}/top1"]) for size in results.sizes]
    # An evaluation is logged after the line of its batch, so that line has the seconds of earlier evaluations only.
    counted = int(np.sum(metrics["batch"][np.any(evaluated, axis=0)] < training["batch"][-1])) if evaluated else 0
    versions = results.summary.get("versions")
    device = versions.get("device") if isinstance(versions, dict) else None
    return Throughput(
        rates,
        f"measured: {path}{f' on {device}' if device else ''}, loader included",
        whole_step=True,
        evaluation_seconds=evaluation / counted if counted and math.isfinite(evaluation) else None,
        checkpoint_seconds=checkpointing / epochs if epochs >= 1 and math.isfinite(checkpointing) else None,
    )


def _rates_by_size(training: Metrics) -> dict[int, float]:
    """By image size, without each size's first line: workers start and kernels are chosen then."""
    names = ("train/images_per_second", "train/image_size", "samples")
    known = (training[names[0]] > 0) & (training[names[1]] > 0) & np.isfinite(training["samples"])
    rate, size, samples = (training[name][known] for name in names)
    images = np.diff(samples)
    same = (size[1:] == size[:-1]) & (images > 0)
    size, images, seconds = size[1:][same], images[same], images[same] / rate[1:][same]
    return {int(one): float(images[size == one].sum() / seconds[size == one].sum()) for one in np.unique(size)}


def by_area(size: int) -> float:
    """Compute by the area of the image: exact for convolutions if no feature map size is rounded."""
    return (size / REFERENCE_SIZE) ** 2


def by_flops(network: nn.Module) -> Work:
    """Compute by FLOPs of a forward pass relative to those at 224 px; the network is on the meta device."""
    reference = flops(network, REFERENCE_SIZE)
    return cache(lambda size: flops(network, size) / reference)


def flops(network: nn.Module, size: int) -> int:
    """Operations of a forward pass over one image (convolutions, matrix products); InputError: not at this size.

    The network is on the meta device.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            network.eval()(torch.empty(1, 3, size, size, device="meta"))
    except Exception as error:
        raise InputError(f"model.name: the network does not accept images of {size} px: {first_line(error)}") from None
    return counter.get_total_flops()


def network_size(config: RunConfig, epoch: int, loader_size: int) -> int:
    """Side in pixels of the network's input in an epoch (counted from 0).

    With `where: batch` Composer resizes (algorithms/progressive_resizing.py): the size follows the share of complete
    epochs, and is rounded down once more when a batch is scaled by a factor.
    """
    resizing = config.algorithms.progressive_resizing
    if resizing is None or resizing.where == "loader":
        return loader_size
    return math.floor(loader_size * (resizing.size_at(epoch / config.epochs, loader_size) / loader_size))


def _step_cost(config: RunConfig, epoch: int) -> float:
    """Compute of a step in an epoch (counted from 0), relative to one forward and backward pass.

    SAM repeats both passes every `interval` steps, activation checkpointing the forward pass; FixRes on the classifier
    has almost no backward pass; a teacher, taken to be as large as the network, costs a forward pass. Weight averaging,
    mixing and label smoothing are not counted.
    """
    fixres, sam = config.algorithms.fixres, config.algorithms.sam
    cost = 1.0 + (FORWARD if config.model.activation_checkpointing else 0.0)
    if fixres is not None and fixres.train == "classifier" and epoch >= fixres.start_epoch(config.epochs):
        cost = FORWARD
    cost += FORWARD if config.algorithms.distillation is not None else 0.0
    return cost * (1.0 if sam is None else 1.0 + 1.0 / sam.interval)


def schedule_of(
    config: RunConfig, epochs: Sequence[EpochPlan], samples: int
) -> tuple[list[int], Callable[[int, int], Rate]]:
    """Steps of each epoch, and (epoch, batch) -> learning rate and momentum, as in recipes/trainer.py."""
    steps = [math.ceil(samples / entry.global_batch_size) for entry in epochs]
    total, rate = sum(steps), rate_function(config.scheduler, peak_lr(config, epochs))
    return steps, lambda epoch, batch: rate(step_at(epoch, batch, steps[epoch], len(steps), total), total)


def momentum_at(config: RunConfig, rate: Rate) -> float | None:
    """The schedule's momentum, else SGD's; None for a default of timm's or torch's optimizer, which needs torch."""
    own = None if "/" in config.optimizer.name else config.optimizer.momentum
    return own if rate.momentum is None else rate.momentum


def make_plan(
    config: RunConfig,
    images: Images,
    devices: int,
    hardware: str = "any",
    machine_name: str | None = None,
    machine: MachineConfig | None = None,
    throughput: Throughput | None = None,
    network: nn.Module | None = None,
) -> dict[str, Any]:
    """Compute a plan, in the form of --json; what is unknown is None.

    With the run's network, which is on the meta device, compute is by FLOPs instead of area, and memory is included.
    InputError: `global_batch_size` is not divisible by the number of devices.
    """
    work = by_area if network is None else by_flops(network)
    epochs, sizes = epoch_plan(config, devices), config.eval.sizes
    memory = config.device_memory_gb or (machine.device_memory_gb if machine else None)
    if network is not None:
        from recipes.memory import microbatch_images, step_memory, with_microbatches

        if config.device_microbatch_size == "auto":
            config = with_microbatches(config, network, devices, epochs, None if memory is None else 1e9 * memory)
    steps, rate_at = schedule_of(config, epochs, images.train)

    def kind(epoch: int) -> tuple[EpochPlan, int, float]:
        return epochs[epoch], network_size(config, epoch, epochs[epoch].size), _step_cost(config, epoch)

    stages: list[dict[str, Any]] = []
    for (entry, size, cost), group in groupby(range(config.epochs), kind):
        members = list(group)
        first, last, count = members[0], members[-1], len(members)
        speed = throughput and throughput.rate(size, cost, work)
        memory_gb = None
        if network is not None:
            fixed, per_image = step_memory(network, config, devices, size, entry.crop == "center")
            memory_gb = (fixed + per_image * microbatch_images(config, entry, devices)) / 1e9
        stages.append(
            {
                "first_epoch": first,  # counted from 0
                "epochs": count,
                "loader_size": entry.size,  # side in pixels of the images from the loader ...
                "size": size,  # ... and at the network's input, which differs with `progressive_resizing.where: batch`
                "crop": entry.crop,
                "global_batch_size": entry.global_batch_size,
                "cost": cost,  # compute of a step relative to one forward and backward pass over all parameters
                "steps": sum(steps[first : last + 1]),
                "first": rate_at(first, 0)._asdict(),
                "last": rate_at(last, steps[last] - 1)._asdict(),
                "epochs_at_224px": count * cost * work(size),
                "images_per_second": speed,  # at which the devices train, and which the loader must supply
                "hours": speed and count * images.train / speed / 3600,
                "memory_gb": memory_gb,
            }
        )

    # 20 steps of each epoch suffice to find the peak of a schedule with a warm-up of epochs.
    points = ((e, rate_at(e, count * part // 20)) for e, count in enumerate(steps) for part in range(20))
    peak_epoch, peak = max(points, key=lambda point: point[1].lr)
    compute, times = sum(stage["epochs_at_224px"] for stage in stages), -(-config.epochs // config.eval.interval)
    evaluation_hours = checkpoint_hours = hours = None
    costs = []
    if throughput is not None:
        evaluation = throughput.evaluation_seconds
        each = [times * images.val / throughput.rate(size, FORWARD, work) for size in sizes]
        evaluation_hours = (sum(each) if evaluation is None else times * evaluation) / 3600
        if throughput.checkpoint_seconds is not None:
            checkpoint_hours = config.epochs * throughput.checkpoint_seconds / 3600
        hours = sum(stage["hours"] for stage in stages) + evaluation_hours + (checkpoint_hours or 0.0)
        for name, price in (machine.prices if machine else {}).items():
            if price is not None:
                costs.append({"kind": name, "dollars": hours * price.usd_per_hour, "price": price.model_dump()})
    known = ("images_per_second_by_size", "source", "factors")
    return {
        "run_name": config.run_name,
        "epochs": config.epochs,
        "images": images._asdict(),
        "hardware": hardware,
        "machine": machine_name,
        "machine_note": machine and machine.note,
        "devices": devices,
        "compute_scaled_by": "area" if network is None else "FLOPs",  # of the images, or of the network
        "peak_lr": peak_lr(config, epochs),  # the schedule's highest learning rate ...
        "peak_epoch": peak_epoch,  # ... the epoch in which it is reached, counted from 0 ...
        "peak_momentum": momentum_at(config, peak),  # ... with this
        "stages": stages,
        "epochs_at_224px": compute,
        # Shares, which may be negative, against as many epochs at 224 px with one forward and backward pass per step;
        # then without the second passes of SAM and the like; then against as many epochs at `train_size`.
        "saving_against_224px": 1.0 - compute / config.epochs,
        "saving_by_size_alone": 1.0 - sum(stage["epochs"] * work(stage["size"]) for stage in stages) / config.epochs,
        "train_size": config.data.train_size,
        "saving_against_train_size": 1.0 - compute / (config.epochs * work(config.data.train_size)),
        "evaluation": {
            "times": times,
            "sizes": sizes,
            "images": images.val,
            "epochs_at_224px": times * images.val / images.train * FORWARD * sum(map(work, sizes)),
        },
        "throughput": throughput and {name: getattr(throughput, name) for name in known},
        "evaluation_hours": evaluation_hours,
        "checkpoint_hours": checkpoint_hours,
        "hours": hours,
        "device_memory_gb": memory,
        "device_microbatch_size": config.device_microbatch_size,  # with --memory what `auto` is, by image size
        "costs": costs,
    }
