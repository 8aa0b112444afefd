"""The parts that the pages are put together from, and how they look, light and dark."""

import html
from collections.abc import Iterable, Sequence

from minilora.report.plots import blend

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbf9; --card: #ffffff; --fg: #1d1f24; --muted: #565d68;
  --grid: #dfe1e5; --accent: #0b66c3; --warm: #b8500a; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --card: #1c1f25; --fg: #e8eaed;
  --muted: #a3abb6; --grid: #343943; --accent: #5aa9ff; --warm: #ff9d4d; } }
* { box-sizing: border-box; }
body { background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 34px 0 2px; }
p { margin: 2px 0 12px; color: var(--muted); max-width: 80ch; }
svg { display: block; } figure { margin: 6px 0; overflow-x: auto; max-width: 100%; }
svg text { fill: var(--fg); font: 13px system-ui, sans-serif; }
svg text.small { font-size: 12px; fill: var(--muted); } svg text.number { font-size: 12px; }
svg text.strong { font-weight: 600; paint-order: stroke; stroke: var(--bg); stroke-width: 5px; }
.grid { stroke: var(--grid); } .axis { stroke: var(--muted); }
.dashed { stroke: var(--muted); stroke-dasharray: 4 4; } .error { stroke: var(--fg); }
.cell, .accent, .better { fill: var(--accent); } .warm, .worse { fill: var(--warm); }
.above { stroke: var(--warm); stroke-width: 2; }
.muted { fill: var(--muted); } .hollow { fill: var(--bg); }
.better { stroke: var(--accent); } .worse { stroke: var(--warm); } .thick { stroke-width: 3; }
.curve { fill: none; stroke-width: 1.4; stroke-opacity: .75; }
.accent-line { stroke: var(--accent); } .muted-line { stroke: var(--muted); }
.row { display: flex; flex-wrap: wrap; gap: 6px 14px; }
dl.about { display: grid; grid-template-columns: max-content 1fr; gap: 1px 14px; margin: 4px 0 10px;
  font-size: 13.5px; } .about dt { color: var(--muted); }
.about dd { margin: 0; overflow-wrap: anywhere; }
h1 { overflow-wrap: anywhere; }
ul.cards { list-style: none; padding: 0; display: grid; gap: 10px; margin: 14px 0 6px;
  grid-template-columns: repeat(auto-fill, minmax(min(280px, 100%), 1fr)); }
.cards li { background: var(--card); border: 1px solid var(--grid); border-radius: 10px;
  padding: 10px 14px; } .cards b { display: block; font-size: 21px; line-height: 1.3; }
.cards span { color: var(--muted); font-size: 13px; }
.cards li.flag { border-color: var(--warm); }
table { border-collapse: collapse; font-size: 13.5px; } td, th { padding: 3px 10px 3px 0;
  text-align: right; border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 600; } td:first-child, th:first-child,
td.words, th.words { text-align: left; } .scroll { overflow-x: auto; }
td.words { color: var(--muted); }
code, pre, .words { font-family: ui-monospace, monospace; font-size: 12.5px; }
td { white-space: nowrap; }
td.words { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: 10px;
  padding: 10px 14px; overflow-x: auto; white-space: pre; max-height: 340px; }
pre.told { white-space: pre-wrap; overflow-wrap: anywhere; max-height: none; line-height: 1.75; }
.told span { border-radius: 3px; } .told .lost { text-decoration: underline dotted var(--warm); }
.halves > * { min-width: 0; }
.halves { display: grid; gap: 8px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
summary { cursor: pointer; color: var(--muted); margin: 8px 0; }
.scale { display: inline-block; width: 120px; height: 9px; border-radius: 4px; margin: 0 6px;
  background: linear-gradient(90deg, FIRST, LAST); }
""".replace("FIRST", blend(0)).replace("LAST", blend(1))


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
