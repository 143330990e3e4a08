"""The report's charts: curves of one run or several over epochs, top-1 over time, and where the time went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from recipes.output import COLORS, DIM, chart, plain, svg, time_unit
from recipes.report import Run, Stage, moving_mean, thin, throughput_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESUME = "#b42318"
MARKERS = "osD^vP*X"
PHASES = {
    "train": ("training steps", COLORS[0]),
    "loader_wait": ("waiting for the loader", COLORS[1]),
    "evaluation": ("evaluation", COLORS[2]),
    "checkpointing": ("checkpoints", COLORS[3]),
}
"""Keys of summary.json's `seconds`: their names here, and their colours."""


def line_of(index: int) -> dict[str, Any]:
    """How a run is drawn in all charts: a colour, and another line style after each cycle of colours."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": ("-", "--", ":", "-.")[index // len(COLORS) % 4]}


def training_curves(runs: Sequence[Run]) -> Markup:
    """Loss, learning rate, momentum and top-1 over epochs, below a band with stages and resumes."""

    def draw(panels: Sequence[Axes]) -> None:
        shown = {"train/loss": "training loss", "train/lr": "learning rate", "train/momentum": "momentum"}
        for panel, (name, label) in zip(panels, shown.items(), strict=False):
            for index, run in enumerate(runs):
                x, y = thin(run.training["epoch"], run.training[name])
                if name == "train/loss":
                    panel.plot(x, y, **line_of(index), alpha=0.3, linewidth=0.9)
                    y = moving_mean(y)
                panel.plot(x, y, **line_of(index), linewidth=1.3)
            panel.set_ylabel(label)
        _draw_accuracy(panels[-1], runs, "epoch")

    alt = "Loss, learning rate, momentum and top-1 accuracy over epochs"
    return _over_epochs(runs, (3.0, 1.6, 1.6, 2.8), draw, alt)


def throughput_curves(runs: Sequence[Run]) -> Markup:
    """Images per second and the share of time spent waiting for the loader, over epochs."""

    def draw(panels: Sequence[Axes]) -> None:
        for index, run in enumerate(runs):
            x, images, waiting = throughput_curve(run.training)
            panels[0].plot(x, images, **line_of(index), linewidth=1.2)
            panels[1].plot(x, 100 * waiting, **line_of(index), linewidth=1.2)
        for panel, label in zip(panels, ("images/s", "loader wait (%)"), strict=True):
            panel.set_ylabel(label)
            panel.set_ylim(bottom=0)

    return _over_epochs(runs, (2.6, 1.4), draw, "Images per second and waiting for the loader over epochs")


def accuracy_over_time(runs: Sequence[Run]) -> Markup:
    """Top-1 by size over the run's time, including evaluations and checkpoints."""
    times = [one.wall_seconds for run in runs for size in run.results.sizes for one in run.results.evaluations(size)]
    divisor, unit = time_unit(max(times, default=0.0))
    with chart(9.6, 3.4) as figure:
        axes = figure.subplots()
        _draw_accuracy(axes, runs, "wall_seconds", divisor)
        axes.set_xlabel(f"time ({unit})")
        axes.set_xlim(left=0)
        return svg(figure, "Top-1 accuracy over time")


def time_spent(seconds_by_run: Sequence[tuple[str, Mapping[str, float]]]) -> Markup:
    """Where the time went: a bar per run, from its name and its seconds by phase."""
    divisor, unit = time_unit(max(sum(seconds.values()) for _, seconds in seconds_by_run))
    with chart(9.6, 1.4 + 0.4 * len(seconds_by_run)) as figure:
        axes = figure.subplots()
        left = np.zeros(len(seconds_by_run))
        for phase, (label, color) in PHASES.items():
            widths = np.array([seconds.get(phase, 0.0) for _, seconds in seconds_by_run]) / divisor
            axes.barh(range(len(left)), widths, left=left, color=color, label=label, height=0.6)
            left += widths
        axes.set_yticks(range(len(left)), [plain(name, 24) for name, _ in seconds_by_run])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel(f"time ({unit})")
        figure.legend(loc="outside upper left", ncols=4)
        return svg(figure, "Where the time went")


def same_stages(runs: Sequence[Run]) -> bool:
    """Whether all runs have the same stage boundaries."""
    return len({tuple((stage.first, stage.size) for stage in run.stages) for run in runs}) == 1


def _over_epochs(
    runs: Sequence[Run], heights: Sequence[float], draw: Callable[[Sequence[Axes]], None], alt: str
) -> Markup:
    """Panels with these heights in inches, over epochs, below a band with a row per run.

    In the band, stages are blocks, darker for larger images; resumes are triangles. Both continue as lines through the
    panels, if there is one run or they are the same in all runs.
    """
    band_height = 0.32 + 0.3 * len(runs)
    sizes = sorted({stage.size for run in runs for stage in run.stages})
    end = max((float(run.training["epoch"][-1]) for run in runs if len(run.training["epoch"])), default=1.0)
    with chart(9.6, 0.2 + sum(heights) + band_height) as figure:
        ratios = (band_height, *heights)
        band, *panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        draw(panels)
        for row, run in enumerate(runs):
            for stage in run.stages:
                shade = 0.95 - 0.45 * (sizes.index(stage.size) + 1) / len(sizes)
                box: dict[str, Any] = {"color": (shade * 0.93, shade * 0.97, 1 - (1 - shade) * 0.4), "height": 0.86}
                band.barh(row, stage.last - stage.first, left=stage.first, edgecolor="white", **box)
                label = _stage_label(stage, end)
                band.text((stage.first + stage.last) / 2, row, label, ha="center", va="center", fontsize=8.5)
            for resume in run.resumes:
                if np.isfinite(resume.epoch):
                    band.plot(resume.epoch, row - 0.32, "v", color=RESUME, markersize=6, clip_on=False)
                    for panel in panels if len(runs) == 1 else ():
                        panel.axvline(resume.epoch, color=RESUME, linewidth=0.9, linestyle=":", zorder=0)
        for stage in runs[0].stages[1:] if same_stages(runs) else ():
            for panel in panels:
                panel.axvline(stage.first, color="#9aa4ae", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        band.set_yticks(range(len(runs)), [plain(run.name, 24) for run in runs] if len(runs) > 1 else ["stages"])
        band.set_ylim(len(runs) - 0.5, -0.6)
        band.grid(False)
        band.tick_params(length=0, labelbottom=False)
        band.spines[:].set_visible(False)
        panels[0].set_xlim(0, 1.004 * end or 1.0)  # shared by all panels
        panels[-1].set_xlabel("epochs")
        return svg(figure, alt)


def _stage_label(stage: Stage, end: float) -> str:
    """As much text as fits on the stage's block."""
    share = (stage.last - stage.first) / (end or 1.0)
    return "" if share < 0.05 else f"{stage.size} px" + (f", batch {stage.batch_size}" if share >= 0.17 else "")


def _draw_accuracy(axes: Axes, runs: Sequence[Run], over: str, divisor: float = 1) -> None:
    """Top-1 by size over `epoch` or `wall_seconds`: for one run a colour per size, for several one per run."""
    sizes = sorted({size for run in runs for size in run.results.sizes})
    for index, run in enumerate(runs):
        for size in run.results.sizes:
            place, points = sizes.index(size), run.results.evaluations(size)
            style: dict[str, Any] = line_of(index) | ({"color": line_of(place)["color"]} if len(runs) == 1 else {})
            x, y = [getattr(one, over) / divisor for one in points], [100 * one.top1 for one in points]
            marker = MARKERS[place % len(MARKERS)]
            axes.plot(x, y, linewidth=1.2, marker=marker, markersize=4.5, clip_on=False, **style)
    for place, size in enumerate(sizes):
        color = line_of(place)["color"] if len(runs) == 1 else DIM
        axes.plot([], [], marker=MARKERS[place % len(MARKERS)], color=color, label=f"{size} px", markersize=4.5)
    axes.set_ylabel("top-1 (%)")
    if sizes:
        axes.legend(loc="lower right", ncols=min(4, len(sizes)))
    else:
        axes.text(0.5, 0.5, "no evaluation yet", ha="center", va="center", transform=axes.transAxes, color=DIM)
