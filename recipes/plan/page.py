"""A plan as a page: the picture, the tables, and where each figure is from."""

from __future__ import annotations

from markupsafe import Markup
from rich.table import Table

from recipes.output import Section, figure, page, paragraph, table
from recipes.plan import text
from recipes.plan.plan import Plan


def plan_page(plan: Plan, picture: Markup) -> str:
    """The page's HTML.

    Args:
        plan: What is told.
        picture: The schedule, as `recipes.output.svg` makes it.
    """
    time = [_table(text.time_table(plan))] if plan.throughput is not None else []
    sections = [
        Section("Schedule", figure(picture) + _table(text.stage_table(plan))),
        Section("Compute", _lines(text.compute(plan))),
        Section("Time and loader", Markup("").join([*time, _lines(text.sources(plan))])),
        Section("Price", _lines(text.price_lines(plan))),
    ]
    if any(part.memory_gb is not None for part in plan.stages):
        sections.append(Section("Memory", _table(text.memory_table(plan))))
    return page(f"Plan: {plan.run_name}", "; ".join(text.heading(plan)), sections)


def _lines(lines: list[str]) -> Markup:
    return Markup("").join(paragraph(line) for line in lines)


def _table(shown: Table) -> Markup:
    cells = [[str(cell) for cell in column.cells] for column in shown.columns]
    headers = [str(column.header) for column in shown.columns]
    return table(headers, list(zip(*cells, strict=True)), numbers=range(1, len(headers)))
