"""The index of techniques: one typed field each, in the order they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, model_validator

from algorithms.augmix import AugMixConfig
from algorithms.blurpool import BlurPoolConfig
from algorithms.channels_last import ChannelsLastConfig
from algorithms.colout import ColOutConfig
from algorithms.composer_library import NOT_RESUMABLE, ComposerLibrary, build_library
from algorithms.ema import EMAConfig
from algorithms.fixres import FixResConfig
from algorithms.gradient_clipping import GradientClippingConfig
from algorithms.label_smoothing import LabelSmoothingConfig
from algorithms.mix import CutMixConfig, MixUpConfig, build_mix
from algorithms.progressive_resizing import ProgressiveResizingConfig
from algorithms.progressive_resizing.progressive_resizing import TOLERANCE
from algorithms.randaugment import RandAugmentConfig
from algorithms.sam import SAMConfig
from algorithms.squeeze_excite import SqueezeExciteConfig
from algorithms.stochastic_depth import StochasticDepthConfig
from algorithms.swa import SWAConfig
from algorithms.technique import Technique

if TYPE_CHECKING:
    from composer.core import Algorithm
    from PIL.Image import Image


class AlgorithmsConfig(BaseModel):
    """The techniques of a run; null is off."""

    model_config = Technique.model_config

    blurpool: BlurPoolConfig | None = None
    squeeze_excite: SqueezeExciteConfig | None = None
    stochastic_depth: StochasticDepthConfig | None = None
    composer: ComposerLibrary = Field(default_factory=dict)
    """Any other algorithm of Composer: class name -> its arguments."""
    channels_last: ChannelsLastConfig | None = None
    randaugment: RandAugmentConfig | None = None
    augmix: AugMixConfig | None = None
    colout: ColOutConfig | None = None
    progressive_resizing: ProgressiveResizingConfig | None = None
    fixres: FixResConfig | None = None
    mixup: MixUpConfig | None = None
    cutmix: CutMixConfig | None = None
    label_smoothing: LabelSmoothingConfig | None = None
    gradient_clipping: GradientClippingConfig | None = None
    ema: EMAConfig | None = None
    swa: SWAConfig | None = None
    sam: SAMConfig | None = None

    @property
    def not_resumable(self) -> dict[str, str]:
        """The techniques that are on and cannot go on bit for bit after an interruption, each with the reason."""
        rooms = {name: getattr(self, name) for name in type(self).model_fields}
        reasons = {name: room.not_resumable for name, room in rooms.items() if isinstance(room, Technique)}
        reasons |= {f"composer.{name}": NOT_RESUMABLE.get(name) for name in self.composer}
        return {name: reason for name, reason in reasons.items() if reason}

    @model_validator(mode="after")
    def _go_together(self) -> AlgorithmsConfig:
        lines = [f"{key}: {reason}" for key, reason in self.conflicts()]
        if lines:
            raise ValueError("\n".join(lines))
        return self

    def conflicts(self) -> list[tuple[str, str]]:
        """Techniques that are on and do not go together: (key path, reason)."""
        return [*mixing_conflicts(self), *averaging_conflicts(self), *stage_conflicts(self)]

    def build(self, total_batches: int, epochs: int) -> list[Algorithm]:
        """Composer's algorithms of the techniques that are on, in the order they run.

        Args:
            total_batches: Length of the run in batches.
            epochs: Length of the run in epochs.
        """
        built = [
            self.blurpool.build() if self.blurpool else None,
            self.squeeze_excite.build() if self.squeeze_excite else None,
            self.stochastic_depth.build() if self.stochastic_depth else None,
            *build_library(self.composer),
            self.channels_last.build() if self.channels_last else None,
            self.colout.build() if self.colout else None,
            self.progressive_resizing.build() if self.progressive_resizing else None,
            self.fixres.build(epochs) if self.fixres else None,
            build_mix(self.mixup, self.cutmix),
            self.label_smoothing.build() if self.label_smoothing else None,
            self.gradient_clipping.build() if self.gradient_clipping else None,
            self.ema.build(total_batches) if self.ema else None,
            self.swa.build(epochs) if self.swa else None,
            self.sam.build() if self.sam else None,
        ]
        return [algorithm for algorithm in built if algorithm is not None]

    def image_transforms(self) -> list[Callable[[Image], Image]]:
        """What the loader applies to each cropped training image, in this order; draws from the global RNGs."""
        transforms = [
            self.randaugment.image_transform() if self.randaugment else None,
            self.augmix.image_transform() if self.augmix else None,
            self.colout.image_transform() if self.colout else None,
        ]
        return [transform for transform in transforms if transform is not None]


def mixing_conflicts(config: AlgorithmsConfig) -> list[tuple[str, str]]:
    """Rules about mixed images and their targets."""
    found: list[tuple[str, str]] = []
    for name in ("mixup", "cutmix"):
        mix = getattr(config, name)
        if mix is not None and mix.interpolate_loss and config.label_smoothing is not None:
            found.append(
                (
                    f"{name}.interpolate_loss",
                    "does not go with label_smoothing, which would smooth one of the two losses only; "
                    "allowed: false, or label_smoothing off",
                )
            )
    if config.mixup and config.cutmix and config.mixup.interpolate_loss != config.cutmix.interpolate_loss:
        found.append(("cutmix.interpolate_loss", "must equal mixup.interpolate_loss where both are on"))
    return found


def averaging_conflicts(config: AlgorithmsConfig) -> list[tuple[str, str]]:
    """Rules about averages of weights."""
    found: list[tuple[str, str]] = []
    if config.ema and config.swa:
        found.append(("swa", "does not go with ema: both replace the weights by an average; allowed: one of them"))
    if config.swa and config.fixres and config.fixres.train == "classifier":
        found.append(
            (
                "swa",
                "does not go with fixres.train: classifier, which holds BatchNorm's statistics, so the average would "
                "never get its own; allowed: fixres.train: all",
            )
        )
    return found


def stage_conflicts(config: AlgorithmsConfig) -> list[tuple[str, str]]:
    """Rules about what the FixRes stage trains on."""
    found: list[tuple[str, str]] = []
    fixres, resizing = config.fixres, config.progressive_resizing
    if fixres is None:
        return found
    if config.colout and config.colout.batch:
        found.append(
            (
                "colout.batch",
                "true does not go with fixres: it would shrink the images of the stage below fixres.size; "
                "allowed: false, which leaves the stage alone",
            )
        )
    if resizing and resizing.where == "batch" and fixres.start + resizing.finetune_fraction < 1 - TOLERANCE:
        found.append(
            (
                "progressive_resizing.finetune_fraction",
                f"{resizing.finetune_fraction} with where: batch would scale the images of the FixRes stage; "
                f"allowed: at least {1 - fixres.start:.4g}, the share of the run after fixres.start, or where: loader",
            )
        )
    return found
