"""report.html: one page about a run, or several side by side, from the files in their folders; without torch.

Here: read a run's folder, and derive stages, resumes and confusions. A damaged file becomes a line of text.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from data.errors import InputError
from data.files import open_regular
from data.text import escape, first_line
from recipes.load import read_document
from recipes.results import CONFIG, METRICS, PREDICTIONS, SUMMARY, Results, read_results

POINTS = 600  # points of a curve at most: about one per pixel of its chart's width
PHASES = {
    "train": "training steps",
    "loader_wait": "waiting for the loader",
    "evaluation": "evaluation",
    "checkpointing": "checkpoints",
}
"""Keys of summary.json's `seconds`, and their names here."""
_CHECKPOINT = re.compile(r"ep\d{3,9}-ba(\d{6,12})")
Array = NDArray[Any]


class SavedPredictions(NamedTuple):
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

    @property
    def standard_error(self) -> float:
        """Of the top-1, in percent."""
        kept = self.evaluated
        right = float(np.mean(self.label[kept] == self.predicted[kept])) if len(kept) else 0.0
        return float(100 * (right * (1 - right) / max(1, len(kept))) ** 0.5)

    def confusions(self) -> Confusions:
        """Those of the evaluated images."""
        return Confusions(self.label[self.evaluated], self.predicted[self.evaluated])

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

    def matrix(self, limit: int) -> tuple[list[int], list[list[int]]]:
        """The classes of the first pairs, at most `limit`, in the order of the labels, and a row of counts for each.

        A row says how often the class was predicted as each of them, and in the last column as any other.
        """
        chosen: set[int] = set()
        for label, predicted, *_ in self.pairs:
            if len(chosen | {label, predicted}) > limit:
                break
            chosen |= {label, predicted}
        classes = sorted(chosen)
        rows = [[self.counts[label, predicted] for predicted in classes] for label in classes]
        return classes, [[*row, self.totals[label] - sum(row)] for label, row in zip(classes, rows, strict=True)]

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


@dataclass(frozen=True)
class Run(Results):
    """One run's folder."""

    name: str
    config: dict[str, Any]  # config.yaml; empty if it cannot be read
    pictures: tuple[Path, ...]  # grids of training images, in the order of the epochs
    predictions: SavedPredictions | None  # None if there are none

    def setting(self, key: str) -> Any:
        """A key of the config, such as `data.path`; None if it is missing."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages that the figures show, in order.

        A stage begins with the epoch in which its size is first seen, or at the last figure of the previous size if
        that is later, as with sizes that change within an epoch.
        """
        training = self.training
        sizes, epochs = training["train/image_size"], training["epoch"]
        known = np.flatnonzero(np.isfinite(sizes))
        starts = [*known[:1], *known[1:][np.diff(sizes[known]) != 0]]
        ends = np.array([*starts[1:], len(sizes)][: len(starts)], int)
        names = ("samples", "time/train_seconds", "time/loader_wait_seconds")
        images, trained, waited = (np.diff(training[name][ends - 1], prepend=0.0) for name in names)
        seconds, found = np.where(trained + waited > 0, trained + waited, np.nan), []
        for start, end, speed, wait in zip(starts, ends, images / seconds, waited / seconds, strict=True):
            first = max(float(np.floor(epochs[start])), float(epochs[start - 1])) if start else 0.0
            largest = np.nan_to_num(training["train/batch_size"][start:end]).max()
            found.append(Stage(first, float(epochs[end - 1]), int(sizes[start]), int(largest), speed, wait))
        return [stage._replace(last=after.first) for stage, after in pairwise(found)] + found[-1:]

    @property
    def sources(self) -> list[str]:
        """The checkpoints from which the run resumed, as in the summary."""
        sources = self.summary.get("resumed_from")
        return [str(source) for source in sources] if isinstance(sources, list) else []

    @cached_property
    def resumes(self) -> list[tuple[float, int, str]]:
        """Epoch (nan if the figures do not show it), batch and source of each resume whose source names a batch."""
        batches, epochs = (np.concatenate([[0.0], self.training[name]]) for name in ("batch", "epoch"))
        named = [(int(names[-1]), source) for source in self.sources if (names := _CHECKPOINT.findall(source))]
        return [(float(np.interp(batch, batches, epochs, right=np.nan)), batch, source) for batch, source in named]

    @property
    def accuracies(self) -> list[tuple[str, dict[str, Any]]]:
        """Size in pixels and figures of each size that was evaluated at the end."""
        return [(size, one) for size, one in section(self.summary, "eval_by_size").items() if isinstance(one, dict)]

    @property
    def seconds(self) -> dict[str, float]:
        """The time of the known phases of the summary; empty if it makes no sense."""
        spent = section(self.summary, "seconds")
        known = {name: float(spent[name]) for name in PHASES if isinstance(spent.get(name), int | float)}
        return known if min(known.values(), default=0) >= 0 < sum(known.values()) < np.inf else {}

    @property
    def not_finite(self) -> Array:
        """The batches whose logged loss is not finite."""
        batches: Array = self.training["batch"][np.isnan(self.training["train/loss"])]
        return batches


def section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping in a file; empty if a damaged file holds something else."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def read_run(folder: Path) -> Run:
    """Read a run's folder, finished or not, even if files are missing.

    Raises:
        InputError: There is no such folder, or it has no file of a run.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 - Path's raises for a name that is too long
        raise InputError(f"{folder}: no such folder; allowed: the folder of a run, such as runs/demo")
    files = (CONFIG, SUMMARY, METRICS)
    if not any((folder / name).exists() for name in files):
        inside = sorted(str(path.parent) for name in files for path in folder.glob(f"*/{name}"))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise InputError(f"{folder}: not a run's folder, it has no {CONFIG}, {SUMMARY} or {METRICS}{hint}")
    results, config, predictions, problems = read_results(folder), {}, None, []
    try:
        config = read_document(folder / CONFIG).value
    except InputError as error:
        problems.append(str(error))
    path = folder / PREDICTIONS
    try:
        predictions = _read_predictions(path) if path.exists() else None
    except Exception as error:  # numpy, zipfile and zlib raise many different exceptions for a damaged archive
        problems.append(f"{path}: damaged: {first_line(error)[:200]}")
    name = str(results.summary.get("run_name") or config.get("run_name") or folder.resolve().name)
    pictures = tuple(sorted((folder / "images").glob("ep*px.png")))
    found = vars(results) | {"problems": (*problems, *results.problems)}
    return Run(**found, name=name, config=config, pictures=pictures, predictions=predictions)


def _read_predictions(path: Path) -> SavedPredictions:
    with os.fdopen(open_regular(path), "rb") as stream, np.load(stream, allow_pickle=False) as file:
        label, predicted, *shares = columns = [file[name] for name in SavedPredictions._fields[:4]]
        classes, names = ([str(one) for one in file[name]] for name in ("classes", "names"))
        found = SavedPredictions(label, predicted, shares[0], shares[1], classes, names, int(file["size"]))
    fit = len({column.shape for column in columns}) == 1 and found.label.ndim == 1 and len(classes) == len(names)
    if not fit or [c.dtype.kind for c in columns] != list("iiff") or not (found.label < len(classes)).all():
        raise ValueError("its parts do not fit each other")
    return found


def thin(curve: Array, points: int = POINTS) -> Array:
    """Reduce curves, float (m, n), to at most `points` points, means of neighbours; nan where none is finite."""
    each = max(1, -(-curve.shape[1] // points))
    padded = np.pad(curve, ((0, 0), (0, -curve.shape[1] % each)), constant_values=np.nan)
    return _finite_means(padded.reshape(len(curve), padded.shape[1] // each, each))


def moving_mean(y: Array) -> Array:
    """The moving mean of a curve, float (n,), over a twenty-fifth of its points; nan where none is finite.

    With fewer than 50 points, it is the curve itself.
    """
    half = len(y) // 50
    return y if half == 0 else _finite_means(sliding_window_view(np.pad(y, half, constant_values=np.nan), 2 * half + 1))


def _finite_means(values: Array) -> Array:
    """Means of the finite values along the last axis."""
    finite = np.isfinite(values)
    means: Array = np.where(finite, values, 0.0).sum(-1) / np.where(finite.any(-1), finite.sum(-1), np.nan)
    return means
