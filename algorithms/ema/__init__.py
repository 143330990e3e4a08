"""EMA: evaluate an exponential moving average of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from algorithms.technique import Fraction, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm

TimeString = Annotated[str, Field(pattern=r"^([1-9][0-9]*(ba|ep)|(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)dur)$")]


class EMAConfig(Technique):
    """Evaluate with a moving average of the weights, by Composer's `EMA`; set `half_life` or `smoothing`."""

    half_life: TimeString | None = None
    """Time in which a weight's share in the average halves: batches (`100ba`), epochs (`2ep`), a share (`0.003dur`)."""
    smoothing: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of `half_life`: the share of the old average that an update keeps."""
    start: Fraction = 0.0
    """Share of the run before the averaging begins."""
    update_interval: TimeString = "1ba"
    """Time between two updates: batches (`20ba`), epochs (`1ep`), a share of the run (`0.001dur`)."""

    @model_validator(mode="after")
    def _consistent(self) -> EMAConfig:
        if (self.half_life is None) == (self.smoothing is None):
            raise ValueError("set exactly one of half_life and smoothing")
        if self.half_life is not None and self.half_life.endswith("ep") != self.update_interval.endswith("ep"):
            raise ValueError(
                f"update_interval: {self.update_interval} does not go with half_life {self.half_life}; "
                "allowed: both in epochs, or neither"
            )
        return self

    def build(self, total_batches: int) -> Algorithm:
        """Composer's algorithm, with shares of the run as batches.

        Args:
            total_batches: Length of the run.
        """
        from algorithms.ema.ema import PortableEMA

        return PortableEMA(
            half_life=None if self.half_life is None else in_batches(self.half_life, total_batches),
            smoothing=self.smoothing,
            ema_start=f"{self.start}dur",
            update_interval=in_batches(self.update_interval, total_batches),
        )


def in_batches(time: str, total_batches: int) -> str:
    """Turn a share of the run (`0.003dur`) into batches (`27ba`), at least one; leave other units as they are."""
    if not time.endswith("dur"):
        return time
    return f"{max(1, round(float(time.removesuffix('dur')) * total_batches))}ba"
