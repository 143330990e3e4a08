"""A run's folder as values: what the run came to, and how its accuracy grew."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.errors import InputError


class ReadRun(NamedTuple):
    """What a run left."""

    folder: Path
    summary: dict[str, Any]
    """summary.json; see watch/summary.py."""
    figures: tuple[dict[str, Any], ...]
    """The lines of metrics.jsonl; see watch/metrics_file.py."""


class Evaluation(NamedTuple):
    """An evaluation at one image size."""

    epoch: float
    """Epochs trained until then."""
    wall_seconds: float
    """Time until then, over all processes of the run: training, waiting, evaluation, checkpoints."""
    top1: float
    """In [0, 1]."""


class Reached(NamedTuple):
    """When an accuracy was reached."""

    epoch: float
    wall_seconds: float


def read_run(folder: Path) -> ReadRun:
    """Read summary.json and metrics.jsonl; torn or foreign lines of the latter are left out, and it may be missing.

    Raises:
        InputError: There is no readable summary.json.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: is not the folder of a run: it holds no summary.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(summary, dict):
        raise InputError(f"{path}: is not a run's summary")
    return ReadRun(folder, summary, read_figures(folder / "metrics.jsonl"))


def read_figures(path: Path) -> tuple[dict[str, Any], ...]:
    """The lines of a metrics.jsonl that are whole."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "batch" in entry:
            found.append(entry)
    return tuple(found)


def evaluation_curve(run: ReadRun, size: int) -> tuple[Evaluation, ...]:
    """The evaluations of a run at one image size in pixels, in order of time."""
    key = f"eval/{size}/top1"
    lines = [line for line in run.figures if line.get(key) is not None]
    return tuple(Evaluation(line["epoch"], line["wall_seconds"], line[key]) for line in lines)


def mean_curve(curves: Sequence[Sequence[Evaluation]]) -> tuple[Evaluation, ...]:
    """The mean of several runs' curves, at the epochs that all of them have: mean accuracy at mean time."""
    by_epoch = [{entry.epoch: entry for entry in curve} for curve in curves]
    if not by_epoch:
        return ()
    common = sorted(set.intersection(*(set(curve) for curve in by_epoch)))
    found = []
    for epoch in common:
        members = [curve[epoch] for curve in by_epoch]
        seconds, top1 = (sum(entry[index] for entry in members) / len(members) for index in (1, 2))
        found.append(Evaluation(epoch, seconds, top1))
    return tuple(found)


def reach(curve: Sequence[Evaluation], target: float) -> Reached | None:
    """When a curve first reaches an accuracy.

    Accuracy is known at evaluations only. Between the first one at or above the target and the one before it, it is
    taken to grow linearly; a target that the first evaluation of all exceeds counts as reached there, not before.

    Args:
        curve: In order of time.
        target: Top-1 in [0, 1].

    Returns:
        None: it is never reached.
    """
    before: Evaluation | None = None
    for entry in curve:
        if entry.top1 >= target:
            if before is None:
                return Reached(entry.epoch, entry.wall_seconds)
            share = (target - before.top1) / (entry.top1 - before.top1)
            return Reached(
                before.epoch + share * (entry.epoch - before.epoch),
                before.wall_seconds + share * (entry.wall_seconds - before.wall_seconds),
            )
        before = entry
    return None


def short_commit(text: str) -> str:
    """A commit's hash in twelve digits, which are enough to find it; other text as it is."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", text)
