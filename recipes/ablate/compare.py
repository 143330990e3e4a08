"""Compare the runs of an ablation: means and spreads over seeds, tables, charts, files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.files import replace_text
from data.text import spreadsheet
from recipes import output
from recipes.ablate import Outcome, Plan, Variant
from recipes.output import ABSENT, COLORS, DIM, Table, chart, duration, svg
from recipes.results import Evaluation, Results, first_reached, mean_curve, short_commit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CSV_FIELDS = tuple(
    """
    variant techniques_on n failed not_run
    top1 top1_std top1_min top1_max top1_minus_baseline
    wall_seconds wall_seconds_std wall_seconds_over_baseline
    images_per_second images_per_second_std images_per_second_over_baseline
    target_top1 seconds_to_target epochs_to_target seconds_to_target_over_baseline on_pareto_front
    """.split()
)
EFFECTS, ACCURACY = "What each technique adds", "Accuracy: top-1"


class Row(NamedTuple):
    """One variant over its seeds."""

    variant: Variant
    values: dict[str, list[float]]
    """Values of each finished run: `wall_seconds`, `images_per_second`, `top1` (at the main size) and `top1_SIZEpx`."""
    figures: dict[str, float]
    """By the columns of table.csv: means and sample standard deviations of the values, and ratios; nan: unknown."""
    curve: tuple[Evaluation, ...]  # mean over the seeds, at the main size

    @property
    def name(self) -> str:
        """`without mixup`."""
        return self.variant.name.replace("-", " ", 1)


class Difference(NamedTuple):
    """What adding a technique changes, over the seeds for which both runs are finished."""

    top1: list[float]  # top-1 with it minus top-1 without it, seed by seed; may be empty
    seconds_ratio: float  # mean wall time with it divided by mean wall time without it; nan: unknown


class Effect(NamedTuple):
    """What a technique is worth."""

    technique: str
    alone: Difference  # added to the baseline
    in_recipe: Difference  # the recipe against the recipe without it


class Comparison(NamedTuple):
    """An ablation's result."""

    size: int  # image size in pixels at which accuracies are compared
    sizes: tuple[int, ...]
    target: float | None  # top-1 in [0, 1] whose time is compared
    rows: tuple[Row, ...]
    effects: tuple[Effect, ...]

    @property
    def most_seeds(self) -> int:
        """The largest number of finished runs of a variant; 0: nothing to show."""
        return max(len(row.values["top1"]) for row in self.rows)

    @property
    def seed_noise(self) -> float | None:
        """The standard deviation of a run's top-1 between seeds, over all variants."""
        return pooled_std([row.values["top1"] for row in self.rows])

    @property
    def standard_error(self) -> float | None:
        """Of a difference between two variants' mean top-1."""
        return None if self.seed_noise is None else self.seed_noise * (2 / self.most_seeds) ** 0.5


def compare(
    variants: Sequence[Variant], outcomes: Sequence[Outcome], sizes: Sequence[int], size: int, target: float | None
) -> Comparison:
    """Compare variants, given an outcome for each run.

    Accuracies are compared at `size`, one of the evaluation's `sizes` in pixels; without a target (top-1 in [0, 1]), it
    is the baseline's final mean.
    """
    runs: dict[frozenset[str], dict[int, Results]] = {frozenset(variant.on): {} for variant in variants}
    for planned, run, _ in outcomes:
        if run is not None:
            runs[frozenset(planned.variant.on)][planned.seed] = run
    if target is None and runs[frozenset()]:
        target = fmean(_top1(run, size) for run in runs[frozenset()].values())
    rows = []
    for variant in variants:
        done = list(runs[frozenset(variant.on)].values())
        others = [failure for planned, run, failure in outcomes if planned.variant == variant and run is None]
        values = {name: [float(run.summary[name]) for run in done] for name in ("wall_seconds", "images_per_second")}
        for px in sizes:
            values["top1" if px == size else f"top1_{px}px"] = [_top1(run, px) for run in done]
        curve = mean_curve([run.evaluations(size) for run in done])
        reached = (target is not None and first_reached(curve, target - 1e-9)) or Evaluation(math.nan, math.nan, 0.0)
        figures: dict[str, float] = {
            "n": len(done),
            "failed": len(others) - others.count(None),
            "not_run": others.count(None),
            "top1_min": min(values["top1"], default=math.nan),
            "top1_max": max(values["top1"], default=math.nan),
            "target_top1": math.nan if target is None else target,
            "seconds_to_target": reached.wall_seconds,
            "epochs_to_target": reached.epoch,
        }
        for name, found in values.items():
            figures[name], figures[f"{name}_std"] = _mean(found), _std(found)
        rows.append(Row(variant, values, figures, curve))
    base = next(row.figures for row in rows if not row.variant.on)
    front = pareto([(row.figures["wall_seconds"], row.figures["top1"]) for row in rows if row.values["top1"]])
    for mine in (row.figures for row in rows):
        for name in ("wall_seconds", "images_per_second", "seconds_to_target"):
            mine[f"{name}_over_baseline"] = mine[name] / (base[name] or math.nan)
        mine["top1_minus_baseline"] = mine["top1"] - base["top1"]
        mine["on_pareto_front"] = int((mine["wall_seconds"], mine["top1"]) in front)

    def difference(having: frozenset[str], lacking: frozenset[str]) -> Difference:
        with_it, without = runs.get(having, {}), runs.get(lacking, {})
        both = [seed for seed in with_it if seed in without]
        seconds = [_mean([group[seed].summary["wall_seconds"] for seed in both]) for group in (with_it, without)]
        top1 = [_top1(with_it[seed], size) - _top1(without[seed], size) for seed in both]
        return Difference(top1, seconds[0] / seconds[1])

    order = dict.fromkeys(name for variant in variants for name in (*variant.on, *variant.off))
    everything = frozenset(order)
    effects = tuple(
        Effect(name, difference(frozenset({name}), frozenset()), difference(everything, everything - {name}))
        for name in order
        if frozenset({name}) in runs or everything - {name} in runs
    )
    return Comparison(size, tuple(sizes), target, tuple(rows), effects)


def _top1(run: Results, size: int) -> float:
    return float(run.summary["eval_by_size"][str(size)]["top1"])


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan


def pareto(points: Sequence[tuple[float, float]]) -> set[tuple[float, float]]:
    """The points (cost, gain) for which no other is at least as good in both and better in one."""
    return {
        (cost, gain)
        for cost, gain in points
        if not any(other <= cost and more >= gain and (other, more) != (cost, gain) for other, more in points)
    }


def pooled_std(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups: each variant has few runs, all together have many.

    The root of the mean variance, weighted by degrees of freedom (n - 1 each); None if every group has one value.
    """
    many = [(len(group) - 1, stdev(group)) for group in groups if len(group) > 1]
    freedom = sum(degrees for degrees, _ in many)
    return math.sqrt(sum(degrees * std**2 for degrees, std in many) / freedom) if freedom else None


def _words(plan: Plan, outcomes: Sequence[Outcome], comparison: Comparison) -> output.Content:
    """What the figures mean, and remarks: failed and missing runs, differences that affect the comparison."""
    walls = [row.values["wall_seconds"] for row in comparison.rows]
    versions = [run.summary.get("versions") or {} for _, run, _ in outcomes if run is not None]
    counts = {
        key: Counter(short_commit(str(entry.get(key))) for entry in versions)
        for key in dict.fromkeys(key for entry in versions for key in entry)
    }
    mixed = {len({"mixup", "cutmix"} & set(variant.on)) for variant in plan.variants}
    return output.sections(
        "ablate/notes.txt.jinja",
        found=comparison,
        interval=plan.recipe.eval.interval,
        jitter=pooled_std([[seconds / fmean(group) for seconds in group] for group in walls]),
        outcomes=outcomes,
        missing=sum(run is None and failure is None for _, run, failure in outcomes),
        cutmix=plan.recipe.algorithms.cutmix if mixed >= {1, 2} else None,
        different={key: found.most_common() for key, found in counts.items() if len(found) > 1},
    )


def _cell(value: float, form: str, unit: str = "") -> str:
    return ABSENT if math.isnan(value) else f"{value:{form}}{unit}"


def _points(mean: float, std: float, sign: str = "") -> str:
    """`91.00 ± 1.41`, in percent."""
    return _cell(100 * mean, f"{sign}.2f") + ("" if math.isnan(std) else f" ± {100 * std:.2f}")


def accuracy_table(comparison: Comparison, sizes: Sequence[int]) -> Table:
    """Top-1 of each variant at the given image sizes, and its gain over the baseline at the main size."""
    names, rows = ["top1" if px == comparison.size else f"top1_{px}px" for px in sizes], []
    for row in comparison.rows:
        figures = row.figures
        words = ["*"] if figures["on_pareto_front"] else []
        words += [f"{figures[key]} {key.replace('_', ' ')}" for key in ("failed", "not_run") if figures[key]]
        shares = [_points(figures[name], figures[f"{name}_std"]) for name in names]
        gain = _points(figures["top1_minus_baseline"], math.nan, "+")
        rows.append([row.name, str(figures["n"]), *shares, gain, " ".join(words)])
    headers = ["variant", "n", *(f"% at {size} px" for size in sizes), "gain", "note"]
    return Table(headers, rows, range(1, 3 + len(sizes)))


def cost_table(comparison: Comparison) -> Table:
    """Time, throughput, and time and epochs to the target, each with its ratio to the baseline's."""
    target, rows = comparison.target, []
    for row in comparison.rows:
        figures = row.figures
        wall, rate, reached = (
            _cell(figures[f"{name}_over_baseline"], ".2f", "x")
            for name in ("wall_seconds", "images_per_second", "seconds_to_target")
        )
        never = target is not None and math.isnan(figures["epochs_to_target"]) and row.curve
        time = [duration(figures["wall_seconds"]), wall, _cell(figures["images_per_second"], ".0f"), rate]
        goal = ["never" if never else duration(figures["seconds_to_target"]), _cell(figures["epochs_to_target"], ".1f")]
        rows.append([row.name, *time, *goal, reached])
    top1 = "target" if target is None else f"{100 * target:.1f}%"
    return Table(["variant", "time", "ratio", "img/s", "ratio", f"to {top1}", "epochs", "ratio"], rows, range(1, 8))


def effect_table(comparison: Comparison) -> Table:
    """What each technique adds, alone and in the recipe."""

    def cells(top1: list[float], seconds_ratio: float) -> tuple[str, str]:
        return _points(_mean(top1), _std(top1), "+"), _cell(seconds_ratio, ".2f", "x")

    rows = [(one.technique, *cells(*one.alone), *cells(*one.in_recipe)) for one in comparison.effects]
    return Table(["technique", "alone: top-1", "time", "in the recipe: top-1", "time"], rows, range(1, 5))


def describe(plan: Plan, outcomes: Sequence[Outcome], comparison: Comparison, sizes: Sequence[int]) -> output.Content:
    """The tables, with top-1 at the given image sizes, and explanations; without a finished run, only remarks."""
    content: output.Content = {}
    if comparison.most_seeds:
        if comparison.effects:
            content[EFFECTS] = [effect_table(comparison)]
        content |= {ACCURACY: [accuracy_table(comparison, sizes)], "Cost": [cost_table(comparison)]}
    return content | _words(plan, outcomes, comparison)


def write(plan: Plan, outcomes: Sequence[Outcome], comparison: Comparison, command: str) -> list[str]:
    """Write table.md, table.csv, accuracy.png and ablation.html into the plan's folder; returns these names."""
    recipe, finished = plan.recipe, [run for _, run, _ in outcomes if run is not None]
    devices = sorted({str((run.summary.get("versions") or {}).get("device")) for run in finished})
    title = f"Ablation of {recipe.run_name}"
    setting = (
        f"{len(plan.variants)} variants of {recipe.model.name}, {recipe.epochs} epochs each, "
        f"seeds {', '.join(map(str, plan.seeds))}: "
        f"{len(finished)} of {len(plan.runs)} runs are finished. {', '.join(devices)}."
    )
    content = describe(plan, outcomes, comparison, comparison.sizes) | {"Command": [output.Code(command)]}
    others = [f"top1_{px}px{part}" for px in comparison.sizes if px != comparison.size for part in ("", "_std")]
    columns = [*CSV_FIELDS, *others]
    lines = []
    for row in comparison.rows:
        figures = (row.figures[column] for column in columns[2:])
        known = (None if math.isnan(figure) else figure for figure in figures)
        lines.append([spreadsheet(row.variant.name), " ".join(row.variant.on), *known])
    replace_text(plan.folder / "table.md", f"# {title}\n\n{setting}\n\n{output.markdown(content)}")
    replace_text(plan.folder / "table.csv", output.csv_text(columns, lines))
    with chart(9, 6.5) as figure:
        _draw_accuracy(figure.subplots(), comparison)
        figure.legend(loc="outside lower center", ncols=4, fontsize="small", handlelength=3.5)
        picture = svg(figure, "Top-1 against time for each variant, and the Pareto front")
        output.save(figure, plan.folder / "accuracy.png")
    content[ACCURACY].append(output.Chart(picture, "Curves and their ends: means; whiskers: lowest to highest seed."))
    if comparison.effects:
        with chart(9, 1.6 + 0.5 * len(comparison.effects)) as figure:
            _draw_effects(figure.subplots(), comparison)
            figure.legend(loc="outside lower center", ncols=3, fontsize="small")
            picture = svg(figure, "Change of top-1 by each technique, alone and in the recipe")
        caption = "Bars: means over the seeds; whiskers: lowest to highest seed."
        content[EFFECTS].append(output.Chart(picture, caption))
    replace_text(plan.folder / "ablation.html", output.render_page(title, setting, content=content))
    return ["table.md", "table.csv", "accuracy.png", "ablation.html"]


def _looks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How each variant is drawn: a technique has a colour and a marker, hollow and dashed when it is removed."""
    names = dict.fromkeys(name for row in rows for name in (*row.variant.on, *row.variant.off))
    looks = {"": (COLORS[6], "o")} | dict(zip(names, zip(cycle(COLORS[:6]), cycle("sD^vP*Xh<>p")), strict=False))
    found = []
    for kind, _, technique in (row.variant.name.partition("-") for row in rows):
        color, marker = looks[technique]
        dashes: Any = {"baseline": (0, (4, 1.5)), "without": "--"}.get(kind, "-")
        face = color if kind in ("recipe", "with") else "white"
        found.append({"color": color, "marker": marker, "linestyle": dashes, "markerfacecolor": face})
    return found


def _range(values: Sequence[float], scale: float) -> list[list[float]]:
    """Distances from the mean to the lowest and the highest value, as matplotlib's error bars take them."""
    return [[scale * (fmean(values) - min(values))], [scale * (max(values) - fmean(values))]]


def _draw_accuracy(axes: Axes, comparison: Comparison) -> None:
    """Top-1 over time: the mean curve of each variant, the range of its final points, and the Pareto front."""
    finished = [one for one in zip(comparison.rows, _looks(comparison.rows), strict=True) if one[0].values["top1"]]
    divisor, unit = output.time_unit(max(max(row.values["wall_seconds"]) for row, _ in finished))
    front = []
    for row, look in finished:
        wall, top1 = row.values["wall_seconds"], row.values["top1"]
        weight: dict[str, Any] = {"linewidth": 1.1, "markersize": 4, "alpha": 0.75, "zorder": 2}
        if row.variant.name in ("recipe", "baseline"):
            weight = {"linewidth": 2.4, "markersize": 6, "zorder": 3}
        points = [(entry.wall_seconds / divisor, 100 * entry.top1) for entry in row.curve]
        axes.plot(*np.array(points).reshape(-1, 2).T, **look | weight, label=row.name)
        end = (fmean(wall) / divisor, 100 * fmean(top1))
        front += [end] if row.figures["on_pareto_front"] else []
        bars = {"xerr": _range(wall, 1 / divisor), "yerr": _range(top1, 100), "elinewidth": 0.6, "zorder": 4}
        axes.errorbar(*end, **look | bars | {"linestyle": "none", "markersize": 7})
    step: dict[str, Any] = {"where": "post", "color": "#b6c2cf", "linewidth": 4.0, "zorder": 1}
    axes.step(*zip(*sorted(front), strict=True), **step, label="Pareto front")
    if comparison.target is not None:
        target = 100 * comparison.target
        axes.axhline(target, color=DIM, linewidth=0.8, linestyle=":", label=f"target {target:.2f} %")
    axes.set_xlim(left=0)
    axes.set(xlabel=f"time of training, loading, evaluation [{unit}]", ylabel=f"top-1 at {comparison.size} px [%]")


def _draw_effects(axes: Axes, comparison: Comparison) -> None:
    """A bar for each technique alone and in the recipe, in points of top-1, with the range over the seeds."""
    error = comparison.standard_error
    shown = [effect for effect in comparison.effects if effect.alone.top1 or effect.in_recipe.top1]
    if error is not None:
        label = "two standard errors of seed noise"
        axes.axvspan(-200 * error, 200 * error, color="#e3e7eb", zorder=0, label=label)
    for shift, color, label, differences in (
        (-0.19, COLORS[0], "added to the baseline", [effect.alone for effect in shown]),
        (0.19, COLORS[1], "in the recipe (minus the recipe without it)", [effect.in_recipe for effect in shown]),
    ):
        bars = [(place + shift, one.top1) for place, one in enumerate(differences) if one.top1]
        ranges = np.hstack([np.empty((2, 0)), *(_range(top1, 100) for _, top1 in bars)])
        places, means = [place for place, _ in bars], [100 * fmean(top1) for _, top1 in bars]
        axes.barh(places, means, 0.36, color=color, label=label, xerr=ranges, error_kw={"elinewidth": 0.8})
    axes.axvline(0, color=COLORS[6], linewidth=0.8)
    axes.set_yticks(range(len(shown)), [effect.technique for effect in shown])
    axes.set(xlabel=f"change of top-1 at {comparison.size} px [percentage points]", ylim=(len(shown) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
