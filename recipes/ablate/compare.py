"""From the runs of an ablation to its comparison: means and spreads over seeds, tables, charts, files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from data.text import markdown as markdown_text
from data.text import spreadsheet
from recipes.ablate.plan import Plan, Variant
from recipes.output import COLORS, Table, chart, csv_text, png, render_page, svg, time_unit
from recipes.results import Evaluation, Results, first_reached, mean_curve, short_commit
from recipes.watch.files import replace_file, replace_text

if TYPE_CHECKING:
    from recipes.ablate.__main__ import Outcome

ABSENT = "-"
CSV_FIELDS = (
    *("variant", "techniques_on", "n", "failed", "not_run"),
    *("top1", "top1_std", "top1_min", "top1_max", "top1_minus_baseline"),
    *("wall_seconds", "wall_seconds_std", "wall_seconds_over_baseline"),
    *("images_per_second", "images_per_second_std", "images_per_second_over_baseline"),
    *("target_top1", "seconds_to_target", "epochs_to_target", "seconds_to_target_over_baseline", "on_pareto_front"),
)
FRONT, TARGET = "#b6c2cf", "#59636e"


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

    def error(self, scale: float) -> list[list[float]]:
        """Distances from the mean to the lowest and the highest value, as matplotlib's error bars take them."""
        return [[scale * (self.mean - self.low)], [scale * (self.high - self.mean)]]


class Row(NamedTuple):
    """One variant over its seeds; None where no run is finished."""

    variant: Variant
    n: int
    """Finished runs."""
    failed: int
    missing: int
    """Runs that were not started, or are not finished."""
    top1: dict[int, Spread]
    """In [0, 1], by image size in pixels."""
    wall_seconds: Spread | None
    images_per_second: Spread | None
    curve: tuple[Evaluation, ...]
    """Mean over the seeds, at the main size."""
    reached: Evaluation | None
    """Where that curve reaches the target."""
    on_front: bool = False
    """No other variant is at least as fast and at least as accurate, and better in one of the two."""
    gain: float | None = None
    """Top-1 less the baseline's."""
    time_ratio: float | None = None
    speed_ratio: float | None = None
    target_ratio: float | None = None
    """Wall time, images/s and time to the target over the baseline's."""

    @property
    def name(self) -> str:
        """`without mixup`."""
        return self.variant.name.replace("-", " ", 1)


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


class Comparison(NamedTuple):
    """An ablation's result."""

    size: int
    """Image size in pixels at which accuracies are compared."""
    sizes: tuple[int, ...]
    target: float | None
    """Top-1 in [0, 1] whose time is compared."""
    rows: tuple[Row, ...]
    effects: tuple[Effect, ...]
    title: str = ""
    setting: str = ""
    """What was run on what."""
    notes: Sequence[str] = ()
    """What the numbers mean."""
    remarks: Sequence[str] = ()
    """Failed and missing runs, what makes runs hard to compare."""
    command: str = ""
    """What was typed."""


Runs = Mapping[Variant, Mapping[int, Results]]
"""The finished runs by variant and seed."""


def compare(plan: Plan, outcomes: Sequence[Outcome], size: int, target: float | None, command: str) -> Comparison:
    """Compare the variants of an ablation.

    Args:
        plan: The ablation.
        outcomes: One for each of its runs.
        size: Image size in pixels at which accuracies are compared.
        target: Top-1 in [0, 1] to time; None: the baseline's mean at its end.
        command: What was typed.
    """
    recipe, variants = plan.recipe, plan.variants
    runs: dict[Variant, dict[int, Results]] = {variant: {} for variant in variants}
    for outcome in outcomes:
        if outcome.run is not None:
            runs[outcome.planned.variant][outcome.planned.seed] = outcome.run
    failed = Counter(outcome.planned.variant for outcome in outcomes if outcome.failure)
    found = compare_runs(variants, runs, failed, len(plan.seeds), recipe.eval.sizes, size, target)
    finished = [run for done in runs.values() for run in done.values()]
    versions = [run.summary.get("versions") or {} for run in finished]
    devices = sorted({str(entry.get("device")) for entry in versions})
    seeds = ", ".join(map(str, plan.seeds))
    setting = (
        f"{len(variants)} variants of {recipe.model.name}, {recipe.epochs} epochs each, seeds {seeds}: "
        f"{len(finished)} of {len(plan.runs)} runs are finished{'. ' if devices else ''}{', '.join(devices)}."
    )

    remarks = [f"Failed: {outcome.planned.label}, {outcome.failure}" for outcome in outcomes if outcome.failure]
    missing = sum(row.missing for row in found.rows)
    if missing:
        remarks.append(f"{missing} of {len(outcomes)} runs are not finished; run the same command again to resume.")
    mixing = {len({"mixup", "cutmix"} & set(variant.on)) for variant in variants}
    if recipe.algorithms.cutmix is not None and {1, 2} <= mixing:
        remarks.append(
            "Where MixUp and CutMix are both on, a batch gets CutMix with probability "
            f"{recipe.algorithms.cutmix.switch_prob:g} and MixUp otherwise; without one of them, the other acts on "
            "every batch."
        )
    for key in dict.fromkeys(key for entry in versions for key in entry):
        counts = Counter(short_commit(str(entry.get(key))) for entry in versions)
        if len(counts) > 1:
            shares = ", ".join(f"{value} ({count} runs)" for value, count in counts.most_common())
            remarks.append(f"Not the same in all runs: {key}: {shares}.")
    return found._replace(
        title=f"Ablation of {recipe.run_name}",
        setting=setting,
        notes=notes(found, recipe.eval.interval),
        remarks=remarks,
        command=command,
    )


def compare_runs(
    variants: Sequence[Variant],
    runs: Runs,
    failed: Mapping[Variant, int],
    seeds: int,
    sizes: Sequence[int],
    size: int,
    target: float | None,
) -> Comparison:
    """The numbers of a comparison.

    Args:
        variants: In the order of the tables.
        runs: Those that finished.
        failed: How many failed.
        seeds: How many runs of each variant there should be.
        sizes: Of the evaluation, in pixels.
        size: That of `sizes` at which accuracies are compared.
        target: Top-1 in [0, 1]; None: the baseline's mean at its end.
    """
    baseline = next((runs.get(variant, {}) for variant in variants if not variant.on), {})
    if target is None and baseline:
        target = fmean(_top1(run, size) for run in baseline.values())
    rows = []
    for variant in variants:
        done = list(runs.get(variant, {}).values())
        curve = mean_curve([run.evaluations(size) for run in done])
        row = Row(
            variant,
            len(done),
            failed.get(variant, 0),
            seeds - len(done) - failed.get(variant, 0),
            {px: spread for px in sizes if (spread := Spread.of([_top1(run, px) for run in done]))},
            Spread.of([run.summary["wall_seconds"] for run in done]),
            Spread.of([run.summary["images_per_second"] for run in done]),
            curve,
            None if target is None else first_reached(curve, target - 1e-9),
        )
        rows.append(row)
    front = pareto({row.variant: (row.wall_seconds.mean, row.top1[size].mean) for row in rows if row.wall_seconds})
    base = next((row for row in rows if not row.variant.on and row.n), None)
    for index, row in enumerate(rows):
        row = rows[index] = row._replace(on_front=row.variant in front)
        if base is not None and row.n:
            rows[index] = row._replace(
                gain=row.top1[size].mean - base.top1[size].mean,
                time_ratio=_over(row.wall_seconds, base.wall_seconds),
                speed_ratio=_over(row.images_per_second, base.images_per_second),
                target_ratio=row.reached.wall_seconds / base.reached.wall_seconds
                if row.reached and base.reached
                else None,
            )
    return Comparison(size, tuple(sizes), target, tuple(rows), _effects(variants, runs, size))


def _over(spread: Spread | None, baseline: Spread | None) -> float | None:
    return spread.mean / baseline.mean if spread and baseline and baseline.mean else None


def _top1(run: Results, size: int) -> float:
    return float(run.summary["eval_by_size"][str(size)]["top1"])


def pareto(points: Mapping[Any, tuple[float, float]]) -> set[Any]:
    """The names of the points (cost, gain) to which no other is at least equal in both and better in one."""

    def beaten(cost: float, gain: float) -> bool:
        others = (point for point in points.values() if point != (cost, gain))
        return any(other_cost <= cost and other_gain >= gain for other_cost, other_gain in others)

    return {name for name, point in points.items() if not beaten(*point)}


def _effects(variants: Sequence[Variant], runs: Runs, size: int) -> tuple[Effect, ...]:
    """What each technique is worth, where at least one of its two comparisons was chosen."""
    by_techniques = {frozenset(variant.on): runs.get(variant, {}) for variant in variants}
    order = dict.fromkeys(name for variant in variants for name in (*variant.on, *variant.off))
    everything, nothing = frozenset(order), frozenset[str]()

    def difference(having: frozenset[str], lacking: frozenset[str]) -> Difference | None:
        with_it, without = (by_techniques.get(chosen, {}) for chosen in (having, lacking))
        both = [seed for seed in with_it if seed in without]
        top1 = Spread.of([_top1(with_it[seed], size) - _top1(without[seed], size) for seed in both])
        if top1 is None:
            return None
        seconds = [fmean(group[seed].summary["wall_seconds"] for seed in both) for group in (with_it, without)]
        return Difference(top1, seconds[0] / seconds[1])

    return tuple(
        Effect(name, difference(frozenset({name}), nothing), difference(everything, everything - {name}))
        for name in order
        if frozenset({name}) in by_techniques or everything - {name} in by_techniques
    )


def pooled_std(spreads: Sequence[Spread | None], relative: bool = False) -> float | None:
    """The standard deviation over seeds, pooled over variants: each has few runs, all together have many.

    Args:
        spreads: Of each variant.
        relative: Pool standard deviations over means.

    Returns:
        The root of the mean variance, weighed by degrees of freedom (n - 1 each); None where every variant has one run.
    """
    many = [(one.n - 1, one.std / (one.mean if relative else 1)) for one in spreads if one and one.std is not None]
    freedom = sum(degrees for degrees, _ in many)
    return math.sqrt(sum(degrees * std**2 for degrees, std in many) / freedom) if freedom else None


def standard_error(comparison: Comparison) -> float | None:
    """Of the difference between two variants' means of top-1, as a share, from the noise between seeds."""
    noise = pooled_std([row.top1.get(comparison.size) for row in comparison.rows])
    return None if noise is None else noise * (2 / max(row.n for row in comparison.rows)) ** 0.5


def notes(comparison: Comparison, eval_interval: int) -> list[str]:
    """What the numbers mean, given the epochs between two evaluations."""
    size, target = comparison.size, comparison.target
    found = [
        f"Top-1 and time are means over n seeds, ± is their sample standard deviation. Gains and ratios are over the "
        f"baseline, gains in percentage points of top-1 at {size} px. A star: on the Pareto front of time and top-1.",
        "Alone: the technique added to the baseline. In the recipe: the recipe less the recipe without the technique. "
        "Both seed by seed.",
    ]
    noise, error = pooled_std([row.top1.get(size) for row in comparison.rows]), standard_error(comparison)
    if noise is not None and error is not None:
        found.append(
            f"Over all variants a run's top-1 has a standard deviation of {100 * noise:.2f} points between seeds, so "
            f"the difference of two means of n = {max(row.n for row in comparison.rows)} has a standard error of "
            f"{100 * error:.2f} points: less than about {200 * error:.1f} points cannot be told from chance."
        )
    if target is not None:
        every = "epoch" if eval_interval == 1 else f"{eval_interval} epochs"
        found.append(
            f"Time to {100 * target:.2f} %: where the mean curve over the seeds first reaches it, on a straight line "
            f"between two evaluations (one every {every}); the first evaluation counts as it is."
        )
    jitter = pooled_std([row.wall_seconds for row in comparison.rows], relative=True)
    found.append(
        "Time is that of training, loading, evaluation and checkpoints, without the program's start."
        + (
            f" Between seeds, that of one variant has a standard deviation of {100 * jitter:.0f} %."
            if jitter is not None
            else ""
        )
    )
    return found


def _percent(spread: Spread | None) -> str:
    if spread is None:
        return ABSENT
    return f"{100 * spread.mean:.2f}" + ("" if spread.std is None else f" ± {100 * spread.std:.2f}")


def _seconds(value: float | None) -> str:
    """`8.8 s`, `209 s`, `35.2 min` or `10.5 h`."""
    if value is None:
        return ABSENT
    divisor, unit = time_unit(value)
    return f"{value:.0f} s" if 99.95 <= value < 600 else f"{value / divisor:.1f} {unit}"


def _times(ratio: float | None) -> str:
    return ABSENT if ratio is None else f"{ratio:.2f}x"


def accuracy_table(comparison: Comparison, sizes: Sequence[int]) -> Table:
    """Top-1 of each variant at some image sizes, and against the baseline at the main one."""
    rows = []
    for row in comparison.rows:
        counts = ((row.failed, "failed"), (row.missing, "not run"))
        note = " ".join(["*"] * row.on_front + [f"{count} {what}" for count, what in counts if count])
        shares = [_percent(row.top1.get(size)) for size in sizes]
        rows.append([row.name, str(row.n), *shares, ABSENT if row.gain is None else f"{100 * row.gain:+.2f}", note])
    return Table(
        ["variant", "n", *(f"% at {size} px" for size in sizes), "gain", "note"], rows, range(1, 3 + len(sizes))
    )


def cost_table(comparison: Comparison) -> Table:
    """Time, throughput, and time and epochs to the target, each with its ratio to the baseline's."""
    target, rows = comparison.target, []
    for row in comparison.rows:
        wall, speed, reached = row.wall_seconds, row.images_per_second, row.reached
        never = target is not None and reached is None and row.curve
        cells = [_seconds(wall and wall.mean), _times(row.time_ratio)]
        cells += [ABSENT if speed is None else f"{speed.mean:.0f}", _times(row.speed_ratio)]
        cells += ["never" if never else _seconds(reached and reached.wall_seconds)]
        cells += [ABSENT if reached is None else f"{reached.epoch:.1f}", _times(row.target_ratio)]
        rows.append([row.name, *cells])
    goal = "target" if target is None else f"{100 * target:.1f}%"
    return Table(["variant", "time", "ratio", "img/s", "ratio", f"to {goal}", "epochs", "ratio"], rows, range(1, 8))


def effect_table(comparison: Comparison) -> Table:
    """What each technique adds, alone and in the recipe."""

    def cells(difference: Difference | None) -> tuple[str, str]:
        if difference is None:
            return ABSENT, ABSENT
        top1 = difference.top1
        deviation = "" if top1.std is None else f" ± {100 * top1.std:.2f}"
        return f"{100 * top1.mean:+.2f}{deviation}", _times(difference.seconds_ratio)

    rows = [(one.technique, *cells(one.alone), *cells(one.in_recipe)) for one in comparison.effects]
    return Table(["technique", "alone: top-1", "time", "in the recipe: top-1", "time"], rows, range(1, 5))


def csv_table(comparison: Comparison) -> str:
    """One line per variant: shares for accuracies, seconds for times; empty where nothing is known."""
    others, rows = [size for size in comparison.sizes if size != comparison.size], []
    for row in comparison.rows:
        top1, wall = row.top1.get(comparison.size) or [None] * 4, row.wall_seconds or [None] * 2
        speed, reached = row.images_per_second or [None] * 2, row.reached
        cells: list[object] = [spreadsheet(row.variant.name), " ".join(row.variant.on), row.n, row.failed, row.missing]
        cells += [*top1[:4], row.gain, *wall[:2], row.time_ratio, *speed[:2], row.speed_ratio, comparison.target]
        cells += [reached and reached.wall_seconds, reached and reached.epoch, row.target_ratio, int(row.on_front)]
        rows.append([*cells, *(cell for size in others for cell in (row.top1.get(size) or [None] * 2)[:2])])
    return csv_text([*CSV_FIELDS, *(f"top1_{size}px{part}" for size in others for part in ("", "_std"))], rows)


def show(comparison: Comparison, console: Console) -> None:
    """Print the tables, each of which fits 80 columns; without a finished run only the remarks."""
    texts = comparison.remarks
    if any(row.n for row in comparison.rows):
        texts = (*comparison.notes, *comparison.remarks)
        others = [size for size in comparison.sizes if size != comparison.size]
        console.print()
        for caption, table in (
            ("What each technique adds", effect_table(comparison)),
            ("Accuracy: top-1", accuracy_table(comparison, [*others[-1:], comparison.size])),
            ("Cost", cost_table(comparison)),
        ):
            if table.rows:
                console.print(f"[bold]{caption}[/bold]", table.terminal(console.width), "", sep="\n")
    for text in texts:
        console.print(text, markup=False, highlight=False)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write table.md, table.csv, ablation.html and, where a run is finished, accuracy.png into a folder that exists.

    Raises:
        OSError: A file cannot be written; the one before it is untouched.
    """
    tables = {
        "What each technique adds": effect_table(comparison),
        "Accuracy: top-1": accuracy_table(comparison, comparison.sizes),
        "Cost": cost_table(comparison),
    }
    parts = [f"# {comparison.title}", comparison.setting]
    parts += [f"## {title}\n\n{table.markdown()}".rstrip() for title, table in tables.items() if table.rows]
    parts += comparison.notes
    if comparison.remarks:
        parts += ["## Remarks", *(f"- {markdown_text(text)}" for text in comparison.remarks)]
    parts.append(f"```sh\n{comparison.command}\n```\n")
    written = [folder / "table.md", folder / "table.csv"]
    replace_text(written[0], "\n\n".join(parts))
    replace_text(written[1], csv_table(comparison))
    charts: dict[str, Markup] = {}
    if any(row.n for row in comparison.rows):
        with chart(11, 6.5) as figure:
            draw_accuracy(figure, comparison)
            charts["Accuracy: top-1"] = svg(figure, "Top-1 against time for each variant, and the Pareto front")
            written.append(folder / "accuracy.png")
            replace_file(written[-1], [png(figure)])
        if comparison.effects:
            with chart(9, 1.6 + 0.5 * len(comparison.effects)) as figure:
                draw_effects(figure, comparison)
                alt = "Change of top-1 by each technique, alone and in the recipe"
                charts["What each technique adds"] = svg(figure, alt)
    written.append(folder / "ablation.html")
    values = {"comparison": comparison, "tables": tables, "charts": charts}
    replace_text(written[-1], render_page("ablate/ablation.html.jinja", comparison.title, comparison.setting, **values))
    return written


def _looks(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """How each variant is drawn: a technique has a colour and a marker, hollow and dashed where it is taken away."""
    names = dict.fromkeys(name for row in comparison.rows for name in (*row.variant.on, *row.variant.off))
    looks = dict(zip(names, zip(cycle(COLORS[:6]), cycle("sD^vP*Xh<>p")), strict=False))
    found = {}
    for row in comparison.rows:
        kind, _, technique = row.variant.name.partition("-")
        color, marker = looks[technique] if technique else (COLORS[6], "o")
        dashes: Any = {"baseline": (0, (4, 1.5)), "without": "--"}.get(kind, "-")
        face = color if kind in ("recipe", "with") else "white"
        look = {"color": color, "marker": marker, "linestyle": dashes, "markerfacecolor": face}
        found[row.variant.name] = look
    return found


def draw_accuracy(figure: Figure, comparison: Comparison) -> None:
    """Left: how top-1 grew with time; right: where each variant ended, and the Pareto front."""
    finished = [(row, row.wall_seconds) for row in comparison.rows if row.wall_seconds is not None]
    divisor, unit = time_unit(max(wall.high for _, wall in finished))
    looks, size = _looks(comparison), comparison.size
    curves, ends = figure.subplots(1, 2)
    for row, wall in finished:
        look, top1, main = looks[row.variant.name], row.top1[size], "-" not in row.variant.name
        curves.plot(
            [entry.wall_seconds / divisor for entry in row.curve],
            [100 * entry.top1 for entry in row.curve],
            **look | {"linewidth": 2.4 if main else 1.1, "markersize": 6 if main else 4},
            alpha=1.0 if main else 0.75,
            zorder=3 if main else 2,
        )
        place = (wall.mean / divisor, 100 * top1.mean)
        bars = {"xerr": wall.error(1 / divisor), "yerr": top1.error(100), "elinewidth": 0.6, "zorder": 3}
        ends.errorbar(*place, **look | bars | {"linestyle": "none", "markersize": 7})
        curves.plot([], [], **look, linewidth=1.2, label=row.name)
    front = sorted((wall.mean / divisor, 100 * row.top1[size].mean) for row, wall in finished if row.on_front)
    ends.step(*zip(*front, strict=True), where="post", color=FRONT, linewidth=4.0, zorder=1, label="Pareto front")
    if comparison.target is not None:
        label = f"target {100 * comparison.target:.2f} %"
        curves.axhline(100 * comparison.target, color=TARGET, linewidth=0.8, linestyle=":", label=label)
    curves.set_xlim(left=0)
    for axes, title in ((curves, "Accuracy against time"), (ends, "Where each variant ended")):
        axes.set(xlabel=f"time of training, loading, evaluation [{unit}]", title=title)
        axes.set_ylabel(f"top-1 at {size} px [%]")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", handlelength=3.5)


def draw_effects(figure: Figure, comparison: Comparison) -> None:
    """A bar for each technique alone and in the recipe, in points of top-1, with the range over the seeds."""
    axes, error = figure.subplots(), standard_error(comparison)
    shown = [effect for effect in comparison.effects if effect.alone or effect.in_recipe]
    if error is not None:
        label = "two standard errors of seed noise"
        axes.axvspan(-200 * error, 200 * error, color="#e3e7eb", zorder=0, label=label)
    for shift, color, label, differences in (
        (-0.19, COLORS[0], "added to the baseline", [effect.alone for effect in shown]),
        (0.19, COLORS[1], "in the recipe (less the recipe without it)", [effect.in_recipe for effect in shown]),
    ):
        bars = [(place + shift, one.top1) for place, one in enumerate(differences) if one is not None]
        axes.barh(
            [place for place, _ in bars],
            [100 * top1.mean for _, top1 in bars],
            height=0.36,
            color=color,
            xerr=np.hstack([np.empty((2, 0)), *(top1.error(100) for _, top1 in bars)]),
            error_kw={"elinewidth": 0.8},
            label=label,
        )
    axes.axvline(0, color=COLORS[6], linewidth=0.8)
    axes.set_yticks(range(len(shown)), [effect.technique for effect in shown])
    axes.set(xlabel=f"change of top-1 at {comparison.size} px [percentage points]", ylim=(len(shown) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
