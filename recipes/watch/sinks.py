"""Destinations of figures and messages: log.txt and the console, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from composer import Logger, State, Timestamp
from composer.loggers import LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from data.files import replace_file, sync
from data.text import Formatter
from recipes.checkpoints.manifest import position_in_words
from recipes.results import clock_time, to_json
from recipes.watch.figures import Clock, is_figure, numbers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

IMAGES_NAME = "train/images"
OURS = ("recipes", "data", "algorithms")  # their INFO is logged; from all others, only warnings and errors
WARNING_SECONDS = 600.0
_LINES_HELD = 100_000  # log records held until the file may be written
_FLUSH_SECONDS = 30
"""A killed process loses at most this many seconds of points, none of them older than its last checkpoint."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def or_warn(path: Path) -> Iterator[None]:
    """A disk error while writing `path` does not stop training: it becomes a warning."""
    try:
        yield
    except OSError as error:
        log.warning("%s cannot be written: %s; training continues", path, error)


# log.txt and the console.


class _FileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk neither stops the training nor prints a traceback."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar; skips records with `file_only`."""

    def __init__(self, stream: TextIO, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.stream = stream
        self.setFormatter(Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        # A closed terminal does not stop training.
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(self.format(record), file=self.stream)
            self.stream.flush()


def _wanted(record: logging.LogRecord) -> bool:
    """INFO and above from our loggers, WARNING and above from others, except for what does not hold here."""
    if record.levelno < logging.WARNING:
        return record.name.partition(".")[0] in OURS
    # "... when resuming": Composer's SWA and StochasticDepth. Ours resume bit for bit (algorithms/swa.py).
    return "has known issues" not in record.getMessage()


class TextLog(LoggerDestination):
    """Sends Python's logging, warnings and a line per epoch and evaluation to log.txt and the console, on rank 0.

    From the start, records are held for the file and warnings go to stderr, because what is found before the run may
    touch its folder, such as a damaged checkpoint, belongs in the log too. `open` creates the file or appends to it.
    `stream` is the console; `resumed_from` names the checkpoint that this process resumes from.
    """

    def __init__(self, path: Path, stream: TextIO, run_name: str) -> None:
        self.path = path
        self.stream = stream
        self.run_name = run_name
        self.resumed_from: str | None = None
        self._handlers: list[logging.Handler] = []
        self._held = MemoryHandler(_LINES_HELD, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._figures: dict[str, float] = {}
        self._levels = {name: logging.getLogger(name).level for name in OURS}
        if dist.get_global_rank() == 0:
            self._send_to(self._held, _ConsoleHandler(sys.stderr, logging.WARNING))
            for name in OURS:
                logging.getLogger(name).setLevel(logging.INFO)
            logging.captureWarnings(True)

    def _send_to(self, *handlers: logging.Handler) -> None:
        root = logging.getLogger()
        for handler in self._handlers:
            root.removeHandler(handler)
        for handler in handlers:
            handler.addFilter(_wanted)
            root.addHandler(handler)
        self._handlers = list(handlers)

    def open(self) -> None:
        """Write the held records, and from now on each line immediately."""
        if not self._handlers:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as old:
            if old.tell():
                old.seek(-1, os.SEEK_END)
                if old.read() != b"\n":  # a killed process left half a line
                    old.write(b"\n")
        file = _FileHandler(self.path, encoding="utf-8")
        file.setFormatter(Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S%z"))
        self._send_to(file, _ConsoleHandler(self.stream))
        self._held.setTarget(file)
        self._held.flush()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Log where training begins."""
        if int(state.timestamp.batch):
            done = position_in_words(int(state.timestamp.epoch), int(state.timestamp.batch_in_epoch))
            log.info("%s resumes from %s: %s are done", self.run_name, self.resumed_from or "its checkpoint", done)
        else:
            log.info("%s: training starts", self.run_name)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the latest training figures for the epoch's line; write those of an evaluation."""
        if "train/loss" in metrics:
            self._figures = metrics
        for size in [name.split("/")[1] for name in metrics if name.startswith("eval/") and name.endswith("/top1")]:
            top1, top5, loss = (metrics[f"eval/{size}/{name}"] for name in ("top1", "top5", "loss"))
            text = "evaluation at %s px: top-1 %.2f %%, top-5 %.2f %%, loss %.4f"
            log.info(text, size, 100 * top1, 100 * top5, loss)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Write one line for the epoch."""
        line, figures = f"epoch {int(state.timestamp.epoch)} done, batch {int(state.timestamp.batch)}", self._figures
        if figures:
            seconds = sum(value for name, value in figures.items() if name.startswith("time/"))
            line += (
                f": {figures['train/image_size']:.0f} px, loss {figures['train/loss']:.4f}, lr "
                f"{figures['train/lr']:.4g}, momentum {figures['train/momentum']:.3f}, "
                f"{figures['train/images_per_second']:.0f} images/s "
                f"({100 * figures['train/loader_wait_fraction']:.0f} % waiting for the loader), {clock_time(seconds)} "
                "in all"
            )
        log.info("%s", line)

    def close(self, state: State | None = None, logger: Logger | None = None) -> None:
        """Restore Python's logging."""
        if self._handlers:
            for handler in self._handlers:
                handler.close()
            self._send_to()
            for name, level in self._levels.items():
                logging.getLogger(name).setLevel(level)
            logging.captureWarnings(False)


# Figures, in metrics.jsonl and TensorBoard.


def kept_lines(path: Path, batch: int, figures: set[str]) -> Iterator[str]:
    """The complete lines of a metrics.jsonl that a run resuming at `batch` will not write again.

    Lines before it stay, later ones go; of those at `batch` itself, those stay whose names are among `figures`, which
    were logged before the checkpoint was taken. A torn last line, or any line that is not a JSON object with a batch,
    is left out.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
                names = {name for name in entry if "/" in name}
                stays = entry["batch"] < batch or (entry["batch"] == batch and names <= figures)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if line.endswith("\n") and stays:
                yield line


class MetricsFile(LoggerDestination):
    """Writes our figures to metrics.jsonl, and with our pictures to `tensorboard`, on rank 0.

    A line is `{"batch": 10, "epoch": 0.5, "samples": 320, "wall_seconds": 12.3, "train/loss": 2.3, ...}`: `batch`,
    `epoch` and `samples` count what is done; `wall_seconds` is the clock's, over all resumes of the run. A figure that
    is not finite is null. Each line is written in one call, so that a killed process leaves complete lines.

    No point occurs twice. A process that dies may have written points after its last checkpoint, and the one that
    resumes from there writes them again. So a checkpoint holds the figures logged at its own batch, and on a resume at
    batch B everything at B or later that is not among them is dropped; in TensorBoard, a new event file tells readers
    to drop the points from B on (`purge_step`), and has those of B again. Figures logged before a checkpoint reach the
    disk before the checkpoint does. (Composer's TensorboardLogger duplicates points, begins a file at each flush, and
    writes every name that anyone logs.)

    A full disk does not stop training: it gives a warning every ten minutes, and every write is tried. `samples`:
    training images in an epoch, over all processes.
    """

    def __init__(self, path: Path, clock: Clock, samples: int, tensorboard: Path | None = None) -> None:
        self.path = path
        self.clock = clock
        self.samples = samples
        self.tensorboard = tensorboard
        self._state: State | None = None
        self._batch = -1
        self._figures: dict[str, float] = {}  # of that batch
        self._file: TextIO | None = None
        self._writer: SummaryWriter | None = None
        self._warned: dict[Path, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Open the files: the position is known, since a checkpoint, if any, is loaded."""
        self._state = state
        self._go_to(int(state.timestamp.batch))
        self._attempt(self.path, self._drop_repeated_lines)
        self._attempt(self.tensorboard, self._add_points, self._figures, flush=True)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write our figures among the metrics."""
        figures = {name: value for name, value in metrics.items() if is_figure(name)}
        if self._state is not None and figures:
            self._go_to(int(self._state.timestamp.batch) if step is None else step)
            self._figures.update(figures)
            self._attempt(self.path, self._add_line, figures, self._state.timestamp)
            self._attempt(self.tensorboard, self._add_points, figures)

    def log_images(
        self, images: Any, name: str = "", channels_last: bool = False, step: int | None = None, *_: Any, **more: Any
    ) -> None:
        """Add our grid of training images, uint8 (H, W, 3)."""
        if name == IMAGES_NAME and self._state is not None:
            self._attempt(self.tensorboard, lambda: self._events().add_image(name, images, step, dataformats="HWC"))

    def state_dict(self) -> dict[str, Any]:
        """The figures of the last batch with any."""
        self._attempt(self.path, self._sync)
        if self._writer is not None:
            self._attempt(self.tensorboard, self._writer.flush)
        return {"batch": self._batch, "figures": dict(self._figures)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self._batch, self._figures = int(state["batch"]), numbers(state["figures"])

    def close(self, state: State, logger: Logger) -> None:
        """The Trainer is closed."""
        self._attempt(self.path, self._sync)
        file, writer, self._file, self._writer, self._state = self._file, self._writer, None, None, None
        if file is not None:
            self._attempt(self.path, file.close)
        if writer is not None:
            self._attempt(self.tensorboard, writer.close)

    def _go_to(self, batch: int) -> None:
        if self._batch != batch:
            self._batch, self._figures = batch, {}

    def _drop_repeated_lines(self) -> None:
        """Drop the lines that will be written again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            replace_file(self.path, (line.encode() for line in kept_lines(self.path, self._batch, set(self._figures))))

    def _add_line(self, figures: dict[str, float], stamp: Timestamp) -> None:
        entry = {
            "batch": self._batch,
            "epoch": int(stamp.epoch) + int(stamp.sample_in_epoch) / self.samples,
            "samples": int(stamp.sample),
            "wall_seconds": round(self.clock.wall, 3),
        }
        rest = {name: value for name, value in figures.items() if name != "train/epoch"}
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(to_json(entry | rest) + "\n")
        self._file.flush()

    def _sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            sync(self._file.fileno())

    def _events(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            # With a short queue, training would wait for the disk.
            options = {"max_queue": 1000, "flush_secs": _FLUSH_SECONDS}
            self._writer = SummaryWriter(str(self.tensorboard), purge_step=self._batch, **options)
        return self._writer

    def _add_points(self, figures: dict[str, float], flush: bool = False) -> None:
        writer = self._events()
        for name, value in figures.items():
            writer.add_scalar(name, value, global_step=self._batch)
        if flush:
            writer.flush()

    def _attempt(self, path: Path | None, action: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Write to `path`, if it is wanted, on rank 0; a disk error becomes a warning."""
        if path is None or dist.get_global_rank() != 0:
            return
        try:
            action(*arguments, **named)
        except OSError as error:
            if path == self.tensorboard:
                self._writer = None  # it would never write again
            if time.monotonic() - self._warned.get(path, -WARNING_SECONDS) >= WARNING_SECONDS:
                self._warned[path] = time.monotonic()
                log.warning("%s cannot be written: %s; training continues", path, error)
