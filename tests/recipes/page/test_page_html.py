from html.parser import HTMLParser

from markupsafe import Markup

from recipes.page.html import Section, figure, page, paragraph, picture, table

EVIL = "<script>alert('x')</script>\"&<b>"


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


def test_foreign_text_stays_text():
    body = table([EVIL, "n"], [[EVIL, 3]], numbers=[1]) + paragraph(EVIL) + figure(picture(b"png", EVIL), EVIL)
    seen = Seen(page(EVIL, EVIL, [Section(EVIL, body)]))
    assert "script" not in seen.tags
    assert "b" not in seen.tags
    assert seen.text.count(EVIL) == 8, "title, heading, subtitle, section, header, cell, paragraph, caption"
    assert ("alt", EVIL) in seen.attributes


def test_markup_is_taken_as_it_is():
    assert "<td><b>x</b></td>" in table(["a"], [[Markup("<b>x</b>")]])
    assert '<td class="number">3</td>' in table(["a", "b"], [["x", 3]], numbers=[1])


def test_a_page_needs_nothing_but_itself():
    seen = Seen(page("t", "s", [Section(f"part {place}", paragraph("x")) for place in range(4)]))
    assert "script" not in seen.tags
    links = [value for name, value in seen.attributes if name in ("src", "href")]
    assert links == ["data:,", "#s1", "#s2", "#s3", "#s4"]
    assert "nav" not in Seen(page("t", "s", [Section("one", paragraph("x"))])).tags


def test_small_pictures_are_enlarged_without_smoothing():
    assert 'class="pixels" width="64"' in picture(b"x", "dot", width=64)
    assert picture(b"abc", "dot", "image/jpeg").endswith('src="data:image/jpeg;base64,YWJj">')
