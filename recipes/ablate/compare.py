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
    from matplotlib.figure import Figure

CSV_FIELDS = (
    *("variant", "techniques_on", "n", "failed", "not_run"),
    *("top1", "top1_std", "top1_min", "top1_max", "top1_minus_baseline"),
    *("wall_seconds", "wall_seconds_std", "wall_seconds_over_baseline"),
    *("images_per_second", "images_per_second_std", "images_per_second_over_baseline"),
    *("target_top1", "seconds_to_target", "epochs_to_target", "seconds_to_target_over_baseline", "on_pareto_front"),
)
EFFECTS, ACCURACY = "What each technique adds", "Accuracy: top-1"


class Row(NamedTuple):
    """One variant over its seeds."""

    variant: Variant
    values: dict[str, list[float]]
    """Values of each finished run: `wall_seconds`, `images_per_second`, `top1` (at the main size) and `top1_SIZEpx`."""
    figures: dict[str, float | None]
    """By the columns of table.csv: means and sample standard deviations of the values, and ratios; None: unknown."""
    curve: tuple[Evaluation, ...]  # mean over the seeds, at the main size

    @property
    def name(self) -> str:
        """`without mixup`."""
        return self.variant.name.replace("-", " ", 1)


class Difference(NamedTuple):
    """What adding a technique changes."""

    top1: list[float]  # top-1 with it minus top-1 without it, seed by seed
    seconds_ratio: float  # mean wall time with it divided by mean wall time without it


class Effect(NamedTuple):
    """What a technique is worth; None if runs are missing."""

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

    @property
    def most_seeds(self) -> int:
        """The largest number of finished runs of a variant; 0: nothing to show."""
        return max(len(row.values["top1"]) for row in self.rows)

    @property
    def standard_error(self) -> float | None:
        """The standard error of a difference between two variants' mean top-1, from the noise between seeds."""
        noise = pooled_std([row.values["top1"] for row in self.rows])
        return None if noise is None else noise * (2 / self.most_seeds) ** 0.5


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
        reached = None if target is None else first_reached(curve, target - 1e-9)
        figures: dict[str, float | None] = {
            **{"n": len(done), "failed": len(others) - others.count(None), "not_run": others.count(None)},
            **{name: fmean(found) if found else None for name, found in values.items()},
            **{f"{name}_std": stdev(found) if len(found) > 1 else None for name, found in values.items()},
            **{"top1_min": min(values["top1"], default=None), "top1_max": max(values["top1"], default=None)},
            **{"target_top1": target, "seconds_to_target": reached and reached.wall_seconds},
            "epochs_to_target": reached and reached.epoch,
        }
        rows.append(Row(variant, values, figures, curve))
    _add_ratios(rows)

    def difference(having: frozenset[str], lacking: frozenset[str]) -> Difference | None:
        with_it, without = runs.get(having, {}), runs.get(lacking, {})
        both = [seed for seed in with_it if seed in without]
        if not both:
            return None
        seconds = [fmean(group[seed].summary["wall_seconds"] for seed in both) for group in (with_it, without)]
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


def _add_ratios(rows: Sequence[Row]) -> None:
    """Compare each variant with the baseline, and with all others on time and top-1."""
    base = next(row.figures for row in rows if not row.variant.on)
    ends = ((row.figures["wall_seconds"], row.figures["top1"]) for row in rows)
    front = pareto([(seconds, top1) for seconds, top1 in ends if seconds is not None and top1 is not None])
    for row in rows:
        mine = row.figures
        for name in ("wall_seconds", "images_per_second", "seconds_to_target"):
            known, reference = mine[name], base[name]
            mine[f"{name}_over_baseline"] = known / reference if known is not None and reference else None
        top1, reference = mine["top1"], base["top1"]
        mine["top1_minus_baseline"] = None if top1 is None or reference is None else top1 - reference
        mine["on_pareto_front"] = int((mine["wall_seconds"], top1) in front)


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


def _notes(comparison: Comparison, eval_interval: int) -> list[str]:
    """What the numbers mean, given the epochs between two evaluations."""
    size, target, error = comparison.size, comparison.target, comparison.standard_error
    found = [
        f"Top-1 and time are means over n seeds, ± is their sample standard deviation. Gains and ratios are over the "
        f"baseline, gains in percentage points of top-1 at {size} px. A star: on the Pareto front of time and top-1.",
        "Alone: the technique added to the baseline. In the recipe: the recipe minus the recipe without the technique. "
        "Both are computed seed by seed.",
    ]
    if error is not None:
        noise = error * (comparison.most_seeds / 2) ** 0.5
        found.append(
            f"Over all variants a run's top-1 has a standard deviation of {100 * noise:.2f} points between seeds, so "
            f"the difference of two means of n = {comparison.most_seeds} has a standard error of "
            f"{100 * error:.2f} points: differences below about {200 * error:.1f} points may be chance."
        )
    if target is not None:
        every = "epoch" if eval_interval == 1 else f"{eval_interval} epochs"
        found.append(
            f"Time to {100 * target:.2f} %: when the mean curve over the seeds first reaches it, interpolated linearly "
            f"between evaluations (one every {every}); at the first evaluation there is nothing to interpolate."
        )
    time = "Time is that of training, loading, evaluation and checkpoints, without starting the program."
    walls = [row.values["wall_seconds"] for row in comparison.rows]
    jitter = pooled_std([[seconds / fmean(group) for seconds in group] for group in walls])
    if jitter is not None:
        time += f" Between seeds, it has a standard deviation of {100 * jitter:.0f} % per variant."
    return [*found, time]


def _remarks(plan: Plan, outcomes: Sequence[Outcome]) -> list[str]:
    """Failed and missing runs, and differences that affect the comparison."""
    found = [
        f"Failed: {planned.variant.name} seed {planned.seed}, {failure}" for planned, _, failure in outcomes if failure
    ]
    if missing := sum(run is None and failure is None for _, run, failure in outcomes):
        found.append(f"{missing} of {len(outcomes)} runs are not finished; run the same command again to resume.")
    cutmix = plan.recipe.algorithms.cutmix
    if cutmix is not None and {1, 2} <= {len({"mixup", "cutmix"} & set(variant.on)) for variant in plan.variants}:
        found.append(
            f"Where MixUp and CutMix are both on, a batch gets CutMix with probability {cutmix.switch_prob:g} and MixUp"
            " otherwise; without one of them, the other acts on every batch."
        )
    versions = [run.summary.get("versions") or {} for _, run, _ in outcomes if run is not None]
    for key in dict.fromkeys(key for entry in versions for key in entry):
        counts = Counter(short_commit(str(entry.get(key))) for entry in versions)
        if len(counts) > 1:
            shares = ", ".join(f"{value} ({count} runs)" for value, count in counts.most_common())
            found.append(f"Not the same in all runs: {key}: {shares}.")
    return found


def _points(mean: float | None, std: float | None, sign: str = "") -> str:
    """`91.00 ± 1.41`, in percent."""
    if mean is None:
        return ABSENT
    return f"{100 * mean:{sign}.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _times(ratio: float | None) -> str:
    return ABSENT if ratio is None else f"{ratio:.2f}x"


def accuracy_table(comparison: Comparison, sizes: Sequence[int]) -> Table:
    """Top-1 of each variant at the given image sizes, and its gain over the baseline at the main size."""
    names, rows = ["top1" if px == comparison.size else f"top1_{px}px" for px in sizes], []
    for row in comparison.rows:
        figures = row.figures
        words = ["*"] if figures["on_pareto_front"] else []
        words += [f"{figures[key]} {key.replace('_', ' ')}" for key in ("failed", "not_run") if figures[key]]
        shares = [_points(figures[name], figures[f"{name}_std"]) for name in names]
        gain = _points(figures["top1_minus_baseline"], None, "+")
        rows.append([row.name, str(figures["n"]), *shares, gain, " ".join(words)])
    headers = ["variant", "n", *(f"% at {size} px" for size in sizes), "gain", "note"]
    return Table(headers, rows, range(1, 3 + len(sizes)))


def cost_table(comparison: Comparison) -> Table:
    """Time, throughput, and time and epochs to the target, each with its ratio to the baseline's."""
    target, rows = comparison.target, []
    for row in comparison.rows:
        figures = row.figures
        speed, epochs = figures["images_per_second"], figures["epochs_to_target"]
        never = target is not None and epochs is None and row.curve
        wall, rate, reached = (
            _times(figures[f"{name}_over_baseline"])
            for name in ("wall_seconds", "images_per_second", "seconds_to_target")
        )
        cells = [duration(figures["wall_seconds"]), wall, ABSENT if speed is None else f"{speed:.0f}", rate]
        cells += ["never" if never else duration(figures["seconds_to_target"])]
        rows.append([row.name, *cells, ABSENT if epochs is None else f"{epochs:.1f}", reached])
    goal = "target" if target is None else f"{100 * target:.1f}%"
    return Table(["variant", "time", "ratio", "img/s", "ratio", f"to {goal}", "epochs", "ratio"], rows, range(1, 8))


def effect_table(comparison: Comparison) -> Table:
    """What each technique adds, alone and in the recipe."""

    def cells(difference: Difference | None) -> tuple[str, str]:
        if difference is None:
            return ABSENT, ABSENT
        std = stdev(difference.top1) if len(difference.top1) > 1 else None
        return _points(fmean(difference.top1), std, "+"), _times(difference.seconds_ratio)

    rows = [(one.technique, *cells(one.alone), *cells(one.in_recipe)) for one in comparison.effects]
    return Table(["technique", "alone: top-1", "time", "in the recipe: top-1", "time"], rows, range(1, 5))


def describe(plan: Plan, outcomes: Sequence[Outcome], comparison: Comparison, sizes: Sequence[int]) -> output.Content:
    """The tables, with top-1 at the given image sizes, and explanations; without a finished run, only remarks."""
    content: output.Content = {}
    if comparison.most_seeds:
        if comparison.effects:
            content[EFFECTS] = [effect_table(comparison)]
        content |= {ACCURACY: [accuracy_table(comparison, sizes)], "Cost": [cost_table(comparison)]}
        content["How to read this"] = [*_notes(comparison, plan.recipe.eval.interval)]
    if remarks := _remarks(plan, outcomes):
        content["Remarks"] = [*remarks]
    return content


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
    lines = (
        [spreadsheet(row.variant.name), " ".join(row.variant.on), *(row.figures[column] for column in columns[2:])]
        for row in comparison.rows
    )
    replace_text(plan.folder / "table.md", f"# {title}\n\n{setting}\n\n{output.markdown(content)}")
    replace_text(plan.folder / "table.csv", output.csv_text(columns, lines))
    with chart(11, 6.5) as figure:
        _draw_accuracy(figure, comparison)
        picture = svg(figure, "Top-1 against time for each variant, and the Pareto front")
        output.save(figure, plan.folder / "accuracy.png")
    content[ACCURACY].append(output.Chart(picture, "Curves and points: means; whiskers: lowest to highest seed."))
    if comparison.effects:
        with chart(9, 1.6 + 0.5 * len(comparison.effects)) as figure:
            _draw_effects(figure, comparison)
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


def _draw_accuracy(figure: Figure, comparison: Comparison) -> None:
    """Left: top-1 over time; right: the final point of each variant, and the Pareto front."""
    finished = [row for row in comparison.rows if row.values["top1"]]
    divisor, unit = output.time_unit(max(max(row.values["wall_seconds"]) for row in finished))
    curves, ends = figure.subplots(1, 2)
    front = []
    for row, look in zip(comparison.rows, _looks(comparison.rows), strict=True):
        wall, top1 = row.values["wall_seconds"], row.values["top1"]
        if not top1:
            continue
        weight: dict[str, Any] = {"linewidth": 1.1, "markersize": 4, "alpha": 0.75, "zorder": 2}
        if row.variant.name in ("recipe", "baseline"):
            weight = {"linewidth": 2.4, "markersize": 6, "alpha": 1.0, "zorder": 3}
        points = [(entry.wall_seconds / divisor, 100 * entry.top1) for entry in row.curve]
        curves.plot(*np.array(points).reshape(-1, 2).T, **look | weight)
        place = (fmean(wall) / divisor, 100 * fmean(top1))
        front += [place] if row.figures["on_pareto_front"] else []
        bars = {"xerr": _range(wall, 1 / divisor), "yerr": _range(top1, 100), "elinewidth": 0.6, "zorder": 3}
        ends.errorbar(*place, **look | bars | {"linestyle": "none", "markersize": 7})
        curves.plot([], [], **look, linewidth=1.2, label=row.name)
    step: dict[str, Any] = {"where": "post", "color": "#b6c2cf", "linewidth": 4.0, "zorder": 1}
    ends.step(*zip(*sorted(front), strict=True), **step, label="Pareto front")
    if comparison.target is not None:
        target = 100 * comparison.target
        curves.axhline(target, color=DIM, linewidth=0.8, linestyle=":", label=f"target {target:.2f} %")
    curves.set_xlim(left=0)
    for axes, title in ((curves, "Accuracy against time"), (ends, "Where each variant ended")):
        axes.set(xlabel=f"time of training, loading, evaluation [{unit}]", title=title)
        axes.set_ylabel(f"top-1 at {comparison.size} px [%]")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", handlelength=3.5)


def _draw_effects(figure: Figure, comparison: Comparison) -> None:
    """A bar for each technique alone and in the recipe, in points of top-1, with the range over the seeds."""
    axes, error = figure.subplots(), comparison.standard_error
    shown = [effect for effect in comparison.effects if effect.alone or effect.in_recipe]
    if error is not None:
        label = "two standard errors of seed noise"
        axes.axvspan(-200 * error, 200 * error, color="#e3e7eb", zorder=0, label=label)
    alone, in_recipe = [effect.alone for effect in shown], [effect.in_recipe for effect in shown]
    for shift, color, label, differences in (
        (-0.19, COLORS[0], "added to the baseline", alone),
        (0.19, COLORS[1], "in the recipe (minus the recipe without it)", in_recipe),
    ):
        bars = [(place + shift, one.top1) for place, one in enumerate(differences) if one is not None]
        ranges = np.hstack([np.empty((2, 0)), *(_range(top1, 100) for _, top1 in bars)])
        places, means = [place for place, _ in bars], [100 * fmean(top1) for _, top1 in bars]
        axes.barh(places, means, 0.36, color=color, label=label, xerr=ranges, error_kw={"elinewidth": 0.8})
    axes.axvline(0, color=COLORS[6], linewidth=0.8)
    axes.set_yticks(range(len(shown)), [effect.technique for effect in shown])
    axes.set(xlabel=f"change of top-1 at {comparison.size} px [percentage points]", ylim=(len(shown) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
