"""A training step that does not wait for the device, and calls only what has something to do.

Composer's Trainer makes the host wait for the device several times a step: it reads the loss to log it, and the numbers
of images, which it has sent to the device to add them over the processes (composer/trainer/trainer.py, lines 2381,
2468, 2686, 2840 and 3636). After each wait the device idles until new work arrives. Here the numbers come from the
sampler's plan, and the loss stays on the device until a line is logged.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from composer import Algorithm, Callback, Event, State, Trainer
from composer.core import Engine, TrainerMode
from composer.loggers import LoggerDestination
from composer.utils import dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_LOSS = "loss/train/total"


class SteadyEngine(Engine):
    """Composer's Engine, which at an event calls only the callbacks that have a method for it, in the same order.

    Composer's calls each of them at each event, some 250 calls a step, before each of which it composes a line for its
    debug log (composer/core/engine.py:463).
    """

    _callbacks: Sequence[Callback] = ()  # those that `_by_event` was made for

    def _run_nonlogger_callbacks(self, event: Event | str) -> None:
        self._run_callbacks(event, self._handlers(Event(event))[0])

    def _run_loggers(self, event: Event | str) -> None:
        self._run_callbacks(event, self._handlers(Event(event))[1])

    def _handlers(self, event: Event) -> tuple[list[Callback], list[Callback]]:
        """The callbacks with a method for an event, and the loggers with one."""
        if self._callbacks != self.state.callbacks:  # at first, and when one was added
            self._callbacks = list(self.state.callbacks)
            self._by_event: dict[Event, tuple[list[Callback], list[Callback]]] = {}
        if event not in self._by_event:
            handlers = [one for one in self._callbacks if _handles(one, event)]
            loggers: list[Callback] = [one for one in handlers if isinstance(one, LoggerDestination)]
            self._by_event[event] = [one for one in handlers if one not in loggers], loggers
        return self._by_event[event]

    def _compile(self, algorithms_to_run: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
        """Composer's reordering, where there is something to reorder."""
        return super()._compile(algorithms_to_run, event) if algorithms_to_run else algorithms_to_run

    def _debug_log(self, event: Event, msg: str) -> None:
        if "ENGINE_DEBUG" in os.environ:
            super()._debug_log(event, msg)


def _handles(callback: Callback, event: Event) -> bool:
    """Whether a callback overrides Composer's empty method for this event, or `run_event`."""
    names = "run_event", event.value
    return any(getattr(getattr(callback, name), "__func__", None) is not getattr(Callback, name) for name in names)


class SteadyTrainer(Trainer):
    """Composer's Trainer, with a `SteadyEngine` once it is built, which reads nothing from the device in a step.

    `images_of` is (epoch, batch in the epoch) -> number of images of that batch, over all processes.
    """

    def __init__(self, *, images_of: Callable[[int, int], int], **options: Any) -> None:
        self._images_of = images_of
        super().__init__(**options)
        self.engine.__class__ = SteadyEngine  # the Trainer makes its engine itself

    def _images(self) -> int:
        stamp = self.state.timestamp
        return self._images_of(int(stamp.epoch), int(stamp.batch_in_epoch))

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Any]:
        """The loader's batches; without asking the other processes after each, as all have equally many."""
        batches = itertools.islice(self.state.dataloader, int(self.state.dataloader_len))
        while True:
            if trainer_mode == TrainerMode.TRAIN:
                self.engine.run_event(Event.BEFORE_DATALOADER)
            batch = next(batches, None)
            if batch is None:
                if trainer_mode == TrainerMode.TRAIN:  # ends the profiler's span, which the event above began
                    self.engine.run_marker_only_event(Event.AFTER_DATALOADER)
                return
            yield batch

    def _use_closures(self) -> bool:
        """Only for an optimizer that repeats passes, as SAM does; Composer reads the loss in each closure."""
        return all(getattr(optimizer, "_step_supports_amp_closure", False) for optimizer in self.state.optimizers)

    def _accumulate_time_across_ranks(
        self, num_samples: float, num_tokens: int, batch_time: timedelta
    ) -> tuple[int, int, timedelta]:
        """Images, tokens and time of the step over all processes; without asking these, as the plan has the images."""
        return self._images(), num_tokens, batch_time

    def _train_batch(self, use_grad_scaling: bool) -> dict[str, Tensor]:
        """Keep the loss on the device for `mean_loss`; Composer's loop takes None for a step without one."""
        self.state.total_loss_dict = super()._train_batch(use_grad_scaling)  # type: ignore[assignment]
        return None  # type: ignore[return-value]

    def _train_microbatches(
        self, microbatches: Sequence[Any], total_loss_dict: dict[str, Tensor], ddp_sync: bool = True
    ) -> Tensor:
        """Forward and backward passes of all microbatches; the sum of their shares of the loss is returned and kept."""
        state, data = self.state, self._train_data_spec
        assert data is not None
        assert state.scaler is not None
        model: Any = state.model
        delayed = not ddp_sync and isinstance(model, DistributedDataParallel)
        with model.no_sync() if delayed else contextlib.nullcontext():
            self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
            scaling = self._use_grad_scaling(state.precision, state.scaler)
            for optimizer in state.optimizers:
                optimizer.zero_grad(set_to_none=True)
            whole, images = state.batch, self._images() / dist.get_world_size()
            for number, microbatch in enumerate(microbatches, 1):
                state.batch = data.microbatch_transforms(state.device.batch_to_device(microbatch))
                losses = self._train_microbatch(scaling, images, number == len(microbatches))
                # SAM gives an empty dict to the pass whose loss nobody wants.
                total_loss_dict[_LOSS] = total_loss_dict.get(_LOSS, 0) + losses["total"]
            state.batch = whole
            if scaling:
                for optimizer in state.optimizers:
                    state.scaler.unscale_(optimizer)
            self.engine.run_event(Event.AFTER_TRAIN_BATCH)
        return total_loss_dict[_LOSS]


def mean_loss(state: State) -> float:
    """The last step's loss, mean over the processes, all of which must call; this waits for the device."""
    loss: Any = state.total_loss_dict[_LOSS]
    loss = loss.clone()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()
