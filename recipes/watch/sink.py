"""What the files of figures have in common: only our figures, only rank 0, and no doubled points after a resume."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist

from recipes.watch.figures import is_figure, numbers

WARNING_SECONDS = 600.0

log = logging.getLogger(__name__)


class FigureSink(LoggerDestination):
    """A destination of figures that begins where the run's checkpoint was taken.

    A process that dies has written points after its last checkpoint; the one that goes on from there writes them again.
    So a checkpoint holds the figures logged at its own batch, and on a resume at batch B everything at B or later that
    is not among them is dropped. What was logged before a checkpoint is on disk before the checkpoint is.

    A full disk does not stop the training: it is said every ten minutes, and each time there are figures, writing is
    tried again.
    """

    def __init__(self) -> None:
        self.state: State | None = None
        self._batch = -1
        self._figures: dict[str, float] = {}
        self._warned = -WARNING_SECONDS

    @abstractmethod
    def start(self, batch: int, figures: dict[str, float]) -> None:
        """Open the file at this batch, whose `figures` are those that stay; called again at each `fit`."""

    @abstractmethod
    def write(self, batch: int, figures: dict[str, float]) -> None:
        """Write figures of a batch."""

    @abstractmethod
    def flush(self) -> None:
        """Make what was written outlive this process, and the machine's loss of power where the disk keeps its word."""

    @abstractmethod
    def shut(self) -> None:
        """Close the file."""

    def fit_start(self, state: State, logger: Logger) -> None:
        """The position is known: a checkpoint, if any, was loaded."""
        del logger
        self.state = state
        batch = int(state.timestamp.batch)
        if self._batch != batch:
            self._batch, self._figures = batch, {}
        if dist.get_global_rank() == 0:
            self.attempt(self.start, batch, dict(self._figures))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write those that are ours."""
        if self.state is None:
            return
        figures = {name: value for name, value in metrics.items() if is_figure(name)}
        if not figures:
            return
        batch = int(self.state.timestamp.batch) if step is None else step
        if batch != self._batch:
            self._batch, self._figures = batch, {}
        self._figures.update(figures)
        if dist.get_global_rank() == 0:
            self.attempt(self.write, batch, figures)

    def state_dict(self) -> dict[str, Any]:
        """The figures of the last batch that had any."""
        if self.state is not None and dist.get_global_rank() == 0:
            self.attempt(self.flush)
        return {"batch": self._batch, "figures": dict(self._figures)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._batch, self._figures = int(state["batch"]), numbers(state["figures"])

    def close(self, state: State, logger: Logger) -> None:
        """The Trainer is closed."""
        del state, logger
        if self.state is not None and dist.get_global_rank() == 0:
            self.attempt(self.shut)
        self.state = None

    def attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do it; trouble with the disk is a warning."""
        try:
            action(*arguments)
        except OSError as error:
            if time.monotonic() - self._warned >= WARNING_SECONDS:
                self._warned = time.monotonic()
                log.warning("%s cannot be written: %s; the training goes on", type(self).__name__, error)
