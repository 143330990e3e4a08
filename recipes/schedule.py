"""Learning rate and momentum as pure functions of how far the run has come.

A step is counted in fractional epochs over all epochs and stretched to the run's number of steps, so that a change of
the batch size between two stages never makes the rate jump, and a run that was interrupted sees the same rates.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Rate(NamedTuple):
    """What the optimizer uses for one step."""

    lr: float
    """Learning rate."""
    momentum: float | None
    """Momentum; None where the schedule leaves the optimizer's own."""


def cosine_between(start: float, end: float, fraction: float) -> float:
    """The half cosine from `start` (fraction 0) to `end` (fraction 1)."""
    return end + (start - end) / 2.0 * (math.cos(math.pi * fraction) + 1.0)


def linear_between(start: float, end: float, fraction: float) -> float:
    """The straight line from `start` (fraction 0) to `end` (fraction 1)."""
    return (end - start) * fraction + start


def one_cycle(
    step: float,
    total_steps: float,
    *,
    lr: float,
    warmup: float,
    div_factor: float,
    final_div_factor: float,
    base_momentum: float,
    max_momentum: float,
    anneal: str,
) -> Rate:
    """One-Cycle policy: the rate rises to `lr` and falls to almost nothing, the momentum does the opposite.

    Equal to `torch.optim.lr_scheduler.OneCycleLR` (two phases) at whole steps; the paper is Smith & Topin 2018,
    "Super-Convergence", section 4.

    Args:
        step: Steps done, in [0, total_steps - 1]; may be fractional.
        total_steps: Steps of the whole run.
        lr: Highest rate, reached at warmup * total_steps - 1.
        warmup: Share of the run in which the rate rises, in (0, 1).
        div_factor: The first step uses lr / div_factor.
        final_div_factor: The last step uses lr / div_factor / final_div_factor.
        base_momentum: Momentum where the rate is highest.
        max_momentum: Momentum at the first and the last step.
        anneal: `cos` or `linear`.

    Returns:
        The rate and the momentum of that step.
    """
    between = cosine_between if anneal == "cos" else linear_between
    first = lr / div_factor
    # torch counts phases by the index of their last step. In a run so short that the rise has no step of its own,
    # the run starts at the top.
    peak = warmup * total_steps - 1.0
    last = total_steps - 1.0
    if step < peak:
        fraction = step / peak
        return Rate(between(first, lr, fraction), between(max_momentum, base_momentum, fraction))
    peak = max(peak, 0.0)
    fraction = min((step - peak) / (last - peak), 1.0) if last > peak else 1.0
    return Rate(between(lr, first / final_div_factor, fraction), between(base_momentum, max_momentum, fraction))


def cosine(step: float, total_steps: float, *, lr: float, warmup: float, final_lr_ratio: float) -> Rate:
    """Linear warm-up from zero, then a half cosine to lr * final_lr_ratio.

    Composer's `CosineAnnealingWithWarmupScheduler` (optim/scheduler.py) at the same fraction of the run.

    Args:
        step: Steps done, in [0, total_steps]; may be fractional.
        total_steps: Steps of the whole run.
        lr: Highest rate, reached at the end of the warm-up.
        warmup: Share of the run in which the rate rises, in [0, 1).
        final_lr_ratio: Rate at the end of the run over `lr`, in [0, 1].

    Returns:
        The rate of that step; the momentum is left to the optimizer.
    """
    progress = min(step / total_steps, 1.0)
    if progress < warmup:
        return Rate(lr * progress / warmup, None)
    return Rate(cosine_between(lr, lr * final_lr_ratio, (progress - warmup) / (1.0 - warmup)), None)


def constant(step: float, total_steps: float, *, lr: float) -> Rate:
    """The same rate at every step."""
    del step, total_steps
    return Rate(lr, None)


def step_at(epoch: int, batch: int, batches: int, epochs: int, total_steps: int) -> float:
    """The position (epoch, batch) as a step of an evenly paced run.

    Args:
        epoch: Whole epochs done.
        batch: Batches done in the current epoch, in [0, batches].
        batches: Batches of the current epoch.
        epochs: Epochs of the run.
        total_steps: Batches of the run, over all epochs.

    Returns:
        The number of steps that a run with batches of one size would have done, in [0, total_steps]. With one batch
        size it is the number of batches done.
    """
    return (epoch * batches + batch) * total_steps / (batches * epochs)
