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
from rich.console import Console

from data.text import markdown as markdown_text
from data.text import spreadsheet
from recipes.ablate import Outcome, Plan, Variant
from recipes.output import ABSENT, COLORS, DIM, Table, chart, csv_text, duration, render_page, save, svg, time_unit
from recipes.results import Evaluation, Results, first_reached, mean_curve, short_commit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSV_FIELDS = (
    *("variant", "techniques_on", "n", "failed", "not_run"),
    *("top1", "top1_std", "top1_min", "top1_max", "top1_minus_baseline"),
    *("wall_seconds", "wall_seconds_std", "wall_seconds_over_baseline"),
    *("images_per_second", "images_per_second_std", "images_per_second_over_baseline"),
    *("target_top1", "seconds_to_target", "epochs_to_target", "seconds_to_target_over_baseline", "on_pareto_front"),
)
EFFECTS, ACCURACY = "What each technique adds", "Accuracy: top-1"


class Spread(NamedTuple):
    """Some values of one quantity."""

    mean: float
    std: float | None  # sample standard deviation (n - 1 degrees of freedom); None of one value
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
    n: int  # finished runs
    failed: int
    missing: int  # runs that were not started, or are not finished
    top1: dict[int, Spread]  # in [0, 1], by image size in pixels
    wall_seconds: Spread | None
    images_per_second: Spread | None
    curve: tuple[Evaluation, ...]  # mean over the seeds, at the main size
    reached: Evaluation | None  # where that curve reaches the target

    @property
    def name(self) -> str:
        """`without mixup`."""
        return self.variant.name.replace("-", " ", 1)


class Ratios(NamedTuple):
    """A variant against the baseline: top-1 less the baseline's, and figures over the baseline's; None: unknown."""

    gain: float | None = None
    wall_seconds: float | None = None
    images_per_second: float | None = None
    seconds_to_target: float | None = None


class Difference(NamedTuple):
    """What adding a technique changes."""

    top1: Spread  # top-1 with it less top-1 without it, seed by seed
    seconds_ratio: float  # mean wall time with it over mean wall time without it


class Effect(NamedTuple):
    """What a technique is worth; None where runs are missing."""

    technique: str
    alone: Difference | None  # added to the baseline
    in_recipe: Difference | None  # the recipe against the recipe without it


class Comparison(NamedTuple):
    """An ablation's result."""

    size: int  # image size in pixels at which accuracies are compared
    sizes: tuple[int, ...]
    target: float | None  # top-1 in [0, 1] whose time is compared
    rows: tuple[Row, ...]
    effects: tuple[Effect, ...]
    title: str = ""
    setting: str = ""  # what was run on what
    notes: Sequence[str] = ()  # what the numbers mean
    remarks: Sequence[str] = ()  # failed and missing runs, what makes runs hard to compare
    command: str = ""  # what was typed

    def ratios(self, row: Row) -> Ratios:
        """A variant against the baseline."""
        base = next((one for one in self.rows if not one.variant.on and one.n), None)
        if base is None or not row.n:
            return Ratios()

        def over(spread: Spread | None, baseline: Spread | None) -> float | None:
            return spread.mean / baseline.mean if spread and baseline and baseline.mean else None

        return Ratios(
            row.top1[self.size].mean - base.top1[self.size].mean,
            over(row.wall_seconds, base.wall_seconds),
            over(row.images_per_second, base.images_per_second),
            row.reached.wall_seconds / base.reached.wall_seconds if row.reached and base.reached else None,
        )

    @property
    def front(self) -> set[str]:
        """The variants on the Pareto front of time and top-1."""
        timed = [(row, row.wall_seconds) for row in self.rows if row.wall_seconds]
        return pareto({row.variant.name: (wall.mean, row.top1[self.size].mean) for row, wall in timed})

    def pooled_std(self) -> float | None:
        """The standard deviation of one run's top-1 between seeds."""
        return pooled_std([row.top1.get(self.size) for row in self.rows])

    def standard_error(self) -> float | None:
        """Of the difference between two variants' means of top-1, as a share, from the noise between seeds."""
        noise = self.pooled_std()
        return None if noise is None else noise * (2 / max(row.n for row in self.rows)) ** 0.5


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
    setting = (
        f"{len(variants)} variants of {recipe.model.name}, {recipe.epochs} epochs each, "
        f"seeds {', '.join(map(str, plan.seeds))}: "
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
    runs: Mapping[Variant, Mapping[int, Results]],
    failed: Mapping[Variant, int],
    seeds: int,
    sizes: Sequence[int],
    size: int,
    target: float | None,
) -> Comparison:
    """The numbers of a comparison.

    Args:
        variants: In the order of the tables.
        runs: Those that finished, by seed.
        failed: How many failed.
        seeds: How many runs of each variant there should be.
        sizes: Of the evaluation, in pixels.
        size: That of `sizes` at which accuracies are compared.
        target: Top-1 in [0, 1]; None: the baseline's mean at its end.
    """
    by_techniques = {frozenset(variant.on): runs.get(variant, {}) for variant in variants}
    baseline = by_techniques.get(frozenset(), {})
    if target is None and baseline:
        target = fmean(_top1(run, size) for run in baseline.values())
    rows = []
    for variant in variants:
        done, gone = list(runs.get(variant, {}).values()), failed.get(variant, 0)
        curve = mean_curve([run.evaluations(size) for run in done])
        row = Row(
            variant,
            n=len(done),
            failed=gone,
            missing=seeds - len(done) - gone,
            top1={px: spread for px in sizes if (spread := Spread.of([_top1(run, px) for run in done]))},
            wall_seconds=Spread.of([run.summary["wall_seconds"] for run in done]),
            images_per_second=Spread.of([run.summary["images_per_second"] for run in done]),
            curve=curve,
            reached=None if target is None else first_reached(curve, target - 1e-9),
        )
        rows.append(row)

    def difference(having: frozenset[str], lacking: frozenset[str]) -> Difference | None:
        with_it, without = (by_techniques.get(chosen, {}) for chosen in (having, lacking))
        both = [seed for seed in with_it if seed in without]
        top1 = Spread.of([_top1(with_it[seed], size) - _top1(without[seed], size) for seed in both])
        if top1 is None:
            return None
        seconds = [fmean(group[seed].summary["wall_seconds"] for seed in both) for group in (with_it, without)]
        return Difference(top1, seconds[0] / seconds[1])

    order = dict.fromkeys(name for variant in variants for name in (*variant.on, *variant.off))
    everything = frozenset(order)
    effects = tuple(
        Effect(name, difference(frozenset({name}), frozenset()), difference(everything, everything - {name}))
        for name in order
        if frozenset({name}) in by_techniques or everything - {name} in by_techniques
    )
    return Comparison(size, tuple(sizes), target, tuple(rows), effects)


def _top1(run: Results, size: int) -> float:
    return float(run.summary["eval_by_size"][str(size)]["top1"])


def pareto(points: Mapping[Any, tuple[float, float]]) -> set[Any]:
    """The names of the points (cost, gain) to which no other is at least equal in both and better in one."""

    def beaten(mine: tuple[float, float]) -> bool:
        return any(cost <= mine[0] and gain >= mine[1] and (cost, gain) != mine for cost, gain in points.values())

    return {name for name, point in points.items() if not beaten(point)}


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


def notes(comparison: Comparison, eval_interval: int) -> list[str]:
    """What the numbers mean, given the epochs between two evaluations."""
    size, target = comparison.size, comparison.target
    found = [
        f"Top-1 and time are means over n seeds, ± is their sample standard deviation. Gains and ratios are over the "
        f"baseline, gains in percentage points of top-1 at {size} px. A star: on the Pareto front of time and top-1.",
        "Alone: the technique added to the baseline. In the recipe: the recipe less the recipe without the technique. "
        "Both seed by seed.",
    ]
    noise, error = comparison.pooled_std(), comparison.standard_error()
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
    time = "Time is that of training, loading, evaluation and checkpoints, without the program's start."
    jitter = pooled_std([row.wall_seconds for row in comparison.rows], relative=True)
    if jitter is not None:
        time += f" Between seeds, that of one variant has a standard deviation of {100 * jitter:.0f} %."
    return [*found, time]


def _points(spread: Spread | None, sign: str = "") -> str:
    """`91.00 ± 1.41`, in percent."""
    if spread is None:
        return ABSENT
    return f"{100 * spread.mean:{sign}.2f}" + ("" if spread.std is None else f" ± {100 * spread.std:.2f}")


def _times(ratio: float | None) -> str:
    return ABSENT if ratio is None else f"{ratio:.2f}x"


def accuracy_table(comparison: Comparison, sizes: Sequence[int]) -> Table:
    """Top-1 of each variant at some image sizes, and against the baseline at the main one."""
    rows, front = [], comparison.front
    for row in comparison.rows:
        counts, gain = ((row.failed, "failed"), (row.missing, "not run")), comparison.ratios(row).gain
        star = ["*"] if row.variant.name in front else []
        note = " ".join([*star, *(f"{count} {what}" for count, what in counts if count)])
        shares = [_points(row.top1.get(size)) for size in sizes]
        rows.append([row.name, str(row.n), *shares, ABSENT if gain is None else f"{100 * gain:+.2f}", note])
    headers = ["variant", "n", *(f"% at {size} px" for size in sizes), "gain", "note"]
    return Table(headers, rows, range(1, 3 + len(sizes)))


def cost_table(comparison: Comparison) -> Table:
    """Time, throughput, and time and epochs to the target, each with its ratio to the baseline's."""
    target, rows = comparison.target, []
    for row in comparison.rows:
        wall, speed, reached, ratios = row.wall_seconds, row.images_per_second, row.reached, comparison.ratios(row)
        never = target is not None and reached is None and row.curve
        cells = [duration(wall and wall.mean), _times(ratios.wall_seconds)]
        cells += [ABSENT if speed is None else f"{speed.mean:.0f}", _times(ratios.images_per_second)]
        cells += ["never" if never else duration(reached and reached.wall_seconds)]
        cells += [ABSENT if reached is None else f"{reached.epoch:.1f}", _times(ratios.seconds_to_target)]
        rows.append([row.name, *cells])
    goal = "target" if target is None else f"{100 * target:.1f}%"
    return Table(["variant", "time", "ratio", "img/s", "ratio", f"to {goal}", "epochs", "ratio"], rows, range(1, 8))


def effect_table(comparison: Comparison) -> Table:
    """What each technique adds, alone and in the recipe."""

    def cells(difference: Difference | None) -> tuple[str, str]:
        if difference is None:
            return ABSENT, ABSENT
        return _points(difference.top1, "+"), _times(difference.seconds_ratio)

    rows = [(one.technique, *cells(one.alone), *cells(one.in_recipe)) for one in comparison.effects]
    return Table(["technique", "alone: top-1", "time", "in the recipe: top-1", "time"], rows, range(1, 5))


def csv_table(comparison: Comparison) -> str:
    """One line per variant: shares for accuracies, seconds for times; empty where nothing is known."""
    others, rows = [size for size in comparison.sizes if size != comparison.size], []
    for row in comparison.rows:
        top1, wall = row.top1.get(comparison.size) or [None] * 4, row.wall_seconds or [None] * 2
        speed, reached, ratios = row.images_per_second or [None] * 2, row.reached, comparison.ratios(row)
        on_front = int(row.variant.name in comparison.front)
        cells: list[object] = [spreadsheet(row.variant.name), " ".join(row.variant.on), row.n, row.failed, row.missing]
        cells += [*top1[:4], ratios.gain, *wall[:2], ratios.wall_seconds]
        cells += [*speed[:2], ratios.images_per_second, comparison.target]
        cells += [reached and reached.wall_seconds, reached and reached.epoch, ratios.seconds_to_target, on_front]
        rows.append([*cells, *(cell for size in others for cell in (row.top1.get(size) or [None] * 2)[:2])])
    return csv_text([*CSV_FIELDS, *(f"top1_{size}px{part}" for size in others for part in ("", "_std"))], rows)


def _tables(comparison: Comparison, sizes: Sequence[int]) -> dict[str, Table]:
    tables = effect_table(comparison), accuracy_table(comparison, sizes), cost_table(comparison)
    return {title: table for title, table in zip((EFFECTS, ACCURACY, "Cost"), tables, strict=True) if table.rows}


def show(comparison: Comparison, console: Console) -> None:
    """Print the tables, each of which fits 80 columns; without a finished run only the remarks."""
    texts = comparison.remarks
    if any(row.n for row in comparison.rows):
        texts = (*comparison.notes, *comparison.remarks)
        others = [size for size in comparison.sizes if size != comparison.size]
        console.print()
        for title, table in _tables(comparison, [*others[-1:], comparison.size]).items():
            console.print(f"[bold]{title}[/bold]", table.terminal(console.width), "", sep="\n")
    for text in texts:
        console.print(text, markup=False, highlight=False)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write table.md, table.csv, ablation.html and, where a run is finished, accuracy.png into a folder that exists.

    Raises:
        OSError: A file cannot be written; the one before it is untouched.
    """
    from recipes.watch.files import replace_text

    tables = _tables(comparison, comparison.sizes)
    parts = [f"# {comparison.title}", comparison.setting]
    parts += [f"## {title}\n\n{table.markdown()}".rstrip() for title, table in tables.items()]
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
            _draw_accuracy(figure, comparison)
            charts[ACCURACY] = svg(figure, "Top-1 against time for each variant, and the Pareto front")
            written.append(folder / "accuracy.png")
            save(figure, written[-1])
        if comparison.effects:
            with chart(9, 1.6 + 0.5 * len(comparison.effects)) as figure:
                _draw_effects(figure, comparison)
                charts[EFFECTS] = svg(figure, "Change of top-1 by each technique, alone and in the recipe")
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
        found[row.variant.name] = {"color": color, "marker": marker, "linestyle": dashes, "markerfacecolor": face}
    return found


def _draw_accuracy(figure: Figure, comparison: Comparison) -> None:
    """Left: how top-1 grew with time; right: where each variant ended, and the Pareto front."""
    finished = [(row, row.wall_seconds) for row in comparison.rows if row.wall_seconds is not None]
    divisor, unit = time_unit(max(wall.high for _, wall in finished))
    looks, size, on_front = _looks(comparison), comparison.size, comparison.front
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
    front = [(wall.mean / divisor, 100 * row.top1[size].mean) for row, wall in finished if row.variant.name in on_front]
    step: dict[str, Any] = {"where": "post", "color": "#b6c2cf", "linewidth": 4.0, "zorder": 1}
    ends.step(*zip(*sorted(front), strict=True), **step, label="Pareto front")
    if comparison.target is not None:
        label = f"target {100 * comparison.target:.2f} %"
        curves.axhline(100 * comparison.target, color=DIM, linewidth=0.8, linestyle=":", label=label)
    curves.set_xlim(left=0)
    for axes, title in ((curves, "Accuracy against time"), (ends, "Where each variant ended")):
        axes.set(xlabel=f"time of training, loading, evaluation [{unit}]", title=title)
        axes.set_ylabel(f"top-1 at {size} px [%]")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", handlelength=3.5)


def _draw_effects(figure: Figure, comparison: Comparison) -> None:
    """A bar for each technique alone and in the recipe, in points of top-1, with the range over the seeds."""
    axes, error = figure.subplots(), comparison.standard_error()
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
