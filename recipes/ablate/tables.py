"""The results as cells of text, and those as Markdown, and as CSV with every digit."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from data.text import spreadsheet
from recipes.ablate.results import Difference, Results, Row, Spread, seed_noise

ABSENT = "-"
CSV_FIELDS = (
    *("variant", "techniques_on", "n", "failed", "not_run"),
    *("top1", "top1_std", "top1_min", "top1_max", "top1_minus_baseline"),
    *("wall_seconds", "wall_seconds_std", "wall_seconds_over_baseline"),
    *("images_per_second", "images_per_second_std", "images_per_second_over_baseline"),
    *("target_top1", "seconds_to_target", "epochs_to_target", "seconds_to_target_over_baseline", "on_pareto_front"),
)


class Table(NamedTuple):
    """Headers and cells, all text."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numbers(self) -> list[int]:
        """The columns that are set flush right: those of figures."""
        return [index for index, header in enumerate(self.headers) if header not in ("variant", "technique", "note")]


def percent(spread: Spread | None) -> str:
    """`96.30 ± 0.40` from a share; the second number is the standard deviation over the seeds."""
    if spread is None:
        return ABSENT
    return f"{100 * spread.mean:.2f}" + ("" if spread.std is None else f" ± {100 * spread.std:.2f}")


def points(share: float | None) -> str:
    """`+1.35`: a difference of shares in percentage points."""
    return ABSENT if share is None else f"{100 * share:+.2f}"


def seconds(value: float | None) -> str:
    """`8.8 s`, `209 s`, `35.2 min` or `10.5 h`."""
    if value is None:
        return ABSENT
    if value < 600:
        return f"{value:.1f} s" if value < 99.95 else f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def times(ratio: float | None) -> str:
    """`1.10x`."""
    return ABSENT if ratio is None else f"{ratio:.2f}x"


def over(spread: Spread | None, baseline: Spread | None) -> float | None:
    """The ratio of two means."""
    return None if spread is None or baseline is None or not baseline.mean else spread.mean / baseline.mean


def gain(row: Row, results: Results) -> float | None:
    """Top-1 less the baseline's, as a share."""
    base = results.baseline
    if base is None or results.size not in row.top1 or results.size not in base.top1:
        return None
    return row.top1[results.size].mean - base.top1[results.size].mean


def target_ratio(row: Row, results: Results) -> float | None:
    """Time to the target over the baseline's."""
    base = results.baseline
    if base is None or base.reached is None or row.reached is None or not base.reached.wall_seconds:
        return None
    return row.reached.wall_seconds / base.reached.wall_seconds


def name(row: Row) -> str:
    """`without mixup`."""
    return row.variant.name.replace("-", " ", 1)


def note(row: Row) -> str:
    """`*`: on the Pareto front; `1 failed`; `1 not run`."""
    parts = [
        "*" * row.on_front,
        f"{row.failed} failed" * bool(row.failed),
        f"{row.missing} not run" * bool(row.missing),
    ]
    return " ".join(part for part in parts if part)


def accuracy_table(results: Results, sizes: Sequence[int]) -> Table:
    """Top-1 of each variant at some image sizes, and against the baseline at the main one."""
    headers = ("variant", "n", *(f"% at {size} px" for size in sizes), "gain", "note")
    return Table(
        headers,
        tuple(
            (
                name(row),
                str(len(row.seeds)),
                *(percent(row.top1.get(size)) for size in sizes),
                points(gain(row, results)),
                note(row),
            )
            for row in results.rows
        ),
    )


def cost_table(results: Results) -> Table:
    """Time, throughput, and time and epochs to the target, each with its ratio to the baseline's."""
    base = results.baseline
    goal = "target" if results.target is None else f"{100 * results.target:.1f}%"
    headers = ("variant", "time", "ratio", "img/s", "ratio", f"to {goal}", "epochs", "ratio")
    rows = []
    for row in results.rows:
        wall, speed, reached = row.wall_seconds, row.images_per_second, row.reached
        missed = results.target is not None and reached is None and row.curve
        rows.append(
            (
                name(row),
                seconds(wall and wall.mean),
                times(over(wall, base and base.wall_seconds)),
                ABSENT if speed is None else f"{speed.mean:.0f}",
                times(over(speed, base and base.images_per_second)),
                "never" if missed else seconds(reached and reached.wall_seconds),
                ABSENT if reached is None else f"{reached.epoch:.1f}",
                times(target_ratio(row, results)),
            )
        )
    return Table(headers, tuple(rows))


def effect_table(results: Results) -> Table:
    """What each technique adds, alone and in the recipe."""

    def cells(difference: Difference | None) -> tuple[str, str]:
        if difference is None:
            return ABSENT, ABSENT
        spread = difference.top1
        return points(spread.mean) + ("" if spread.std is None else f" ± {100 * spread.std:.2f}"), times(
            difference.seconds_ratio
        )

    return Table(
        ("technique", "alone: top-1", "time", "in the recipe: top-1", "time"),
        tuple((effect.technique, *cells(effect.alone), *cells(effect.in_recipe)) for effect in results.effects),
    )


def notes(results: Results, groups: Sequence[Sequence[float]], eval_interval: int) -> list[str]:
    """What the numbers mean, a sentence or two each.

    Args:
        results: The results.
        groups: Top-1 of each variant's runs at the main size.
        eval_interval: Epochs between two evaluations.
    """
    found = [
        f"Top-1 and time are means over n seeds, ± is their sample standard deviation. Gains and ratios are over the "
        f"baseline, gains in percentage points of top-1 at {results.size} px. A star: on the Pareto front of time and "
        "top-1.",
        "Alone: the technique added to the baseline. In the recipe: the recipe less the recipe without the technique. "
        "Both seed by seed.",
    ]
    noise, n = seed_noise(groups), max((len(group) for group in groups), default=0)
    if noise is not None:
        error = 100 * noise * (2 / n) ** 0.5
        found.append(
            f"Over all variants a run's top-1 has a standard deviation of {100 * noise:.2f} points between seeds, so "
            f"the difference of two means of n = {n} has a standard error of {error:.2f} points: less than about "
            f"{2 * error:.1f} points is not told apart from chance."
        )
    if results.target is not None:
        every = "epoch" if eval_interval == 1 else f"{eval_interval} epochs"
        found.append(
            f"Time to {100 * results.target:.2f} %: where the mean curve over the seeds first reaches it, on a "
            f"straight line between two evaluations (one every {every}); the first evaluation counts as it is."
        )
    found.append(
        "Time is that of training, loading, evaluation and checkpoints, without the program's start." + _jitter(results)
    )
    return found


def _jitter(results: Results) -> str:
    """How far to trust the times: their relative standard deviation over the seeds, pooled as that of top-1 is."""
    walls = [row.wall_seconds for row in results.rows if row.wall_seconds and row.wall_seconds.std is not None]
    freedom = sum(wall.n - 1 for wall in walls)
    if not freedom:
        return ""
    share = (sum((wall.n - 1) * ((wall.std or 0.0) / wall.mean) ** 2 for wall in walls) / freedom) ** 0.5
    return f" Between seeds, that of one variant has a standard deviation of {100 * share:.0f} %."


def markdown(table: Table) -> str:
    """The table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---:" if index in table.numbers else "---" for index in range(len(table.headers))]
    return "\n".join([line(table.headers), line(rule), *map(line, table.rows)]) + "\n"


def csv_text(results: Results) -> str:
    """One line per variant with every digit: shares for accuracies, seconds for times; empty where nothing is known."""
    base = results.baseline
    others = [size for size in results.sizes if size != results.size]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_FIELDS, *(f"top1_{size}px{part}" for size in others for part in ("", "_std"))])
    for row in results.rows:
        top1, wall, speed, reached = row.top1.get(results.size), row.wall_seconds, row.images_per_second, row.reached
        cells = [spreadsheet(row.variant.name), " ".join(row.variant.on), len(row.seeds), row.failed, row.missing]
        cells += [*(top1[:4] if top1 else [None] * 4), gain(row, results)]
        cells += [*(wall[:2] if wall else [None] * 2), over(wall, base and base.wall_seconds)]
        cells += [*(speed[:2] if speed else [None] * 2), over(speed, base and base.images_per_second)]
        cells += [results.target, reached and reached.wall_seconds, reached and reached.epoch]
        cells += [target_ratio(row, results), int(row.on_front)]
        for size in others:
            cells += row.top1[size][:2] if size in row.top1 else [None] * 2
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()
