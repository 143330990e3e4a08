"""A loss that is not finite ends the run before that state is saved."""

from __future__ import annotations

import math

import torch
from composer import Logger, State
from composer.core import Precision
from composer.loggers import LoggerDestination


class DivergedError(Exception):
    """The loss is not finite: exit status 1, one line, no traceback."""


class StopOnNan(LoggerDestination):
    """Ends the run when a logged loss is not finite; it reads only what is logged anyway.

    In FP16 two logged losses in a row must be non-finite: the gradient scaler skips a step that overflows, and training
    continues from the weights before it.
    """

    def __init__(self) -> None:
        self._state: State | None = None
        self._again = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Training begins."""
        self._state = state

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Check the loss; DivergedError: it is not finite."""
        if self._state is None or "train/loss" not in metrics:
            return
        lost = not math.isfinite(metrics["train/loss"])
        if lost and (self._again or not _scaled(self._state)):
            raise diverged(self._state, metrics["train/loss"])
        self._again = lost


def is_finite(state: State, loss: float) -> bool:
    """Whether the last `loss`, the weights and the BatchNorm statistics are finite; waits for the device once.

    The loss belongs to the weights before the last step, so the weights are checked too.
    """
    if not _scaled(state) and not math.isfinite(loss):
        return False
    tensors = [
        tensor.detach()
        for tensor in (*state.model.parameters(), *state.model.buffers())
        if tensor.is_floating_point() and tensor.numel()
    ]
    # A sum reveals non-finite values, several times faster on a CPU than the largest magnitude.
    return bool(torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors]).isfinite().all())


def diverged(state: State, loss: float) -> DivergedError:
    """The error: what happened, where, and what to try."""
    stamp = state.timestamp
    what = "the weights are not finite" if math.isfinite(loss) else f"the loss is {loss}"
    half = ", precision=amp_bf16 instead of amp_fp16" if _scaled(state) else ""
    return DivergedError(
        f"{what} at batch {int(stamp.batch)} (epoch {int(stamp.epoch)}), learning rate "
        f"{state.optimizers[0].param_groups[0]['lr']:.4g}; this state is not saved. What helps: a third of the rate "
        f"(--lr), a longer scheduler.warmup, algorithms.gradient_clipping=on{half}; stop_on_nan=false continues"
    )


def _scaled(state: State) -> bool:
    return bool(state.precision == Precision.AMP_FP16)
