"""FixRes: finish at the test's resolution and crop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from algorithms.technique import Fraction, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm


def start_epoch(start: float, epochs: int) -> int:
    """The first epoch of the FixRes stage, counted from 0; `epochs` where there is none.

    Args:
        start: Share of the run before the stage, in [0, 1].
        epochs: Length of the run.

    Returns:
        The nearest epoch to `start * epochs`, such that the stage has at least one epoch when `start` is below 1, and
        something comes before it when `start` is above 0. A run of one epoch cannot have both, and has no stage then.
    """
    first = round(start * epochs)
    if start < 1:
        first = min(first, epochs - 1)
    if start > 0:
        first = max(first, 1)
    return first


class FixResConfig(Technique):
    """Finish at `size` px with test-time crops (Touvron et al. 2019), on all parameters or the classifier's only."""

    start: Fraction = 85 / 90
    """Share of the run before the stage; it begins at the nearest epoch, and lasts at least one."""
    size: Annotated[int, Field(ge=8, le=4096)] = 288
    """Side of the images in the stage, in pixels."""
    train: Literal["all", "classifier"] = "all"
    """What is trained in the stage: everything, or the last Linear and the last BatchNorm with all else frozen."""

    def build(self, epochs: int) -> Algorithm | None:
        """The algorithm that freezes; None where nothing is frozen, since the sampler sets size and crop."""
        if self.train == "all":
            return None
        from algorithms.fixres.fixres import FixRes

        return FixRes(start_epoch(self.start, epochs))
