"""HTML from values: everything that a person named is escaped here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from pipeline.errors import printable


def escaped(text: object) -> str:
    """Return a text for HTML, also inside an attribute; escapes stand for control characters."""
    return html.escape(printable(str(text)))


def card(title: str, *content: str, note: str = "", wide: bool = False) -> str:
    """Return a section of the page; empty without content.

    Args:
        title: Escaped here.
        content: HTML.
        note: HTML beside the title.
        wide: Whether the section takes the whole width of a wide window.
    """
    if not any(content):
        return ""
    small = f" <small>{note}</small>" if note else ""
    css = ' class="wide"' if wide else ""
    return f"<section{css}><h2>{escaped(title)}{small}</h2>{''.join(content)}</section>\n"


def figures(drawn: Iterable[tuple[str, str]]) -> str:
    """Return figures side by side, as many as the width has room for; one or two are larger.

    Args:
        drawn: HTML of the heading, and the SVG.
    """
    drawn = list(drawn)
    css = "figures" if len(drawn) > 2 else "figures two"
    made = [f"<figure>{f'<figcaption>{head}</figcaption>' if head else ''}{svg}</figure>" for head, svg in drawn]
    return f'<div class="{css}">{"".join(made)}</div>' if made else ""


def split(left: str, right: str) -> str:
    """Return two elements side by side where the width has room for both."""
    return f'<div class="split">{left}{right}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, css: str = "") -> str:
    """Return a table whose cells are HTML; it scrolls sideways where the window is narrow.

    A row of one cell takes the whole width, and belongs to the row above.
    """
    top = f"<thead><tr>{''.join(f'<th>{cell}' for cell in head)}" if head else ""
    body = "".join(_row(row, len(head)) for row in rows)
    return f'<div class="scroll"><table class="{css}">{top}<tbody>{body}</table></div>'


def _row(cells: Sequence[str], width: int) -> str:
    if len(cells) == 1 < width:
        return f'<tr class="note"><td colspan="{width}">{cells[0]}\n'
    return "<tr>" + "".join(f"<td>{cell}" for cell in cells) + "\n"


def paragraphs(texts: Iterable[str]) -> str:
    """Return paragraphs of HTML; commands are blocks of their own, and empty texts are left out."""
    return "".join(text if text.startswith("<pre") else f"<p>{unbroken(text)}</p>" for text in texts if text)


def unbroken(text: str) -> str:
    """Return HTML in which no line ends inside a number such as `1.07e-2` or `95 %`."""
    return re.sub(r"[\d.]+e-\d+", r'<span class="n">\g<0></span>', text).replace(" %", "\N{NO-BREAK SPACE}%")


def folded(summary: str, content: str) -> str:
    """Return content that opens with a click; `summary` is HTML."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Return a legend of colours: CSS class and name."""
    return "".join(f'<span class="key {css}">{escaped(name)}</span>' for css, name in entries)
