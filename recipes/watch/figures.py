"""The figures of a run, under our own names, and the clock behind them.

Every `loggers.interval` batches, after the first batch and after the last of each epoch:

- `train/loss`: the step's loss, mean over the processes; `train/lr` and `train/momentum`: as used by the step;
- `train/image_size`: height in pixels of the model's input; `train/batch_size`: images of the step, all processes;
- `train/images_per_second`: over all processes, since the last figures, excluding evaluation and checkpoints;
- `train/loader_wait_fraction`: share of that time for which rank 0 waited for its loader;
- `train/epoch`: epochs done, with a fraction;
- `time/train_seconds`, `time/loader_wait_seconds`, `time/evaluation_seconds`, `time/checkpointing_seconds`: cumulative.

After each evaluation, for each size: `eval/SIZE/top1` and `eval/SIZE/top5` in [0, 1], `eval/SIZE/loss`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from composer import Callback, Event, Logger, State

from recipes.optimizer import momentum_of
from recipes.step import mean_loss

Phase = Literal["train", "loader_wait", "evaluation", "checkpointing"]
PHASES: tuple[Phase, ...] = ("train", "loader_wait", "evaluation", "checkpointing")
EVAL_LABEL = "eval_"  # evaluators are labelled `eval_SIZE`
_PHASE_FROM: Mapping[Event, Phase | None] = {
    Event.FIT_START: "loader_wait",  # its workers start
    Event.EPOCH_START: "loader_wait",
    Event.BEFORE_DATALOADER: "loader_wait",
    Event.AFTER_DATALOADER: "train",
    Event.BATCH_CHECKPOINT: "checkpointing",
    Event.EPOCH_END: "train",  # the wait for the batch after the last one is over
    Event.EPOCH_CHECKPOINT: "checkpointing",
    Event.FIT_END: None,  # an evaluation may follow, which starts the clock again
}


class Clock:
    """Splits wall time into phases, cumulative over the run's successive processes (resumes).

    Between calls of `fit` the clock is stopped. What a killed process did after its last checkpoint is not counted: the
    process that resumes from that checkpoint does it again.
    """

    def __init__(self) -> None:
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._phase: Phase | None = None
        self._since = 0.0

    def enter(self, phase: Phase | None) -> Phase | None:
        """End the current phase, which is returned, and begin another; None stops the clock."""
        now, previous = time.perf_counter(), self._phase
        if previous is not None:
            self._seconds[previous] += now - self._since
        self._phase, self._since = phase, now
        return previous

    def read(self) -> dict[Phase, float]:
        """Seconds spent in each phase until now."""
        self.enter(self._phase)
        return dict(self._seconds)

    @property
    def wall(self) -> float:
        """Seconds spent in all phases until now."""
        return sum(self.read().values())

    @property
    def working(self) -> float:
        """Seconds spent on training steps and waiting for the loader, excluding evaluation and checkpoints."""
        seconds = self.read()
        return seconds["train"] + seconds["loader_wait"]

    def set(self, seconds: dict[str, float]) -> None:
        """Continue from the readings of an earlier process."""
        self._seconds = {phase: float(seconds.get(phase, 0.0)) for phase in PHASES}


def numbers(saved: Mapping[str, Any]) -> dict[str, float]:
    """Figures by name from a checkpoint, which may hold anything; TypeError: a value is not a number."""
    if not all(isinstance(value, int | float) for value in saved.values()):
        raise TypeError("a figure that is not a number")
    return dict(saved)


def is_figure(name: str) -> bool:
    """Whether this is one of our figures, not something that Composer or its callbacks log."""
    return name.startswith(("train/", "eval/")) or (name.startswith("time/") and name.endswith("_seconds"))


class Figures(Callback):
    """Computes and logs the figures; owns the clock that others read.

    It comes before the callback that saves checkpoints in the Trainer's list, so that the clock sees a save begin. Only
    where a line is logged does it wait for the device, to read the loss. `samples` are the training images in an epoch,
    over all processes; `loss` is the last that was read; `evaluations` is the last evaluation by image size:
    `{"224": {"top1": 0.76, "top5": 0.93, "loss": 1.0}}`.
    """

    def __init__(self, samples: int, interval: int) -> None:
        self.clock = Clock()
        self.samples = samples
        self.interval = interval
        self.loss: float | None = None
        self.evaluations: dict[str, dict[str, float]] = {}
        self._fresh: dict[str, float] = {}
        self._step = dict.fromkeys(("train/lr", "train/momentum", "train/image_size"), float("nan"))
        self._window = (0, self.clock.read())  # samples and times at the last figures
        self._before_evaluation: Phase | None = None

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Set the clock, then call the event's method."""
        if event in _PHASE_FROM:
            self.clock.enter(_PHASE_FROM[event])
        super().run_event(event, state, logger)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start measuring throughput."""
        self._window = (int(state.timestamp.sample), self.clock.read())

    def after_forward(self, state: State, logger: Logger) -> None:
        """Record the size of the model's input, after the algorithms changed it."""
        self._step["train/image_size"] = int(state.batch[0].shape[-2])

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Runs just before the optimizer step; at the end of the batch the rate is already that of the next step."""
        group = state.optimizers[0].param_groups[0]
        self._step["train/lr"], self._step["train/momentum"] = float(group["lr"]), momentum_of(group)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log if due."""
        stamp, in_epoch = state.timestamp, int(state.timestamp.sample_in_epoch)
        if int(stamp.batch) % self.interval != 0 and int(stamp.batch) != 1 and in_epoch < self.samples:
            return
        before = 0 if state.previous_timestamp is None else int(state.previous_timestamp.sample)
        self.loss = mean_loss(state)
        (first, then), now = self._window, self.clock.read()
        waited = now["loader_wait"] - then["loader_wait"]
        elapsed = max(now["train"] - then["train"] + waited, 1e-9)
        self._window = (int(stamp.sample), now)
        figures = {
            "train/loss": self.loss,
            **self._step,
            "train/batch_size": int(stamp.sample) - before,
            "train/images_per_second": round((int(stamp.sample) - first) / elapsed, 2),
            "train/loader_wait_fraction": round(waited / elapsed, 4),
            "train/epoch": int(stamp.epoch) + in_epoch / self.samples,
            **{f"time/{phase}_seconds": round(now[phase], 3) for phase in PHASES},
        }
        logger.log_metrics(figures, step=int(stamp.batch))

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Evaluation begins."""
        self._before_evaluation = self.clock.enter("evaluation")

    def eval_end(self, state: State, logger: Logger) -> None:
        """One evaluator has finished; its metrics are reduced over the processes and cached."""
        label = state.dataloader_label or ""
        if not label.startswith(EVAL_LABEL):
            return
        size, metrics = label.removeprefix(EVAL_LABEL), state.eval_metrics[label]
        figures = {name: round(float(metrics[name].compute()), 6) for name in ("top1", "top5", "loss")}
        self.evaluations[size] = figures
        self._fresh.update({f"eval/{size}/{name}": value for name, value in figures.items()})

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """All evaluators have finished."""
        self.clock.enter(self._before_evaluation)
        fresh, self._fresh = self._fresh, {}
        if fresh:
            logger.log_metrics(fresh, step=int(state.timestamp.batch))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the clock's readings and the last evaluation."""
        evaluations = {size: dict(figures) for size, figures in self.evaluations.items()}
        return {"seconds": self.clock.read(), "evaluations": evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.clock.set(state["seconds"])
        self.evaluations = {size: numbers(figures) for size, figures in state["evaluations"].items()}
