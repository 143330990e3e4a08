"""log.txt, and what of it appears on the console."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from data.text import Formatter
from recipes.checkpoints.manifest import position_in_words
from recipes.watch.clock import duration

OURS = ("recipes", "data", "algorithms")
"""Namespaces whose information is logged; of all others, warnings and worse."""

_MOST_HELD = 100_000
"""Lines kept until the file may be written."""

log = logging.getLogger(__name__)


def wanted(record: logging.LogRecord) -> bool:
    """Ours from INFO on, others' from WARNING on."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in OURS


class _FileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk neither stops the training nor prints a traceback."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar; a record with `file_only` is not for the console."""

    def __init__(self, stream: TextIO, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.stream.flush()
        except (OSError, ValueError):
            pass  # A terminal that went away does not stop the training.


def _end_last_line(path: Path) -> None:
    """A process that was killed may have left half a line."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


class TextLog(LoggerDestination):
    """Sends Python's logging, warnings and a line per epoch and evaluation to log.txt and the console, on rank 0.

    Times are local, with the offset from UTC. A run that goes on appends, and says so.

    Args:
        path: The file; its folder is made.
        stream: The console.
        run_name: For the first line.

    Attributes:
        resumed_from: The checkpoint that this process goes on from, or none.
    """

    def __init__(self, path: Path, stream: TextIO, run_name: str) -> None:
        self.path = path
        self.stream = stream
        self.run_name = run_name
        self.resumed_from: list[str] = []
        self._handlers: list[logging.Handler] = []
        self._held: MemoryHandler | None = None
        self._levels: dict[str, int] = {}
        self._figures: dict[str, float] = {}
        self._capturing = False

    def hold(self) -> None:
        """Keep what is logged for the file, until `open` says that it may be written; warnings go to stderr meanwhile.

        What is found out before the run may touch its folder, such as a damaged checkpoint, belongs into the log, too.
        """
        if self._handlers or dist.get_global_rank() != 0:
            return
        self._held = MemoryHandler(_MOST_HELD, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._handle(self._held, _ConsoleHandler(sys.stderr, logging.WARNING))
        for name in OURS:
            self._levels[name] = logging.getLogger(name).level
            logging.getLogger(name).setLevel(logging.INFO)
        self._capturing = warnings.showwarning.__module__ != logging.__name__
        if self._capturing:
            logging.captureWarnings(True)

    def _handle(self, file: logging.Handler, console: logging.Handler) -> None:
        """Send what is logged to these two."""
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
        console.setFormatter(Formatter("%(message)s"))
        self._handlers = [file, console]
        for handler in self._handlers:
            handler.addFilter(wanted)
            logging.getLogger().addHandler(handler)

    def open(self) -> None:
        """Begin to write; may be called before the Trainer is made, which calls it if it was not."""
        self.hold()
        if self._held is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(self.path)
        file, held = _FileHandler(self.path, encoding="utf-8"), self._held
        file.setFormatter(Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S%z"))
        self._handle(file, _ConsoleHandler(self.stream))
        held.setTarget(file)
        held.flush()
        self._held = None

    def init(self, state: State, logger: Logger) -> None:
        """The Trainer is being made."""
        del state, logger
        self.open()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say where the training begins."""
        del logger
        batch = int(state.timestamp.batch)
        if batch:
            name = self.resumed_from[-1] if self.resumed_from else "its checkpoint"
            done = position_in_words(int(state.timestamp.epoch), int(state.timestamp.batch_in_epoch))
            log.info("%s goes on from %s: %s are done", self.run_name, name, done)
        else:
            log.info("%s starts", self.run_name)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the training's last figures for the epoch's line; write those of an evaluation."""
        del step
        if "train/loss" in metrics:
            self._figures = dict(metrics)
        for size in [name.split("/")[1] for name in metrics if name.startswith("eval/") and name.endswith("/top1")]:
            values = {name: metrics.get(f"eval/{size}/{name}", float("nan")) for name in ("top1", "top5", "loss")}
            text = "evaluation at %s px: top-1 %.2f %%, top-5 %.2f %%, loss %.4f"
            log.info(text, size, 100 * values["top1"], 100 * values["top5"], values["loss"])

    def epoch_end(self, state: State, logger: Logger) -> None:
        """One line for the epoch."""
        del logger
        log.info(epoch_line(int(state.timestamp.epoch), int(state.timestamp.batch), self._figures))

    def close(self, state: State, logger: Logger) -> None:
        """Leave Python's logging as it was."""
        del state, logger
        self.end()

    def end(self) -> None:
        """As `close`, where there is no Trainer yet."""
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        if self._capturing:
            logging.captureWarnings(False)
        self._handlers, self._levels, self._capturing, self._held = [], {}, False, None


def epoch_line(epoch: int, batch: int, figures: dict[str, float]) -> str:
    """A readable line at an epoch's end from the last figures logged in it."""
    if not figures:
        return f"epoch {epoch} done, batch {batch}"
    seconds = sum(value for name, value in figures.items() if name.startswith("time/"))
    return (
        f"epoch {epoch} done, batch {batch}: {figures['train/image_size']:.0f} px, loss {figures['train/loss']:.4f}, "
        f"lr {figures['train/lr']:.4g}, momentum {figures['train/momentum']:.3f}, "
        f"{figures['train/images_per_second']:.0f} images/s "
        f"({100 * figures['train/loader_wait_fraction']:.0f} % waiting for the loader), {duration(seconds)} in all"
    )
