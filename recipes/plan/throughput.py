"""Images per second at each image size: measured by a run, told by the user, or published and scaled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.plan.compute import REFERENCE_SIZE, Evaluation, Stage, Work
from recipes.plan.tables import FactorConfig, ThroughputConfig
from recipes.results import METRICS, Metrics, read_results


class Throughput(NamedTuple):
    """Training images per second over all devices."""

    at: dict[int, float]
    """By image size in pixels; at other sizes it is scaled from the nearest by compute."""
    source: str
    factors: tuple[tuple[str, float, str], ...] = ()
    """What is already in the figures: (technique, factor, source)."""
    whole_step: bool = False
    """The figures are for the run's own steps, SAM's second passes and the like included."""
    evaluation_seconds: float | None = None
    """One evaluation, at all sizes; None: not measured."""
    checkpoint_seconds: float | None = None
    """Waiting for checkpoints, per epoch; None: not measured."""


def images_per_second(throughput: Throughput, size: int, cost: float, work: Work) -> float:
    """Training images per second at an image size.

    Args:
        throughput: What is known.
        size: Side of the images in pixels.
        cost: Compute of a step over that of one forward and backward pass.
        work: Compute by image size.
    """
    near = min(throughput.at, key=lambda known: abs(math.log(known / size)))
    rate = throughput.at[near] * work(near) / work(size)
    return rate if throughput.whole_step else rate / cost


def training_seconds(throughput: Throughput, stage: Stage, samples: int, work: Work) -> float:
    """Wall time of a stage's training steps."""
    return stage.epochs * samples / images_per_second(throughput, stage.size, stage.cost, work)


def evaluation_seconds(throughput: Throughput, evaluation: Evaluation, work: Work) -> float:
    """Wall time of all evaluations: as measured, or as forward passes, a third of a training step each."""
    if throughput.evaluation_seconds is not None:
        return evaluation.times * throughput.evaluation_seconds
    return sum(
        evaluation.times * evaluation.images / images_per_second(throughput, size, 1 / 3, work)
        for size in evaluation.sizes
    )


def published(config: RunConfig, device: str, devices: int, table: ThroughputConfig) -> Throughput | None:
    """The published figure for a model, device, number of devices and precision; None where there is none.

    Args:
        config: The run.
        device: Such as `V100-16GB`.
        devices: Their number.
        table: Figures, and the techniques' factors, which hold in mixed precision.
    """
    half, model = config.precision != "fp32", config.model.name
    for entry in table.published:
        if (entry.model, entry.device, entry.devices, entry.half) == (model, device, devices, half):
            factors = _factors(config, entry.channels_last, table) if half else ()
            rate = entry.images_per_second * math.prod(factor for _, factor, _ in factors)
            return Throughput({entry.size: rate}, f"published: {entry.source}", factors)
    return None


def _factors(config: RunConfig, channels_last: bool, table: ThroughputConfig) -> tuple[tuple[str, float, str], ...]:
    known, found = table.factors, []
    mine = config.algorithms.channels_last is not None

    def take(name: str, entry: FactorConfig, inverse: bool = False) -> None:
        found.append((name, 1 / entry.factor if inverse else entry.factor, entry.source))

    if mine != channels_last:
        take("channels_last" if mine else "no channels_last", known.channels_last, inverse=not mine)
    if config.algorithms.blurpool is not None:
        take("blurpool", known.blurpool if mine else known.blurpool_without_channels_last)
    return tuple(found)


def told(rate: float) -> Throughput:
    """What the user gives for plain training at 224 px."""
    return Throughput({REFERENCE_SIZE: rate}, "given: --images-per-second")


def measured(run: Path) -> Throughput:
    """The throughput of a run on the machine, from its metrics.jsonl; waiting for the loader included.

    Left out are the first figures of each image size, in which workers start and kernels are chosen.

    Args:
        run: The run's folder, RUNS_FOLDER/RUN_NAME.

    Raises:
        InputError: It holds no metrics.jsonl, or too few figures.
    """
    results = read_results(run)
    path, metrics, training = run / METRICS, results.metrics, results.training
    if not path.is_file():
        raise InputError(f"{path}: cannot be read: no such file; allowed: the folder of a run")
    at = rates_by_size(training)
    if not at:
        raise InputError(f"{path}: too few figures of train/images_per_second; allowed: a run of 20 batches or more")
    epochs, evaluation, checkpointing = (
        float(training[name][-1]) for name in ("epoch", "time/evaluation_seconds", "time/checkpointing_seconds")
    )
    evaluated = [np.isfinite(metrics[f"eval/{size}/top1"]) for size in results.sizes]
    # An evaluation comes after the figures of its batch, which hold the time of those before.
    counted = int(np.sum(metrics["batch"][np.any(evaluated, axis=0)] < training["batch"][-1])) if evaluated else 0
    versions = results.summary.get("versions")
    device = versions.get("device") if isinstance(versions, dict) else None
    return Throughput(
        at,
        f"measured: {path}{f' on {device}' if device else ''}, loader included",
        whole_step=True,
        evaluation_seconds=evaluation / counted if counted else None,
        checkpoint_seconds=checkpointing / epochs if epochs >= 1 else None,
    )


def rates_by_size(training: Metrics) -> dict[int, float]:
    """Images over seconds at each image size, from the figures of the training."""
    rate, size, samples = (training[name] for name in ("train/images_per_second", "train/image_size", "samples"))
    known = (rate > 0) & (size > 0) & np.isfinite(samples)
    rate, size, samples = rate[known], size[known], samples[known]
    images = np.diff(samples)
    same = (size[1:] == size[:-1]) & (images > 0)
    size, images, seconds = size[1:][same], images[same], images[same] / rate[1:][same]
    return {int(one): float(images[size == one].sum() / seconds[size == one].sum()) for one in np.unique(size)}
