"""The pictures of an ablation: accuracy against time, the Pareto front, and each technique's effect."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from recipes.ablate.results import Results, Row
from recipes.output import COLORS

MARKERS = "osD^vP*Xh<>p"
FRONT = "#b6c2cf"
UNITS = ((2 * 3600, 3600, "h"), (10 * 60, 60, "min"), (0, 1, "s"))


def unit_of(seconds: float) -> tuple[float, str]:
    """Seconds in the unit that suits a length of time, and its name."""
    return next((length, name) for least, length, name in UNITS if seconds >= least)


def draw_accuracy(figure: Figure, results: Results) -> None:
    """Left: how top-1 grew with time; right: where each variant ended, and the Pareto front.

    A technique has a colour and a marker: hollow and dashed where it is taken from the recipe, filled and solid where
    it is added to the baseline.
    """
    rows = [row for row in results.rows if row.wall_seconds is not None]
    longest = max((row.wall_seconds.high for row in rows if row.wall_seconds), default=1.0)
    unit, name = unit_of(longest)
    styles = _styles(results)
    curves, ends = figure.subplots(1, 2)
    for row in rows:
        _curve(curves, row, styles[row.variant.name], unit)
        _end(ends, row, styles[row.variant.name], unit, results.size)
    if results.target is not None:
        curves.axhline(100 * results.target, color="#59636e", linewidth=0.8, linestyle=":")
    front = sorted(
        (row.wall_seconds.mean / unit, 100 * row.top1[results.size].mean)
        for row in rows
        if row.on_front and row.wall_seconds
    )
    if front:
        ends.step(*zip(*front, strict=True), where="post", color=FRONT, linewidth=4.0, zorder=1)
    curves.set_xlim(left=0)
    for axes, title in ((curves, "Accuracy against time"), (ends, "Where each variant ended")):
        axes.set(xlabel=f"time of training, loading, evaluation [{name}]", title=title)
        axes.set_ylabel(f"top-1 at {results.size} px [%]")
    figure.legend(
        handles=_legend(results, styles), loc="outside lower center", ncols=4, fontsize="small", handlelength=3.5
    )


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """How each variant is drawn."""
    names = dict.fromkeys(name for row in results.rows for name in (*row.variant.on, *row.variant.off))
    looks = dict(zip(names, zip(cycle(COLORS[:6]), cycle(MARKERS[1:])), strict=False))
    found = {}
    for row in results.rows:
        kind, _, technique = row.variant.name.partition("-")
        if kind in ("recipe", "baseline"):
            dash = "-" if kind == "recipe" else (0, (4, 1.5))
            found[row.variant.name] = {"color": COLORS[6], "marker": "o", "filled": kind == "recipe", "dash": dash}
            continue
        color, marker = looks[technique]
        filled = kind == "with"
        found[row.variant.name] = {"color": color, "marker": marker, "filled": filled, "dash": "-" if filled else "--"}
    return found


def _curve(axes: Axes, row: Row, style: dict[str, Any], unit: float) -> None:
    main = style["color"] == COLORS[6]
    axes.plot(
        [entry.wall_seconds / unit for entry in row.curve],
        [100 * entry.top1 for entry in row.curve],
        color=style["color"],
        linestyle=style["dash"],
        linewidth=2.4 if main else 1.1,
        marker=style["marker"],
        markersize=6 if main else 4,
        markerfacecolor=style["color"] if style["filled"] else "white",
        alpha=1.0 if main else 0.75,
        zorder=3 if main else 2,
    )


def _end(axes: Axes, row: Row, style: dict[str, Any], unit: float, size: int) -> None:
    time, top1 = row.wall_seconds, row.top1[size]
    assert time is not None
    axes.errorbar(
        time.mean / unit,
        100 * top1.mean,
        xerr=[[(time.mean - time.low) / unit], [(time.high - time.mean) / unit]],
        yerr=[[100 * (top1.mean - top1.low)], [100 * (top1.high - top1.mean)]],
        color=style["color"],
        marker=style["marker"],
        markersize=7,
        markerfacecolor=style["color"] if style["filled"] else "white",
        elinewidth=0.6,
        zorder=3,
    )


def _legend(results: Results, styles: dict[str, dict[str, Any]]) -> list[Line2D]:
    handles = []
    for row in results.rows:
        if row.wall_seconds is None:
            continue
        style = styles[row.variant.name]
        face = style["color"] if style["filled"] else "white"
        handles.append(
            Line2D(
                [],
                [],
                color=style["color"],
                linestyle=style["dash"],
                linewidth=1.2,
                marker=style["marker"],
                markerfacecolor=face,
                label=row.variant.name.replace("-", " ", 1),
            )
        )
    handles.append(Line2D([], [], color=FRONT, linewidth=4.0, label="Pareto front"))
    if results.target is not None:
        handles.append(
            Line2D([], [], color="#59636e", linewidth=0.8, linestyle=":", label=f"target {100 * results.target:.2f} %")
        )
    return handles


def draw_effects(figure: Figure, results: Results, noise: float | None) -> None:
    """A bar for each technique alone and in the recipe, in points of top-1, with the range over the seeds.

    Args:
        figure: To draw in.
        results: The results.
        noise: Standard error of a difference, a share; drawn as a band about zero twice as wide to each side.
    """
    axes = figure.subplots()
    shown = [effect for effect in results.effects if effect.alone or effect.in_recipe]
    if noise is not None:
        axes.axvspan(-200 * noise, 200 * noise, color="#e3e7eb", zorder=0, label="two standard errors of seed noise")
    for shift, attribute, color, label in (
        (-0.19, "alone", COLORS[0], "added to the baseline"),
        (0.19, "in_recipe", COLORS[1], "in the recipe (less the recipe without it)"),
    ):
        bars = [(place, getattr(effect, attribute)) for place, effect in enumerate(shown)]
        bars = [(place, difference.top1) for place, difference in bars if difference is not None]
        axes.barh(
            [place + shift for place, _ in bars],
            [100 * top1.mean for _, top1 in bars],
            height=0.36,
            color=color,
            xerr=[
                [100 * (top1.mean - top1.low) for _, top1 in bars],
                [100 * (top1.high - top1.mean) for _, top1 in bars],
            ],
            error_kw={"elinewidth": 0.8},
            label=label,
        )
    axes.axvline(0, color=COLORS[6], linewidth=0.8)
    axes.set_yticks(range(len(shown)), [effect.technique for effect in shown])
    axes.set(xlabel=f"change of top-1 at {results.size} px [percentage points]", ylim=(len(shown) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
