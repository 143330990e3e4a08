import csv
import io
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from recipes.output import TEMPLATES, Table, chart, csv_text, plain, render_page, svg

EVIL = "<script>alert('x')</script>\"&<b>"
NAMES = ["<script>alert(1)</script>", "a $x^2$ b", "\\frac", "line\nbreak\x07", "--> x", "_hidden", "ä 猫"]


def drawn(name):
    with chart(4, 3) as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1])
        axes.set_title(plain(name))
        axes.set_yticks([0.5], [plain(name)])
        return svg(drawn, name)


@pytest.mark.parametrize("name", NAMES)
def test_foreign_text_is_a_label_and_nothing_else(name):
    text = drawn(name)
    assert text.startswith('<svg role="img" aria-label="')
    elements = list(ET.fromstring(text.replace("\x07", "")).iter())  # HTML lets a control character pass, XML does not
    assert not [element for element in elements if element.tag.endswith("script")]
    shown = [element.text for element in elements if element.tag.endswith("}text")]
    assert shown.count("".join(one if one.isprintable() else " " for one in name)) == 2


class Seen(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


BODY = TEMPLATES.from_string("""{% from "templates/parts.html.jinja" import figure, paragraph, table %}
{% for heading in headings %}
<h2>{{ heading }}</h2>
{{ table([evil, "n"], [[evil, markup]], numbers=[1]) }}{{ paragraph(evil) }}{{ figure(paragraph(""), evil) }}
{% endfor %}""")


def test_foreign_text_stays_text_and_markup_is_taken_as_it_is():
    text = render_page(EVIL, EVIL, BODY, headings=[EVIL] * 4, evil=EVIL, markup=Markup("<i>3</i>"))
    seen = Seen(text)
    assert not {"script", "b"} & set(seen.tags)
    assert seen.text.count(EVIL) == 3 + 4 * 6, "three titles; link, heading, header, cell, paragraph, caption"
    assert '<td class="number"><i>3</i></td>' in text


@pytest.mark.parametrize(("headings", "links"), [(3, []), (4, ["#s1", "#s2", "#s3", "#s4"])])
def test_a_page_needs_nothing_but_itself(headings, links):
    seen = Seen(render_page("t", "s", BODY, headings=range(headings), evil="", markup=""))
    assert [value for name, value in seen.attributes if name in ("src", "href")] == ["data:,", *links]


CELLS = Table(("name", "a value"), [("x | y", "-"), ("[bold]z[/bold]", 0.1)], numbers=[1])


def test_a_table_reads_back_from_markdown_and_csv():
    header, rule, *rows = [tuple(line.strip("| \n").split(" | ")) for line in CELLS.markdown().splitlines()]
    assert (header, rule) == (CELLS.headers, ("---", "---:"))
    assert rows == [("x \\| y", "-"), ("[bold]z[/bold]", "0.1")], "a bar in a cell is escaped"
    lines = list(csv.reader(io.StringIO(csv_text(CELLS.headers, [*CELLS.rows, (None, 1 / 3)]))))
    assert lines == [["name", "a value"], ["x | y", "-"], ["[bold]z[/bold]", "0.1"], ["", repr(1 / 3)]]
