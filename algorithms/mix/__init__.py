"""MixUp, CutMix, and the switch between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from algorithms.technique import Fraction, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm

Alpha = Annotated[float, Field(gt=0)]


class MixUpConfig(Technique):
    """Blend each image and its target with another's of the batch (Zhang et al. 2018), by Composer's `MixUp`."""

    alpha: Alpha = 0.2
    """Parameter of the Beta distribution of the other image's weight; the larger, the more even the blend."""
    interpolate_loss: bool = False
    """Blend two losses instead of the targets; only for a loss that is linear in the target."""


class CutMixConfig(Technique):
    """Replace a box of each image by another's of the batch (Yun et al. 2019), by Composer's `CutMix`."""

    alpha: Alpha = 1.0
    """Parameter of the Beta distribution of the share that is kept."""
    interpolate_loss: bool = False
    """Blend two losses instead of the targets; only for a loss that is linear in the target."""
    uniform_sampling: bool = False
    """Place the box so that each pixel is as likely to be replaced; false: centre it anywhere in the image."""
    switch_prob: Fraction = 0.5
    """Where MixUp is on too: the probability that a batch gets CutMix, and not MixUp."""


def build_mix(mixup: MixUpConfig | None, cutmix: CutMixConfig | None) -> Algorithm | None:
    """Composer's own algorithm where one of the two is on, the switch between them where both are."""
    if mixup is None and cutmix is None:
        return None
    from composer.algorithms import CutMix, MixUp

    mixing = None if mixup is None else MixUp(**mixup.model_dump())
    if cutmix is None:
        return mixing
    cutting = CutMix(**cutmix.model_dump(exclude={"switch_prob"}))
    if mixing is None:
        return cutting
    from algorithms.mix.mix import MixUpOrCutMix

    return MixUpOrCutMix(mixing, cutting, cutmix.switch_prob)
