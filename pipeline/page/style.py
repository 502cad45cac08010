"""The look of the page: its style sheet, light and dark, and the few lines of script that sort a table."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f5f7f9; --line: #dfe3e8; --text: #1b1f24; --soft: #5b6470; --paper: #ffffff;
  --accent: #0072b2; --near: #009e7324; --warn: #b04a00;
  /* Okabe and Ito (2008), told apart with any kind of colour vision; yellow is darkened on white. */
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #c4609c;
  --c4: #d08c00; --c5: #3fa4dc; --c6: #444b54; --c7: #a89a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1f25; --line: #303741; --text: #e8ebef; --soft: #9aa5b1; --paper: #0d1013;
    --accent: #56b4e9; --near: #1fc29630; --warn: #ff9a5c;
    --c0: #4aa8e8; --c1: #ff7f3f; --c2: #1fc296; --c3: #e49ac6;
  --c4: #f2b134; --c5: #a5dcff; --c6: #c9d0d8; --c7: #f0e442;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 20px 20px 40px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: anywhere;
}
header { color: var(--soft); margin-bottom: 10px; }
.answer { border-left: 5px solid var(--accent); background: var(--card); border-radius: 10px; padding: 16px 20px; }
.answer h1 { margin: 0 0 4px; font-size: clamp(1.2rem, 3.4vw, 1.65rem); line-height: 1.25; text-wrap: balance; }
.answer p { margin: 2px 0 0; }
main { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 14px; }
section { background: var(--card); border-radius: 10px; padding: 14px 18px 16px; min-width: 0; flex: 1 1 460px; }
section.wide { flex-basis: 100%; }
@media (max-width: 760px) {
  body { padding: 12px 10px 30px; }
  main { gap: 10px; }
  section { padding: 12px 12px 14px; flex-basis: 100%; }
  .answer { padding: 12px 14px; }
  .best td:not(:first-child) small { display: block; }
  .best { font-size: 0.88rem; }
  .best th, .best td { padding-right: 8px; }
  .best th { white-space: normal; }
}
h2 { font-size: 1rem; margin: 0 0 8px; }
small { font-weight: 400; color: var(--soft); font-size: 0.85rem; }
p { margin: 0 0 10px; }
p:last-child { margin-bottom: 0; }
code, pre { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { background: var(--paper); border-radius: 4px; padding: 1px 5px; }
pre {
  background: var(--paper); border-radius: 6px; padding: 10px 12px; margin: 6px 0 10px;
  overflow-x: auto; overflow-wrap: normal;
}
.soft { color: var(--soft); }
.warn { color: var(--warn); }
.n { white-space: nowrap; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
.split { display: flex; flex-wrap: wrap; gap: 10px 32px; }
.split > * { flex: 1 1 340px; min-width: 0; }
.figures.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.figures { display: grid; gap: 14px 18px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.best td { white-space: nowrap; }
.best tr:has(+ .note) td { border-bottom: 0; }
.best .note td { padding-top: 0; color: var(--soft); font-size: 0.85rem; white-space: normal; }
.trials td { white-space: nowrap; font-size: 0.86rem; padding-right: 16px; }
.sortable th { cursor: pointer; }
.bars td:first-child { white-space: nowrap; width: 1%; max-width: 180px; overflow: hidden; text-overflow: ellipsis; }
.bars td { white-space: nowrap; }
.bar { display: inline-block; height: 0.75em; background: var(--accent); border-radius: 2px; margin-right: 6px; }
.key { margin-right: 14px; white-space: nowrap; }
.key::before { content: "●"; color: var(--c); margin-right: 5px; }
.key.ring::before { content: "○"; }
summary { cursor: pointer; }
details > :not(summary) { margin-top: 8px; }
details + p { margin-top: 10px; }
b[class^="c"] { color: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
svg { display: block; width: 100%; height: auto; font-size: 11.5px; fill: var(--text); }
svg .grid { stroke: var(--line); fill: none; }
svg .tick, svg .axis { fill: var(--soft); }
svg .mid { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .strong { fill: var(--c); }
svg .dot { fill: var(--c, var(--text)); }
svg .ring { fill: none; stroke: var(--c, var(--text)); stroke-width: 1.2; }
svg .ring circle { pointer-events: all; }
svg .winner { stroke: var(--text); stroke-width: 2; }
svg .band { fill: var(--near); }
svg .level { stroke: var(--c2); stroke-dasharray: 2 3; fill: none; }
svg .rule { stroke: var(--soft); stroke-dasharray: 4 3; fill: none; }
svg .curve { fill: none; stroke: var(--c, var(--text)); stroke-linejoin: round; }
svg .bold { stroke-width: 2.4; }
svg .faint { stroke-width: 1; opacity: 0.4; }
svg .thin { stroke-width: 0.7; opacity: 0.18; }
svg .mean { fill: var(--c, var(--text)); }
svg .span { fill: var(--c); opacity: 0.35; }
svg .span.complete { opacity: 1; }
svg .span.diverged, svg .span.failed { fill: none; stroke: var(--c); opacity: 1; }
svg .between { stroke: var(--soft); fill: none; stroke-width: 0.6; }
svg .speed { fill: var(--accent); opacity: 0.75; }
@media print { body { max-width: none; } section, .answer { break-inside: avoid; } }
"""

SORT = """
for (const head of document.querySelectorAll(".sortable th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.dataset.down = head.dataset.down ? "" : "1";
  const text = row => row.cells[column].textContent.trim();
  const key = row => isNaN(parseFloat(text(row))) ? text(row) : parseFloat(text(row));
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  body.append(...[...body.rows].sort((a, b) => (down ? 1 : -1) * order(key(a), key(b))));
};
"""
"""Sorts a table by the column whose head is clicked; the page reads the same without."""
