"""Label smoothing: softer targets."""

from __future__ import annotations

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor

from algorithms.config import LabelSmoothingConfig
from algorithms.targets import soft_targets


class LabelSmoothing(Algorithm):
    """Replaces the labels of each microbatch by soft targets for the loss; Composer's asks the device about the labels.

    With MixUp or CutMix on, it is not built: `Mix` makes the soft targets, and smooths them.
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def match(self, event: Event, state: State) -> bool:
        """Before the loss."""
        return event == Event.BEFORE_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the labels."""
        images, labels = state.batch
        assert isinstance(state.outputs, Tensor)
        state.batch = (images, soft_targets(labels, state.outputs.shape[1], self.smoothing))


def build(config: LabelSmoothingConfig) -> LabelSmoothing:
    """The algorithm with these fields."""
    return LabelSmoothing(config.smoothing)
