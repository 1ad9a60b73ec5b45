"""Writes texts, figures and tables as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

from nnunet_mim.errors import printable
from nnunet_mim.system.files import write_atomically

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #57606a; --paper: #fff; --line: #d5dae0; --shade: #f4f6f8;
        --mark: #fff4d6; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7eb; --soft: #9aa4ae; --paper: #14181c; --line: #333b43; --shade: #1d2329;
          --mark: #3a3115; --accent: #56b4e9; }
}
body { margin: 0 auto; max-width: 1100px; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; }
figure { margin: 1.2rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; background: #fff; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1.2rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; }
th { background: var(--shade); font-weight: 600; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
td { white-space: nowrap; }
.words td:not(:first-child) { white-space: normal; }
.words td { vertical-align: top; overflow-wrap: anywhere; min-width: 3.5rem; }
tr.marked td { background: var(--mark); }
.lead { max-width: none; font-size: 1.12rem; padding: .9rem 1.1rem; border-left: 4px solid var(--accent);
        background: var(--shade); border-radius: 4px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem 1rem; background: var(--shade);
      border-radius: 4px; font-size: .8rem; }
.note { color: var(--soft); font-size: .92rem; }
"""


@dataclass(frozen=True)
class Section:
    """One part of a page."""

    title: str
    text: str = ""
    """an empty line starts a new paragraph"""
    note: str = ""
    """text below the figures, in smaller print"""
    figures: Sequence[Figure | bytes] = ()
    """matplotlib figures, whose label becomes the alternative text, or bytes of PNG files"""
    table: list[list[str]] | None = None
    """rows of cells; the first row is the heading, not shown if all its cells are empty"""
    code: str = ""
    """lines shown as they are"""
    marked: Collection[int] = ()
    """numbers of highlighted rows of the table; 1 is the first below the heading"""
    words: bool = False
    """whether the table holds words, not numbers"""


def write_page(path: Path, title: str, sections: Sequence[Section], summary: str = "") -> None:
    """Write an HTML file that needs no other file and no network: pictures are inside it as base64 PNG.

    Args:
        path: the file; its folder is made. The former file stays until the new one is complete.
        title: title of the page.
        sections: parts of the page, from top to bottom.
        summary: highlighted sentence below the title.
    """
    title = html.escape(title)
    first = f'<p class="lead">{html.escape(summary)}</p>\n' if summary else ""
    body = "\n".join(_section_html(section) for section in sections)
    page = f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{first}{body}
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", "replace"))


def _section_html(section: Section) -> str:
    parts = [f"<section>\n<h2>{html.escape(section.title)}</h2>", *_paragraphs(section.text, "<p>")]
    if section.table:
        parts.append(_table_html(section.table, section.marked, section.words))
    for figure in section.figures:
        label = str(figure.get_label()) if isinstance(figure, Figure) else ""
        png = base64.b64encode(figure_png(figure) if isinstance(figure, Figure) else figure).decode()
        alt = html.escape(label or section.title, quote=True)
        parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{png}"></figure>')
    parts += _paragraphs(section.note, '<p class="note">')
    if section.code:
        parts.append(f"<pre>{html.escape(section.code)}</pre>")
    return "\n".join([*parts, "</section>"])


def _table_html(table: list[list[str]], marked: Collection[int], words: bool) -> str:
    head, *rows = table
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = [f"<tr>{cells}</tr>"] if any(head) else []
    for number, row in enumerate(rows, start=1):
        start = '<tr class="marked">' if number in marked else "<tr>"
        lines.append(start + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    kind = ' class="words"' if words else ""
    return f'<div class="scroll"><table{kind}>\n' + "\n".join(lines) + "\n</table></div>"


def _paragraphs(text: str, tag: str) -> list[str]:
    return [f"{tag}{html.escape(p.strip())}</p>" for p in text.split("\n\n") if p.strip()]


def markdown_text(text: object) -> str:
    """A text from a file for one line of Markdown, a table's cell too: no HTML, link, line or column begins in it."""
    shown = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", printable(text, None)).replace("|", "/")
    return shown.replace("](", "]\\(")


def yaml_text(text: str) -> str:
    """A text as a value in YAML, in quotes unless it is like cc-by-4.0."""
    return text if re.fullmatch(r"[A-Za-z]+-[A-Za-z0-9.-]*[A-Za-z0-9]", text) else json.dumps(text)


def figure_png(figure: Figure, dpi: float = 110) -> bytes:
    """Draw a figure as the bytes of a PNG file."""
    ticks = {id(text) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in axis.findobj(Text)}
    for text in figure.findobj(Text):
        if id(text) not in ticks:
            text.set_parse_math(False)  # names from files may hold dollar signs
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
