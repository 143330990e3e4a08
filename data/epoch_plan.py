"""What one epoch's batches look like, in plain values: planning a run needs no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

Crop = Literal["random", "center"]


class EpochPlan(NamedTuple):
    """What one epoch's batches look like."""

    size: int
    """Side of the images in pixels."""
    crop: Crop
    """`random`: RandomResizedCrop; `center`: the test-time resize and centre crop."""
    global_batch_size: int
    """Images per step over all devices, at most."""
