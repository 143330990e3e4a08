"""The picture of a range test: the loss against the rate, and below it what each method suggests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from recipes.find_lr.curve import Curve
from recipes.find_lr.suggest import METHODS, Suggestion
from recipes.output import COLORS

HEADROOM = 1.25
"""The picture ends at this multiple of the highest first loss; what takes off leaves it."""
CHOSEN, PRESENT = COLORS[1], "#59636e"


def draw(
    figure: Figure,
    curves: Sequence[Curve],
    suggestions: Sequence[Suggestion],
    *,
    chosen: float | None,
    present: float,
    images: int,
) -> None:
    """Draw the test.

    Args:
        figure: Empty.
        curves: One per run.
        suggestions: Of these curves.
        chosen: The rate that is proposed, at `images` a step; None: there is none.
        present: The rate that the config has now, at `images` a step.
        images: Images per step of the test.
    """
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1.2))
    _losses(above, curves)
    _strip(below, suggestions)
    for axes in (above, below):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        lrs = np.concatenate([curve.lrs for curve in curves])
        low, high = lrs.min(), lrs.max()
        axes.set_xlim(low, high)
        if low <= present <= high:
            axes.axvline(present, color=PRESENT, linestyle=":", label=f"now in the config: {present:.2g}")
        if chosen is not None:
            axes.axvline(chosen, color=CHOSEN, label=f"proposed: {chosen:.2g}")
    above.legend(loc="lower left")
    below.set_xlabel(f"learning rate (at {images} images a step, log scale)")


def _losses(axes: Axes, curves: Sequence[Curve]) -> None:
    """Each run's losses as points and their average as a line."""
    color = COLORS[0]
    for index, curve in enumerate(curves):
        axes.plot(curve.lrs, curve.losses, ".", color=color, alpha=0.25, markersize=4, markeredgewidth=0)
        label = "smoothed training loss, one line per run" if index == 0 else None
        axes.plot(curve.lrs, curve.smoothed, color=color, alpha=0.8, label=label)
    losses = np.concatenate([curve.losses for curve in curves])
    first = [float(curve.losses[0]) for curve in curves if np.isfinite(curve.losses[0])]
    if first:
        top, bottom = HEADROOM * max(first), float(losses[np.isfinite(losses)].min())
        axes.set_ylim(bottom - 0.05 * (top - bottom), top)
    axes.set_ylabel("loss")


def _strip(axes: Axes, suggestions: Sequence[Suggestion]) -> None:
    """A row per method: each run's rate as a dot, their geometric mean as a bar."""
    names = [method.name for method in METHODS]
    for suggestion in suggestions:
        row, color = names.index(suggestion.method), COLORS[2]
        rates = [rate for rate in suggestion.per_run if rate is not None]
        axes.plot(rates, [row] * len(rates), "o", color=color, alpha=0.5, markersize=5, markeredgewidth=0)
        axes.plot([suggestion.geometric_mean], [row], "|", color=color, markersize=14, markeredgewidth=2.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title("suggestions: a dot per run, a bar at their geometric mean", fontsize="small")
