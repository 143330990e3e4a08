"""The index of techniques: one typed field each, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, model_validator

from algorithms import Technique
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
from algorithms.progressive_resizing import TOLERANCE, ProgressiveResizingConfig
from algorithms.randaugment import RandAugmentConfig
from algorithms.sam import SAMConfig
from algorithms.squeeze_excite import SqueezeExciteConfig
from algorithms.stochastic_depth import StochasticDepthConfig
from algorithms.swa import SWAConfig

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

    def build(self, total_batches: int, epochs: int) -> list[Algorithm]:
        """Composer's algorithms of the techniques that are on, in the order in which they run."""
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
        found = [algorithm for algorithm in built if algorithm is not None]
        for kind in map(type, found):
            kind.__qualname__ = kind.__name__  # checkpoints hold it; for a local class it would name the function
        return found

    def image_transforms(self) -> list[Callable[[Image], Image]]:
        """The loader's transforms of each cropped training image, in this order; they draw from the global RNGs."""
        transforms = [
            self.randaugment.image_transform() if self.randaugment else None,
            self.augmix.image_transform() if self.augmix else None,
            self.colout.image_transform() if self.colout else None,
        ]
        return [transform for transform in transforms if transform is not None]

    @property
    def not_resumable(self) -> dict[str, str]:
        """The techniques that are on and with which a run cannot be resumed bit for bit, each with the reason."""
        techniques = {name: getattr(self, name) for name in type(self).model_fields}
        reasons = {name: item.not_resumable for name, item in techniques.items() if isinstance(item, Technique)}
        reasons |= {f"composer.{name}": NOT_RESUMABLE.get(name) for name in self.composer}
        return {name: reason for name, reason in reasons.items() if reason}

    @model_validator(mode="after")
    def _go_together(self) -> AlgorithmsConfig:
        if lines := [f"{key}: {reason}" for key, reason in self._conflicts()]:
            raise ValueError("\n".join(lines))
        return self

    def _conflicts(self) -> Iterator[tuple[str, str]]:
        """Techniques that are on but incompatible: (key path, reason)."""
        mixup, cutmix, fixres, resizing = self.mixup, self.cutmix, self.fixres, self.progressive_resizing
        for name, mix in (("mixup", mixup), ("cutmix", cutmix)):
            if mix and mix.interpolate_loss and self.label_smoothing:
                reason = "incompatible with label_smoothing, which would smooth only one of the two losses"
                yield f"{name}.interpolate_loss", f"{reason}; allowed: false, or label_smoothing off"
        if mixup and cutmix and mixup.interpolate_loss != cutmix.interpolate_loss:
            yield "cutmix.interpolate_loss", "must equal mixup.interpolate_loss if both are on"
        if self.ema and self.swa:
            yield "swa", "incompatible with ema: both replace the weights by an average; allowed: one of them"
        if self.swa and fixres and fixres.train == "classifier":
            yield (
                "swa",
                "incompatible with fixres.train: classifier, which freezes BatchNorm's statistics, so the average "
                "would never get its own statistics; allowed: fixres.train: all",
            )
        if fixres and self.colout and self.colout.batch:
            yield (
                "colout.batch",
                "true is incompatible with fixres: it would shrink the stage's images below fixres.size; "
                "allowed: false, which does not affect the stage",
            )
        on_batches = resizing if resizing and resizing.where == "batch" else None
        if fixres and on_batches and fixres.start + on_batches.finetune_fraction < 1 - TOLERANCE:
            yield (
                "progressive_resizing.finetune_fraction",
                f"{on_batches.finetune_fraction} with where: batch would scale the images of the FixRes stage; "
                f"allowed: at least {1 - fixres.start:.4g}, the share of the run after fixres.start, or where: loader",
            )
