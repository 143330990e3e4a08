"""The progress bar: how far the whole run is, how fast, how long yet."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from recipes.watch.clock import duration
from recipes.watch.figures import EVAL_LABEL, Figures

REPAINT_SECONDS = 0.2
RATE_BATCHES = 20
"""images/s is that of the last so many batches."""


if TYPE_CHECKING:
    _Tqdm = tqdm[Any]
else:
    _Tqdm = tqdm  # its stubs make it generic, which it is not


class Bar(_Tqdm):
    """A tqdm whose line is two texts of ours around the bar."""

    def __init__(self, texts: tuple[str, str], **options: Any) -> None:
        self.texts = texts
        super().__init__(**options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the format may use."""
        return {**super().format_dict, "before": self.texts[0], "after": self.texts[1]}


class Progress(LoggerDestination):
    """One bar over the whole run, on rank 0; on a stream that is no terminal, a plain line every now and then.

    `epoch 3/12 24px |███   | 21% 123 img/s ETA 0:03:10 loss 1.234 top-1 93.21%`

    Bar, percentage and ETA count pixels (images times size squared), because a 288 px epoch takes five times as long as
    a 128 px one. The ETA is the time of this process per pixel, evaluations and checkpoints so far included, times the
    pixels to come. images/s leaves evaluations and checkpoints out.

    Args:
        figures: The clock, and the last evaluation.
        plan: (samples, size in pixels) of each epoch.
        eval_size: top-1 is that of the last evaluation at this size in pixels.
        stream: Where to; a terminal gets the bar.
        line_seconds: Time between two plain lines.
    """

    def __init__(
        self,
        figures: Figures,
        plan: Sequence[tuple[int, int]],
        eval_size: int,
        stream: TextIO,
        line_seconds: float,
    ) -> None:
        self.figures = figures
        self.clock = figures.clock
        self.plan = list(plan)
        self.eval_size = str(eval_size)
        self.stream = stream
        self.line_seconds = line_seconds
        # Pixels before each epoch: a convolution's cost grows with images times size squared.
        self._past = [0, *itertools.accumulate(samples * size * size for samples, size in self.plan)]
        self.total = self._past[-1]
        self._bar: Bar | None = None
        self._start: tuple[int, float] | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=RATE_BATCHES + 1)
        self._painted = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Begin at the resumed position."""
        del logger
        if dist.get_global_rank() != 0:
            return
        self._shut()
        self._recent.clear()
        self._recent.append((int(state.timestamp.sample), self.clock.working))
        self._start = (self._work(state), self.clock.wall)
        self._painted = time.monotonic()
        if self.stream.isatty():
            self._bar = Bar(
                self.texts(state),
                total=self.total,
                initial=self._start[0],
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{before} |{bar}| {percentage:3.0f}% {after}",
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Count the batch; repaint where it is time to."""
        del logger
        if self._start is None:
            return
        self._recent.append((int(state.timestamp.sample), self.clock.working))
        wait = REPAINT_SECONDS if self._bar is not None else self.line_seconds
        if time.monotonic() - self._painted >= wait:
            self._paint(state, "")

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Say what takes so long."""
        del logger
        if self._bar is not None and time.monotonic() - self._painted >= REPAINT_SECONDS:
            size = (state.dataloader_label or "").removeprefix(EVAL_LABEL)
            self._paint(state, f"evaluating {size}px {int(state.eval_timestamp.batch)}/{state.dataloader_len or '?'}")

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Show the epoch as done."""
        del logger
        if self._bar is not None:
            self._paint(state, "")

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Show the new top-1."""
        self.epoch_end(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Leave the bar's last state on the screen; what is said after the training begins its own line."""
        del state, logger
        self._shut()

    def close(self, state: State, logger: Logger) -> None:
        """Likewise, where the training ended early."""
        self.fit_end(state, logger)

    def texts(self, state: State) -> tuple[str, str]:
        """What stands before and after the bar."""
        stamp = state.timestamp
        # Between the end of an epoch and the next's first batch, the one that ended.
        number = int(stamp.epoch) + (int(stamp.sample_in_epoch) > 0 or int(stamp.epoch) == 0)
        before = f"epoch {number}/{len(self.plan)} {self.plan[min(number, len(self.plan)) - 1][1]}px"
        images = self._recent[-1][0] - self._recent[0][0]
        seconds = self._recent[-1][1] - self._recent[0][1]
        after = f"{images / seconds if seconds else 0:.0f} img/s ETA {duration(self._remaining(state))}"
        loss = state.total_loss_dict.get("loss/train/total")
        after += "" if loss is None else f" loss {loss:.3f}"
        top1 = self.figures.evaluations.get(self.eval_size, {}).get("top1")
        after += "" if top1 is None else f" top-1 {100 * top1:.2f}%"
        return before, after

    def _work(self, state: State) -> int:
        epoch = min(int(state.timestamp.epoch), len(self.plan))
        size = self.plan[epoch][1] if epoch < len(self.plan) else 0
        return self._past[epoch] + int(state.timestamp.sample_in_epoch) * size * size

    def _remaining(self, state: State) -> float:
        assert self._start is not None  # since fit_start
        work, (start, since) = self._work(state), self._start
        if work >= self.total:
            return 0.0
        return (self.clock.wall - since) / (work - start) * (self.total - work) if work > start else float("inf")

    def _paint(self, state: State, note: str) -> None:
        self._painted = time.monotonic()
        before, after = self.texts(state)
        work = self._work(state)
        if self._bar is None:
            share = f"{100 * work / self.total:.0f}%"
            self.stream.write(f"{before} {share} {after}\n")
            self.stream.flush()
            return
        self._bar.texts = (before, note or after)
        self._bar.n = min(work, self.total)
        self._bar.refresh()

    def _shut(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._start = None
