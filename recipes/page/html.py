"""HTML pages in one file: no script, no address, nothing that a browser would have to fetch."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


class Section(NamedTuple):
    """A heading with what stands below it."""

    title: str
    body: Markup


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
        title: Heading and title of the window; text, escaped here.
        subtitle: The line below it; text, escaped here.
        sections: In order; a list of links to them stands on top where there are more than three.
    """
    return TEMPLATES.get_template("page.html").render(title=title, subtitle=subtitle, sections=sections)


def paragraph(text: object, note: bool = False) -> Markup:
    """A paragraph; text is escaped, `Markup` is taken as it is."""
    return Markup('<p class="note">{}</p>' if note else "<p>{}</p>").format(text)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> Markup:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        headers: One per column; escaped.
        rows: Cells; text is escaped, `Markup` is taken as it is.
        numbers: Indices of the columns that hold numbers, which are set flush right.
    """

    def line(tag: str, cells: Sequence[object]) -> Markup:
        parts = (
            Markup("<{0}{1}>{2}</{0}>").format(tag, Markup(' class="number"') if index in numbers else "", cell)
            for index, cell in enumerate(cells)
        )
        return Markup("<tr>{}</tr>").format(Markup("").join(parts))

    body = Markup("\n").join(line("td", row) for row in rows)
    return Markup('<div class="scroll"><table><thead>{}</thead><tbody>{}</tbody></table></div>').format(
        line("th", headers), body
    )


def figure(content: Markup, caption: str = "") -> Markup:
    """A picture (see `picture` and chart.svg) with a line below it."""
    below = Markup("<figcaption>{}</figcaption>").format(caption) if caption else ""
    return Markup("<figure>{}{}</figure>").format(content, below)


def picture(image: bytes, alt: str, media_type: str = "image/png", width: int | None = None) -> Markup:
    """An image inside the page; with `width` in CSS pixels, enlarged to it without smoothing.

    Args:
        image: The encoded image.
        alt: What it shows.
        media_type: Of `image`.
        width: None: its own size.
    """
    data = base64.b64encode(image).decode("ascii")
    style = Markup(' class="pixels" width="{}"').format(width) if width else ""
    return Markup('<img alt="{}"{} src="data:{};base64,{}">').format(escape(alt), style, media_type, data)
