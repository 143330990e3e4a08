"""How commands present results, in one style: terminal tables, Markdown, CSV, charts and pages that work offline.

A command describes its result once, as `Content`, which is printed and written from here. A page is a Jinja template
below recipes/, with the macros of templates/parts.html.jinja, rendered into templates/page.html.jinja: one HTML file
without scripts, for which a browser fetches nothing else. Jinja escapes text there, and not in TEXTS. matplotlib, which
takes half a second to import, is loaded by the first chart.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import rich.table
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from rich.console import Console
from rich.text import Text

from data.files import replace_file
from data.text import markdown as markdown_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind readers can distinguish; the pale yellow is left out.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1f24")
DIM = "#59636e"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "composer-resnet",  # equal charts are equal bytes
}
ABSENT = "-"  # a cell without a value
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Table(NamedTuple):
    """Cells of text, or of values shown by `str`."""

    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: Sequence[int] = ()  # indices of the columns of numbers, which are right-aligned

    def terminal(self, width: int) -> rich.table.Table:
        """For rich, with up to three spaces between the columns, as far as a terminal of `width` has room."""
        text = sum(max(len(str(cell)) for cell in column) for column in zip(self.headers, *self.rows, strict=True))
        gap = max(1, min(3, (width - text) // len(self.headers)))
        shown = rich.table.Table(box=None, padding=(0, gap, 0, 0), header_style="bold")
        for index, header in enumerate(self.headers):
            shown.add_column(header, justify="right" if index in self.numbers else "left", overflow="fold")
        for row in self.rows:
            shown.add_row(*(Text(str(cell)) for cell in row))
        return shown

    def markdown(self) -> str:
        """For a Markdown file."""
        rule = ["---:" if index in self.numbers else "---" for index in range(len(self.headers))]
        lines = [self.headers, rule, *self.rows]
        return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


class Chart(NamedTuple):
    """A chart for pages, made by `svg`."""

    svg: Markup
    caption: str = ""


class Code(NamedTuple):
    """Lines to copy."""

    code: str


Content = dict[str, list["str | Table | Chart | Code"]]
"""Paragraphs, tables, charts and code by the title of their section, which may be empty."""


def show(content: Content, *lines: str) -> None:
    """Print lines and then the content to the terminal, without charts; code is not wrapped."""
    console = Console(highlight=False, markup=False, emoji=False)  # a path may hold [brackets]
    for line in lines:
        console.print(line)
    for title, blocks in content.items():
        if title:
            console.print(f"\n{title}", style="bold")
        for block in blocks:
            if isinstance(block, Code):
                console.print(f"\n{block.code}\n", soft_wrap=True)
            elif not isinstance(block, Chart):
                console.print(block if isinstance(block, str) else block.terminal(console.width))


def markdown(content: Content) -> str:
    """The same as Markdown."""
    parts = []
    for title, blocks in content.items():
        parts.append(f"## {title}")
        for block in blocks:
            if isinstance(block, Code):
                parts.append(f"```sh\n{block.code}\n```")
            elif not isinstance(block, Chart):
                parts.append(markdown_text(block) if isinstance(block, str) else block.markdown().rstrip())
    return "\n\n".join(parts) + "\n"


def csv_text(headers: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A CSV file; numbers with every digit, None as an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([headers, *rows])
    return out.getvalue()


def time_unit(seconds: float) -> tuple[float, str]:
    """A suitable unit for a length of time: its seconds, and its name."""
    return (3600, "h") if seconds >= 7200 else (60, "min") if seconds >= 600 else (1, "s")


def duration(seconds: float) -> str:
    """`8.8 s`, `209 s`, `35.2 min` or `10.5 h`; `-` for nan."""
    if math.isnan(seconds):
        return ABSENT
    divisor, unit = time_unit(seconds)
    return f"{seconds:.0f} s" if 99.95 <= seconds < 600 else f"{seconds / divisor:.1f} {unit}"


TEXTS = TEMPLATES.overlay(autoescape=False, keep_trailing_newline=True)
TEXTS.filters = TEXTS.filters | {"markdown": markdown_text, "duration": duration}


def sections(template: str, **values: Any) -> Content:
    """The text of a template of TEXTS: paragraphs, separated by blank lines, by the title in `## TITLE` above them.

    A line end within a paragraph is a space; a title without text is left out.
    """
    found: Content = {}
    for part in re.split(r"^## ", TEXTS.get_template(template).render(values), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        if paragraphs := [" ".join(one.split("\n")) for one in re.split(r"\n{2,}", text.strip()) if one]:
            found[title] = [*paragraphs]
    return found


@contextmanager
def chart(width: float = 9.0, height: float = 4.0) -> Iterator[Figure]:
    """A figure to draw in, with sizes in inches and the project's style; needs no screen and no pyplot."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def plain(text: str, longest: int = 40) -> str:
    """Outside text as a label: one line, cut at `longest` characters, without dollar signs read as mathematics."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return (line if len(line) <= longest else line[: longest - 1] + "…").replace("$", r"\$")


def svg(drawn: Figure, alt: str) -> Markup:
    """A figure as an SVG element for a page, with a description; call it inside the figure's `with chart()`."""
    drawn.savefig(buffer := io.StringIO(), format="svg", metadata={"Date": None})
    element = buffer.getvalue().partition("<svg")[2]
    return Markup('<svg role="img" aria-label="{}"').format(escape(alt)) + Markup(element)


def save(drawn: Figure, path: Path) -> None:
    """Write a figure as a PNG file of 150 dots per inch; creates its folder."""
    drawn.savefig(buffer := io.BytesIO(), format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [buffer.getvalue()])


def render_page(
    title: str, subtitle: str, template: str | Template = "templates/content.html.jinja", **values: Any
) -> str:
    """A whole page: its heading, the line below it, and a body from a template and that template's values (`content=`).

    More than three `<h2>` give a list of links at the top.
    """
    before, *parts = TEMPLATES.get_template(template).render(values).split("<h2>")
    numbered = (f'<h2 id="s{number}">{part}' for number, part in enumerate(parts, 1))
    headings = [Markup(re.split("</h2>", part, maxsplit=1)[0]) for part in parts]
    body = Markup("".join([before, *numbered]))
    return TEMPLATES.get_template("templates/page.html.jinja").render(
        title=title, subtitle=subtitle, headings=headings, body=body
    )
