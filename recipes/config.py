"""The typed, frozen and complete description of a run, and the only home of its defaults.

Nothing here imports torch or Composer: a config is read, checked, listed and planned in milliseconds. A rule about one
field is on that field; a rule about several fields is a validator of the class that holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from algorithms.config import AlgorithmsConfig, Fraction, PositiveFloat, PositiveInt, Technique
from data.config import AugmentConfig


class Part(BaseModel):
    """A section of the YAML: frozen, and an unknown key is an error.

    The text under a field is its description; an error shows it if no limit states what is allowed. `load.py` validates
    strictly and as JSON, so a `before` validator must return tuples where tuples are expected.
    """

    model_config = Technique.model_config


ImageSize = Annotated[int, Field(ge=8, le=4096)]


def _by_size(value: object) -> object:
    """Accept one number for all sizes, and convert the string keys of a JSON round trip back to sizes."""
    if isinstance(value, dict):
        sizes = {int(key) if isinstance(key, str) and key.isdecimal() else key: item for key, item in value.items()}
        if not sizes or len(sizes) < len(value):
            raise ValueError(f"got {value}; allowed: at least one image size, and each once")
        return sizes
    return value


BySize = Annotated[PositiveInt | dict[ImageSize, PositiveInt], BeforeValidator(_by_size)]


def at_size(values: int | dict[int, int], size: int) -> int:
    """The entry of the smallest listed size that is at least `size` px; above the largest listed one, its entry."""
    if isinstance(values, int):
        return values
    return values[min((listed for listed in values if listed >= size), default=max(values))]


class ModelConfig(Part):
    """The network to train."""

    name: str = "resnet50"
    """A classifier of torchvision (`resnet50`) or, with the prefix `timm/`, of timm (`timm/resnet50d`)."""
    num_classes: PositiveInt | None = None
    """Outputs of the classifier; null: one per class folder of the training set."""
    zero_init_residual: bool = True
    """Start each residual block as the identity: the scale of its last BatchNorm at zero (Goyal et al. 2017, 5.1)."""
    weights: Annotated[str, Field(min_length=1)] | None = None
    """Start from a state dict (.safetensors, .pth), a run's folder or checkpoint, s3://..., `timm` or `torchvision`."""
    weights_strict: bool = True
    """Refuse weights if a tensor outside the classifier does not fit; false: load what fits, and list the rest."""
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """What summary.json's `weights_sha256` is for these weights; null: anything. A run's own config holds it."""
    sync_batchnorm: bool = False
    """Compute BatchNorm's statistics over all devices."""
    activation_checkpointing: bool = False
    """Recompute the activations of each residual stage in the backward pass: less memory, about a third more time."""


class LossConfig(Part):
    """The training loss."""

    name: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    mean_over_classes: bool = False
    """Binary cross-entropy: the mean over the classes, as in timm, and the classifier's bias stays; false: the sum."""
    target_threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Binary cross-entropy: targets above this become 1 and others 0, after any mixing; null: targets stay soft."""

    @model_validator(mode="after")
    def _binary(self) -> LossConfig:
        if self.name == "cross_entropy" and (self.mean_over_classes or self.target_threshold is not None):
            raise ValueError("mean_over_classes and target_threshold are for binary_cross_entropy only")
        return self


LibraryName = Annotated[str, Field(pattern=r"^(timm|torch)/[a-z0-9]+$", examples=["timm/lamb", "torch/adamw"])]


class OptimizerConfig(Part):
    """The optimizer: torch's SGD, Composer's SGD with decoupled weight decay, or any optimizer of timm or torch.

    Arguments that have no key below, such as `betas`, are written beside these keys.
    """

    model_config = Part.model_config | {"extra": "allow"}

    name: Literal["sgd", "decoupled_sgdw"] | LibraryName = "sgd"
    """`sgd` and `decoupled_sgdw`, or `timm/NAME` by timm.optim.list_optimizers(), `torch/CLASS` in lower case."""
    lr: PositiveFloat = 2.0
    """The schedule's highest learning rate, at `lr_batch_size` images per step."""
    lr_batch_size: PositiveInt | None = None
    """Scale `lr` linearly from this global batch size to that of the stage with the most epochs; null: do not scale."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """For schedules that do not set the momentum themselves; ignored by optimizers without momentum."""
    nesterov: bool = True
    """Nesterov's momentum; ignored by timm's optimizers, whose names say which momentum they use."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-5
    decay_norm_and_bias: bool = False
    """Apply weight decay to BatchNorm parameters and biases as well."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of timm's or torch's optimizer that have no key of their own here."""
        return self.model_extra or {}


class OneCycleConfig(Part):
    """One-Cycle (Smith & Topin 2018), as torch's OneCycleLR: rate and momentum."""

    name: Literal["one_cycle"] = "one_cycle"
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the run in which the rate rises."""
    div_factor: Annotated[float, Field(ge=1)] = 25.0
    """The run starts at lr / div_factor ..."""
    final_div_factor: Annotated[float, Field(ge=1)] = 1e4
    """... and ends at lr / div_factor / final_div_factor."""
    base_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.85
    max_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    anneal: Literal["cos", "linear"] = "cos"


class CosineConfig(Part):
    """Linear warm-up, then a half cosine."""

    name: Literal["cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the run in which the rate rises linearly from zero."""
    final_lr_ratio: Fraction = 0.0
    """The run ends at lr * final_lr_ratio."""
    first_lr_ratio: Fraction = 0.0
    """The warm-up begins at lr * first_lr_ratio."""
    overlap: bool = False
    """The cosine begins with the run, and the warm-up covers its first part, as in timm; false: it follows it."""


class StepConfig(Part):
    """A rate that is multiplied by a factor after each share of the run, as torch's StepLR."""

    name: Literal["step"] = "step"
    interval: Annotated[float, Field(gt=0, le=1)] = 1 / 3
    """Share of the run between two changes of the rate."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1


class ConstantConfig(Part):
    """The same rate throughout."""

    name: Literal["constant"] = "constant"


SchedulerConfig = Annotated[OneCycleConfig | CosineConfig | StepConfig | ConstantConfig, Field(discriminator="name")]


class DataConfig(Part):
    """Where the images are and how they are read."""

    path: Annotated[str, Field(min_length=1)]
    """A folder with `train/CLASS/IMAGE` and `val/CLASS/IMAGE`, or data.prepare's output in a folder or at s3://..."""
    cache_folder: Annotated[str, Field(min_length=1)] = "cache"
    """Where images from s3:// are kept on each machine."""
    cache_gb: PositiveFloat | None = None
    """Limit of that cache in GB (1e9 bytes); what does not fit is read from the bucket every time. null: no limit."""
    stage_first: bool = False
    """Download the images from s3:// before training starts, instead of during it."""
    train_size: ImageSize = 224
    """Side of a training image in pixels, unless a stage sets another."""
    train_samples: PositiveInt | None = None
    """Train on only this many images, the same ones every epoch, spread evenly over the classes; null: on all."""
    workers: Annotated[int, Field(ge=0)] = 4
    """Loader processes per device; 0: load in the training process."""
    prefetch_factor: PositiveInt = 4
    """Batches that each worker prepares ahead."""
    timeout: Annotated[str, Field(pattern=r"^[1-9][0-9]*(s|m|h)$", examples=["30s", "10m"])] | None = "10m"
    """If the loader delivers no batch for this long, the run is saved and ends with status 75; null: wait forever."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Mean and standard deviation per channel (R, G, B) of images in [0, 1]; ImageNet's."""
    max_bad_fraction: Fraction = 0.01
    """Images that cannot be decoded are replaced and logged; the run fails if they exceed this share of a split."""
    augment: AugmentConfig = AugmentConfig()


class EvalConfig(Part):
    """Evaluation: resize the short side to size / crop_ratio, then crop the centre."""

    sizes: tuple[ImageSize, ...] = Field(default=(224,), min_length=1)
    """Image sizes in pixels at which top-1 and top-5 are computed; `top1` in summary.json is that of the last size."""
    crop_ratio: Annotated[float, Field(gt=0, le=1)] = 0.875
    interval: PositiveInt = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    device_batch_size: BySize = 256

    @field_validator("sizes", mode="before")
    @classmethod
    def _one_size(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value

    @field_validator("sizes")
    @classmethod
    def _once_each(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"each size once, got {list(value)}")
        return value


def seconds(text: str) -> float:
    """Read a time such as `30s`, `5m` or `1h`."""
    return int(text[:-1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[text[-1]]


class CheckpointsConfig(Part):
    """Where and how often the run's state is saved."""

    folder: str = "{runs_folder}/{run_name}/checkpoints"
    """Local folder, or `s3://bucket/prefix/{run_name}`; {runs_folder} and {run_name} are filled in."""
    interval: Annotated[str, Field(pattern=r"^[1-9][0-9]*(ep|ba|s|m|h)$", examples=["1ep", "500ba", "10m"])] = "1ep"
    """Epochs (`1ep`), batches (`500ba`) or time (`30s`, `10m`, `1h`) between checkpoints; the end is always saved."""
    keep: PositiveInt = 3
    """How many of the newest checkpoints to keep on disk; the best by top-1 is kept too."""
    keep_remote: PositiveInt = 3
    """How many of the newest checkpoints to keep in the bucket; the best by top-1 is kept too."""
    patience: Annotated[str, Field(pattern=r"^[1-9][0-9]*(s|m|h)$", examples=["30s", "5m"])] = "5m"
    """How long a run waits for an unreachable bucket at its start and end; training never waits."""
    restart: bool = False
    """Start from scratch if no checkpoint can be used, and let a later run replace an earlier one; false: errors."""
    metadata: Annotated[str, Field(pattern=r"^https?://[^@\s]+$", examples=["http://169.254.169.254"])] | None = None
    """Address of the EC2 instance metadata, polled for spot interruption notices; null: do not poll."""

    @field_validator("folder")
    @classmethod
    def _known_placeholders(cls, value: str) -> str:
        try:
            names = [name for _, name, _, _ in Formatter().parse(value) if name is not None]
        except ValueError:
            names = ["{"]
        if set(names) - {"runs_folder", "run_name"} or not value:
            raise ValueError(f"got {value!r}; allowed: a folder; {{runs_folder}} and {{run_name}} are filled in")
        if "://" in value and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^/@].*", value):
            raise ValueError("allowed: a folder, or s3://BUCKET/PREFIX; credentials come from the environment")
        return value


class LoggersConfig(Part):
    """Where metrics go besides the progress bar, metrics.jsonl and log.txt."""

    progress_bar: bool = True
    tensorboard: bool = True
    wandb: dict[str, object] | None = None
    """Arguments of Composer's WandBLogger, such as {project: resnet}."""
    mlflow: dict[str, object] | None = None
    """Arguments of Composer's MLFlowLogger, such as {experiment_name: resnet}."""
    interval: PositiveInt = 10
    """Batches between two lines of metrics.jsonl and points of TensorBoard; the end of an epoch is always logged."""


class RunConfig(Part):
    """One run."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    """Letters, digits, `.`, `_` and `-`; names the run's folder, and a second run with this name resumes the first."""
    runs_folder: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    device: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    precision: Literal["fp32", "amp_fp16", "amp_bf16", "auto"] = "fp32"
    """`auto`: bfloat16 on a GPU that computes in it, FP16 on an older one, FP32 on any other device."""
    deterministic: bool = False
    """Use deterministic kernels on a GPU; on a CPU they always are."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its kernels at each new shape and take the fastest, which need not be the same one in two runs."""
    compile: bool | Literal["reduce-overhead"] = False
    """torch.compile the network: one graph for each shape, made when a stage begins; `reduce-overhead`: CUDA graphs."""
    profile: bool = False
    """Trace a few steps at each image size into RUN/profile, with a summary of where the time of a step goes."""
    stop_on_nan: bool = True
    """End the run when its loss is not finite, before that state is saved."""
    device_memory_gb: PositiveFloat | None = None
    """Memory of one device in GB (1e9 bytes), to check the batch sizes; null: ask the GPU, if any."""
    max_duration: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}ep$", examples=["90ep"])] = "90ep"
    """Length of the run, such as 90ep; everything that depends on time is a share of it."""
    autoresume: bool = True
    """Resume from the newest checkpoint of this run_name; false: start from scratch, later resume only that run."""
    resume: str | None = None
    """Start from this checkpoint, a file or its folder; later, resume from the run's own newer ones."""
    device_batch_size: BySize | None = None
    """Images per device and optimizer step, one number or one per image size; unset where global_batch_size is set."""
    global_batch_size: BySize | None = None
    """Images per optimizer step over all devices; a multiple of their number."""
    device_microbatch_size: BySize | Literal["auto"] | None = None
    """Accumulate gradients over microbatches of this many images, a divisor of the device's batch; null: do not.

    `auto`: the largest whose estimated memory fits the device, by the config and the device's memory alone. A run's
    own config and its checkpoints hold what was chosen, here and for `precision`.
    """
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = OneCycleConfig()
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    loggers: LoggersConfig = LoggersConfig()
    algorithms: AlgorithmsConfig = AlgorithmsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if errors := list(_conflicts(self)):
            raise ValueError("\n".join(errors))
        return self

    @property
    def automatic(self) -> list[str]:
        """The keys whose value depends on the device; none in the config of a run that has started."""
        return [key for key in ("precision", "device_microbatch_size") if getattr(self, key) == "auto"]

    def started_from(self, weights_sha256: str | None) -> RunConfig:
        """The config of a run that started from weights with this hash; of a run that did not, this one."""
        if self.model.weights is None:
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"weights_sha256": weights_sha256})})

    @property
    def epochs(self) -> int:
        """Length of the run in epochs."""
        return int(self.max_duration.removesuffix("ep"))


UNKNOWN = "unknown key"  # to which load.py adds the known ones
_PASSWORD = re.compile(r"//[^/\s\"':]+:[^/\s\"']*@")  # of an address


def _conflicts(config: RunConfig) -> Iterator[str]:
    """Conflicts between keys, one line each, with the key in front."""
    device, total = config.device_batch_size, config.global_batch_size
    if device is None and total is None:
        yield "device_batch_size: missing; set it, or global_batch_size"
    if device is not None and total is not None:
        yield "device_batch_size: set together with global_batch_size; set one of them to null"
    if config.autoresume or config.resume is not None:
        switch = "autoresume to false" if config.autoresume else "resume to null"
        for name, reason in config.algorithms.not_resumable.items():
            yield f"algorithms.{name}: cannot be resumed bit for bit, {reason}; to train anyway, set {switch}"
    for key, value in flat_items(config.model_dump(mode="json")):
        if _PASSWORD.search(str(value)):
            # The config is stored in plain text with every run and checkpoint.
            allowed = "allowed: an address without one, and AWS_ACCESS_KEY_ID and the like in the environment"
            yield f"{key}: holds a password, which the run's files would show; {allowed}"
    if "/" not in config.optimizer.name:
        yield from (f"optimizer.{key}: {UNKNOWN}" for key in config.optimizer.arguments)
    yield from _exclusions(config)
    swa = config.algorithms.swa
    if swa is not None and config.epochs < 3:
        yield f"algorithms.swa: needs a run of at least 3 epochs, got {config.max_duration}"
    resizing = config.algorithms.progressive_resizing
    if resizing is not None and (smallest := resizing.size_at(0.0, config.data.train_size)) < 8:
        yield f"algorithms.progressive_resizing.initial_scale: makes images of {smallest} px; allowed: at least 8 px"


def _exclusions(config: RunConfig) -> Iterator[str]:
    if config.deterministic and config.cudnn_benchmark:
        yield "cudnn_benchmark: may choose other kernels in the next run; set it or deterministic to false"
    if config.compile and config.model.activation_checkpointing:
        # torch.compile cannot trace the context in which the second pass leaves BatchNorm's statistics alone.
        yield "compile: cannot compile model.activation_checkpointing; set one of them to false"


def flat_items(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its key path, `a.b`; an empty section counts as a value."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from flat_items(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
