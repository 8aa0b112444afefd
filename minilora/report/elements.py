"""The parts that the pages are put together from; nothing is loaded from anywhere."""

import html
from collections.abc import Iterable, Sequence

from minilora.report.style import STYLE


def document(title: str, parts: Sequence[str]) -> str:
    """Return a whole page; it holds no script and its policy forbids loading anything."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n"
        "<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def escaped(words: object) -> str:
    """Write words as HTML."""
    return html.escape(str(words))


def section(title: str, about: str) -> str:
    """Head a section, and say what it shows."""
    return f"<h2>{escaped(title)}</h2><p>{escaped(about)}</p>"


def figure(drawing: str) -> str:
    """Frame a drawing."""
    return f"<figure>{drawing}</figure>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int | None = None) -> str:
    """Make a table of text; column `words` is set as text, the first one always."""

    def row(tag: str, cells: Sequence[str]) -> str:
        look = [" class=words" if i == words else "" for i in range(len(cells))]
        inside = (
            f"<{tag}{c}>{escaped(cell)}</{tag[:2]}>" for c, cell in zip(look, cells, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    head = row('th scope="col"', header)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def details(summary: str, inside: str) -> str:
    """Fold something away."""
    return f"<details><summary>{summary}</summary>{inside}</details>"


def boxes(cards: Iterable[tuple[str, str, bool]]) -> str:
    """Make cards of a figure, words about it, and whether it should stand out."""
    items = "".join(
        f"<li{' class=flag' if flag else ''}><b>{escaped(shown)}</b>"
        f"<span>{escaped(words)}</span></li>"
        for shown, words, flag in cards
    )
    return f'<ul class="cards">{items}</ul>'
