"""MixUp, CutMix, and the switch between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from algorithms import Fraction, PositiveFloat, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger


def is_cutmix(seed: int, batch: int, switch_prob: float) -> bool:
    """Whether a batch gets CutMix rather than MixUp: a function of its position only, the same on all ranks.

    `switch_prob` is the probability of CutMix, as in timm's `Mixup`.
    """
    import numpy as np

    return bool(np.random.default_rng((seed, batch)).random() < switch_prob)


class MixUpConfig(Technique):
    """Blend each image and its target with another's of the batch (Zhang et al. 2018), by Composer's `MixUp`."""

    alpha: PositiveFloat = 0.2
    """Parameter of the Beta distribution of the other image's weight; the larger, the more even the blend."""
    interpolate_loss: bool = False
    """Blend two losses instead of the targets; only for a loss that is linear in the target."""


class CutMixConfig(Technique):
    """Replace a box of each image by another's of the batch (Yun et al. 2019), by Composer's `CutMix`."""

    alpha: PositiveFloat = 1.0
    """Parameter of the Beta distribution of the share that is kept."""
    interpolate_loss: bool = False
    """Blend two losses instead of the targets; only for a loss that is linear in the target."""
    uniform_sampling: bool = False
    """Place the box so that each pixel is equally likely to be replaced; false: centre it anywhere in the image."""
    switch_prob: Fraction = 0.5
    """If MixUp is on too: the probability that a batch gets CutMix rather than MixUp."""


def build_mix(mixup: MixUpConfig | None, cutmix: CutMixConfig | None) -> Algorithm | None:
    """Composer's own algorithm if one of the two is on; if both are, a switch between them.

    The switch gives each batch to exactly one (Wightman et al. 2021; timm's `Mixup`, mode `batch`). The choice is drawn
    from (seed, batch) at each event rather than stored, so that it is the same for all microbatches, for SAM's second
    pass, on all ranks and after a resume.
    """
    from composer.algorithms import CutMix, MixUp
    from composer.core import Algorithm

    mixing = MixUp(**mixup.model_dump()) if mixup else None
    cutting = CutMix(**cutmix.model_dump(exclude={"switch_prob"})) if cutmix else None
    if mixing is None or cutting is None or cutmix is None:
        return mixing or cutting
    members, switch_prob = (mixing, cutting), cutmix.switch_prob

    class MixUpOrCutMix(Algorithm):
        def match(self, event: Event, state: State) -> bool:
            return members[0].match(event, state)  # as CutMix does: both have the same `interpolate_loss`

        def apply(self, event: Event, state: State, logger: Logger) -> None:
            batch = state.timestamp.batch.value
            members[is_cutmix(state.rank_zero_seed, batch, switch_prob)].apply(event, state, logger)

    return MixUpOrCutMix()  # type: ignore[no-untyped-call]  # Composer's
