"""The report's charts: curves of one run or several over epochs, top-1 over time, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from recipes.output import COLORS, DIM, chart, plain, svg, time_unit
from recipes.report import PHASES, Run, moving_mean, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESUME = "#b42318"
MARKERS = "osD^vP*X"


def line_of(index: int) -> dict[str, Any]:
    """How a run is drawn in all charts: a colour, and another line style after each cycle of colours."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": ("-", "--", ":", "-.")[index // len(COLORS) % 4]}


def training_curves(runs: Sequence[Run]) -> Markup:
    """Loss, learning rate, momentum and top-1 over epochs, below a band with stages and resumes."""
    labels = ("training loss", "learning rate", "momentum", "top-1 (%)")
    with _over_epochs(runs, (3.0, 1.6, 1.6, 2.8), labels) as (figure, panels):
        for panel, name in zip(panels[:3], ("train/loss", "train/lr", "train/momentum"), strict=True):
            _draw_figure(panel, runs, name)
        _draw_accuracy(panels[3], runs, "epoch")
        return svg(figure, "Loss, learning rate, momentum and top-1 accuracy over epochs")


def throughput_curves(runs: Sequence[Run]) -> Markup:
    """Images per second and the share of time spent waiting for the loader, over epochs."""
    with _over_epochs(runs, (2.6, 1.4), ("images/s", "loader wait (%)")) as (figure, panels):
        _draw_figure(panels[0], runs, "train/images_per_second")
        _draw_figure(panels[1], runs, "train/loader_wait_fraction", scale=100)
        for panel in panels:
            panel.set_ylim(bottom=0)
        return svg(figure, "Images per second and waiting for the loader over epochs")


def _draw_figure(axes: Axes, runs: Sequence[Run], name: str, scale: float = 1) -> None:
    """A column of the training figures over epochs, a line per run; the loss with its moving mean."""
    for index, run in enumerate(runs):
        x, y = thin(np.stack([run.training["epoch"], scale * run.training[name]]))
        if name == "train/loss":
            axes.plot(x, y, **line_of(index), alpha=0.3, linewidth=0.9)
            y = moving_mean(y)
        axes.plot(x, y, **line_of(index), linewidth=1.3)


def accuracy_over_time(runs: Sequence[Run]) -> Markup:
    """Top-1 by size over the run's time, including evaluations and checkpoints."""
    times = [one.wall_seconds for run in runs for size in run.sizes for one in run.evaluations(size)]
    divisor, unit = time_unit(max(times, default=0.0))
    with chart(9.6, 3.4) as figure:
        axes = figure.subplots()
        _draw_accuracy(axes, runs, "wall_seconds", divisor)
        axes.set(xlabel=f"time ({unit})", ylabel="top-1 (%)")
        axes.set_xlim(left=0)
        return svg(figure, "Top-1 accuracy over time")


def time_spent(runs: Sequence[Run]) -> Markup:
    """Where the time went: a bar per run."""
    divisor, unit = time_unit(max(sum(run.seconds.values()) for run in runs))
    with chart(9.6, 1.4 + 0.4 * len(runs)) as figure:
        axes = figure.subplots()
        left = np.zeros(len(runs))
        for color, (phase, label) in zip(COLORS, PHASES.items(), strict=False):
            widths = np.array([run.seconds.get(phase, 0.0) for run in runs]) / divisor
            axes.barh(range(len(left)), widths, left=left, color=color, label=label, height=0.6)
            left += widths
        axes.set_yticks(range(len(left)), [plain(run.name, 24) for run in runs])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel(f"time ({unit})")
        figure.legend(loc="outside upper left", ncols=4)
        return svg(figure, "Where the time went")


@contextmanager
def _over_epochs(
    runs: Sequence[Run], heights: Sequence[float], labels: Sequence[str]
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure and its panels, to draw in: over epochs, with these heights in inches, below a band with a row per run.

    In the band, stages are blocks, darker for larger images; resumes are triangles. For one run, both continue as lines
    through the panels.
    """
    band_height = 0.32 + 0.3 * len(runs)
    sizes = sorted({stage.size for run in runs for stage in run.stages})
    end = max((float(run.training["epoch"][-1]) for run in runs if len(run.training["epoch"])), default=1.0)
    with chart(9.6, 0.2 + sum(heights) + band_height) as figure:
        ratios = (band_height, *heights)
        band, *panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        for row, run in enumerate(runs):
            for stage in run.stages:
                shade = 0.95 - 0.45 * (sizes.index(stage.size) + 1) / len(sizes)
                box: dict[str, Any] = {"color": (shade * 0.93, shade * 0.97, 1 - (1 - shade) * 0.4), "height": 0.86}
                band.barh(row, stage.last - stage.first, left=stage.first, edgecolor="white", **box)
                share = (stage.last - stage.first) / (end or 1.0)  # as much text as fits on the block
                label = f"{stage.size} px" if share >= 0.05 else ""
                label += f", batch {stage.batch_size}" if share >= 0.17 else ""
                band.text((stage.first + stage.last) / 2, row, label, ha="center", va="center", fontsize=8.5)
            for epoch, *_ in run.resumes:
                band.plot(epoch, row - 0.32, "v", color=RESUME, markersize=6, clip_on=False)
        for panel, label in zip(panels, labels, strict=True):
            panel.set_ylabel(label)
            for stage in runs[0].stages[1:] if len(runs) == 1 else ():
                panel.axvline(stage.first, color="#9aa4ae", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
            for epoch, *_ in runs[0].resumes if len(runs) == 1 else ():
                panel.axvline(epoch, color=RESUME, linewidth=0.9, linestyle=":", zorder=0)
        band.set_yticks(range(len(runs)), [plain(run.name, 24) for run in runs] if len(runs) > 1 else ["stages"])
        band.set_ylim(len(runs) - 0.5, -0.6)
        band.grid(False)
        band.tick_params(length=0, labelbottom=False)
        band.spines[:].set_visible(False)
        panels[0].set_xlim(0, 1.004 * end or 1.0)  # shared by all panels
        panels[-1].set_xlabel("epochs")
        yield figure, panels


def _draw_accuracy(axes: Axes, runs: Sequence[Run], over: str, divisor: float = 1) -> None:
    """Top-1 by size over `epoch` or `wall_seconds`: for one run a colour per size, for several one per run."""
    sizes = sorted({size for run in runs for size in run.sizes})
    for index, run in enumerate(runs):
        for size in run.sizes:
            place, points = sizes.index(size), run.evaluations(size)
            style: dict[str, Any] = line_of(index) | ({"color": line_of(place)["color"]} if len(runs) == 1 else {})
            x, y = [getattr(one, over) / divisor for one in points], [100 * one.top1 for one in points]
            marker = MARKERS[place % len(MARKERS)]
            axes.plot(x, y, linewidth=1.2, marker=marker, markersize=4.5, clip_on=False, **style)
    for place, size in enumerate(sizes):
        color = line_of(place)["color"] if len(runs) == 1 else DIM
        axes.plot([], [], marker=MARKERS[place % len(MARKERS)], color=color, label=f"{size} px", markersize=4.5)
    if sizes:
        axes.legend(loc="lower right", ncols=min(4, len(sizes)))
    else:
        axes.text(0.5, 0.5, "no evaluation yet", ha="center", va="center", transform=axes.transAxes, color=DIM)
