"""The figures of a run, under our own names.

Every `interval` batches, after the first batch and after the last of each epoch:

- `train/loss`: the step's, mean over the processes; `train/lr` and `train/momentum`: those the step used;
- `train/image_size`: height in pixels of what the model saw; `train/batch_size`: images of the step, all processes;
- `train/images_per_second`: over all processes, since the last figures, evaluation and checkpoints left out;
- `train/loader_wait_fraction`: share of that time that rank 0 waited for its loader;
- `train/epoch`: epochs done, with a fraction;
- `time/train_seconds`, `time/loader_wait_seconds`, `time/evaluation_seconds`, `time/checkpointing_seconds`: cumulative.

After each evaluation, for each size: `eval/SIZE/top1` and `eval/SIZE/top5` in [0, 1], `eval/SIZE/loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer import Callback, Logger, State

from recipes.watch.clock import PHASES, Clock

EVAL_LABEL = "eval_"
"""Evaluators of the sizes are labelled `eval_SIZE`."""


def numbers(saved: Mapping[str, Any]) -> dict[str, float]:
    """Figures by name out of a checkpoint, which may hold anything.

    Raises:
        TypeError: A value is not a number.
    """
    if not all(isinstance(value, int | float) for value in saved.values()):
        raise TypeError("a figure that is not a number")
    return dict(saved)


def is_figure(name: str) -> bool:
    """Tell our figures from what Composer and its callbacks log."""
    return name.startswith(("train/", "eval/")) or (name.startswith("time/") and name.endswith("_seconds"))


def momentum_of(group: dict[str, Any]) -> float:
    """Momentum of an optimizer's parameter group: SGD's, or Adam's first beta; 0 where it has neither."""
    if "betas" in group:
        return float(group["betas"][0])
    return float(group.get("momentum", 0.0))


class Figures(Callback):
    """Computes the figures and logs them; keeps the clock that others read.

    It stands before the callback that saves checkpoints in the Trainer's list, so that the clock sees a save begin.
    It never waits for the device: all it reads is on the host already.

    Args:
        clock: Shared with those who show or write times.
        samples: Training images in an epoch, over all processes.
        interval: Batches between two sets of figures.

    Attributes:
        evaluations: Last evaluation by image size: `{"224": {"top1": 0.76, "top5": 0.93, "loss": 1.0}}`.
    """

    def __init__(self, clock: Clock, samples: int, interval: int) -> None:
        self.clock = clock
        self.samples = samples
        self.interval = interval
        self.evaluations: dict[str, dict[str, float]] = {}
        self._fresh: dict[str, float] = {}
        self._step: dict[str, float] = {}
        self._window = (0, 0.0, 0.0)
        self._before_evaluation: Any = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """The first batch of a loader waits for its workers to start."""
        del logger
        self.clock.enter("loader_wait")
        self._open_window(state)

    def epoch_start(self, state: State, logger: Logger) -> None:
        """The loader begins a new epoch."""
        self.clock.enter("loader_wait")

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Waiting for a batch begins; a checkpoint, if any, was saved."""
        self.clock.enter("loader_wait")

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch is here."""
        self.clock.enter("train")

    def after_forward(self, state: State, logger: Logger) -> None:
        """What the model saw, after the algorithms changed it."""
        self._step["train/image_size"] = int(state.batch[0].shape[-2])

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Just before the optimizer's step; at the batch's end the rate is the next step's already."""
        group = state.optimizers[0].param_groups[0]
        self._step["train/lr"] = float(group["lr"])
        self._step["train/momentum"] = momentum_of(group)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log, where it is time to."""
        batch, in_epoch = int(state.timestamp.batch), int(state.timestamp.sample_in_epoch)
        if batch % self.interval == 0 or batch == 1 or in_epoch >= self.samples:
            figures = self._training(state)
            self._open_window(state)
            logger.log_metrics(figures, step=batch)

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Evaluation begins."""
        self._before_evaluation = self.clock.enter("evaluation")

    def eval_end(self, state: State, logger: Logger) -> None:
        """One evaluator is through; its metrics were reduced over the processes and are cached."""
        label = state.dataloader_label or ""
        if not label.startswith(EVAL_LABEL):
            return
        size = label.removeprefix(EVAL_LABEL)
        metrics = state.eval_metrics[label]
        figures: dict[str, float] = {
            name: round(float(metrics[name].compute()), 6) for name in ("top1", "top5", "loss") if name in metrics
        }
        self.evaluations[size] = figures
        self._fresh.update({f"eval/{size}/{name}": value for name, value in figures.items()})

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """All evaluators are through."""
        self.clock.enter(self._before_evaluation)
        fresh, self._fresh = self._fresh, {}
        if fresh:
            logger.log_metrics(fresh, step=int(state.timestamp.batch))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """What runs until the next batch is asked for is saving."""
        self.clock.enter("checkpointing")

    def epoch_end(self, state: State, logger: Logger) -> None:
        """The wait for a batch that did not come is over."""
        self.clock.enter("train")

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """What runs until the next epoch is saving."""
        self.clock.enter("checkpointing")

    def fit_end(self, state: State, logger: Logger) -> None:
        """Training is over; an evaluation may follow, and starts the clock again."""
        self.clock.enter(None)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the clock's readings and the last evaluation."""
        return {
            "seconds": self.clock.read(),
            "evaluations": {size: dict(figures) for size, figures in self.evaluations.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.clock.set(state["seconds"])
        self.evaluations = {size: numbers(figures) for size, figures in state["evaluations"].items()}

    def _open_window(self, state: State) -> None:
        self._window = (int(state.timestamp.sample), self.clock.working, self.clock.read()["loader_wait"])

    def _training(self, state: State) -> dict[str, float]:
        stamp, seconds = state.timestamp, self.clock.read()
        before = 0 if state.previous_timestamp is None else int(state.previous_timestamp.sample)
        samples, working, waiting = self._window
        elapsed = max(self.clock.working - working, 1e-9)
        figures = {
            "train/loss": state.total_loss_dict.get("loss/train/total", float("nan")),
            "train/lr": self._step.get("train/lr", float("nan")),
            "train/momentum": self._step.get("train/momentum", float("nan")),
            "train/image_size": self._step.get("train/image_size", float("nan")),
            "train/batch_size": int(stamp.sample) - before,
            "train/images_per_second": round((int(stamp.sample) - samples) / elapsed, 2),
            "train/loader_wait_fraction": round((seconds["loader_wait"] - waiting) / elapsed, 4),
            "train/epoch": int(stamp.epoch) + int(stamp.sample_in_epoch) / self.samples,
        }
        return figures | {f"time/{phase}_seconds": round(seconds[phase], 3) for phase in PHASES}
