"""The page: self-contained, escaped, described in words."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from nnunet_mim.reporting.page import Section, figure_png, write_page
from nnunet_mim.system import files


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_is_self_contained_and_escaped(tmp_path) -> None:
    path = tmp_path / "new folder" / "page.html"
    figure = Figure()
    figure.set_label("What it <shows>")
    write_page(path, "Masks <in> masks", [
        Section("Views & masks", "One <b>.\n\nTwo.", "A <note>.", [figure]),
        Section("Losses", figures=[figure, figure_png(figure)]),
        Section("Organs", "Dice", table=[["organ", "Dice"], ["<liver>", "0.9"]], code="a <\nb"),
    ])  # fmt: skip
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(https?:)?//", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    tags = Tags(text).tags
    assert not {"script", "link", "iframe", "b", "in", "liver", "note", "shows"} & {tag for tag, _ in tags}
    assert [tag for tag, _ in tags].count("p") == 4
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert len(images) == 3
    for attrs in images:
        assert attrs["alt"]
        kind, data = attrs["src"].split(",")
        assert kind == "data:image/png;base64"
        assert matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png").shape[2] == 4
    assert "&lt;liver&gt;" in text
    assert "<pre>a &lt;\nb</pre>" in text
    assert "prefers-color-scheme: dark" in text


def test_lead_marked_rows_and_tables_of_words(tmp_path) -> None:
    table = [["setting", "value"], ["batch_size", "2"], ["lr", "<3>"]]
    sections = [Section("Settings", table=table, marked=[2], words=True), Section("Run", table=[["", ""], ["a", "b"]])]
    write_page(tmp_path / "page.html", "Run", sections, "Learning: level <1>.")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<p class="lead">Learning: level &lt;1&gt;.</p>' in text
    assert '<tr class="marked"><td>lr</td><td>&lt;3&gt;</td></tr>' in text
    assert text.count('<table class="words">') == 1
    assert text.count("<th ") == 2  # an empty heading is left out
    assert '<p class="lead">' not in write_and_read(tmp_path, "without")


def write_and_read(folder, title: str) -> str:
    write_page(folder / "page.html", title, [])
    return (folder / "page.html").read_text(encoding="utf-8")


def test_former_page_stays_until_the_new_one_is_complete(tmp_path, monkeypatch) -> None:
    write_page(tmp_path / "page.html", "first", [])

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_page(tmp_path / "page.html", "second", [])
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert "first" in (tmp_path / "page.html").read_text()


def test_section_needs_only_a_title() -> None:
    section = Section("Empty")
    assert (section.text, section.figures, section.table) == ("", (), None)
    with pytest.raises(AttributeError):
        section.title = "other"  # type: ignore[misc]
