"""From runs to figures: means and spreads over seeds, comparisons, and the Pareto front; pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance
from typing import NamedTuple

from recipes.ablate.variants import Variant
from recipes.read_run import Evaluation, Reached, ReadRun, evaluation_curve, mean_curve, reach


class Spread(NamedTuple):
    """Some values of one quantity."""

    mean: float
    std: float | None
    """Sample standard deviation (n - 1 degrees of freedom); None of one value."""
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are no values."""
        if not values:
            return None
        std = stdev(values) if len(values) > 1 else None
        return cls(fmean(values), std, min(values), max(values), len(values))


class Row(NamedTuple):
    """One variant over its seeds."""

    variant: Variant
    seeds: tuple[int, ...]
    """Those whose runs finished."""
    failed: int
    missing: int
    """Runs that were not reached."""
    top1: dict[int, Spread]
    """In [0, 1], by image size in pixels."""
    wall_seconds: Spread | None
    images_per_second: Spread | None
    curve: tuple[Evaluation, ...]
    """Mean over the seeds, at the main size."""
    reached: Reached | None
    """Where that curve reaches the target."""
    on_front: bool
    """No other variant is at least as fast and at least as accurate, and better in one of the two."""


class Difference(NamedTuple):
    """What adding a technique changes."""

    top1: Spread
    """Top-1 with it less top-1 without it, seed by seed."""
    seconds_ratio: float
    """Mean wall time with it over mean wall time without it."""


class Effect(NamedTuple):
    """What a technique is worth; None where runs are missing."""

    technique: str
    alone: Difference | None
    """Added to the baseline."""
    in_recipe: Difference | None
    """The recipe against the recipe without it."""


class Results(NamedTuple):
    """All that the tables and the picture show."""

    size: int
    """Image size in pixels at which accuracies are compared."""
    sizes: tuple[int, ...]
    target: float | None
    """Top-1 in [0, 1] whose time is compared."""
    rows: tuple[Row, ...]
    effects: tuple[Effect, ...]

    @property
    def baseline(self) -> Row | None:
        """The row with which the others are compared, if it has any runs."""
        return next((row for row in self.rows if not row.variant.on and row.seeds), None)


Runs = dict[Variant, dict[int, ReadRun]]
"""The finished runs by variant and seed."""


def summarise(
    variants: Sequence[Variant],
    runs: Runs,
    failed: dict[Variant, int],
    *,
    seeds: int,
    sizes: Sequence[int],
    size: int,
    target: float | None,
) -> Results:
    """Everything that is shown.

    Args:
        variants: In the order of the table.
        runs: Those that finished.
        failed: How many failed, by variant.
        seeds: How many runs of each variant there should be.
        sizes: Of the evaluation, in pixels.
        size: That of `sizes` at which accuracies are compared.
        target: Top-1 in [0, 1]; None: the baseline's mean at its end.
    """
    baseline = next((variant for variant in variants if not variant.on), None)
    if target is None and baseline is not None and runs.get(baseline):
        target = fmean(_top1(run, size) for run in runs[baseline].values())
    rows = []
    for variant in variants:
        done = runs.get(variant, {})
        curve = mean_curve([evaluation_curve(run, size) for run in done.values()])
        times = Spread.of([run.summary["wall_seconds"] for run in done.values()])
        speeds = Spread.of([run.summary["images_per_second"] for run in done.values()])
        accuracies = {px: Spread.of([_top1(run, px) for run in done.values()]) for px in sizes}
        rows.append(
            Row(
                variant,
                tuple(done),
                failed.get(variant, 0),
                seeds - len(done) - failed.get(variant, 0),
                {px: value for px, value in accuracies.items() if value is not None},
                times,
                speeds,
                curve,
                None if target is None else reach(curve, target - 1e-9),
                False,
            )
        )
    measured = [row for row in rows if row.wall_seconds is not None]
    front = pareto([(row.wall_seconds.mean, row.top1[size].mean) for row in measured if row.wall_seconds])
    best = {row.variant for row, on in zip(measured, front, strict=True) if on}
    marked = tuple(row._replace(on_front=row.variant in best) for row in rows)
    return Results(size, tuple(sizes), target, marked, effects(variants, runs, size))


def _top1(run: ReadRun, size: int) -> float:
    return float(run.summary["eval_by_size"][str(size)]["top1"])


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the Pareto front.

    Args:
        points: (cost, gain): less of the first is better, more of the second is.

    Returns:
        For each point, whether no other is at least as good in both and better in one; equal points stand or fall
        together.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front, best, leader = [False] * len(points), -math.inf, None
    for index in order:
        gain = points[index][1]
        front[index] = gain > best or points[index] == leader
        if gain > best:
            best, leader = gain, points[index]
    return front


def effects(variants: Sequence[Variant], runs: Runs, size: int) -> tuple[Effect, ...]:
    """What each technique is worth, where at least one of its two comparisons was chosen."""
    by_techniques = {frozenset(variant.on): runs.get(variant, {}) for variant in variants}
    order = dict.fromkeys(name for variant in variants for name in (*variant.on, *variant.off))
    everything = frozenset(order)
    found = []
    for name in order:
        one = frozenset({name})
        alone = _difference(by_techniques.get(one), by_techniques.get(frozenset()), size)
        inside = _difference(by_techniques.get(everything), by_techniques.get(everything - one), size)
        if one in by_techniques or everything - one in by_techniques:
            found.append(Effect(name, alone, inside))
    return tuple(found)


def _difference(having: dict[int, ReadRun] | None, lacking: dict[int, ReadRun] | None, size: int) -> Difference | None:
    both = [seed for seed in having or () if seed in (lacking or ())]
    if not having or not lacking or not both:
        return None
    top1 = Spread.of([_top1(having[seed], size) - _top1(lacking[seed], size) for seed in both])
    times = [fmean(group[seed].summary["wall_seconds"] for seed in both) for group in (having, lacking)]
    assert top1 is not None
    return Difference(top1, times[0] / times[1])


def seed_noise(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation over seeds, pooled over variants: each has few runs, all together have many.

    Args:
        groups: The accuracies of each variant's runs.

    Returns:
        The root of the mean variance, weighed by degrees of freedom (n - 1 each); None where every group has one run.
    """
    many = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in many)
    if not freedom:
        return None
    return math.sqrt(sum((len(group) - 1) * variance(group) for group in many) / freedom)
