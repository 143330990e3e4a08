"""One run of the range test: the run's own Trainer and pipeline, with a rate that rises from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from composer import Callback, Logger, State
from composer.utils import dist, reproducibility

from data.sampler import PositionSampler
from data.source import Source
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.find_lr.curve import Curve, End, Ramp, curve_of, end_of
from recipes.schedule import epoch_plan
from recipes.trainer import build_trainer

OnStep = Callable[[float, float], None]


class RisingRate(Callback):
    """Sets each step's rate, keeps its loss, and ends the training where the test is over.

    Args:
        ramp: The test.
        on_step: Told each step's rate and loss.
    """

    def __init__(self, ramp: Ramp, on_step: OnStep) -> None:
        self.ramp = ramp
        self.on_step = on_step
        self.lrs = ramp.lrs()
        self.losses: list[float] = []
        self.end: End | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Runs before every step, after the recipe's own schedule."""
        del logger
        rate = float(self.lrs[len(self.losses)])
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate
            if "initial_lr" in group:
                # DecoupledSGDW scales its decay by lr / initial_lr, which is 1 where a run's rate is highest.
                group["initial_lr"] = rate

    def batch_end(self, state: State, logger: Logger) -> None:
        """The loss is the mean over all processes, so all of them end together."""
        del logger
        self.losses.append(float(state.total_loss_dict["loss/train/total"]))
        self.on_step(float(self.lrs[len(self.losses) - 1]), self.losses[-1])
        self.end = end_of(self.losses, self.ramp)
        if self.end is not None:
            state.stop_training()


@contextmanager
def same_randomness() -> Iterator[None]:
    """Leave the generators of Python, NumPy and torch, on the GPU too, as they were."""
    before = reproducibility.get_rng_state()
    try:
        yield
    finally:
        reproducibility.load_rng_state(before)


def range_test(config: RunConfig, *, train: Source, val: Source, ramp: Ramp, on_step: OnStep) -> Curve:
    """Train a fresh model with a rising rate, and throw it away.

    Nothing outside is touched: the model and the optimizer are its own, the generators are as before, no file is
    written. Two tests with one config give the same bits.

    Args:
        config: From `trial_config`; its seed is the test's, its `max_duration` is not used.
        train: Training images.
        val: Evaluation images; they are not looked at.
        ramp: How the rate rises.
        on_step: Called after each step with its rate and its loss.

    Raises:
        InputError: A technique does not accept its values.
    """
    rank, world_size = dist.get_global_rank(), dist.get_world_size()
    images = epoch_plan(config, world_size)[0].global_batch_size
    epochs = -(-ramp.steps // -(-len(train) // images))
    config = config.model_copy(update={"max_duration": f"{epochs}ep"})
    sampler = PositionSampler(len(train), epoch_plan(config, world_size), config.seed, rank, world_size)
    rising = RisingRate(ramp, on_step)
    with same_randomness():
        try:
            algorithms = config.algorithms.build(sum(sampler.batches(epoch) for epoch in range(epochs)), epochs)
        except ValueError as error:  # Composer's own checks of what stands under `composer:`
            raise InputError(*str(error).strip().splitlines()) from None
        trainer = build_trainer(
            config,
            train=train,
            val=val,
            sampler=sampler,
            algorithms=algorithms,
            callbacks=[rising],
            loggers=[],
        )
        trainer.state.evaluators = []  # the end of a training would be followed by an evaluation
        try:
            trainer.fit()
        finally:
            trainer.close()
    assert rising.end is not None
    return curve_of(rising.losses, ramp, config.seed, rising.end)
