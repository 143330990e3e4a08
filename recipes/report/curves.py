"""The report's charts: curves of one run or several over epochs, top-1 over time, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from recipes.page.chart import COLORS, chart, plain, svg
from recipes.report.read import Run
from recipes.report.timeline import Resume, Stage, moving_mean, resumes, speeds, stages, thinned

RESUME = "#b42318"
DIM = "#59636e"
PHASES = {
    "train": ("training steps", COLORS[0]),
    "loader_wait": ("waiting for the loader", COLORS[1]),
    "evaluation": ("evaluation", COLORS[2]),
    "checkpointing": ("checkpoints", COLORS[3]),
}
"""Keys of summary.json's `seconds`: what they are called here, and their colours."""
LABELLED = 0.05
"""A stage's size is written on it where it takes this share of the picture's width, and its batch size too ..."""
LABELLED_WHOLE = 0.17
"""... where it takes this one."""


def color(index: int) -> str:
    """A run's colour in all charts."""
    return COLORS[index % len(COLORS)]


def line_style(index: int) -> str:
    """A run's line: another one for each round through the colours."""
    return ("-", "--", ":", "-.")[index // len(COLORS) % 4]


def curves(runs: Sequence[Run]) -> Markup:
    """Loss, learning rate, momentum and top-1 over epochs, under a band with stages and resumes."""
    with chart(9.6, 9.0 + _band_inches(runs)) as figure:
        heights = [_band_inches(runs), 3.0, 1.6, 1.6, 2.8]
        band, *panels = figure.subplots(5, 1, sharex=True, height_ratios=heights)
        _band(band, runs)
        names = ("train/loss", "train/lr", "train/momentum")
        labels = ("training loss", "learning rate", "momentum")
        for panel, name, label in zip(panels, names, labels, strict=False):
            for index, run in enumerate(runs):
                x, y = thinned(run.training["epoch"], run.training[name])
                style = {"linestyle": line_style(index), "color": color(index), "linewidth": 1.3}
                if name == "train/loss":
                    panel.plot(x, y, **style | {"alpha": 0.3, "linewidth": 0.9})
                    y = moving_mean(y)
                panel.plot(x, y, **style)
            panel.set_ylabel(label)
        _accuracy(panels[-1], runs)
        _finish([band, *panels], runs)
        return svg(figure, "Loss, learning rate, momentum and top-1 accuracy over epochs")


def throughput(runs: Sequence[Run]) -> Markup:
    """Images per second and the share of time spent waiting for the loader, over epochs."""
    with chart(9.6, 4.2 + _band_inches(runs)) as figure:
        band, rate, wait = figure.subplots(3, 1, sharex=True, height_ratios=[_band_inches(runs), 2.6, 1.4])
        _band(band, runs)
        for index, run in enumerate(runs):
            x, images, waiting = speeds(run.training)
            style = {"color": color(index), "linestyle": line_style(index), "linewidth": 1.2}
            rate.plot(x, images, **style)
            wait.plot(x, 100 * waiting, **style)
        rate.set_ylabel("images/s")
        rate.set_ylim(bottom=0)
        wait.set_ylabel("loader wait (%)")
        wait.set_ylim(bottom=0)
        _finish([band, rate, wait], runs)
        return svg(figure, "Images per second and waiting for the loader over epochs")


def accuracy_over_time(runs: Sequence[Run]) -> Markup:
    """Top-1 by size over the time that the run had taken, evaluations and checkpoints included."""
    times = [figures["wall_seconds"] for run in runs for figures in run.evaluations.values()]
    unit, divisor = _unit(max((float(np.nanmax(one, initial=0.0)) for one in times), default=0.0))
    with chart(9.6, 3.4) as figure:
        axes = figure.subplots()
        _accuracy(axes, runs, "wall_seconds", divisor)
        axes.set_xlabel(f"time ({unit})")
        axes.set_xlim(left=0)
        return svg(figure, "Top-1 accuracy over time")


def _unit(seconds: float) -> tuple[str, int]:
    """The unit that suits a length of time, and its seconds."""
    return ("h", 3600) if seconds >= 2 * 3600 else ("min", 60) if seconds >= 120 else ("s", 1)


def time_spent(rows: Sequence[tuple[str, dict[str, float]]]) -> Markup:
    """Where the time went, a bar per run.

    Args:
        rows: (run's name, seconds by phase).
    """
    longest = max(sum(seconds.values()) for _, seconds in rows)
    unit, divisor = _unit(longest)
    with chart(9.6, 1.4 + 0.4 * len(rows)) as figure:
        axes = figure.subplots()
        left = np.zeros(len(rows))
        for phase, (label, shade) in PHASES.items():
            widths = np.array([seconds.get(phase, 0.0) for _, seconds in rows]) / divisor
            axes.barh(range(len(rows)), widths, left=left, color=shade, label=label, height=0.6)
            left += widths
        axes.set_yticks(range(len(rows)), [plain(name, 24) for name, _ in rows])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel(f"time ({unit})")
        figure.legend(loc="outside upper left", ncols=4)
        return svg(figure, "Where the time went")


def same_stages(runs: Sequence[Run]) -> bool:
    """Whether the borders of one run's stages are those of all."""
    borders = {tuple((stage.first, stage.size) for stage in stages(run.training)) for run in runs}
    return len(borders) == 1


def _band_inches(runs: Sequence[Run]) -> float:
    return 0.32 + 0.3 * len(runs)


def _band(axes: Any, runs: Sequence[Run]) -> None:
    """A row per run: its stages as blocks, darker the larger the images, and its resumes as triangles."""
    sizes = sorted({stage.size for run in runs for stage in stages(run.training)})
    end = max((stage.last for run in runs for stage in stages(run.training)), default=0.0) or 1.0
    for row, run in enumerate(runs):
        for stage in stages(run.training):
            shade = 0.95 - 0.45 * (sizes.index(stage.size) + 1) / len(sizes)
            box = {"color": (shade * 0.93, shade * 0.97, 1 - (1 - shade) * 0.4), "edgecolor": "white"}
            axes.barh(row, stage.last - stage.first, left=stage.first, height=0.86, **box)
            axes.text((stage.first + stage.last) / 2, row, _words(stage, end), ha="center", va="center", fontsize=8.5)
        for resume in _placed(run):
            axes.plot(resume.epoch, row - 0.32, "v", color=RESUME, markersize=6, clip_on=False)
    axes.set_yticks(range(len(runs)), [plain(run.name, 24) for run in runs] if len(runs) > 1 else ["stages"])
    axes.set_ylim(len(runs) - 0.5, -0.6)
    axes.grid(False)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[:].set_visible(False)


def _words(stage: Stage, end: float) -> str:
    share = (stage.last - stage.first) / end
    if share < LABELLED:
        return ""
    return f"{stage.size} px" + (f", batch {stage.batch_size}" if share >= LABELLED_WHOLE else "")


def _placed(run: Run) -> list[Resume]:
    return [resume for resume in resumes(run.resumed_from, run.training) if np.isfinite(resume.epoch)]


def _accuracy(axes: Any, runs: Sequence[Run], over: str = "epoch", divisor: int = 1) -> None:
    """Top-1 by size: of one run a colour per size, of several a colour per run and a marker per size.

    Args:
        axes: To draw in.
        runs: The runs.
        over: Which of the evaluations' figures (`read.EVALUATED`) goes to the right ...
        divisor: ... in how many of its units.
    """
    sizes = sorted({size for run in runs for size in run.evaluations})
    markers = "osD^vP*X"
    for index, run in enumerate(runs):
        for size, figures in run.evaluations.items():
            place = sizes.index(size)
            shade = color(place) if len(runs) == 1 else color(index)
            style = {"marker": markers[place % len(markers)], "markersize": 4.5, "color": shade, "clip_on": False}
            axes.plot(figures[over] / divisor, 100 * figures["top1"], line_style(index), linewidth=1.2, **style)
    for place, size in enumerate(sizes):
        shade = color(place) if len(runs) == 1 else DIM
        axes.plot([], [], marker=markers[place % len(markers)], color=shade, label=f"{size} px", markersize=4.5)
    axes.set_ylabel("top-1 (%)")
    if sizes:
        axes.legend(loc="lower right", ncols=min(4, len(sizes)))
    else:
        axes.text(0.5, 0.5, "no evaluation yet", ha="center", va="center", transform=axes.transAxes, color=DIM)


def _finish(all_axes: Sequence[Any], runs: Sequence[Run]) -> None:
    """Stages and resumes as lines through every panel, where they are of one run or the same in all."""
    panels = all_axes[1:]
    end = max((float(run.training["epoch"][-1]) for run in runs if len(run.training["epoch"])), default=1.0)
    panels[0].set_xlim(0, 1.004 * end or 1.0)  # shared by all
    if same_stages(runs):
        for stage in stages(runs[0].training)[1:]:
            for panel in panels:
                panel.axvline(stage.first, color="#9aa4ae", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    if len(runs) == 1:
        for resume in _placed(runs[0]):
            for panel in panels:
                panel.axvline(resume.epoch, color=RESUME, linewidth=0.9, linestyle=":", zorder=0)
    panels[-1].set_xlabel("epochs")
