"""Charts in one style, for PNG files and for pages."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# Okabe & Ito's colours, told apart by colour-blind readers too; the pale yellow is left out.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1f24")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "composer-resnet",  # the same chart is the same bytes
}


@contextmanager
def chart(width: float = 9.0, height: float = 4.0) -> Iterator[Figure]:
    """A figure to draw in, inches wide and high, whose axes have the project's style.

    `with chart() as figure: axes = figure.subplots(...)`, with `cycle(COLORS)` for the lines. No global state of
    pyplot is touched, and no screen is needed.
    """
    with rc_context({**STYLE, "axes.prop_cycle": cycler(color=COLORS)}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def plain(text: str, longest: int = 40) -> str:
    """Foreign text as a label: one line, cut at `longest` characters, and no mathematics between dollar signs."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return (line if len(line) <= longest else line[: longest - 1] + "…").replace("$", r"\$")


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as an SVG element for a page.

    Args:
        figure: Drawn.
        alt: What it shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    element = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    return Markup(element)


def save(figure: Figure, path: Path) -> None:
    """The figure as a PNG file of 150 dots per inch; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
