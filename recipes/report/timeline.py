"""The time line of a run, from its figures: stages, resumes, and curves with as many points as a picture can show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

POINTS = 600
"""Points of a curve at most: about one per pixel of its chart's width."""
_CHECKPOINT = re.compile(r"ep\d{3,9}-ba(\d{6,12})")

Figures = Mapping[str, NDArray[np.float64]]
"""`Run.training`."""


class Stage(NamedTuple):
    """A stretch of a run with one image size, as it was trained."""

    first: float
    """Epochs done when it began ..."""
    last: float
    """... and when it ended, or so far."""
    size: int
    """Of the images, in pixels."""
    batch_size: int
    """Images of its largest step, over all devices."""
    images_per_second: float
    """Evaluation and checkpoints left out; nan where unknown."""
    wait_fraction: float
    """Share of that time that rank 0 waited for its loader."""


class Resume(NamedTuple):
    """One time that the run went on from a checkpoint."""

    batch: int
    epoch: float
    """nan where the figures do not say when the batch was."""
    source: str
    """The checkpoint, as the run named it."""


def stages(training: Figures) -> list[Stage]:
    """The stages that the figures show, in order.

    A border falls on the beginning of the epoch in which the new size is first seen, or on the last figure of the old
    size where that is later, as with sizes that change within an epoch.
    """
    sizes, epochs = training["train/image_size"], training["epoch"]
    known = np.flatnonzero(np.isfinite(sizes))
    if not len(known):
        return []
    changes = known[1:][sizes[known[1:]] != sizes[known[:-1]]]
    starts = [known[0], *changes]
    found = []
    for start, end in zip(starts, [*changes, len(sizes)], strict=True):
        before = start - 1 if start > 0 else None
        first = 0.0 if before is None else max(float(np.floor(epochs[start])), float(epochs[before]))
        rate, waiting = speed(training, before, end - 1)
        largest = training["train/batch_size"][start:end]
        batch_size = int(np.nanmax(largest)) if np.isfinite(largest).any() else 0
        found.append(Stage(first, float(epochs[end - 1]), int(sizes[start]), batch_size, rate, waiting))
    return [stage._replace(last=after.first) for stage, after in pairwise(found)] + found[-1:]


def speed(training: Figures, before: int | None, last: int) -> tuple[float, float]:
    """Images per second, and the share of time spent waiting for the loader, between two rows of figures.

    Args:
        training: The figures.
        before: Row after which the stretch begins; None: the run's beginning.
        last: Its last row.
    """

    def spent(name: str) -> float:
        column = training[name]
        return float(column[last] - (0.0 if before is None else column[before]))

    waited = spent("time/loader_wait_seconds")
    seconds = spent("time/train_seconds") + waited
    if not seconds > 0:
        return float("nan"), float("nan")
    return spent("samples") / seconds, waited / seconds


def speeds(
    training: Figures, points: int = POINTS // 4
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Throughput over the run, in stretches of about equal length that end where stages do.

    Returns:
        (epochs in the middle of each stretch, images per second, share of time spent waiting for the loader).
    """
    sizes, epochs = training["train/image_size"], training["epoch"]
    if not len(epochs):
        return (np.empty(0),) * 3
    ends = np.unique(np.linspace(0, len(epochs) - 1, min(points, len(epochs))).astype(int))
    borders = np.flatnonzero(sizes[1:] != sizes[:-1])
    ends = np.union1d(ends, borders)
    rows = [(None, int(ends[0])), *zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    middles = [(epochs[last] + (0.0 if before is None else epochs[before])) / 2 for before, last in rows]
    rates = np.array([speed(training, before, last) for before, last in rows])
    return np.array(middles), rates[:, 0], rates[:, 1]


def thinned(
    x: NDArray[np.float64], y: NDArray[np.float64], points: int = POINTS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A curve with at most so many points: each the mean of as many neighbours; nan where none of them is finite.

    Args:
        x: float (n,).
        y: float (n,).
        points: At most.
    """
    each = -(-len(x) // points)
    if each <= 1:
        return x, y
    starts = np.arange(0, len(x), each)
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(finite, y, 0.0), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    return np.add.reduceat(x, starts) / np.diff([*starts, len(x)]), means


def averaged(y: NDArray[np.float64]) -> bool:
    """Whether a curve has points enough for its moving mean to be another curve."""
    return len(y) >= 50


def moving_mean(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """A curve as the mean over a twenty-fifth of its points around each; nan where none of them is finite."""
    if not len(y):
        return y
    window = np.ones(2 * (len(y) // 50) + 1)
    finite = np.isfinite(y)
    counts = np.convolve(finite, window, "same")
    sums = np.convolve(np.where(finite, y, 0.0), window, "same")
    means = np.full(len(y), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0.5)
    return means


def resumes(sources: Sequence[str], training: Figures) -> list[Resume]:
    """When a run went on from a checkpoint, by the checkpoints' names.

    Args:
        sources: `resumed_from` of summary.json; an entry that names no checkpoint is left out.
        training: The figures, which tell the epoch of a batch.
    """
    found = []
    for source in sources:
        names = _CHECKPOINT.findall(source)
        if names:
            batch = int(names[-1])
            found.append(Resume(batch, epoch_of(batch, training), source))
    return found


def epoch_of(batch: int, training: Figures) -> float:
    """Epochs done after a batch, between the figures on both sides; nan where there are none."""
    batches = training["batch"]
    if not len(batches) or batch > batches[-1]:
        return float("nan")
    return float(np.interp(batch, np.concatenate([[0], batches]), np.concatenate([[0], training["epoch"]])))
