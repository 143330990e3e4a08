"""From a config and its data to Composer's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from composer import Algorithm, Callback, DataSpec, Evaluator, Event, Logger, State, Trainer
from composer.loggers import LoggerDestination
from composer.profiler import Profiler
from composer.utils import dist, reproducibility

from data.augment import Augment
from data.loader import eval_loader, train_loader
from data.normalise import Normalise
from data.sampler import PositionSampler
from data.source import Source
from data.wait import Gate
from recipes.checkpoints.patience import seconds
from recipes.config import RunConfig, at_size
from recipes.errors import InputError
from recipes.gradient_sync import sync_strategy
from recipes.model import build_classifier, checkpoint_activations
from recipes.optimizer import ExemptNormsAndBiases, Schedule, build_optimizer
from recipes.position import PositionSeed
from recipes.schedule import peak_lr, rate_function
from recipes.sync_batchnorm import SameStatistics


def device_name(device: str) -> str:
    """Composer's name of the device: `auto` is the GPU, else Apple's, else the CPU."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "gpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Microbatches(Callback):
    """Accumulates gradients over portions whose size depends on the image size.

    Args:
        images: Images per device and forward pass at an image size in pixels.
    """

    def __init__(self, images: Callable[[int], int]) -> None:
        self.images = images

    def batch_start(self, state: State, logger: Logger) -> None:
        """The batch's size is known, and it is not split yet."""
        del logger
        state.device_train_microbatch_size = self.images(state.batch[0].shape[-1])


class WholeEpochs(Callback):
    """Tells Composer how many batches the coming epoch has.

    Composer 0.32.1 asks the loader for its length once (`State.set_dataloader`) and ends every epoch after so many
    batches: where a later stage has smaller batches, and so more of them, the rest of its images would be left out.

    Args:
        sampler: Of the training loader.
    """

    def __init__(self, sampler: PositionSampler) -> None:
        self.sampler = sampler

    def fit_start(self, state: State, logger: Logger) -> None:
        """A run that goes on in the middle of an epoch does not start one."""
        del logger
        self._measure(state)

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Runs before the loader is iterated, and before Composer tells the sampler which epoch it is."""
        del logger
        self._measure(state)

    def _measure(self, state: State) -> None:
        self.sampler.set_epoch(int(state.timestamp.epoch))
        state.dataloader_len = -1  # ask the loader again


def evaluate_every(interval: int) -> Callable[[State, Event], bool]:
    """Evaluate at the end of every `interval`-th epoch and of the last."""

    def due(state: State, event: Event) -> bool:
        last = state.max_duration is not None and state.timestamp >= state.max_duration
        return event == Event.EPOCH_END and (int(state.timestamp.epoch) % interval == 0 or last)

    return due


def split(batch: tuple[torch.Tensor, torch.Tensor], images: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch in portions of at most so many images; Composer's own warns where one portion is the whole."""
    return list(zip(torch.split(batch[0], int(images)), torch.split(batch[1], int(images)), strict=True))


def build_evaluators(config: RunConfig, source: Source, device: str, gate: Gate | None = None) -> list[Evaluator]:
    """One evaluator per size of `eval.sizes`, labelled `eval_SIZE`."""
    normalise = Normalise(config.data.mean, config.data.std)
    evaluators = []
    for size in config.eval.sizes:
        loader = eval_loader(
            source,
            size=size,
            crop_ratio=config.eval.crop_ratio,
            device_batch_size=at_size(config.eval.device_batch_size, size),
            rank=dist.get_global_rank(),
            world_size=dist.get_world_size(),
            workers=config.data.workers,
            prefetch_factor=config.data.prefetch_factor,
            pin_memory=device == "gpu",
            limit=None if config.data.timeout is None else seconds(config.data.timeout),
            gate=gate,
        )
        evaluators.append(
            Evaluator(
                label=f"eval_{size}",
                dataloader=DataSpec(loader, microbatch_transforms=normalise, split_batch=split),
                eval_interval=evaluate_every(config.eval.interval),
                device_eval_microbatch_size=at_size(config.eval.device_batch_size, size),
            )
        )
    return evaluators


def build_train_data(
    config: RunConfig, source: Source, sampler: PositionSampler, device: str, gate: Gate | None = None
) -> DataSpec:
    """The training loader, with the normalisation that runs on the device."""
    loader = train_loader(
        source,
        sampler,
        augment=Augment.of(config.data.mean, config.data.std, **config.data.augment.model_dump()),
        image_transforms=config.algorithms.image_transforms(),
        eval_crop_ratio=config.eval.crop_ratio,
        seed=config.seed,
        workers=config.data.workers,
        prefetch_factor=config.data.prefetch_factor,
        pin_memory=device == "gpu",
        limit=None if config.data.timeout is None else seconds(config.data.timeout),
        gate=gate,
    )
    return DataSpec(loader, microbatch_transforms=Normalise(config.data.mean, config.data.std), split_batch=split)


def build_callbacks(config: RunConfig, sampler: PositionSampler, batches: Sequence[int]) -> list[Callback]:
    """What the recipe itself needs at each step: whole epochs, seeds, rates, portions, equal statistics."""
    plan = sampler.plan
    callbacks: list[Callback] = [
        WholeEpochs(sampler),
        PositionSeed(config.seed),
        SameStatistics(),
        Schedule(rate_function(config.scheduler, peak_lr(config, plan)), batches),
    ]
    if not config.optimizer.decay_norm_and_bias:
        callbacks.append(ExemptNormsAndBiases())
    if config.device_microbatch_size is not None:
        callbacks.append(Microbatches(partial(at_size, config.device_microbatch_size)))
    return callbacks


def build_trainer(
    config: RunConfig,
    *,
    train: Source,
    val: Source,
    sampler: PositionSampler,
    algorithms: Sequence[Algorithm],
    callbacks: Sequence[Callback],
    loggers: Sequence[LoggerDestination],
    gate: Gate | None = None,
    profiler: Profiler | None = None,
) -> Trainer:
    """A Trainer at the position from which `fit()` goes on.

    Args:
        config: The run.
        train: Training images.
        val: Evaluation images.
        sampler: This process's batches.
        algorithms: The techniques, in order.
        callbacks: What watches the run and saves it; the recipe's own come before them.
        loggers: Where the figures go.
        gate: Asked before each batch, see data/wait.py.
        profiler: Composer's, where the run is profiled.

    Raises:
        InputError: The config names what does not exist, such as a model.
    """
    device, plan = device_name(config.device), sampler.plan
    batches = [sampler.batches(epoch) for epoch in range(config.epochs)]
    reproducibility.seed_all(config.seed)
    model = build_classifier(
        config.model.name,
        config.model.num_classes or len(train.classes),
        zero_init_residual=config.model.zero_init_residual,
        loss=config.loss.name,
        sync_batchnorm=config.model.sync_batchnorm and dist.get_world_size() > 1,
        device_type="cuda" if device == "gpu" else device,
    )
    settings = config.optimizer.model_dump(include={"name", "momentum", "nesterov", "weight_decay"})
    trainer = Trainer(
        model=model,
        train_dataloader=build_train_data(config, train, sampler, device, gate),
        eval_dataloader=build_evaluators(config, val, device, gate),
        optimizers=build_optimizer(model.parameters(), lr=peak_lr(config, plan), **settings),
        max_duration=config.max_duration,
        algorithms=list(algorithms),
        callbacks=[*build_callbacks(config, sampler, batches), *callbacks],
        loggers=list(loggers),
        device=device,
        precision=config.precision,
        device_train_microbatch_size=max(entry.global_batch_size for entry in plan),
        seed=config.seed,
        run_name=config.run_name,
        deterministic_mode=config.deterministic,
        ddp_sync_strategy=sync_strategy(algorithms),
        compile_config={} if config.compile else None,
        spin_dataloaders=False,
        progress_bar=False,
        auto_log_hparams=False,
        python_log_level=None,
        profiler=profiler,
    )
    if config.model.activation_checkpointing:
        # After the surgery of BlurPool and its like, which may put other blocks in a block's place.
        checkpoint_activations(trainer.state.model)
    position = trainer.state.timestamp
    try:
        sampler.start_at(int(position.epoch), int(position.batch_in_epoch))
    except ValueError as error:
        raise InputError(f"the checkpoint's position is not one of this run: {error}") from None
    return trainer
