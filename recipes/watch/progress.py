"""The progress bar: how far the run is, how fast it runs, and how long it will take."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import NoReturn, TextIO

from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from recipes.results import clock_time
from recipes.watch.figures import EVAL_LABEL, Figures

REPAINT_SECONDS = 0.2
PLAIN_LINE_SECONDS = 30.0  # between two lines if the console is not a terminal
RATE_BATCHES = 20  # number of recent batches over which images/s is computed


class Progress(LoggerDestination):
    """One bar over the whole run, on rank 0; on a stream that is not a terminal, a plain line from time to time.

    `epoch 3/12 24px |███   | 21% 123 img/s ETA 0:03:10 loss 1.234 top-1 93.21%`

    Bar, percentage and ETA count pixels (images times size squared), because a 288 px epoch takes five times as long as
    a 128 px one. The ETA is this process's time per pixel, including evaluations and checkpoints so far, times the
    remaining pixels. images/s excludes evaluations and checkpoints. top-1 is that of the last evaluation at `eval_size`
    pixels; `sizes` has the image size in pixels of each epoch.
    """

    def __init__(self, figures: Figures, sizes: Sequence[int], eval_size: int, stream: TextIO) -> None:
        self.figures = figures
        self.sizes = sizes
        self.eval_size = str(eval_size)
        self.stream = stream
        # Pixels before each epoch: a convolution's cost grows with images times size squared.
        self._past = [0, *itertools.accumulate(figures.samples * size * size for size in sizes)]
        self._bar: tqdm[NoReturn] | None = None
        self._start: tuple[int, float] | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=RATE_BATCHES + 1)
        self._painted = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Begin at the resumed position."""
        if dist.get_global_rank() != 0:
            return
        self.fit_end(state, logger)
        clock = self.figures.clock
        self._recent.clear()
        self._recent.append((int(state.timestamp.sample), clock.working))
        self._start = (self._work(state), clock.wall)
        self._painted = time.monotonic()
        if self.stream.isatty():
            self._bar = tqdm(
                total=self._past[-1], initial=self._start[0], file=self.stream, dynamic_ncols=True, bar_format=" "
            )
            self._paint(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Count the batch; repaint if due."""
        if self._start is None:
            return
        self._recent.append((int(state.timestamp.sample), self.figures.clock.working))
        wait = REPAINT_SECONDS if self._bar is not None else PLAIN_LINE_SECONDS
        if time.monotonic() - self._painted >= wait:
            self._paint(state)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Show that an evaluation is running."""
        if self._bar is not None and time.monotonic() - self._painted >= REPAINT_SECONDS:
            size = (state.dataloader_label or "").removeprefix(EVAL_LABEL)
            self._paint(state, f"evaluating {size}px {int(state.eval_timestamp.batch)}/{state.dataloader_len or '?'}")

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Show the epoch as done, or the new top-1."""
        if self._bar is not None:
            self._paint(state)

    eval_after_all = epoch_end

    def fit_end(self, state: State, logger: Logger) -> None:
        """Leave the bar's last state on the screen; later output starts on a new line."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._start = None

    close = fit_end  # if training ended early

    def _work(self, state: State) -> int:
        """Pixels processed."""
        epoch = int(state.timestamp.epoch)
        if epoch >= len(self.sizes):
            return self._past[-1]
        return self._past[epoch] + int(state.timestamp.sample_in_epoch) * self.sizes[epoch] ** 2

    def _remaining(self, work: int) -> float:
        """Remaining seconds."""
        assert self._start is not None  # since fit_start
        start, since = self._start
        left = self._past[-1] - work
        if left <= 0:
            return 0.0
        return (self.figures.clock.wall - since) / (work - start) * left if work > start else float("inf")

    def _paint(self, state: State, note: str = "") -> None:
        """Show the state, with `note` in place of the figures behind the bar."""
        self._painted = time.monotonic()
        stamp, work, total = state.timestamp, self._work(state), self._past[-1]
        # Between the end of an epoch and the first batch of the next one, the epoch that ended.
        number = int(stamp.epoch) + (int(stamp.sample_in_epoch) > 0 or int(stamp.epoch) == 0)
        before = f"epoch {number}/{len(self.sizes)} {self.sizes[min(number, len(self.sizes)) - 1]}px"
        images, seconds = (self._recent[-1][part] - self._recent[0][part] for part in (0, 1))
        after = f"{images / seconds if seconds else 0:.0f} img/s ETA {clock_time(self._remaining(work))}"
        loss = self.figures.loss
        after += "" if loss is None else f" loss {loss:.3f}"
        top1 = self.figures.evaluations.get(self.eval_size, {}).get("top1")
        after += "" if top1 is None else f" top-1 {100 * top1:.2f}%"
        if self._bar is None:
            self.stream.write(f"{before} {100 * work / total:.0f}% {after}\n")
            self.stream.flush()
            return
        self._bar.bar_format = f"{before} |{{bar}}| {{percentage:3.0f}}% {note or after}"
        self._bar.n = min(work, total)
        self._bar.refresh()
