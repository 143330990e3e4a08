"""metrics.jsonl: the figures of a run, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from recipes.json_text import to_json
from recipes.watch.clock import Clock
from recipes.watch.files import replace_file, sync
from recipes.watch.sink import FigureSink


def kept_lines(path: Path, batch: int, figures: set[str]) -> Iterator[str]:
    """The whole lines of a file that a run going on at `batch` would not write again.

    Args:
        path: A metrics.jsonl; a torn last line, or any that is no JSON object with a batch, is left out.
        batch: Position of the resume: lines before it stay, later ones go.
        figures: Names logged at `batch` itself before the checkpoint was taken; lines with others go.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
                at = entry["batch"]
                names = {name for name in entry if "/" in name}
                stays = at < batch or (at == batch and names <= figures)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if line.endswith("\n") and stays:
                yield line


class MetricsFile(FigureSink):
    """Writes `{"batch": 10, "epoch": 0.5, "samples": 320, "wall_seconds": 12.3, "train/loss": 2.3, ...}` per line.

    `batch`, `epoch` and `samples` count what is done; `wall_seconds` is the clock's, over all processes of the run. A
    figure that is not finite is null. Each line is handed to the system whole, so that a killed process leaves whole
    lines.

    Args:
        path: The file; its folder is made.
        clock: The run's.
        samples: Training images in an epoch, over all processes.
    """

    def __init__(self, path: Path, clock: Clock, samples: int) -> None:
        super().__init__()
        self.path = path
        self.clock = clock
        self.samples = samples
        self._file: TextIO | None = None

    def start(self, batch: int, figures: dict[str, float]) -> None:
        """Drop what will be written again, and open for appending."""
        self.shut()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = (line.encode() for line in kept_lines(self.path, batch, set(figures)))
            replace_file(self.path, lines)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, batch: int, figures: dict[str, float]) -> None:
        """Append one line."""
        assert self.state is not None  # Sink sets it before it writes
        stamp = self.state.timestamp
        entry = {
            "batch": batch,
            "epoch": int(stamp.epoch) + int(stamp.sample_in_epoch) / self.samples,
            "samples": int(stamp.sample),
            "wall_seconds": round(self.clock.wall, 3),
        }
        rest = {name: value for name, value in figures.items() if name != "train/epoch"}
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(to_json(entry | rest) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Sync the file."""
        if self._file is not None:
            self._file.flush()
            sync(self._file.fileno())

    def shut(self) -> None:
        """Sync and close the file."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None
