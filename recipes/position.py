"""Randomness of the training process as a function of the position in the run."""

from __future__ import annotations

import random

import numpy as np
import torch
from composer import Callback, Logger, State
from composer.utils import dist


def position_seed(seed: int, rank: int, batch: int) -> int:
    """A 32-bit seed for one process and one step of the run.

    Args:
        seed: The run's seed, in [0, 2**32).
        rank: Global rank of the process.
        batch: Steps done since the start of the run.
    """
    return int(np.random.SeedSequence((seed, rank, batch)).generate_state(1)[0])


class PositionSeed(Callback):
    """Seeds the generators of Python, NumPy and torch before each step from (seed, rank, step).

    MixUp, CutMix, stochastic depth, dropout and whatever else draws from them then depend on the position only: not on
    the loader's workers, not on what was drawn before, and not on where the run was interrupted.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Runs before the batch is fetched, the first event of a step."""
        del logger
        value = position_seed(self.seed, dist.get_global_rank(), int(state.timestamp.batch))
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)
