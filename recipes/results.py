"""Read what a run wrote, for all commands: summary.json as a dict, metrics.jsonl as columns of numbers.

At the end, functions that write figures in the same form everywhere.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.files import open_regular, read_regular

# The files of a run's folder.
CONFIG, LOG, SUMMARY, METRICS = "config.yaml", "log.txt", "summary.json", "metrics.jsonl"
PREDICTIONS = "predictions.npz"
COLUMNS = tuple(
    """
    batch epoch samples wall_seconds
    train/loss train/lr train/momentum train/image_size train/batch_size
    train/images_per_second train/loader_wait_fraction
    time/train_seconds time/loader_wait_seconds time/evaluation_seconds time/checkpointing_seconds
    """.split()
)
"""Columns of every table of metrics; each evaluated size adds `eval/SIZE/top1`, `top5` and `loss`."""
_LARGEST_SUMMARY = 2**26  # bytes
_LARGEST_NUMBER = 1e100  # beyond any figure of a run; a chart with larger ones cannot be drawn
_EVALUATED = re.compile(r"eval/(\d{1,9})/(top1|top5|loss)")

Metrics = dict[str, NDArray[np.float64]]
"""Lines of metrics.jsonl in order of batches: float64 (n,) by name, nan where a line has no finite number."""


class Evaluation(NamedTuple):
    """An evaluation at one image size, or a point between two of them."""

    epoch: float  # epochs trained until then
    wall_seconds: float  # time until then, summed over the run's resumes: training, waiting, evaluation, checkpoints
    top1: float  # in [0, 1]


@dataclass(frozen=True)
class Results:
    """The results in a run's folder; empty where a file is missing or damaged."""

    folder: Path
    summary: dict[str, Any]  # summary.json (watch/summary.py writes it)
    metrics: Metrics  # metrics.jsonl (watch/sinks.py writes it)
    problems: tuple[str, ...]  # what could not be used, one line each

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self.summary.get("finished") is True

    @cached_property
    def training(self) -> Metrics:
        """The lines with training figures."""
        names = [name for name in COLUMNS if name.startswith("train/")]
        kept = np.any([np.isfinite(self.metrics[name]) for name in names], axis=0)
        return {name: column[kept] for name, column in self.metrics.items()}

    @property
    def sizes(self) -> list[int]:
        """Image sizes in pixels with evaluations, in ascending order."""
        found = map(_EVALUATED.fullmatch, self.metrics)
        return sorted({int(match[1]) for match in found if match and match[2] == "top1"})

    def evaluations(self, size: int) -> tuple[Evaluation, ...]:
        """The evaluations at an image size in pixels, oldest first."""
        top1 = self.metrics.get(f"eval/{size}/top1", np.empty(0))
        kept = np.flatnonzero(np.isfinite(top1))
        columns = (self.metrics["epoch"], self.metrics["wall_seconds"], top1)
        return tuple(map(Evaluation, *(column[kept].tolist() for column in columns)))


def read_results(folder: Path) -> Results:
    """Read a run's folder, finished or not; missing or damaged files raise no error."""
    problems: list[str] = []
    summary: dict[str, Any] = {}
    path = folder / SUMMARY
    try:
        summary = read_summary(path)
    except (OSError, ValueError) as error:
        fault = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else error
        problems.append(f"{path}: {fault}")
    return Results(folder, summary, _read_metrics(folder / METRICS, problems), tuple(problems))


def read_summary(path: Path) -> dict[str, Any]:
    """The content of a summary.json; OSError: it cannot be read; ValueError: it is not a JSON object."""

    def whole(digits: str) -> float:  # a number beyond any run becomes infinity, so that no later conversion overflows
        return int(digits) if len(digits) < 19 else float(digits)

    try:
        summary = json.loads(read_regular(path, _LARGEST_SUMMARY), parse_int=whole)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(summary, dict):
        raise ValueError("holds no JSON object")
    return summary


def _read_metrics(path: Path, problems: list[str]) -> Metrics:
    entries, damaged = [], 0
    try:
        with os.fdopen(open_regular(path), "rb") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    if not all(math.isfinite(_number(entry[name])) for name in ("batch", "epoch")):
                        raise ValueError
                except (ValueError, TypeError, KeyError, RecursionError):
                    damaged += 1
                else:
                    entries.append(entry)
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror or error}")
    if damaged:
        problems.append(f"{path}: {damaged} damaged {'line' if damaged == 1 else 'lines'} skipped")
    entries.sort(key=lambda entry: entry["batch"])
    names = (*COLUMNS, *filter(_EVALUATED.fullmatch, dict.fromkeys(chain(*entries))))
    return {name: np.array([_number(entry.get(name)) for entry in entries]) for name in names}


def _number(value: Any) -> float:
    """A number of a run unchanged; nan for anything else that JSON may hold."""
    known = isinstance(value, float) or type(value) is int
    return float(value) if known and abs(value) < _LARGEST_NUMBER else math.nan


def mean_curve(curves: Sequence[Sequence[Evaluation]]) -> tuple[Evaluation, ...]:
    """The mean of several runs' evaluations at the epochs that all of them have: mean top-1 at mean time."""
    by_epoch = [{entry.epoch: entry for entry in curve} for curve in curves]
    common = sorted(set.intersection(*map(set, by_epoch))) if by_epoch else []
    means = (np.mean([curve[epoch] for curve in by_epoch], axis=0).tolist() for epoch in common)
    return tuple(Evaluation(*mean) for mean in means)


def first_reached(curve: Sequence[Evaluation], target: float) -> Evaluation | None:
    """The point at which a curve, in order of time, first reaches a top-1 in [0, 1]; None if it never does.

    It is interpolated linearly between evaluations; if the very first one is above the target, it is that one.
    """
    for before, after in zip([None, *curve], curve, strict=False):
        if after.top1 >= target:
            if before is None:
                return after
            share = (target - before.top1) / (after.top1 - before.top1)
            return Evaluation(*(a + share * (b - a) for a, b in zip(before, after, strict=True)))
    return None


def short_commit(text: str) -> str:
    """A commit hash cut to twelve digits, which suffice to find it; other text unchanged."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", text)


def clock_time(seconds: float) -> str:
    """`1:02:03`, with any number of hours; `?` if not known."""
    if not 0 <= seconds < 1e7:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def to_json(content: object, **options: Any) -> str:
    """JSON in which a number that is not finite is null (RFC 8259 does not allow it); `options` are `json.dumps`'s."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
