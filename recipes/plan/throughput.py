"""Images per second, measured by a run or published in throughput.yaml, and the prices in prices.yaml."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
from pydantic import Field

from recipes.config import Part, PositiveFloat, PositiveInt, RunConfig
from recipes.errors import InputError
from recipes.load import load_table
from recipes.results import METRICS, Metrics, read_results

PRICES = Path(__file__).with_name("prices.yaml")
THROUGHPUT = Path(__file__).with_name("throughput.yaml")
REFERENCE_SIZE = 224
"""Side in pixels of the images in which compute is counted."""
FORWARD = 1 / 3
"""Share of a training step that is its forward pass."""
Work = Callable[[int], float]
"""Compute of a pass over one image of so many pixels a side, over that at 224 px."""

Text = Annotated[str, Field(min_length=1)]
Day = Annotated[str, Field(pattern=r"^(after )?[0-9]{4}(-[0-9]{2}){0,2}$", examples=["2026-11-09", "after 2025-08"])]
Table = TypeVar("Table", bound=Part)


class PriceConfig(Part):
    """Price of a machine."""

    usd_per_hour: Annotated[float, Field(ge=0)]
    region: Text
    date: Day
    """A day, a month or a year, or `after` one."""
    source: Text


class MachineConfig(Part):
    """A machine that can be rented."""

    device: Text
    """As in throughput.yaml."""
    devices: PositiveInt
    vcpus: PositiveInt | None = None
    device_memory_gb: PositiveFloat | None = None
    """Usable memory of one device, in GB (1e9 bytes)."""
    note: Text | None = None
    on_demand: PriceConfig | None = None
    spot: PriceConfig | None = None


class PricesConfig(Part):
    """prices.yaml."""

    machines: dict[str, MachineConfig]


class PublishedConfig(Part):
    """A published throughput of training."""

    model: Text
    device: Text
    devices: PositiveInt
    half: bool
    """Mixed precision."""
    channels_last: bool
    size: PositiveInt
    """Side of the images in pixels."""
    images_per_second: PositiveFloat
    """Over all devices."""
    source: Text


class FactorConfig(Part):
    """Throughput with a technique over that without it."""

    factor: PositiveFloat
    source: Text


class ThroughputConfig(Part):
    """throughput.yaml."""

    published: tuple[PublishedConfig, ...]
    factors: dict[str, FactorConfig]
    """In mixed precision."""


class Factor(NamedTuple):
    """A published figure is multiplied by this for a technique."""

    name: str
    factor: float
    source: str


class Throughput(NamedTuple):
    """Training images per second over all devices."""

    images_per_second_by_size: dict[int, float]  # by image size in pixels
    source: str
    factors: tuple[Factor, ...] = ()  # already in the figures
    whole_step: bool = False  # the figures are for the run's own steps, with SAM's second passes and the like
    evaluation_seconds: float | None = None  # one evaluation, at all sizes; None: not measured
    checkpoint_seconds: float | None = None  # waiting for checkpoints, per epoch; None: not measured

    def rate(self, size: int, cost: float, work: Work) -> float:
        """Training images per second at any size, scaled by compute from the nearest size that is known.

        Args:
            size: Side of the images in pixels.
            cost: Compute of a step over that of one forward and backward pass.
            work: Compute by image size.
        """
        known = self.images_per_second_by_size
        near = min(known, key=lambda other: abs(math.log(other / size)))
        rate = known[near] * work(near) / work(size)
        return rate if self.whole_step else rate / cost


def published(config: RunConfig, device: str, devices: int) -> Throughput | None:
    """The published figure for the run's model and precision on so many devices; None where there is none."""
    table = load_table(THROUGHPUT, ThroughputConfig)
    half, model = config.precision != "fp32", config.model.name
    channels_last, blurpool = (getattr(config.algorithms, name) is not None for name in ("channels_last", "blurpool"))
    for entry in table.published:
        if (entry.model, entry.device, entry.devices, entry.half) != (model, device, devices, half):
            continue
        factors = []
        if half and channels_last != entry.channels_last:
            known = table.factors["channels_last"]
            name, factor = ("channels_last", known.factor) if channels_last else ("no channels_last", 1 / known.factor)
            factors.append(Factor(name, factor, known.source))
        if half and blurpool:
            known = table.factors["blurpool" if channels_last else "blurpool_without_channels_last"]
            factors.append(Factor("blurpool", known.factor, known.source))
        rate = entry.images_per_second * math.prod(factor.factor for factor in factors)
        return Throughput({entry.size: rate}, f"published: {entry.source}", tuple(factors))
    return None


def measured(run: Path) -> Throughput:
    """The throughput of a run in RUNS_FOLDER/RUN_NAME, from its metrics.jsonl; waiting for the loader included.

    Raises:
        InputError: There is no metrics.jsonl, or it holds too few values.
    """
    results = read_results(run)
    path, metrics, training = run / METRICS, results.metrics, results.training
    if not path.is_file():
        raise InputError(f"{path}: cannot be read: no such file; allowed: the folder of a run")
    rates = rates_by_size(training)
    if not rates:
        raise InputError(f"{path}: too few values of train/images_per_second; allowed: a run of 20 batches or more")
    epochs, evaluation, checkpointing = (
        float(training[name][-1]) for name in ("epoch", "time/evaluation_seconds", "time/checkpointing_seconds")
    )
    evaluated = [np.isfinite(metrics[f"eval/{size}/top1"]) for size in results.sizes]
    # An evaluation comes after the line of its batch, whose seconds are those of the evaluations before.
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


def rates_by_size(training: Metrics) -> dict[int, float]:
    """Images over seconds at each image size in pixels, from the lines of metrics.jsonl that have them.

    The first line of each size is left out: in it workers start and kernels are chosen.
    """
    rate, size, samples = (training[name] for name in ("train/images_per_second", "train/image_size", "samples"))
    known = (rate > 0) & (size > 0) & np.isfinite(samples)
    rate, size, samples = rate[known], size[known], samples[known]
    images = np.diff(samples)
    same = (size[1:] == size[:-1]) & (images > 0)
    size, images, seconds = size[1:][same], images[same], images[same] / rate[1:][same]
    return {int(one): float(images[size == one].sum() / seconds[size == one].sum()) for one in np.unique(size)}
