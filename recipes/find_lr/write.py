"""What a range test leaves: lr.csv, lr.json, lr.png, lr.html, and a table in the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from recipes.find_lr.curve import Curve, Ramp
from recipes.find_lr.plot import draw
from recipes.find_lr.suggest import METHODS, Suggestion, still_falling
from recipes.find_lr.trial import Pasted, Peak
from recipes.json_text import to_json
from recipes.output import Section, chart, figure, page, paragraph, svg, table
from recipes.watch.files import replace_file, replace_text

HEADERS = ("method", "geom. mean", "median", "mean", "spread", "lowest", "highest")
ENDS = {
    "complete": "reached the last rate",
    "diverged": "diverged, stopped",
    "not finite": "loss no longer finite, stopped",
}


class Result(NamedTuple):
    """A finished test."""

    run_name: str
    size: int
    """Side of the images in pixels."""
    images: int
    """Images per step over all devices."""
    devices: int
    present: float
    """The rate that the config has for `images` a step."""
    ramp: Ramp
    curves: tuple[Curve, ...]
    suggestions: tuple[Suggestion, ...]
    chosen: Suggestion | None
    """The one that is proposed; None where no method found anything."""
    line: Pasted | None
    peaks: tuple[Peak, ...]
    command: str
    """The command line that was given."""
    versions: dict[str, str | None]


def write(result: Result, folder: Path) -> None:
    """Write all files; each is the old one or the new one.

    Args:
        result: Of the test.
        folder: Made where it is missing.

    Raises:
        OSError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with chart(height=5.2) as drawn:
        chosen = None if result.chosen is None else result.chosen.geometric_mean
        draw(drawn, result.curves, result.suggestions, chosen=chosen, present=result.present, images=result.images)
        png = io.BytesIO()
        drawn.savefig(png, format="png", dpi=150)
        html = _page(result, drawn)
    replace_text(folder / "lr.csv", _csv(result.curves))
    replace_file(folder / "lr.png", [png.getvalue()])
    replace_text(folder / "lr.html", html)
    replace_text(folder / "lr.json", to_json(_json(result), indent=1) + "\n")


def _csv(curves: Sequence[Curve]) -> str:
    """One line per step: run and step from 0, seed, rate, loss, smoothed loss; numbers as exact as they are."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("run", "seed", "step", "lr", "loss", "smoothed_loss"))
    for run, curve in enumerate(curves):
        points = zip(curve.lrs.tolist(), curve.losses.tolist(), curve.smoothed.tolist(), strict=True)
        rows.writerows((run, curve.seed, step, *point) for step, point in enumerate(points))
    return text.getvalue()


def _json(result: Result) -> dict[str, Any]:
    """The result without the curves, which stand in lr.csv."""
    return {
        "run_name": result.run_name,
        "image_size": result.size,
        "global_batch_size": result.images,
        "devices": result.devices,
        "ramp": result.ramp._asdict(),
        "runs": [{"seed": curve.seed, "steps": len(curve.lrs), "end": curve.end} for curve in result.curves],
        "present_lr": result.present,
        "suggestions": {suggestion.method: suggestion._asdict() for suggestion in result.suggestions},
        "chosen": None if result.chosen is None else result.chosen.method,
        "optimizer": None if result.line is None else result.line._asdict(),
        "peak_lr_by_devices": {str(peak.devices): peak.lr for peak in result.peaks},
        "command": result.command,
        "versions": result.versions,
    }


def cells(suggestion: Suggestion) -> tuple[str, ...]:
    """A suggestion as the columns of `HEADERS`; in brackets the runs that it is of, where not all have one."""
    rates = [rate for rate in suggestion.per_run if rate is not None]
    runs = len(suggestion.per_run)
    return (
        suggestion.method + (f" ({len(rates)} of {runs})" if len(rates) < runs else ""),
        f"{suggestion.geometric_mean:.2g}",
        f"{suggestion.median:.2g}",
        f"{suggestion.mean:.2g}",
        f"x{suggestion.spread:.2f}" if len(rates) > 1 else "-",
        f"{min(rates):.2g}",
        f"{max(rates):.2g}",
    )


def rows(suggestions: Sequence[Suggestion]) -> list[tuple[str, ...]]:
    """A row for each method, in the order of `METHODS`; dashes where no run had what it looks for."""
    found = {suggestion.method: cells(suggestion) for suggestion in suggestions}
    return [found.get(method.name, (method.name, *["-"] * (len(HEADERS) - 1))) for method in METHODS]


def _page(result: Result, drawn: Figure) -> str:
    subtitle = (
        f"{result.run_name}: {len(result.curves)} runs of up to {result.ramp.steps} steps, "
        f"{result.images} images of {result.size} px a step on {result.devices} device(s)"
    )
    alt = "Training loss against the learning rate on a logarithmic scale, with the suggestions of each method below"
    caption = "Points are single batches. Each step's loss is that before its weights moved."
    runs = [(str(curve.seed), str(len(curve.lrs)), f"{curve.lrs[-1]:.3g}", ENDS[curve.end]) for curve in result.curves]
    made = [(name, value or "-") for name, value in result.versions.items()]
    return page(
        "Learning-rate range test",
        subtitle,
        [
            Section("Result", _conclusion(result)),
            Section("Curves", figure(svg(drawn, alt), caption)),
            Section("Suggestions", _suggestions(result)),
            Section("Runs", table(("seed", "steps", "last rate", "end"), runs, numbers=(0, 1, 2))),
            Section(
                "How it was made",
                Markup("<pre>{}</pre>").format(result.command) + table(("what", "version"), made),
            ),
        ],
    )


def caution(result: Result) -> str:
    """What a reader of the result must know, or nothing."""
    falling = sum(still_falling(curve, result.ramp.steps) for curve in result.curves)
    if not falling:
        return ""
    return (
        f"In {falling} of {len(result.curves)} runs the loss was still falling at the last rate, "
        f"{result.ramp.end_lr:g}: higher ones may be better, try a higher --end-lr."
    )


def _conclusion(result: Result) -> Markup:
    if result.line is None or result.chosen is None:
        return paragraph(NOTHING)
    rows = [(str(peak.devices), str(peak.images), f"{peak.lr:.3g}") for peak in result.peaks]
    return (
        paragraph(f"For the YAML ({result.chosen.method}, geometric mean of the runs; it was {result.present:.3g}):")
        + Markup("<pre>{}</pre>").format(result.line.yaml)
        + paragraph(Markup("or on the command line <code>{}</code>").format(result.line.overrides))
        + (paragraph(caution(result)) if caution(result) else "")
        + paragraph("The schedule's highest rate is then, by linear scaling:")
        + table(("devices", "images a step", "highest rate"), rows, numbers=(0, 1, 2))
    )


def _suggestions(result: Result) -> Markup:
    if not result.suggestions:
        return paragraph(NOTHING)
    note = f"Rates at {result.images} images a step. Spread: geometric standard deviation over the runs, a factor."
    note += " A dash: no run had what the method looks for."
    body = table(HEADERS, rows(result.suggestions), numbers=range(1, len(HEADERS)))
    return body + paragraph(note, note=True)


NOTHING = (
    "No suggestion: too few steps before the loss took off, or a loss that never fell. "
    "Try a lower --start-lr, more --steps, or a higher --end-lr."
)


def show(result: Result, console: Console) -> None:
    """Print the table and what to paste, in 80 columns."""
    if result.line is None or result.chosen is None:
        console.print(NOTHING)
        return
    grid = Table(title=f"Learning rates at {result.images} images of {result.size} px a step", title_justify="left")
    for index, header in enumerate(HEADERS):
        grid.add_column(header, justify="right" if index else "left")
    for method, row in zip(METHODS, rows(result.suggestions), strict=True):
        grid.add_row(*row, style="bold" if method.name == result.chosen.method else None)
    console.print(grid)
    console.print(
        f"\nFor the YAML ({result.chosen.method}, geometric mean; the config has {result.present:.3g} now):\n",
        highlight=False,
    )
    console.print(result.line.yaml, highlight=False, markup=False)
    console.print(f"\nor on the command line: {result.line.overrides}", highlight=False, soft_wrap=True)
    if caution(result):
        console.print(f"\n{caution(result)}", highlight=False)
    scaled = ", ".join(f"{peak.lr:.2g} on {peak.devices}" for peak in result.peaks)
    if len({peak.lr for peak in result.peaks}) > 1:
        console.print(f"\nThe highest rate is then, by number of devices: {scaled}.", highlight=False)
