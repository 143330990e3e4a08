"""EMA: evaluate an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from algorithms import Fraction, Technique, bare_name

if TYPE_CHECKING:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
    from torch import Tensor

TimeString = Annotated[str, Field(pattern=r"^([1-9][0-9]*(ba|ep)|(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)dur)$")]


def in_batches(time: str, total_batches: int) -> str:
    """Convert a share of the run (`0.003dur`) to batches (`27ba`), at least one; other units stay."""
    if not time.endswith("dur"):
        return time
    return f"{max(1, round(float(time.removesuffix('dur')) * total_batches))}ba"


def _renamed(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The same tensors under the given names, which may differ by wrappers' prefixes.

    Raises:
        ValueError: A tensor's name is not among `names`, so it would never be used.
    """
    by_bare_name = {bare_name(name): name for name in names}
    if unknown := [name for name in tensors if bare_name(name) not in by_bare_name]:
        raise ValueError(f"ema: the moving average has {unknown[0]}, which the model lacks")
    return {by_bare_name[bare_name(name)]: tensor for name, tensor in tensors.items()}


class EMAConfig(Technique):
    """Evaluate with a moving average of the weights, by Composer's `EMA`; set `half_life` or `smoothing`."""

    half_life: TimeString | None = None
    """Time in which a weight's share in the average halves: batches (`100ba`), epochs (`2ep`), a share (`0.003dur`)."""
    smoothing: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of `half_life`: the share of the old average that an update keeps."""
    start: Fraction = 0.0
    """Share of the run before averaging begins."""
    update_interval: TimeString = "1ba"
    """Time between two updates: batches (`20ba`), epochs (`1ep`), a share of the run (`0.001dur`)."""

    @model_validator(mode="after")
    def _consistent(self) -> EMAConfig:
        if (self.half_life is None) == (self.smoothing is None):
            raise ValueError("set exactly one of half_life and smoothing")
        if self.half_life is not None and self.half_life.endswith("ep") != self.update_interval.endswith("ep"):
            raise ValueError(
                f"update_interval: {self.update_interval} is incompatible with half_life {self.half_life}; "
                "allowed: both in epochs, or neither"
            )
        return self

    def build(self, total_batches: int) -> Algorithm:
        """Composer's algorithm, with shares of the run in batches, and independent of the number of processes.

        DDP changes the names of weights (`module.module.*` instead of `module.*`). Composer ignores an average whose
        name it does not find, so a run resumed with another number of processes would evaluate weights that were never
        averaged. Here, checkpoints use the names of a single process, and loaded averages get the model's names.
        """
        from composer.algorithms import EMA

        class PortableEMA(EMA):
            def state_dict(self) -> dict[str, Any]:
                state = super().state_dict()
                for store, tensors in state["ema_model"].items():
                    state["ema_model"][store] = {
                        f"module.{bare_name(name)}": tensor for name, tensor in tensors.items()
                    }
                return state

            def apply(self, event: Event, state: State, logger: Logger) -> None:
                if event in self.move_device_events:  # fit, evaluation or prediction starts
                    average: Any = self.ema_model
                    parameters, buffers = dict(state.model.named_parameters()), dict(state.model.named_buffers())
                    average.named_parameters_dict = _renamed(average.named_parameters_dict, parameters)
                    average.named_buffers_dict = _renamed(average.named_buffers_dict, buffers)
                super().apply(event, state, logger)

        return PortableEMA(
            half_life=None if self.half_life is None else in_batches(self.half_life, total_batches),
            smoothing=self.smoothing,
            ema_start=f"{self.start}dur",
            update_interval=in_batches(self.update_interval, total_batches),
        )
