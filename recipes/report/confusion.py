"""Which classes are taken for which, from a run's predictions; labels (N,) and predictions (N,) are integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Pair:
    """Images of one class that were taken for another."""

    label: int
    predicted: int
    count: int
    total: int
    """Evaluated images of the class `label`."""


def judged(label: Labels, predicted: Labels) -> NDArray[np.intp]:
    """Indices of the images that count: decoded and evaluated."""
    return np.flatnonzero((label >= 0) & (predicted >= 0))


def confused_pairs(label: Labels, predicted: Labels) -> list[Pair]:
    """All pairs of classes that were confused, most images first; ties in the order of the labels."""
    kept = judged(label, predicted)
    label, predicted = label[kept].astype(np.int64), predicted[kept].astype(np.int64)
    wrong = label != predicted
    width = int(predicted.max(initial=0)) + 1
    codes, counts = np.unique(label[wrong] * width + predicted[wrong], return_counts=True)
    totals = np.bincount(label)
    order = np.argsort(-counts, kind="stable")
    return [
        Pair(int(code // width), int(code % width), int(count), int(totals[code // width]))
        for code, count in zip(codes[order], counts[order], strict=True)
    ]


def most_confused(pairs: Sequence[Pair], limit: int) -> list[int]:
    """The classes of the first pairs, at most so many, in the order of the labels."""
    chosen: list[int] = []
    for pair in pairs:
        fresh = [one for one in (pair.label, pair.predicted) if one not in chosen]
        if len(chosen) + len(fresh) > limit:
            break
        chosen += fresh
    return sorted(chosen)


def confusion_matrix(label: Labels, predicted: Labels, classes: Sequence[int]) -> NDArray[np.intp]:
    """How often each of some classes was taken for each of them, and for any other.

    Returns:
        int64 (k, k + 1): a row per class of the images, a column per predicted class, the last one for all others.
    """
    kept = judged(label, predicted)
    place = np.full(int(max(label[kept].max(initial=0), predicted[kept].max(initial=0), *classes, 0)) + 1, len(classes))
    place[np.asarray(classes, np.int64)] = np.arange(len(classes))
    rows, columns = place[label[kept]], place[predicted[kept]]
    counts = np.bincount(rows * (len(classes) + 1) + columns, minlength=(len(classes) + 1) ** 2)
    return counts.reshape(len(classes) + 1, len(classes) + 1)[:-1]


def hardest(label: Labels, predicted: Labels, limit: int) -> list[tuple[int, int, int]]:
    """The classes with the lowest accuracy: (label, right, evaluated images), lowest first."""
    kept = judged(label, predicted)
    totals = np.bincount(label[kept])
    right = np.bincount(label[kept], weights=label[kept] == predicted[kept], minlength=len(totals)).astype(np.int64)
    present = np.flatnonzero(totals)
    order = present[np.argsort(right[present] / totals[present], kind="stable")][:limit]
    return [(int(one), int(right[one]), int(totals[one])) for one in order if right[one] < totals[one]]


def surest_errors(
    label: Labels, predicted: Labels, probability: NDArray[np.floating[Any]], limit: int
) -> NDArray[np.intp]:
    """Indices of the wrong predictions with the highest probability, highest first."""
    kept = judged(label, predicted)
    wrong = kept[label[kept] != predicted[kept]]
    order = np.argsort(-np.nan_to_num(probability[wrong]), kind="stable")
    return np.take(wrong, order[:limit])
