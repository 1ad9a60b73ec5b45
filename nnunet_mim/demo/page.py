"""One self-contained HTML file of texts, figures and tables."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #57606a; --paper: #fff; --line: #d5dae0; --shade: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7eb; --soft: #9aa4ae; --paper: #14181c; --line: #333b43; --shade: #1d2329; }
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
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem 1rem; background: var(--shade);
      border-radius: 4px; font-size: .8rem; }
.note { color: var(--soft); font-size: .92rem; }
"""


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        title: heading.
        text: plain text; an empty line starts a new paragraph.
        note: text under the figures, in smaller print.
        figures: matplotlib figures (their label is the text for those who cannot see them) or the bytes of PNG files.
        table: rows of cells, the first row being the heading; None for no table.
        code: lines to be shown as they are.
    """

    title: str
    text: str = ""
    note: str = ""
    figures: Sequence[Figure | bytes] = ()
    table: list[list[str]] | None = None
    code: str = ""


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write one HTML file that needs no other file and no network: pictures are inside it as base64 PNG."""
    body = "\n".join(_section_html(section) for section in sections)
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _section_html(section: Section) -> str:
    parts = [f"<section>\n<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(p)}</p>" for p in _paragraphs(section.text)]
    if section.table:
        head, *rows = section.table
        lines = ["<tr>" + "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append('<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>")
    for figure in section.figures:
        label = str(figure.get_label()) if isinstance(figure, Figure) else ""
        png = base64.b64encode(figure_png(figure) if isinstance(figure, Figure) else figure).decode()
        alt = html.escape(label or section.title, quote=True)
        parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{png}"></figure>')
    parts += [f'<p class="note">{html.escape(p)}</p>' for p in _paragraphs(section.note)]
    if section.code:
        parts.append(f"<pre>{html.escape(section.code)}</pre>")
    return "\n".join([*parts, "</section>"])


def _paragraphs(text: str) -> list[str]:
    return [p.strip() for p in text.split("\n\n") if p.strip()]


def figure_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return buffer.getvalue()
