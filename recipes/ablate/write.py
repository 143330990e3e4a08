"""The results in files, and in the terminal."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from rich.console import Console
from rich.table import Table as RichTable

from data.text import clean
from data.text import markdown as markdown_text
from recipes.ablate.results import Results, seed_noise
from recipes.ablate.tables import Table, accuracy_table, cost_table, csv_text, effect_table, markdown, notes
from recipes.output import Section, figure, page, paragraph, table
from recipes.watch.files import replace_file

TERMINAL_SIZES = 2
"""Image sizes for which 80 columns have room."""


class Story(NamedTuple):
    """All that is told about an ablation."""

    title: str
    results: Results
    accuracies: list[list[float]]
    """Top-1 of each variant's runs at the main size."""
    eval_interval: int
    setting: str
    """What was run on what."""
    remarks: list[str]
    """Failed runs, runs that are missing, what makes runs hard to compare."""
    command: list[str]
    """What was typed."""

    @property
    def texts(self) -> list[str]:
        """What the numbers mean."""
        return notes(self.results, self.accuracies, self.eval_interval)

    @property
    def standard_error(self) -> float | None:
        """Of a difference between two variants' means, as a share."""
        noise, n = seed_noise(self.accuracies), max((len(group) for group in self.accuracies), default=0)
        return None if noise is None else noise * (2 / n) ** 0.5


def show(story: Story, console: Console) -> None:
    """Print the tables, each of which fits 80 columns; without a finished run only the remarks."""
    results = story.results
    if not any(row.seeds for row in results.rows):
        console.print(*story.remarks, sep="\n", markup=False, highlight=False)
        return
    others = [size for size in results.sizes if size != results.size]
    sizes = [*others[-(TERMINAL_SIZES - 1) :], results.size]
    console.print()
    for caption, content in (
        ("What each technique adds", effect_table(results)),
        ("Accuracy: top-1", accuracy_table(results, sizes)),
        ("Cost", cost_table(results)),
    ):
        if content.rows:
            console.print(f"[bold]{caption}[/bold]")
            console.print(_rich(content, console.width))
            console.print()
    for text in (*story.texts, *story.remarks):
        console.print(text, markup=False, highlight=False, soft_wrap=False)


def _rich(content: Table, width: int) -> RichTable:
    """The table with three spaces between its columns, or as many of them as the width has room for.

    One alone lets headers of several words run together.
    """
    lines = (content.headers, *content.rows)
    text = sum(max(map(len, column)) for column in zip(*lines, strict=True))
    gap = max(1, min(3, (width - text) // len(content.headers)))
    out = RichTable(box=None, padding=(0, gap, 0, 0), header_style="bold")
    for index, header in enumerate(content.headers):
        out.add_column(header, justify="right" if index in content.numbers else "left", overflow="fold")
    for row in content.rows:
        out.add_row(*row)
    return out


def write(story: Story, folder: Path) -> list[Path]:
    """Write table.md, table.csv, ablation.html and accuracy.png.

    Args:
        story: What to tell.
        folder: Where; it exists.

    Returns:
        What was written.

    Raises:
        OSError: A file cannot be written; the one before it is untouched.
    """
    files = {
        "table.md": clean(_markdown(story)).encode(),
        "table.csv": clean(csv_text(story.results)).encode(),
    }
    pictures: dict[str, Markup] = {}
    if any(row.wall_seconds for row in story.results.rows):
        # matplotlib takes a second to import, which a list or an error need not wait for.
        from recipes.ablate.picture import draw_accuracy, draw_effects
        from recipes.output import chart, svg

        with chart(11, 6.5) as drawn:
            draw_accuracy(drawn, story.results)
            pictures["accuracy"] = svg(drawn, "Top-1 against time for each variant, and the Pareto front")
            buffer = io.BytesIO()
            drawn.savefig(buffer, format="png", dpi=150)
            files["accuracy.png"] = buffer.getvalue()
        if story.results.effects:
            with chart(9, 1.6 + 0.5 * len(story.results.effects)) as drawn:
                draw_effects(drawn, story.results, story.standard_error)
                pictures["effects"] = svg(drawn, "Change of top-1 by each technique, alone and in the recipe")
    files["ablation.html"] = clean(_html(story, pictures)).encode()
    for name, content in files.items():
        replace_file(folder / name, [content])
    return [folder / name for name in files]


def _markdown(story: Story) -> str:
    results = story.results
    parts = [f"# {story.title}", story.setting]
    if results.effects:
        parts += ["## What each technique adds", markdown(effect_table(results))]
    parts += ["## Accuracy: top-1", markdown(accuracy_table(results, results.sizes))]
    parts += ["## Cost", markdown(cost_table(results)), *story.texts]
    if story.remarks:
        parts += ["## Remarks", *(f"- {markdown_text(text)}" for text in story.remarks)]
    parts.append(f"```sh\n{shlex.join(story.command)}\n```")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _html(story: Story, pictures: dict[str, Markup]) -> str:
    results = story.results

    def html(content: Table) -> Markup:
        return table(content.headers, content.rows, content.numbers)

    sections = []
    if results.effects:
        body = [html(effect_table(results))]
        if "effects" in pictures:
            body.append(figure(pictures["effects"], "Bars: means over the seeds; whiskers: lowest to highest seed."))
        sections.append(Section("What each technique adds", _join(body)))
    body = [html(accuracy_table(results, results.sizes))]
    if "accuracy" in pictures:
        body.append(figure(pictures["accuracy"], "Curves and points: means; whiskers: lowest to highest seed."))
    sections.append(Section("Accuracy: top-1", _join(body)))
    sections.append(Section("Cost", html(cost_table(results))))
    if story.remarks:
        sections.append(Section("Remarks", _join([paragraph(text) for text in story.remarks])))
    typed = Markup("<pre>{}</pre>").format(shlex.join(story.command))
    sections.append(Section("How to read this", _join([*(paragraph(text) for text in story.texts), typed])))
    return page(story.title, story.setting, sections)


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("\n").join(parts)
