"""Compare the runs of an ablation: means and spreads over seeds, tables, charts, files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
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
    title: str = ""
    setting: str = ""  # which runs on which hardware
    notes: Sequence[str] = ()  # what the numbers mean
    remarks: Sequence[str] = ()  # failed and missing runs, and differences that affect the comparison
    command: str = ""  # the command line

    @property
    def most_seeds(self) -> int:
        """The largest number of finished runs of a variant; 0: nothing to show."""
        return max(len(row.values["top1"]) for row in self.rows)

    @property
    def standard_error(self) -> float | None:
        """The standard error of a difference between two variants' mean top-1, from the noise between seeds."""
        noise = pooled_std([row.values["top1"] for row in self.rows])
        return None if noise is None else noise * (2 / self.most_seeds) ** 0.5


def compare(plan: Plan, outcomes: Sequence[Outcome], size: int, target: float | None, command: str) -> Comparison:
    """Compare the variants of an ablation, given an outcome for each run."""
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
    if missing := len(outcomes) - len(finished) - failed.total():
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
    """Compute a comparison from the finished `runs` by seed, of the `seeds` planned runs of each variant.

    Accuracies are compared at `size`, one of the evaluation's `sizes` in pixels; without a target (top-1 in [0, 1]), it
    is the baseline's final mean.
    """
    by_techniques = {frozenset(variant.on): runs.get(variant, {}) for variant in variants}
    baseline = by_techniques.get(frozenset(), {})
    if target is None and baseline:
        target = fmean(_top1(run, size) for run in baseline.values())
    rows = []
    for variant in variants:
        done, gone = list(runs.get(variant, {}).values()), failed.get(variant, 0)
        values = {name: [float(run.summary[name]) for run in done] for name in ("wall_seconds", "images_per_second")}
        for px in sizes:
            values["top1" if px == size else f"top1_{px}px"] = [_top1(run, px) for run in done]
        figures: dict[str, float | None] = {"n": len(done), "failed": gone, "not_run": seeds - len(done) - gone}
        for name, found in values.items():
            figures[name] = fmean(found) if found else None
            figures[f"{name}_std"] = stdev(found) if len(found) > 1 else None
        figures["top1_min"], figures["top1_max"] = min(values["top1"], default=None), max(values["top1"], default=None)
        curve = mean_curve([run.evaluations(size) for run in done])
        reached = None if target is None else first_reached(curve, target - 1e-9)
        figures |= {"target_top1": target, "seconds_to_target": reached and reached.wall_seconds}
        figures["epochs_to_target"] = reached and reached.epoch
        rows.append(Row(variant, values, figures, curve))
    _add_ratios(rows)

    def difference(having: frozenset[str], lacking: frozenset[str]) -> Difference | None:
        with_it, without = (by_techniques.get(chosen, {}) for chosen in (having, lacking))
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
        if frozenset({name}) in by_techniques or everything - {name} in by_techniques
    )
    return Comparison(size, tuple(sizes), target, tuple(rows), effects)


def _top1(run: Results, size: int) -> float:
    return float(run.summary["eval_by_size"][str(size)]["top1"])


def _add_ratios(rows: Sequence[Row]) -> None:
    """Compare each variant with the baseline, and with all others on time and top-1."""
    base = next((row.figures for row in rows if not row.variant.on), {})
    points = [(row.figures["wall_seconds"] or 0.0, row.figures["top1"] or 0.0) for row in rows if row.values["top1"]]
    front = pareto(points)
    for row in rows:
        mine = row.figures
        for name in ("wall_seconds", "images_per_second", "seconds_to_target"):
            known, reference = mine[name], base.get(name)
            mine[f"{name}_over_baseline"] = known / reference if known is not None and reference else None
        top1, reference = mine["top1"], base.get("top1")
        mine["top1_minus_baseline"] = None if top1 is None or reference is None else top1 - reference
        mine["on_pareto_front"] = int((mine["wall_seconds"], top1) in front)


def pareto(points: Sequence[tuple[float, float]]) -> set[tuple[float, float]]:
    """The points (cost, gain) for which no other is at least as good in both and better in one."""

    def beaten(mine: tuple[float, float]) -> bool:
        return any(cost <= mine[0] and gain >= mine[1] and (cost, gain) != mine for cost, gain in points)

    return {point for point in points if not beaten(point)}


def pooled_std(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups: each variant has few runs, all together have many.

    The root of the mean variance, weighted by degrees of freedom (n - 1 each); None if every group has one value.
    """
    many = [(len(group) - 1, stdev(group)) for group in groups if len(group) > 1]
    freedom = sum(degrees for degrees, _ in many)
    return math.sqrt(sum(degrees * std**2 for degrees, std in many) / freedom) if freedom else None


def notes(comparison: Comparison, eval_interval: int) -> list[str]:
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
        seconds, speed, epochs = (figures[name] for name in ("wall_seconds", "images_per_second", "epochs_to_target"))
        never = target is not None and epochs is None and row.curve
        cells = [duration(seconds), _times(figures["wall_seconds_over_baseline"])]
        cells += [ABSENT if speed is None else f"{speed:.0f}", _times(figures["images_per_second_over_baseline"])]
        cells += ["never" if never else duration(figures["seconds_to_target"])]
        cells += [ABSENT if epochs is None else f"{epochs:.1f}", _times(figures["seconds_to_target_over_baseline"])]
        rows.append([row.name, *cells])
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


def csv_table(comparison: Comparison) -> str:
    """One line per variant: accuracies as shares, times in seconds; empty if not known."""
    others = [f"top1_{px}px{part}" for px in comparison.sizes if px != comparison.size for part in ("", "_std")]
    columns, rows = [*CSV_FIELDS, *others], list[list[object]]()
    for row in comparison.rows:
        names = [spreadsheet(row.variant.name), " ".join(row.variant.on)]
        rows.append([*names, *(row.figures[column] for column in columns[2:])])
    return output.csv_text(columns, rows)


def describe(comparison: Comparison, sizes: Sequence[int]) -> output.Content:
    """The tables, with top-1 at the given image sizes, and explanations; without a finished run, only remarks."""
    content: output.Content = {}
    if comparison.most_seeds:
        if comparison.effects:
            content[EFFECTS] = [effect_table(comparison)]
        content |= {ACCURACY: [accuracy_table(comparison, sizes)], "Cost": [cost_table(comparison)]}
        content["How to read this"] = [*comparison.notes]
    if comparison.remarks:
        content["Remarks"] = [*comparison.remarks]
    return content


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write table.md, table.csv, accuracy.png and ablation.html into a folder that exists.

    Raises:
        OSError: A file cannot be written; its previous version is unchanged.
    """
    content = describe(comparison, comparison.sizes) | {"Command": [output.Code(comparison.command)]}
    names = ("table.md", "table.csv", "accuracy.png", "ablation.html")
    table, values, picture, page = written = [folder / name for name in names]
    replace_text(table, f"# {comparison.title}\n\n{comparison.setting}\n\n{output.markdown(content)}")
    replace_text(values, csv_table(comparison))
    with chart(11, 6.5) as figure:
        _draw_accuracy(figure, comparison)
        alt = "Top-1 against time for each variant, and the Pareto front"
        content[ACCURACY].append(
            output.Chart(svg(figure, alt), "Curves and points: means; whiskers: lowest to highest seed.")
        )
        output.save(figure, picture)
    if comparison.effects:
        with chart(9, 1.6 + 0.5 * len(comparison.effects)) as figure:
            _draw_effects(figure, comparison)
            alt = "Change of top-1 by each technique, alone and in the recipe"
            caption = "Bars: means over the seeds; whiskers: lowest to highest seed."
            content[EFFECTS].append(output.Chart(svg(figure, alt), caption))
    replace_text(page, output.render_page(comparison.title, comparison.setting, content=content))
    return written


def _looks(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """How each variant is drawn: a technique has a colour and a marker, hollow and dashed when it is removed."""
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


def _range(values: Sequence[float], scale: float) -> list[list[float]]:
    """Distances from the mean to the lowest and the highest value, as matplotlib's error bars take them."""
    return [[scale * (fmean(values) - min(values))], [scale * (max(values) - fmean(values))]]


def _draw_accuracy(figure: Figure, comparison: Comparison) -> None:
    """Left: top-1 over time; right: the final point of each variant, and the Pareto front."""
    finished = [row for row in comparison.rows if row.values["top1"]]
    divisor, unit = output.time_unit(max(max(row.values["wall_seconds"]) for row in finished))
    looks, front = _looks(comparison), []
    curves, ends = figure.subplots(1, 2)
    for row in finished:
        look, main = looks[row.variant.name], "-" not in row.variant.name
        wall, top1 = row.values["wall_seconds"], row.values["top1"]
        curves.plot(
            [entry.wall_seconds / divisor for entry in row.curve],
            [100 * entry.top1 for entry in row.curve],
            **look | {"linewidth": 2.4 if main else 1.1, "markersize": 6 if main else 4},
            alpha=1.0 if main else 0.75,
            zorder=3 if main else 2,
        )
        place = (fmean(wall) / divisor, 100 * fmean(top1))
        front += [place] if row.figures["on_pareto_front"] else []
        bars = {"xerr": _range(wall, 1 / divisor), "yerr": _range(top1, 100), "elinewidth": 0.6, "zorder": 3}
        ends.errorbar(*place, **look | bars | {"linestyle": "none", "markersize": 7})
        curves.plot([], [], **look, linewidth=1.2, label=row.name)
    step: dict[str, Any] = {"where": "post", "color": "#b6c2cf", "linewidth": 4.0, "zorder": 1}
    ends.step(*zip(*sorted(front), strict=True), **step, label="Pareto front")
    if comparison.target is not None:
        label = f"target {100 * comparison.target:.2f} %"
        curves.axhline(100 * comparison.target, color=DIM, linewidth=0.8, linestyle=":", label=label)
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
    for shift, color, label, differences in (
        (-0.19, COLORS[0], "added to the baseline", [effect.alone for effect in shown]),
        (0.19, COLORS[1], "in the recipe (minus the recipe without it)", [effect.in_recipe for effect in shown]),
    ):
        bars = [(place + shift, one.top1) for place, one in enumerate(differences) if one is not None]
        axes.barh(
            [place for place, _ in bars],
            [100 * fmean(top1) for _, top1 in bars],
            height=0.36,
            color=color,
            xerr=np.hstack([np.empty((2, 0)), *(_range(top1, 100) for _, top1 in bars)]),
            error_kw={"elinewidth": 0.8},
            label=label,
        )
    axes.axvline(0, color=COLORS[6], linewidth=0.8)
    axes.set_yticks(range(len(shown)), [effect.technique for effect in shown])
    axes.set(xlabel=f"change of top-1 at {comparison.size} px [percentage points]", ylim=(len(shown) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
