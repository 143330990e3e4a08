"""Progressive resizing: small images first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from algorithms.progressive_resizing.progressive_resizing import TOLERANCE, size_at
from algorithms.technique import Fraction, PositiveInt, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm

__all__ = ["ProgressiveResizingConfig", "size_at"]


class ProgressiveResizingConfig(Technique):
    """Train on small images first and let them grow (fast.ai's progressive resizing), on Composer's schedule."""

    where: Literal["loader", "batch"] = "loader"
    """Decode to the size in the loader, one size per epoch; or scale whole batches by Composer's own class."""
    mode: Literal["resize", "crop"] = "resize"
    """Scale the image, or cut out a random part of it (`where: batch` only)."""
    initial_scale: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """First size as a share of the full size."""
    delay_fraction: Fraction = 0.5
    """Share of the run at the first size."""
    finetune_fraction: Fraction = 0.2
    """Share of the run at the full size, at the end; the size grows linearly between the two."""
    size_increment: PositiveInt = 4
    """Sizes are rounded to multiples of this many pixels."""

    @model_validator(mode="after")
    def _consistent(self) -> ProgressiveResizingConfig:
        if self.delay_fraction + self.finetune_fraction > 1 + TOLERANCE:
            total = self.delay_fraction + self.finetune_fraction
            raise ValueError(f"delay_fraction + finetune_fraction must not exceed 1, got {total}")
        if self.mode == "crop" and self.where == "loader":
            raise ValueError("mode: crop needs where: batch, because the loader resizes its crops")
        return self

    def size_at(self, progress: float, full_size: int) -> int:
        """Side in pixels at a point of the run, a share in [0, 1], of images that are `full_size` pixels at its end."""
        return size_at(
            progress,
            full_size,
            self.initial_scale,
            self.delay_fraction,
            self.finetune_fraction,
            self.size_increment,
        )

    def build(self) -> Algorithm | None:
        """Composer's algorithm on batches; None where the loader does it."""
        if self.where == "loader":
            return None
        from composer.algorithms import ProgressiveResizing

        delay, finetune = self.delay_fraction, self.finetune_fraction
        if delay + finetune > 1 - TOLERANCE:
            # Composer divides by the length of the ramp, which is zero here: give it one that ends at `delay`.
            delay, finetune = delay - 2 * TOLERANCE, min(finetune, 1 - delay)
        return ProgressiveResizing(
            mode=self.mode,
            initial_scale=self.initial_scale,
            delay_fraction=delay,
            finetune_fraction=finetune,
            size_increment=self.size_increment,
        )
