"""From a config and its data to Composer's Trainer."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from composer import Algorithm, Callback, DataSpec, Evaluator, Event, Logger, State
from composer.loggers import LoggerDestination
from composer.profiler import Profiler
from composer.utils import dist, reproducibility

from algorithms import build
from algorithms.distillation import Teacher
from data.augment import Normalise
from data.errors import InputError
from data.loader import Loading, eval_loader, train_loader
from data.sampler import PositionSampler
from data.source import Source
from recipes.config import DataConfig, RunConfig, at_size, seconds
from recipes.model import build_classifier, checkpoint_activations
from recipes.optimizer import build_optimizer, exempt_norms_and_biases, set_momentum
from recipes.schedule import Rate, peak_lr, rate_function, step_at
from recipes.step import SteadyTrainer

log = logging.getLogger(__name__)


def device_name(device: str) -> str:
    """Composer's name of the device; `auto` is the GPU, else Apple's MPS, else the CPU."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "gpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def build_trainer(
    config: RunConfig,
    *,
    train: Source,
    val: Source,
    sampler: PositionSampler,
    algorithms: Sequence[Algorithm],
    callbacks: Sequence[Callback],
    loggers: Sequence[LoggerDestination],
    profiler: Profiler | None = None,
) -> SteadyTrainer:
    """Build a Trainer at the position from which `fit()` continues.

    This module's callbacks come before `callbacks`. InputError: the config names a model that does not exist, or the
    checkpoint is from another run.
    """
    device, lr = device_name(config.device), peak_lr(config, sampler.plan)
    reproducibility.seed_all(config.seed)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    mode = config.compile if isinstance(config.compile, str) else None
    classes = config.model.num_classes or len(train.classes)
    model = build_classifier(config, classes, "cuda" if device == "gpu" else device)
    ours: list[Callback] = [
        WholeEpochs(sampler),
        PositionSeed(config.seed),
        SameStatistics(),
        Schedule(rate_function(config.scheduler, lr), [sampler.batches(epoch) for epoch in range(config.epochs)]),
    ]
    if not config.optimizer.decay_norm_and_bias:
        ours.append(ExemptNormsAndBiases())
    microbatch = config.device_microbatch_size
    assert not isinstance(microbatch, str)  # prepare_run replaces `auto`
    if microbatch is not None:
        ours.append(Microbatches(microbatch))
    if config.compile:
        ours.append(Compilation())
    trainer = SteadyTrainer(
        images_of=sampler.images,
        model=model,
        train_dataloader=build_train_data(config, train, sampler, device),
        eval_dataloader=build_evaluators(config, val, device),
        optimizers=build_optimizer(config.optimizer, model.parameters(), lr),
        max_duration=config.max_duration,
        algorithms=list(algorithms),
        callbacks=[*ours, *callbacks],
        loggers=list(loggers),
        device=device,
        precision=config.precision,
        device_train_microbatch_size=max(entry.global_batch_size for entry in sampler.plan),  # the whole batch
        seed=config.seed,
        run_name=config.run_name,
        deterministic_mode=config.deterministic,
        ddp_sync_strategy=sync_strategy(algorithms),
        # Sizes are fixed in a stage: graphs for them are faster than one for any size.
        compile_config={"dynamic": False, "mode": mode} if config.compile else None,
        spin_dataloaders=False,
        progress_bar=False,
        auto_log_hparams=False,
        python_log_level=None,
        profiler=profiler,
    )
    if config.model.activation_checkpointing:
        # After model surgery such as BlurPool's, which may replace blocks.
        checkpoint_activations(trainer.state.model)
    position = trainer.state.timestamp
    try:
        sampler.start_at(int(position.epoch), int(position.batch_in_epoch))
    except ValueError as error:
        raise InputError(f"the checkpoint's position is not one of this run: {error}") from None
    return trainer


def build_algorithms(config: RunConfig, batches: Sequence[int], teacher: Teacher | None = None) -> list[Algorithm]:
    """The techniques of a run with so many batches in each epoch; InputError where Composer refuses their values.

    Without a `teacher`, distillation is left out.
    """
    try:
        return build.build_algorithms(config.algorithms, sum(batches), len(batches), teacher)
    except ValueError as error:  # Composer's own checks of the values under `composer:`
        raise InputError(*str(error).strip().splitlines()) from None


def build_train_data(config: RunConfig, source: Source, sampler: PositionSampler, device: str) -> DataSpec:
    """The training loader, with the normalisation that runs on the device."""
    data = config.data
    loader = train_loader(
        source,
        sampler,
        augment=data.augment,
        mean=data.mean,
        std=data.std,
        image_transforms=build.build_image_transforms(config.algorithms),
        eval_crop_ratio=config.eval.crop_ratio,
        seed=config.seed,
        **loading(data, device),
    )
    return DataSpec(loader, microbatch_transforms=Normalise(data.mean, data.std), split_batch=split)


def build_evaluators(config: RunConfig, source: Source, device: str) -> list[Evaluator]:
    """One evaluator per size of `eval.sizes`, labelled `eval_SIZE`."""
    data = config.data

    def due(state: State, event: Event) -> bool:
        last = state.max_duration is not None and state.timestamp >= state.max_duration
        return event == Event.EPOCH_END and (int(state.timestamp.epoch) % config.eval.interval == 0 or last)

    evaluators = []
    for size in config.eval.sizes:
        images = at_size(config.eval.device_batch_size, size)
        loader = eval_loader(
            source,
            size=size,
            crop_ratio=config.eval.crop_ratio,
            device_batch_size=images,
            rank=dist.get_global_rank(),
            world_size=dist.get_world_size(),
            **loading(data, device),
        )
        spec = DataSpec(loader, microbatch_transforms=Normalise(data.mean, data.std), split_batch=split)
        evaluators.append(
            Evaluator(label=f"eval_{size}", dataloader=spec, eval_interval=due, device_eval_microbatch_size=images)
        )
    return evaluators


def loading(data: DataConfig, device: str) -> Loading:
    """The loaders' settings for a device (Composer's name for it)."""
    limit = None if data.timeout is None else seconds(data.timeout)
    return Loading(workers=data.workers, prefetch_factor=data.prefetch_factor, pin_memory=device == "gpu", limit=limit)


def split(batch: tuple[torch.Tensor, torch.Tensor], images: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch as microbatches of at most `images` images; Composer's own warns if one microbatch is the whole batch."""
    return list(zip(torch.split(batch[0], int(images)), torch.split(batch[1], int(images)), strict=True))


# The callbacks that `build_trainer` adds.


def position_seed(seed: int, rank: int, batch: int) -> int:
    """A 32-bit seed for one process and one step, from the run's seed, the global rank and the steps done."""
    return int(np.random.SeedSequence((seed, rank, batch)).generate_state(1)[0])


class PositionSeed(Callback):
    """Seeds the generators of Python, NumPy and torch before each step from (seed, rank, step).

    MixUp, CutMix, stochastic depth, dropout and everything else that draws from them then depend on the position only:
    not on the loader's workers, on earlier draws, or on where the run was interrupted.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Runs before the batch is fetched, the first event of a step."""
        value = position_seed(self.seed, dist.get_global_rank(), int(state.timestamp.batch))
        random.seed(value)
        np.random.seed(value)
        # torch.manual_seed does the same, but formats a stack for each kind of device that is not there.
        torch.default_generator.manual_seed(value)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(value)
        elif torch.backends.mps.is_available():
            torch.mps.manual_seed(value)


class ExemptNormsAndBiases(Callback):
    """Splits the optimizer's group after model surgery, which can add parameters to one group only."""

    def before_load(self, state: State, logger: Logger) -> None:
        """The surgery (Event.INIT) is done, and no checkpoint is loaded yet."""
        exempt_norms_and_biases(state.optimizers[0])


class Schedule(Callback):
    """Sets the learning rate and the momentum of each step from the run's position alone; it has no state to save.

    A Composer scheduler would see the first position twice, could not set the momentum, and would convert epochs to
    batches by the current stage's batch size (docs/decisions.md). `rate` is the schedule, (step, total steps) -> Rate;
    `batches` are those of each epoch of the run.
    """

    def __init__(self, rate: Callable[[float, float], Rate], batches: Sequence[int]) -> None:
        self.rate = rate
        self.batches = batches

    def batch_start(self, state: State, logger: Logger) -> None:
        """Runs before every step."""
        epoch, batch, total = int(state.timestamp.epoch), int(state.timestamp.batch_in_epoch), sum(self.batches)
        rate = self.rate(step_at(epoch, batch, self.batches[epoch], len(self.batches), total), total)
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate.lr
            if rate.momentum is not None:
                set_momentum(group, rate.momentum)


class Microbatches(Callback):
    """Accumulates gradients over microbatches of so many images per device, one number or one per image size."""

    def __init__(self, images: int | dict[int, int]) -> None:
        self.images = images

    def batch_start(self, state: State, logger: Logger) -> None:
        """The batch's size is known, and it is not split yet."""
        state.device_train_microbatch_size = at_size(self.images, state.batch[0].shape[-1])


class Compilation(Callback):
    """Lets torch.compile make as many graphs as a run has shapes, and says when it does, and how long that step took.

    A stage has one image size and batches of two sizes, which differ by one image; so has an evaluation. torch itself
    would stop at 8 graphs, and then run the network uncompiled without a word (torch._dynamo.config.recompile_limit).
    """

    def __init__(self) -> None:
        torch._dynamo.config.recompile_limit = 256
        self._shapes: set[tuple[str, int, int]] = set()
        self._began: float | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Notice a new shape."""
        shape = "train" if state.model.training else "evaluate", len(state.batch[1]), int(state.batch[0].shape[-1])
        if shape not in self._shapes:
            self._shapes.add(shape)
            self._began = time.perf_counter()
            log.info("compiling the network to %s on %d images of %d px", *shape)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Tell how long the first step with this shape took."""
        if self._began is not None:
            log.info("compiled; that step took %.0f s", time.perf_counter() - self._began)
            self._began = None

    eval_batch_start, eval_batch_end = batch_start, batch_end


class WholeEpochs(Callback):
    """Tells Composer how many batches the coming epoch has.

    Composer 0.32.1 asks the loader for its length once (`State.set_dataloader`) and ends every epoch after that many
    batches. If a later stage has smaller batches, and so more of them, the rest of its images would be left out.
    """

    def __init__(self, sampler: PositionSampler) -> None:
        self.sampler = sampler

    def fit_start(self, state: State, logger: Logger) -> None:
        """For a run that resumes in the middle of an epoch, where EPOCH_START does not fire."""
        self.epoch_start(state, logger)

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Runs before the loader is iterated, and before Composer sets the sampler's epoch."""
        self.sampler.set_epoch(int(state.timestamp.epoch))
        state.dataloader_len = -1  # ask the loader again


class SameStatistics(Callback):
    """Evaluates with the first process's running statistics on every process.

    DDP copies them before each training step, so after a step each process has added its own batch to them; without
    this, an evaluation shared by several processes would evaluate several models.
    """

    def eval_start(self, state: State, logger: Logger) -> None:
        """Runs after EMA and the like have swapped in their weights."""
        if torch.distributed.is_initialized():
            for buffer in state.model.buffers():
                torch.distributed.broadcast(buffer, src=0)


class FixedBuckets(Algorithm):
    """Makes DDP keep its first gradient buckets, by requesting its `find_unused_parameters`.

    Without it, DDP rebuilds its buckets in another order after a process's first step
    (`Reducer::should_rebuild_buckets` in torch's reducer.cpp). With more than two processes, the first step after a
    resume would then add the gradients in another order than in an uninterrupted run. It is an algorithm because
    Composer's Trainer has no argument for it and asks only the algorithms (composer/trainer/trainer.py:1583).
    """

    find_unused_parameters = True

    def __init__(self) -> None:  # Composer's __init__ has no types
        pass

    def match(self, event: Event, state: State) -> bool:
        """Never: only the attribute counts."""
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Nothing."""


def sync_strategy(algorithms: Sequence[Algorithm]) -> str:
    """Composer's name for when gradients are reduced: once per step, or after each microbatch.

    Once is enough, and cheaper, unless a technique leaves parameters unused, which may differ between microbatches;
    Composer's own choice cannot tell `FixedBuckets` from such a technique (composer/trainer/trainer.py:494).
    """
    uneven = any(item.find_unused_parameters for item in algorithms if not isinstance(item, FixedBuckets))
    return "multi_auto_sync" if uneven else "single_auto_sync"
