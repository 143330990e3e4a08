"""What a range test measures: the rates of its steps, the loss at each, and when to stop. No torch, no Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

End = Literal["complete", "diverged", "not finite"]


class Ramp(NamedTuple):
    """How the rate rises, and when its rise ends."""

    start_lr: float
    """Rate of the first step, above 0."""
    end_lr: float
    """Rate of the last step, above `start_lr`."""
    steps: int
    """Optimizer steps, at least 2."""
    smoothing: float
    """Share of the average that a step keeps, in [0, 1); 0 does not smooth."""
    divergence: float
    """The test ends where the smoothed loss exceeds its smallest value so far by this factor, above 1."""

    def lrs(self) -> NDArray[np.float64]:
        """The rate of each step, float64 (steps,): equal ratios, both ends included (as in torch-lr-finder)."""
        return np.geomspace(self.start_lr, self.end_lr, self.steps).astype(np.float64, copy=False)


class Curve(NamedTuple):
    """One run of the test."""

    seed: int
    lrs: NDArray[np.float64]
    """Rates of the steps that were made, float64 (n,)."""
    losses: NDArray[np.float64]
    """Training loss of each step's batch before the weights moved, float64 (n,); the last may be inf or NaN."""
    smoothed: NDArray[np.float64]
    """`smooth(losses)`, float64 (n,)."""
    end: End


def smooth(losses: Sequence[float] | NDArray[np.float64], smoothing: float) -> NDArray[np.float64]:
    """Exponential moving average with bias correction.

    At step i (from 0) it is the mean of losses 0 to i with weights smoothing**(i - k), so the first value is the first
    loss, not a share of it. fastai's `AvgSmoothLoss` (fastai/learner.py; its default 0.98) and Adam's moments (Kingma &
    Ba 2015, section 3) correct the bias in the same way; torch-lr-finder starts at the first loss and does not.

    Args:
        losses: Any length.
        smoothing: In [0, 1).

    Returns:
        float64 of the same length; what follows an inf or a NaN is not finite.
    """
    values = [float(loss) for loss in losses]
    averages = accumulate(values, lambda average, loss: smoothing * average + (1.0 - smoothing) * loss, initial=0.0)
    weights = 1.0 - smoothing ** np.arange(1, len(values) + 1, dtype=np.float64)
    return np.array(list(averages)[1:], np.float64) / weights


def end_of(losses: Sequence[float], ramp: Ramp) -> End | None:
    """Why the test ends after these losses; None where it goes on.

    The rule is fastai's (`LRFinder`, factor 4) and torch-lr-finder's (factor 5), on the smoothed loss.

    Args:
        losses: Of all steps so far, at least one.
        ramp: The test.
    """
    if not np.isfinite(losses[-1]):
        return "not finite"
    smoothed = smooth(losses, ramp.smoothing)
    if smoothed[-1] > ramp.divergence * smoothed.min():
        return "diverged"
    return "complete" if len(losses) >= ramp.steps else None


def curve_of(losses: Sequence[float], ramp: Ramp, seed: int, end: End) -> Curve:
    """The curve of the losses of a test that ended."""
    values = np.asarray(losses, dtype=np.float64)
    return Curve(seed, ramp.lrs()[: len(values)], values, smooth(values, ramp.smoothing), end)
