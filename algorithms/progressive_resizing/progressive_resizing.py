"""The size of the images as a function of progress."""

from __future__ import annotations

TOLERANCE = 1e-9
"""Shares of a run that differ by less are the same; a batch is more than that of any run."""


def size_at(
    progress: float,
    full_size: int,
    initial_scale: float,
    delay_fraction: float,
    finetune_fraction: float,
    size_increment: int,
) -> int:
    """Side of the images at a time of the run, as Composer's `ProgressiveResizing` computes it.

    Unlike Composer's, a ramp of length zero (delay_fraction + finetune_fraction == 1) is a step at `delay_fraction`.

    Args:
        progress: Share of the run that is done, in [0, 1].
        full_size: Side in pixels at full scale.
        initial_scale: Scale until `delay_fraction`, in (0, 1].
        delay_fraction: Share of the run before the ramp, in [0, 1].
        finetune_fraction: Share of the run after the ramp, in [0, 1].
        size_increment: Round to a multiple of this many pixels.

    Returns:
        Side in pixels: a multiple of `size_increment`, at least one; or `full_size`, where that multiple reaches it.
    """
    ramp = 1 - finetune_fraction - delay_fraction
    if progress < delay_fraction - TOLERANCE:
        done = 0.0
    elif ramp < TOLERANCE:
        done = 1.0
    else:
        done = min(max(progress - delay_fraction, 0.0) / ramp, 1.0)
    scale = initial_scale + (1 - initial_scale) * done
    size = round(full_size * scale / size_increment) * size_increment
    return min(max(size, size_increment), full_size)
