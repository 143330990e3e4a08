"""Rates that a range test's curve suggests, and what several runs of it say together. No torch, no Trainer.

Each method takes rates (rising, equal ratios) and smoothed losses, and returns a rate or None where the curve has not
what the method looks for. Multiplying all losses by a number changes none of them, and multiplying all rates by a
number multiplies the suggestion by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.find_lr.curve import Curve

SKIP_START = 0.1
"""Share of the ramp's steps that is left out at the start, where the average has seen few losses (fastai's lr_find)."""
SKIP_END = 5
"""Steps left out at the end, where the loss has taken off (fastai's and torch-lr-finder's)."""
FEWEST = 10
"""Points that must remain for a suggestion."""
WINDOW = 15
"""Points between the two ends of the sliding window (fastai's `slide`, which was made for 100 steps)."""
STEADY = 0.005
"""Difference of slopes per step, over the curve's height, below which the window's ends agree."""


def usable(
    lrs: NDArray[np.float64], losses: NDArray[np.float64], steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The part of a curve that is looked at.

    That is without its first and last points, up to the first inf or NaN, and up to where, past its lowest point, it is
    higher than where it began: a network that fell apart there may go on to a loss that falls again (fastai and
    torch-lr-finder would call that the steepest descent).

    Args:
        lrs: Rates, (n,).
        losses: Smoothed losses, (n,).
        steps: Steps that the whole ramp would have had.

    Returns:
        Rates and losses, both finite and of one length, which may be 0.
    """
    wrong = np.flatnonzero(~np.isfinite(losses))
    start = int(SKIP_START * steps)
    end = min(len(losses) - SKIP_END, int(wrong[0]) if len(wrong) else len(losses))
    if end > start:
        bottom = start + int(losses[start:end].argmin())
        apart = np.flatnonzero(losses[bottom:end] > losses[start])
        end = bottom + int(apart[0]) if len(apart) else end
    kept = slice(start, max(start, end))
    return lrs[kept], losses[kept]


def steepest(lrs: NDArray[np.float64], losses: NDArray[np.float64]) -> float | None:
    """The rate at which the loss falls fastest, by the slope against the logarithm of the rate.

    Central differences, as torch-lr-finder's suggestion and Lightning's; fastai's `steep` takes forward differences.
    Lightning 2.5.3 went over to the slope against the rate itself, which favours the lowest rates; see its issue 21141.

    Returns:
        None where the loss falls nowhere.
    """
    slopes = np.gradient(losses, np.log(lrs))
    return float(lrs[slopes.argmin()]) if slopes.min() < 0 else None


def valley(lrs: NDArray[np.float64], losses: NDArray[np.float64]) -> float | None:
    """Half-way down the longest descent: fastai's `valley`, its default.

    The descent is the longest subsequence of falling losses, whose points need not be neighbours (the first to end
    where several are longest). It is taken to begin as many points before its end as it has points; a third and half of
    a third of these on is the suggestion.

    Returns:
        None where the loss falls nowhere.
    """
    lengths = np.ones(len(losses), dtype=int)
    for index in range(1, len(losses)):
        higher = losses[:index] > losses[index]
        if higher.any():
            lengths[index] += lengths[:index][higher].max()
    end = int(lengths.argmax())
    if lengths[end] == 1:
        return None
    third = lengths[end] / 3
    return float(lrs[max(end - int(lengths[end]) + int(third) + int(third / 2), 0)])


def lowest(lrs: NDArray[np.float64], losses: NDArray[np.float64]) -> float | None:
    """The rate at which the smoothed loss is lowest, from which on a batch's loss exceeds the recent average.

    Smith 2017, section 3.3: the highest rate of a cyclical schedule is that at which learning "slows, becomes ragged,
    or starts to fall".

    Returns:
        None where it is lowest at the first point, so that nothing was learnt.
    """
    index = int(losses.argmin())
    return float(lrs[index]) if index else None


def tenth(lrs: NDArray[np.float64], losses: NDArray[np.float64]) -> float | None:
    """A tenth of the rate at which the loss is lowest: fastai's `minimum`.

    Returns:
        None where `lowest` is.
    """
    rate = lowest(lrs, losses)
    return None if rate is None else rate / 10


def window(lrs: NDArray[np.float64], losses: NDArray[np.float64]) -> float | None:
    """The left end of the rightmost window whose two ends have the same slope: fastai's `slide`.

    The window is `WINDOW` points wide and moves down from the highest rate as long as its ends' slopes differ: past
    the take-off, to where the descent is steady. fastai compares with 0.005 in units of the loss; here it is that share
    of the curve's height, so that a sum over classes suggests what a mean does.

    Returns:
        None where the slopes agree nowhere, or nothing falls.
    """
    height = losses.max() - losses.min()
    if len(losses) <= WINDOW or losses.argmin() == 0:
        return None
    slopes = np.gradient(losses) / height
    steady = np.flatnonzero(np.abs(slopes[WINDOW:] - slopes[:-WINDOW]) <= STEADY)
    if not len(steady):
        return None
    # fastai keeps the last window whose ends still differ, one point right of the first that agrees.
    return float(lrs[min(int(steady[-1]) + 1, len(lrs) - 1 - WINDOW)])


class Method(NamedTuple):
    """A way to read a curve."""

    name: str
    suggest: Callable[[NDArray[np.float64], NDArray[np.float64]], float | None]


METHODS = (
    Method("steepest", steepest),
    Method("valley", valley),
    Method("minimum/10", tenth),
    Method("sliding window", window),
    Method("minimum", lowest),
)


class Suggestion(NamedTuple):
    """What one method says over the runs."""

    method: str
    per_run: tuple[float | None, ...]
    """One per run, in their order; None where it found nothing."""
    mean: float
    median: float
    geometric_mean: float
    """The one that is used: a rate that is twice too high and one that is half of it err alike."""
    spread: float
    """Geometric standard deviation, a factor of at least 1 (sample, n - 1); 1.0 of a single run says nothing."""


def over_runs(method: str, per_run: Sequence[float | None]) -> Suggestion | None:
    """Put the runs' suggestions together; None where there is none."""
    found = np.array([rate for rate in per_run if rate is not None])
    if not len(found):
        return None
    logs = np.log(found)
    spread = float(np.exp(logs.std(ddof=1))) if len(found) > 1 else 1.0
    return Suggestion(
        method=method,
        per_run=tuple(per_run),
        mean=float(found.mean()),
        median=float(np.median(found)),
        geometric_mean=float(np.exp(logs.mean())),
        spread=spread,
    )


def suggestions(curves: Sequence[Curve], steps: int) -> list[Suggestion]:
    """What each method says of these curves, in the order of `METHODS`, without those that find nothing.

    Args:
        curves: The runs.
        steps: Steps of the whole ramp.
    """
    parts = [usable(curve.lrs, curve.smoothed, steps) for curve in curves]
    found = []
    for method in METHODS:
        rates = [method.suggest(lrs, losses) if len(lrs) >= FEWEST else None for lrs, losses in parts]
        found.append(over_runs(method.name, rates))
    return [suggestion for suggestion in found if suggestion is not None]


def choose(found: Sequence[Suggestion]) -> Suggestion | None:
    """The suggestion to train with: `minimum`, as the highest rate of the schedule; None where it was not found.

    On the demo's digits (4 epochs of One-Cycle, batch 32) neither a tenth of it nor ten times as much trains better:
    85.3, 93.6 and 89.2 % top-1 with timm/resnet10t (3 seeds), 94.6, 96.6 and 78.8 % with ResNet-50 (1 seed). The other
    four are 3 to 70 times lower there, made for rates that a run keeps from its start; a schedule that warms up and
    comes down again takes more. All figures: docs/find_lr.md.
    """
    return next((suggestion for suggestion in found if suggestion.method == "minimum"), None)


def still_falling(curve: Curve, steps: int) -> bool:
    """The ramp ended before the loss turned, so that higher rates may be better than what is suggested.

    Args:
        curve: A run.
        steps: Steps of the whole ramp.
    """
    _, losses = usable(curve.lrs, curve.smoothed, steps)
    return curve.end == "complete" and len(losses) > 0 and bool(curve.smoothed[-1] <= losses.min())
