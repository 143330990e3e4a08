"""Where the time of a run goes."""

from __future__ import annotations

import time
from typing import Literal

Phase = Literal["train", "loader_wait", "evaluation", "checkpointing"]
PHASES: tuple[Phase, ...] = ("train", "loader_wait", "evaluation", "checkpointing")


def duration(seconds: float) -> str:
    """`1:02:03`, hours growing without bound; `?` where it is not known."""
    if not 0 <= seconds < 1e7:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Clock:
    """Splits wall time into phases, cumulative over all processes that led to the present state of a run.

    Between runs of `fit` the clock stands still. What a killed process did after its last checkpoint is not counted:
    the run that goes on from that checkpoint does it again.
    """

    def __init__(self) -> None:
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._phase: Phase | None = None
        self._since = 0.0

    def enter(self, phase: Phase | None) -> Phase | None:
        """End the present phase and begin another; None stops the clock.

        Returns:
            The phase that was ended.
        """
        now = time.perf_counter()
        previous = self._phase
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
        """Seconds spent on training steps and waiting for the loader: evaluation and checkpoints left out."""
        seconds = self.read()
        return seconds["train"] + seconds["loader_wait"]

    def set(self, seconds: dict[str, float]) -> None:
        """Go on from the readings of an earlier process."""
        self._seconds = {phase: float(seconds.get(phase, 0.0)) for phase in PHASES}
