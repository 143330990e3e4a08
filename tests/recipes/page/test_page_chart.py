import xml.etree.ElementTree as ET

import matplotlib as mpl
import pytest
from PIL import Image

from recipes.page.chart import COLORS, chart, plain, save, svg

NAMES = ["<script>alert(1)</script>", "a $x^2$ b", "$", "\\frac", "line\nbreak\x07", "--> x", "_hidden", "ä 猫"]


def drawn(name):
    with chart(4, 3) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1])
        axes.set_title(plain(name))
        axes.set_yticks([0.5], [plain(name)])
        return svg(figure, name)


@pytest.mark.parametrize("name", NAMES)
def test_foreign_text_is_a_label_and_nothing_else(name):
    text = drawn(name)
    assert text.startswith('<svg role="img" aria-label="')
    elements = list(ET.fromstring(text.replace("\x07", "")).iter())  # HTML lets a control character pass, XML does not
    assert not [element for element in elements if element.tag.endswith("script")]
    shown = [element.text for element in elements if element.tag.endswith("}text")]
    assert shown.count("".join(one if one.isprintable() else " " for one in name)) == 2


def test_long_labels_are_cut():
    assert plain("x" * 50) == "x" * 39 + "…"
    assert len(plain("x" * 40)) == 40
    assert plain("abcdef", 4) == "abc…"


def test_the_same_chart_is_the_same_bytes_and_leaves_the_style_alone(tmp_path):
    before = dict(mpl.rcParams)
    assert drawn("a") == drawn("a")
    with chart(2, 1) as figure:
        line, *_ = figure.subplots().plot([1, 2])
        save(figure, tmp_path / "new" / "chart.png")
    assert dict(mpl.rcParams) == before
    assert line.get_color() == COLORS[0]
    with Image.open(tmp_path / "new" / "chart.png") as image:
        assert image.size == (300, 150)
