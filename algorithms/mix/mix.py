"""MixUp or CutMix: exactly one of them for each batch."""

from __future__ import annotations

import numpy as np
from composer.algorithms import CutMix, MixUp
from composer.core import Algorithm, Event, State
from composer.loggers import Logger


def is_cutmix(seed: int, batch: int, switch_prob: float) -> bool:
    """Whether a batch gets CutMix, as a function of its position alone.

    Args:
        seed: The run's seed, the same on all ranks, so that all ranks choose alike.
        batch: Batches trained before this one.
        switch_prob: Probability of CutMix, in [0, 1] (`switch_prob` of timm's `Mixup`).

    Returns:
        True for CutMix, False for MixUp.
    """
    return bool(np.random.default_rng((seed, batch)).random() < switch_prob)


class MixUpOrCutMix(Algorithm):
    """Gives each batch to `mixup` or to `cutmix` (Wightman et al. 2021; timm's `Mixup`, mode `batch`).

    The choice is drawn anew from (seed, batch) at each event rather than kept, so that it is the same for all
    microbatches, for SAM's second pass, on all ranks and after a resume.

    Args:
        mixup: Composer's MixUp.
        cutmix: Composer's CutMix, with the same `interpolate_loss`.
        switch_prob: Probability of CutMix, in [0, 1].
    """

    def __init__(self, mixup: MixUp, cutmix: CutMix, switch_prob: float) -> None:
        self.mixup = mixup
        self.cutmix = cutmix
        self.switch_prob = switch_prob

    def __repr__(self) -> str:
        return f"MixUpOrCutMix(switch_prob={self.switch_prob})"

    def _chosen(self, state: State) -> MixUp | CutMix:
        batch = state.timestamp.batch.value
        return self.cutmix if is_cutmix(state.rank_zero_seed, batch, self.switch_prob) else self.mixup

    def match(self, event: Event, state: State) -> bool:
        """Where both match: BEFORE_FORWARD, and BEFORE_LOSS or BEFORE_BACKWARD."""
        return self.mixup.match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Let the batch's one do it."""
        self._chosen(state).apply(event, state, logger)
