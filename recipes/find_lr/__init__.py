"""`python -m recipes.find_lr`: a learning-rate range test with the run's own pipeline.

Here: a test's curve, and the learning rates that it suggests. Needs no torch. Smith 2017, "Cyclical Learning Rates for
Training Neural Networks", section 3.3, with the exponential ramp that fastai made usual. Each method takes rates
(rising, with equal ratios) and smoothed losses, and returns a rate, or None if the curve lacks what it looks for.
Multiplying all losses by a number changes no suggestion, and multiplying all rates by a number multiplies the
suggestions by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
End = Literal["complete", "diverged", "not finite"]
ENDS: dict[End, str] = {
    "complete": "reached the last rate",
    "diverged": "diverged, stopped",
    "not finite": "loss no longer finite, stopped",
}
SKIP_START = 0.1
"""Share of the ramp's steps ignored at the start, where the average covers few losses (fastai's lr_find)."""
SKIP_END = 5  # steps ignored at the end, where the loss has risen (fastai, torch-lr-finder)
FEWEST = 10  # points required for a suggestion
WINDOW = 15  # points between the two ends of the sliding window (fastai's `slide`, made for 100 steps)
STEADY = 0.005  # largest difference of slopes per step, relative to the curve's height, for the window's ends to agree


class Ramp(NamedTuple):
    """How the learning rate rises, and when the test stops."""

    start_lr: float  # of the first step, above 0
    end_lr: float  # of the last step, above `start_lr`
    steps: int  # at least 2
    smoothing: float  # share of the average loss that a step keeps, in [0, 1)
    divergence: float  # the test stops when the smoothed loss exceeds its minimum by this factor, above 1

    def lrs(self) -> Values:
        """The rate of each step, (steps,): equal ratios, including both ends (as in torch-lr-finder)."""
        return np.geomspace(self.start_lr, self.end_lr, self.steps).astype(np.float64, copy=False)


class Curve(NamedTuple):
    """One run of the test; its arrays are float64 (n,) for n steps done."""

    seed: int
    lrs: Values
    losses: Values  # training loss of each step's batch before the update; the last may be inf or NaN
    smoothed: Values
    end: End


def smooth(losses: Sequence[float], smoothing: float) -> Values:
    """Exponential moving average with bias correction; values after an inf or NaN are not finite.

    At step i (from 0) it is the mean of losses 0 to i with weights smoothing**(i - k). fastai's `AvgSmoothLoss` and
    Adam's moments (Kingma & Ba 2015, section 3) correct the bias in the same way; torch-lr-finder does not.
    """
    averages = accumulate(losses, lambda average, loss: smoothing * average + (1.0 - smoothing) * loss, initial=0.0)
    weights = 1.0 - smoothing ** np.arange(1, len(losses) + 1, dtype=np.float64)
    return np.array(list(averages)[1:], np.float64) / weights


def end_of(losses: Sequence[float], ramp: Ramp) -> End | None:
    """Why the test stops after these losses (at least one); None if it continues.

    The rule is fastai's (`LRFinder`, factor 4) and torch-lr-finder's (factor 5), on the smoothed loss.
    """
    if not np.isfinite(losses[-1]):
        return "not finite"
    smoothed = smooth(losses, ramp.smoothing)
    if smoothed[-1] > ramp.divergence * smoothed.min():
        return "diverged"
    return "complete" if len(losses) >= ramp.steps else None


def curve_of(losses: Sequence[float], ramp: Ramp, seed: int, end: End) -> Curve:
    """The curve of a test that stopped after these losses."""
    return Curve(seed, ramp.lrs()[: len(losses)], np.array(losses, np.float64), smooth(losses, ramp.smoothing), end)


def usable(curve: Curve, steps: int) -> tuple[Values, Values]:
    """The rates and losses that the methods use, given the number of steps in the ramp; finite, and maybe empty.

    The first and last points are left out, everything after the first inf or NaN, and everything after the point beyond
    the minimum at which the loss is back above its start: the loss of a diverged network may fall again, which fastai
    and torch-lr-finder would mistake for the steepest descent.
    """
    losses, start = curve.smoothed, int(SKIP_START * steps)
    end = min([len(losses) - SKIP_END, *np.flatnonzero(~np.isfinite(losses))[:1]])
    if end > start:
        bottom = start + int(losses[start:end].argmin())
        end = min([end, *(bottom + np.flatnonzero(losses[bottom:end] > losses[start])[:1])])
    kept = slice(start, max(start, end))
    return curve.lrs[kept], losses[kept]


def steepest(lrs: Values, losses: Values) -> float | None:
    """The rate at which the loss falls fastest, by the slope against the logarithm of the rate; None: it never falls.

    Central differences, as in torch-lr-finder and Lightning; fastai's `steep` takes forward differences. Lightning
    2.5.3 changed to the slope against the rate itself, which favours the lowest rates (its issue 21141).
    """
    slopes = np.gradient(losses, np.log(lrs))
    return float(lrs[slopes.argmin()]) if slopes.min() < 0 else None


def valley(lrs: Values, losses: Values) -> float | None:
    """A point half-way down the longest descent: fastai's default, `valley`; None if the loss never falls.

    The descent is the longest subsequence of falling losses, whose points need not be neighbours (the first to end
    if several are longest). It is assumed to begin as many points before its end as it has points; the suggestion lies
    a third plus half of a third of these points after that.
    """
    lengths = np.ones(len(losses), dtype=int)
    for index in range(1, len(losses)):
        lengths[index] += lengths[:index][losses[:index] > losses[index]].max(initial=0)
    end = int(lengths.argmax())
    third = lengths[end] / 3
    return float(lrs[max(end - int(lengths[end]) + int(third) + int(third / 2), 0)]) if lengths[end] > 1 else None


def minimum(lrs: Values, losses: Values) -> float | None:
    """The rate of the lowest smoothed loss; None if that is the first point, so that nothing was learnt.

    Smith 2017, section 3.3: the highest rate of a cyclical schedule is that at which learning "slows, becomes ragged,
    or starts to fall".
    """
    index = int(losses.argmin())
    return float(lrs[index]) if index else None


def tenth_of_minimum(lrs: Values, losses: Values) -> float | None:
    """What fastai calls `minimum`."""
    rate = minimum(lrs, losses)
    return None if rate is None else rate / 10


def window(lrs: Values, losses: Values) -> float | None:
    """The left end of the rightmost window whose ends have the same slope: fastai's `slide`; None if there is none.

    The window is `WINDOW` points wide and moves down from the highest rate while the slopes at its ends differ, to
    where the descent is steady. fastai compares with 0.005 in units of the loss; here the limit is relative to the
    curve's height, so that a loss summed over classes gives the same suggestion as a mean.
    """
    if len(losses) <= WINDOW or losses.argmin() == 0:
        return None
    slopes = np.gradient(losses) / (losses.max() - losses.min())
    steady = np.flatnonzero(np.abs(slopes[WINDOW:] - slopes[:-WINDOW]) <= STEADY)
    # fastai keeps the last window whose ends still differ, one point right of the first that agrees.
    return float(lrs[min(int(steady[-1]) + 1, len(lrs) - 1 - WINDOW)]) if len(steady) else None


METHODS: dict[str, Callable[[Values, Values], float | None]] = {
    "steepest": steepest,
    "valley": valley,
    "minimum/10": tenth_of_minimum,
    "sliding window": window,
    "minimum": minimum,
}
CHOSEN = "minimum"
"""The method whose rate is proposed as the highest rate of the schedule.

On the demo's digits neither a tenth of it nor ten times as much trains better. The other four methods give rates 3 to
70 times lower, which suit a rate that is constant from the start. The measurements are in docs/find_lr.md.
"""


class Suggestion(NamedTuple):
    """What one method suggests, over several runs."""

    method: str
    per_run: tuple[float | None, ...]
    mean: float
    median: float
    geometric_mean: float  # the mean that is used: a factor of two too high or too low is equally wrong
    spread: float  # geometric standard deviation (sample, n - 1), a factor of at least 1; 1.0 for a single run

    @property
    def rates(self) -> list[float]:
        """The rates of the runs that have one."""
        return [rate for rate in self.per_run if rate is not None]


def suggestions(curves: Sequence[Curve], steps: int) -> dict[str, Suggestion]:
    """What each method suggests from curves, given the ramp's number of steps; methods without a result are omitted."""
    parts = [usable(curve, steps) for curve in curves]
    found = {}
    for name, method in METHODS.items():
        per_run = tuple(method(lrs, losses) if len(lrs) >= FEWEST else None for lrs, losses in parts)
        rates = np.array([rate for rate in per_run if rate is not None])
        if len(rates):
            logs = np.log(rates)
            means = float(rates.mean()), float(np.median(rates)), float(np.exp(logs.mean()))
            found[name] = Suggestion(name, per_run, *means, float(np.exp(logs.std(ddof=1))) if len(rates) > 1 else 1.0)
    return found


def still_falling(curve: Curve, steps: int) -> bool:
    """Whether the ramp ended before the loss rose, so that rates above the suggestions may be better."""
    _, losses = usable(curve, steps)
    return curve.end == "complete" and len(losses) > 0 and bool(curve.smoothed[-1] <= losses.min())
