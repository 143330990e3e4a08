"""report.html: one page about a run, or several side by side, from the files in their folders; without torch.

Here: read a run's folder, and derive stages, resumes and confusions. A damaged file becomes a line of text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.text import escape, first_line
from recipes.errors import InputError
from recipes.load import read_document
from recipes.results import CONFIG, METRICS, PREDICTIONS, SUMMARY, Metrics, Results, read_results

POINTS = 600  # points of a curve at most: about one per pixel of its chart's width
_CHECKPOINT = re.compile(r"ep\d{3,9}-ba(\d{6,12})")
Array = NDArray[Any]


class Predictions(NamedTuple):
    """The last evaluation, image by image; N images, C classes (recipes/watch/pictures.py writes it)."""

    label: Array  # int (N,); negative where the image could not be decoded
    predicted: Array  # int (N,); negative where no process evaluated the image
    probability: Array  # float (N,), of `predicted`
    label_probability: Array  # float (N,), of `label`
    classes: list[str]  # folder names in label order
    names: list[str]  # human-readable class names
    size: int  # in pixels

    def name(self, label: int) -> str:
        """A class's name; a model may have more outputs than the dataset has classes."""
        return escape(self.names[label]) if 0 <= label < len(self.names) else f"class {label}"

    @property
    def evaluated(self) -> NDArray[np.intp]:
        """Indices of the images that were decoded and evaluated."""
        return np.flatnonzero((self.label >= 0) & (self.predicted >= 0))

    def most_confident_errors(self, limit: int) -> list[int]:
        """Indices of the wrong predictions with the highest probability, highest first."""
        kept = self.evaluated
        wrong = kept[self.label[kept] != self.predicted[kept]]
        order = np.argsort(-np.nan_to_num(self.probability[wrong]), kind="stable")[:limit]
        return [int(index) for index in wrong[order]]


class Confusions:
    """Which classes were predicted as which, from labels and predictions, int (N,) each."""

    def __init__(self, label: Array, predicted: Array) -> None:
        self.counts = Counter(zip(label.tolist(), predicted.tolist(), strict=True))
        self.totals = Counter(label.tolist())
        pairs = [(*pair, count, self.totals[pair[0]]) for pair, count in self.counts.items() if pair[0] != pair[1]]
        self.pairs: list[tuple[int, int, int, int]] = sorted(pairs, key=lambda pair: (-pair[2], pair))
        """(label, predicted, images, images of that label), most images first."""

    def most_confused(self, limit: int) -> list[int]:
        """The classes of the first pairs, at most `limit`, in the order of the labels."""
        chosen: set[int] = set()
        for label, predicted, *_ in self.pairs:
            if len(chosen | {label, predicted}) > limit:
                break
            chosen |= {label, predicted}
        return sorted(chosen)

    def matrix(self, classes: Sequence[int]) -> list[list[int]]:
        """A row per class: how often it was predicted as each of `classes`, and in the last column as any other."""
        rows = [[self.counts[label, predicted] for predicted in classes] for label in classes]
        return [[*row, self.totals[label] - sum(row)] for label, row in zip(classes, rows, strict=True)]

    def hardest(self, limit: int) -> list[tuple[int, int, int]]:
        """The classes with the lowest accuracy below 100 %: (label, images right, images), lowest first."""
        found = [(label, self.counts[label, label], total) for label, total in self.totals.items()]
        return sorted((one for one in found if one[1] < one[2]), key=lambda one: (one[1] / one[2], one[0]))[:limit]


class Stage(NamedTuple):
    """A stage of a run, with one image size, as it was trained."""

    first: float  # epochs done at its start ...
    last: float  # ... and at its end, or so far
    size: int  # of the images, in pixels
    batch_size: int  # images of its largest step, over all devices; 0 if unknown
    images_per_second: float  # excluding evaluation and checkpoints; nan if unknown
    wait_fraction: float  # share of that time for which rank 0 waited for its loader


class Resume(NamedTuple):
    """One time that the run resumed from a checkpoint."""

    batch: int
    epoch: float  # nan if the figures do not show the epoch of the batch
    source: str  # the checkpoint's name in summary.json


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    name: str
    results: Results
    config: dict[str, Any]  # config.yaml; empty if it cannot be read
    pictures: tuple[Path, ...]  # grids of training images, in the order of the epochs
    predictions: Predictions | None  # None if there are none
    problems: tuple[str, ...]  # what could not be used, one line each

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return self.results.summary

    @cached_property
    def training(self) -> Metrics:
        """The training figures."""
        return self.results.training

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages that the figures show, in order."""
        return stages(self.training)

    @cached_property
    def resumes(self) -> list[Resume]:
        """The resumes, from the checkpoints named in the summary."""
        sources = self.summary.get("resumed_from")
        return resumes([str(one) for one in sources] if isinstance(sources, list) else [], self.training)

    def setting(self, key: str) -> Any:
        """A key of the config, such as `data.path`; None if it is missing."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> Run:
    """Read a run's folder, finished or not, even if files are missing.

    Raises:
        InputError: There is no such folder, or it has no file of a run.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; allowed: the folder of a run, such as runs/demo")
    files = (CONFIG, SUMMARY, METRICS)
    if not any((folder / name).exists() for name in files):
        inside = sorted(str(path.parent) for name in files for path in folder.glob(f"*/{name}"))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise InputError(f"{folder}: not a run's folder, it has no {CONFIG}, {SUMMARY} or {METRICS}{hint}")
    results, config, problems = read_results(folder), {}, []
    try:
        config = read_document(folder / CONFIG).value
    except InputError as error:
        problems.append(str(error))
    predictions = _read_predictions(folder / PREDICTIONS, problems)
    return Run(
        name=str(results.summary.get("run_name") or config.get("run_name") or folder.resolve().name),
        results=results,
        config=config,
        pictures=tuple(sorted((folder / "images").glob("ep*px.png"))),
        predictions=predictions,
        problems=(*problems, *results.problems),
    )


def _read_predictions(path: Path, problems: list[str]) -> Predictions | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            label, predicted, *chances = columns = [file[name] for name in Predictions._fields[:4]]
            classes, names = ([str(one) for one in file[name]] for name in ("classes", "names"))
            found = Predictions(label, predicted, chances[0], chances[1], classes, names, int(file["size"]))
        fit = len({column.shape for column in columns}) == 1 and found.label.ndim == 1 and len(classes) == len(names)
        if not fit or [c.dtype.kind for c in columns] != list("iiff") or not (found.label < len(classes)).all():
            raise ValueError("its parts do not fit each other")
    except Exception as error:  # numpy, zipfile and zlib raise many different exceptions for a damaged archive
        problems.append(f"{path}: damaged: {first_line(error)[:200]}")
        return None
    return found


def stages(training: Metrics) -> list[Stage]:
    """The stages that figures show, in order.

    A stage begins with the epoch in which its size is first seen, or at the last figure of the previous size if that is
    later, as with sizes that change within an epoch.
    """
    sizes, epochs = training["train/image_size"], training["epoch"]
    known = np.flatnonzero(np.isfinite(sizes))
    starts = [*known[:1], *known[1:][np.diff(sizes[known]) != 0]]
    found = []
    for start, end in zip(starts, [*starts[1:], len(sizes)], strict=False):
        first = max(float(np.floor(epochs[start])), float(epochs[start - 1])) if start else 0.0
        largest = np.nan_to_num(training["train/batch_size"][start:end]).max()
        speed = _throughput(training, start - 1 if start else None, end - 1)
        found.append(Stage(first, float(epochs[end - 1]), int(sizes[start]), int(largest), *speed))
    return [stage._replace(last=after.first) for stage, after in pairwise(found)] + found[-1:]


def _throughput(training: Metrics, before: int | None, last: int) -> tuple[float, float]:
    """Images per second, and the share of time spent waiting for the loader, between two rows.

    `before` is None for the start of the run.
    """

    def grown(name: str) -> float:
        return float(training[name][last] - (0.0 if before is None else training[name][before]))

    waited = grown("time/loader_wait_seconds")
    seconds = grown("time/train_seconds") + waited
    return (grown("samples") / seconds, waited / seconds) if seconds > 0 else (np.nan, np.nan)


def throughput_curve(training: Metrics) -> NDArray[np.float64]:
    """Throughput over the run, in segments of about equal length that do not cross stages.

    Returns:
        (3, n): epoch in the middle of each segment, images per second, share of time spent waiting for the loader.
    """
    sizes, epochs = training["train/image_size"], training["epoch"]
    if not len(epochs):
        return np.empty((3, 0))
    even = np.linspace(0, len(epochs) - 1, min(POINTS // 4, len(epochs))).astype(int)
    ends = np.union1d(even, np.flatnonzero(sizes[1:] != sizes[:-1])).tolist()
    found = []
    for before, last in zip([None, *ends], ends, strict=False):
        middle = (epochs[last] + (0.0 if before is None else epochs[before])) / 2
        found.append((middle, *_throughput(training, before, last)))
    return np.array(found).T


def thin(x: Array, y: Array, points: int = POINTS) -> tuple[Array, Array]:
    """Reduce a curve, float (n,) each, to at most `points` points, means of neighbours; nan where none is finite."""
    starts = np.arange(0, len(x), max(1, -(-len(x) // points)))
    if len(starts) == len(x):
        return x, y
    return np.add.reduceat(x, starts) / np.diff([*starts, len(x)]), _finite_means(
        y, lambda v: np.add.reduceat(v, starts)
    )


def moving_mean(y: Array) -> Array:
    """The moving mean of a curve, float (n,), over a twenty-fifth of its points; nan where none is finite.

    With fewer than 50 points, it is the curve itself.
    """
    window = np.ones(2 * (len(y) // 50) + 1)
    return y if len(window) == 1 else _finite_means(y, lambda values: np.convolve(values, window, "same"))


def _finite_means(y: Array, add_up: Callable[[Array], Array]) -> Array:
    """Means of the finite values, grouped by `add_up`."""
    finite = np.isfinite(y)
    sums, counts = add_up(np.where(finite, y, 0.0)), add_up(finite.astype(float))
    means: Array = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0.5)
    return means


def resumes(sources: Sequence[str], training: Metrics) -> list[Resume]:
    """When a run resumed, from the names of the checkpoints; a source that is not a checkpoint name is left out."""
    batches, epochs = (np.concatenate([[0.0], training[name]]) for name in ("batch", "epoch"))
    found = []
    for source in sources:
        if names := _CHECKPOINT.findall(source):
            batch = int(names[-1])
            epoch = float(np.interp(batch, batches, epochs)) if batch <= batches[-1] else np.nan
            found.append(Resume(batch, epoch, source))
    return found
