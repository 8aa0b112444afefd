"""How the page looks, light and dark; nothing is loaded from anywhere."""

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
