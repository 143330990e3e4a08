"""Progressive resizing: small images first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from algorithms import Fraction, PositiveInt, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm

TOLERANCE = 1e-9  # shares of a run that differ by less than this count as equal; one batch is a larger share of any run


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
        if (total := self.delay_fraction + self.finetune_fraction) > 1 + TOLERANCE:
            raise ValueError(f"delay_fraction + finetune_fraction must not exceed 1, got {total}")
        if self.mode == "crop" and self.where == "loader":
            raise ValueError("mode: crop needs where: batch, because the loader resizes its crops")
        return self

    def size_at(self, progress: float, full_size: int) -> int:
        """Side of the images at a point of the run, as Composer's `ProgressiveResizing` computes it.

        Unlike in Composer's, a ramp of length zero (delay_fraction + finetune_fraction == 1) is a step. `progress` is
        the completed share of the run.

        Returns:
            Side in pixels: a multiple of `size_increment`, at least one; or `full_size`, if that multiple reaches it.
        """
        ramp = 1 - self.finetune_fraction - self.delay_fraction
        if progress < self.delay_fraction - TOLERANCE:
            done = 0.0
        elif ramp < TOLERANCE:
            done = 1.0
        else:
            done = min(max(progress - self.delay_fraction, 0.0) / ramp, 1.0)
        scale = self.initial_scale + (1 - self.initial_scale) * done
        size = round(full_size * scale / self.size_increment) * self.size_increment
        return min(max(size, self.size_increment), full_size)

    def build(self) -> Algorithm | None:
        """Composer's algorithm on batches; None with `where: loader`."""
        if self.where == "loader":
            return None
        from composer.algorithms import ProgressiveResizing

        delay, finetune = self.delay_fraction, self.finetune_fraction
        if delay + finetune > 1 - TOLERANCE:
            # Composer would divide by the ramp's length, zero here, so give it a tiny ramp that ends at `delay`.
            delay, finetune = delay - 2 * TOLERANCE, min(finetune, 1 - delay)
        fields = self.model_dump(exclude={"where"}) | {"delay_fraction": delay, "finetune_fraction": finetune}
        return ProgressiveResizing(**fields)
