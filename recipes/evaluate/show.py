"""Figures of an evaluation for people and for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape as rich_escape
from rich.table import Table

from data.text import escape, spreadsheet
from recipes.evaluate.count import Evaluation, Result
from recipes.json_text import to_json

SHOWN_CLASSES = 20
"""Rows of the table of classes; the worst come first."""
_SHOWN_SETTINGS = 4
_SHOWN_BAD = 5
FLIP = "mean of the logits of an image and its mirror image"


def print_tables(found: Evaluation, *, per_class: bool) -> None:
    """Print tables for a terminal of 80 columns."""
    console = Console(highlight=False)
    weights = "EMA's average" if found.weights == "ema" else "trained weights"
    if found.manifest is None:
        weights = "another project's weights"
    else:
        console.print(f"{escape(found.manifest.run_name)}, {found.manifest.describe()}", soft_wrap=True, markup=False)
    end = "; mean of the logits with the mirror image's" if found.flip else ""
    console.print(f"{escape(found.location)}: {weights}, {found.precision}{end}", soft_wrap=True, markup=False)
    console.print(f"on {escape(found.data)}", soft_wrap=True, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("size, px", "crop ratio", "top-1, %", "top-5, %", "loss", "images"):
        table.add_column(heading, justify="right")
    for result in found.results:
        figures = (f"{100 * result.top1:.2f}", f"{100 * result.top5:.2f}", f"{result.counts.loss:.4f}")
        table.add_row(str(result.size), f"{result.crop_ratio:g}", *figures, f"{result.images:,}")
    console.print(table)
    if per_class:
        console.print(_classes(found))
    if found.bad_images:
        console.print(f"not counted, because they cannot be decoded: {len(found.bad_images)} images", soft_wrap=True)
        for line in found.bad_images[:_SHOWN_BAD]:
            console.print(f"  {escape(line)}", soft_wrap=True, markup=False)


def _classes(found: Evaluation) -> Table:
    """Top-1 of each class at each setting, the worst at the last one first."""
    shown = found.results[-_SHOWN_SETTINGS:]
    last = shown[-1].counts
    present = [index for index in range(len(found.classes)) if last.images[index]]
    present.sort(key=lambda index: int(last.top1[index]) / int(last.images[index]))
    rest = len(present) - SHOWN_CLASSES
    title = "top-1 of each class, %" + (
        f" (the worst {SHOWN_CLASSES} of {len(present)})" if rest > 0 else ", worst first"
    )
    if len(shown) < len(found.results):
        title += f"; the last {len(shown)} of {len(found.results)} settings, --csv has all"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="")
    table.add_column("class", no_wrap=True, max_width=30)
    for result in shown:
        crop = f"\ncrop {result.crop_ratio:g}" if len({one.crop_ratio for one in shown}) > 1 else ""
        table.add_column(f"{result.size} px{crop}", justify="right")
    table.add_column("images", justify="right")
    for index in present[:SHOWN_CLASSES]:
        shares = [f"{100 * int(one.counts.top1[index]) / int(one.counts.images[index]):.1f}" for one in shown]
        table.add_row(rich_escape(escape(found.names[index])), *shares, str(int(last.images[index])))
    return table


def class_rows(found: Evaluation, result: Result) -> Iterator[dict[str, Any]]:
    """The figures of each class that has images, at one setting."""
    for index, (folder, name) in enumerate(zip(found.classes, found.names, strict=True)):
        images = int(result.counts.images[index])
        if images:
            top1, top5 = int(result.counts.top1[index]), int(result.counts.top5[index])
            hits = {"top1_correct": top1, "top5_correct": top5, "top1": top1 / images, "top5": top5 / images}
            yield {"class": escape(folder), "name": escape(name), "images": images} | hits


def as_csv(found: Evaluation) -> str:
    """The figures of each class as CSV, one line for each setting and class; accuracies in [0, 1].

    A name that a spreadsheet would compute has a `'` before it, here and not in the JSON.
    """
    text = io.StringIO()
    fields = ["size", "crop_ratio", "class", "name", "images", "top1_correct", "top5_correct", "top1", "top5"]
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for result in found.results:
        for row in class_rows(found, result):
            texts = {key: spreadsheet(row[key]) for key in ("class", "name")}
            writer.writerow({"size": result.size, "crop_ratio": result.crop_ratio} | row | texts)
    return text.getvalue()


def as_json(found: Evaluation, *, per_class: bool) -> str:
    """Everything as one JSON object; accuracies in [0, 1]."""
    results = []
    for result in found.results:
        figures = {
            "size": result.size,
            "crop_ratio": result.crop_ratio,
            "images": result.images,
            "top1_correct": int(result.counts.top1.sum()),
            "top5_correct": int(result.counts.top5.sum()),
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.counts.loss,
        }
        results.append(figures | ({"classes": list(class_rows(found, result))} if per_class else {}))
    content = {
        "run_name": found.manifest.run_name if found.manifest else None,
        "checkpoint": found.location,
        "epoch": found.manifest.epoch if found.manifest else None,
        "finished": found.manifest.finished if found.manifest else None,
        "weights": found.weights,
        "weights_sha256": found.weights_sha256,
        "data": escape(found.data),
        "flip": FLIP if found.flip else None,
        "precision": found.precision,
        "results": results,
        "bad_images": list(map(escape, found.bad_images)),
    }
    return to_json(content, indent=2)
