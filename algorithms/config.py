"""All fields of the techniques: types, defaults, meanings; and the index, one typed field each, in running order.

Reading a config must stay fast: torch and Composer are imported only by the techniques' modules (`NAME.py`), from which
`build.py` makes Composer's algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from algorithms.composer_library import NOT_RESUMABLE, ComposerLibrary

TOLERANCE = 1e-9  # shares of a run that differ by less than this count as equal; one batch is a larger share of any run

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
FractionBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]
TimeString = Annotated[str, Field(pattern=r"^([1-9][0-9]*(ba|ep)|(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)dur)$")]

_TIMM_FORM = r"^rand(-(m[0-9]+|n[1-9][0-9]*|p(0?\.[0-9]+|1)|mstd[0-9.]*[0-9]|mmax[0-9]+|inc[01]))*$"


class Technique(BaseModel):
    """A technique's YAML line: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    not_resumable: ClassVar[str | None] = None
    """Why an interrupted run cannot be resumed bit for bit with this technique; None: it can."""


class BlurPoolConfig(Technique):
    """Blur before every subsampling (Zhang 2019), by Composer's `BlurPool`."""

    replace_convs: bool = True
    """Blur at strided convolutions."""
    replace_maxpools: bool = True
    """Blur at max-pooling layers."""
    blur_first: bool = True
    """Blur before the strided convolution; false: convolve at stride 1 and blur after, as in the paper; much slower."""
    min_channels: PositiveInt = 16
    """Skip convolutions with fewer input channels, such as the stem's."""

    @model_validator(mode="after")
    def _replaces_something(self) -> BlurPoolConfig:
        if not (self.replace_convs or self.replace_maxpools):
            raise ValueError("replace_convs and replace_maxpools are both false, so nothing would change")
        return self


class SqueezeExciteConfig(Technique):
    """A Squeeze-and-Excitation block (Hu et al. 2018) after each wide convolution, by Composer's `SqueezeExcite`."""

    latent_channels: PositiveFloat = 64.0
    """Channels of the block's hidden layer; below 1: a share of the convolution's output channels."""
    min_channels: PositiveInt = 128
    """Only convolutions with at least this many input and output channels get a block."""


class StochasticDepthConfig(Technique):
    """Skip residual blocks at random while training (Huang et al. 2016), by Composer's `StochasticDepth`."""

    target_layer_name: Literal["ResNetBottleneck"] = "ResNetBottleneck"
    """The block to skip; Composer supports only torchvision's `Bottleneck`."""
    stochastic_method: Literal["block", "sample"] = "block"
    """Skip a block for the whole batch, or for single images."""
    drop_rate: PositiveFraction = 0.2
    """Probability of skipping a block; with `linear`, that of the last block."""
    drop_distribution: Literal["linear", "uniform"] = "linear"
    """Let the probability grow linearly with depth, or be the same in all blocks."""
    drop_warmup: Fraction = 0.0
    """Share of the run in which the probability rises from zero; `block` only."""

    @model_validator(mode="after")
    def _warmup_of_blocks(self) -> StochasticDepthConfig:
        if self.stochastic_method == "sample" and self.drop_warmup > 0:
            raise ValueError("drop_warmup: Composer has a warm-up for stochastic_method: block only; allowed: 0")
        return self


class ChannelsLastConfig(Technique):
    """Keep the weights in NHWC memory order, by Composer's `ChannelsLast`; it has no fields."""


class RandAugmentConfig(Technique):
    """Apply a chain of random augmentations to each image (Cubuk et al. 2020), by Composer's `RandAugmentTransform`."""

    severity: Annotated[int, Field(ge=1, le=10)] = 9
    """Strength of the augmentations, 1 to 10 (M in the paper)."""
    depth: PositiveInt = 2
    """Augmentations in the chain (N in the paper)."""
    augmentation_set: Literal["all", "safe", "original"] = "all"
    """`safe` leaves out what ImageNet-C tests; `original` has the colour operations of the AugMix authors' code."""
    timm: Annotated[str, Field(pattern=_TIMM_FORM, examples=["rand-m7-mstd0.5-inc1"])] | None = None
    """timm's own RandAugment by its form, instead of Composer's; the fields above do not apply then."""


class AugMixConfig(Technique):
    """Mix each image with chains of random augmentations of it (Hendrycks et al. 2020), by Composer's AugMix."""

    severity: Annotated[int, Field(ge=1, le=10)] = 3
    """Strength of the augmentations, 1 to 10."""
    depth: Literal[-1] | PositiveInt = -1
    """Augmentations in a chain; -1: drawn from 1, 2 and 3."""
    width: PositiveInt = 3
    """Number of chains."""
    alpha: PositiveFloat = 1.0
    """Parameter of the Dirichlet and Beta distributions of the weights."""
    augmentation_set: Literal["all", "safe", "original"] = "all"
    """`safe` leaves out what ImageNet-C tests; `original` has the colour operations of the paper's code."""


class ColOutConfig(Technique):
    """Drop random rows and columns, which makes the images smaller, by Composer's `ColOut`."""

    p_row: FractionBelowOne = 0.15
    """Share of the rows to drop."""
    p_col: FractionBelowOne = 0.15
    """Share of the columns to drop."""
    batch: bool = True
    """Drop the same ones in the whole batch, after loading; false: different ones in each image, in the loader."""

    @model_validator(mode="after")
    def _drops_something(self) -> ColOutConfig:
        if self.p_row == self.p_col == 0:
            raise ValueError("p_row and p_col are both 0, so nothing would change")
        return self


class ProgressiveResizingConfig(Technique):
    """Train on small images first and let them grow (fast.ai's progressive resizing), on Composer's schedule."""

    where: Literal["loader", "batch"] = "loader"
    """Decode to the size in the loader, one size per epoch; or scale whole batches by Composer's own class."""
    mode: Literal["resize", "crop"] = "resize"
    """Scale the image, or cut out a random part of it (`where: batch` only)."""
    initial_scale: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """First size as a share of the full size."""
    delay_fraction: Fraction = 0.5
    """Share of the run at the first size."""
    finetune_fraction: Fraction = 0.2
    """Share of the run at the full size, at the end; the size grows linearly between the two."""
    size_increment: PositiveInt = 4
    """Sizes are rounded to multiples of this many pixels."""

    @model_validator(mode="after")
    def _consistent(self) -> ProgressiveResizingConfig:
        if (total := self.delay_fraction + self.finetune_fraction) > 1 + TOLERANCE:
            raise ValueError(f"delay_fraction + finetune_fraction must not exceed 1, got {total}")
        if self.mode == "crop" and self.where == "loader":
            raise ValueError("mode: crop needs where: batch, because the loader resizes its crops")
        return self

    def size_at(self, progress: float, full_size: int) -> int:
        """Side of the images at a point of the run, as Composer's `ProgressiveResizing` computes it.

        Unlike in Composer's, a ramp of length zero (delay_fraction + finetune_fraction == 1) is a step. `progress` is
        the completed share of the run.

        Returns:
            Side in pixels: a multiple of `size_increment`, at least one; or `full_size`, if that multiple reaches it.
        """
        ramp = 1 - self.finetune_fraction - self.delay_fraction
        if progress < self.delay_fraction - TOLERANCE:
            done = 0.0
        elif ramp < TOLERANCE:
            done = 1.0
        else:
            done = min(max(progress - self.delay_fraction, 0.0) / ramp, 1.0)
        scale = self.initial_scale + (1 - self.initial_scale) * done
        size = round(full_size * scale / self.size_increment) * self.size_increment
        return min(max(size, self.size_increment), full_size)


class FixResConfig(Technique):
    """Finish at `size` px with test-time crops (Touvron et al. 2019), on all parameters or the classifier's only."""

    start: Fraction = 85 / 90
    """Share of the run before the stage; it begins at the nearest epoch, and lasts at least one."""
    size: Annotated[int, Field(ge=8, le=4096)] = 288
    """Side of the images in the stage, in pixels."""
    train: Literal["all", "classifier"] = "all"
    """What is trained in the stage: everything, or only the last Linear and the last BatchNorm."""

    def start_epoch(self, epochs: int) -> int:
        """The first epoch of the stage, counted from 0; `epochs` if there is none.

        It is the nearest epoch to `start * epochs` such that the stage has at least one epoch if `start` is below 1,
        and does not start the run if `start` is above 0. A run of one epoch cannot satisfy both, and has no stage.
        """
        first = round(self.start * epochs)
        if self.start < 1:
            first = min(first, epochs - 1)
        return max(first, 1) if self.start > 0 else first


class MixUpConfig(Technique):
    """Blend each image and its target with another's of the batch (Zhang et al. 2018), as Composer's `MixUp` does."""

    alpha: PositiveFloat = 0.2
    """Parameter of the Beta distribution of the other image's weight; the larger, the more even the blend."""
    interpolate_loss: bool = False
    """Blend two losses instead of the targets; only for a loss that is linear in the target."""


class CutMixConfig(Technique):
    """Replace a box of each image by another's of the batch (Yun et al. 2019), as Composer's `CutMix` does."""

    alpha: PositiveFloat = 1.0
    """Parameter of the Beta distribution of the share that is kept."""
    interpolate_loss: bool = False
    """Blend two losses instead of the targets; only for a loss that is linear in the target."""
    uniform_sampling: bool = False
    """Place the box so that each pixel is equally likely to be replaced; false: centre it anywhere in the image."""
    switch_prob: Fraction = 0.5
    """If MixUp is on too: the probability that a batch gets CutMix rather than MixUp."""


class LabelSmoothingConfig(Technique):
    """Shrink the targets towards the uniform distribution (Szegedy et al. 2016), as Composer's `LabelSmoothing`."""

    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the target that is spread evenly over all classes."""


class DistillationConfig(Technique):
    """Learn from a trained network's outputs too (Hinton et al. 2015), on the same mixed crops (Beyer et al. 2022)."""

    teacher: Annotated[str, Field(min_length=1)]
    """`timm/NAME` with timm's weights; a run's folder or a checkpoint, also `s3://...`; or a state dict on disk."""
    alpha: PositiveFraction = 0.5
    """Share of the teacher's part in the loss; 1: the labels do not count."""
    temperature: PositiveFloat = 1.0
    """Divides both networks' logits; the higher, the more the small probabilities count."""


class GradientClippingConfig(Technique):
    """Bound the gradients before the optimizer's step, by Composer's `GradientClipping`."""

    type: Literal["norm", "value", "adaptive"] = "norm"
    """Bound the norm of all gradients together, each element, or each unit's norm relative to that of its weights."""
    threshold: PositiveFloat
    """The bound; for `adaptive` the ratio of the gradient's norm to the weights' norm."""


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


class SWAConfig(Technique):
    """Near the end, replace the weights by their average so far (Izmailov et al. 2018), by Composer's `SWA`."""

    start: Fraction = 0.7
    """Share of the run before averaging begins."""
    end: Fraction = 0.97
    """Share of the run after which the average replaces the weights; at least one epoch is left for BatchNorm."""
    update_interval: Annotated[str, Field(pattern=r"^[1-9][0-9]*(ba|ep)$")] = "1ep"
    """Time between two updates: epochs (`1ep`) or batches (`100ba`)."""

    @model_validator(mode="after")
    def _ordered(self) -> SWAConfig:
        if self.start >= self.end:
            raise ValueError(f"start must come before end, got {self.start} and {self.end}")
        return self


class SAMConfig(Technique):
    """Step along the gradient of the worst point nearby (Foret et al. 2021), every `interval` batches."""

    rho: PositiveFloat = 0.05
    """Radius of the neighbourhood, in the L2 norm of all weights."""
    epsilon: PositiveFloat = 1e-12
    """Added to the gradient's norm, against division by zero."""
    interval: PositiveInt = 1
    """Batches from one such step to the next; each costs a second forward and backward pass."""


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
    distillation: DistillationConfig | None = None
    gradient_clipping: GradientClippingConfig | None = None
    ema: EMAConfig | None = None
    swa: SWAConfig | None = None
    sam: SAMConfig | None = None

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
