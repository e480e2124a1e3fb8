"""The page around a report: structure, style and the script that draws the charts in the reader's colours."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="secateur">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="charts">{charts}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""

# the browser itself refuses to load anything: what is not in the file can't be asked for
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --raised: #f3f4f0; --ink: #1c2326; --muted: #566265; --rule: #dcdfda;
  --keep: #2f6f6a; --removed: #d98a45; --keepsoft: #2f6f6a59; --removedsoft: #d98a4559;
  --better: #1f6b43; --worse: #a63d1d;
  --warn: #fbf0dd; --warnrule: #d98a45;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14191b; --raised: #1d2426; --ink: #e5e9e7; --muted: #9eaaa8; --rule: #313a3c;
    --keep: #58a89d; --removed: #e2a466; --keepsoft: #58a89d59; --removedsoft: #e2a46659;
    --better: #7fcf9f; --worse: #f0977a;
    --warn: #2b2419; --warnrule: #b97a3c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
main { max-width: 50rem; margin: 0 auto; padding: 3.5rem 1.25rem 5rem; }
h1, h2, h3 { line-height: 1.25; font-weight: 600; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3.5rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
p { margin: .5rem 0; max-width: 42rem; overflow-wrap: anywhere; }
a { color: inherit; }
.kicker { color: var(--muted); margin: 0 0 .3rem; }
.lede { font-size: 1.1rem; }
.muted, figcaption, .notes { color: var(--muted); font-size: .875rem; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.5rem 2rem;
  margin: 2.2rem 0 0; }
.headline div { border-top: 2px solid var(--ink); padding-top: .6rem; }
.headline dt { color: var(--muted); font-size: .875rem; }
.headline dd { margin: 0; font-variant-numeric: tabular-nums; }
.headline .now { font-size: 1.7rem; line-height: 1.25; font-weight: 600; letter-spacing: -.01em; white-space: nowrap; }
.headline .unit { font-size: .65em; }
.headline .was { color: var(--muted); font-size: .875rem; }
.better, .worse, .same { white-space: nowrap; }
.better { color: var(--better); }
.worse { color: var(--worse); }
figure { margin: 1.2rem 0 1.8rem; }
.chart { width: 100%; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0 0; padding: 0; list-style: none;
  color: var(--muted); font-size: .875rem; }
.key i { display: inline-block; width: .75rem; height: .75rem; margin-right: .4rem; border-radius: 2px; }
i.keep { background: var(--keep); }
i.removed { background: var(--removed); }
i.carries { background: var(--muted); }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .875rem; padding-bottom: .3rem; }
th, td { text-align: right; padding: .45rem .75rem; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; }
thead th { border-bottom-color: var(--muted); vertical-align: bottom; }
tbody th { font-weight: 400; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts th { width: 11rem; color: var(--muted); padding-right: 1rem; text-align: left; }
.notes { padding-left: 1.2rem; margin: .8rem 0; }
.box { background: var(--raised); border-left: 3px solid var(--rule); padding: .8rem 1.1rem; margin: 1.2rem 0; }
.box.warning { background: var(--warn); border-left-color: var(--warnrule); }
.box p { margin: .2rem 0; }
.blocks { display: flex; flex-wrap: wrap; gap: 4px; margin: 1rem 0 .4rem; padding: 0; list-style: none;
  font-variant-numeric: tabular-nums; font-size: .8rem; }
.blocks li { width: 2.2rem; line-height: 2.2rem; text-align: center; border-radius: 3px;
  border: 1px solid var(--keep); }
.blocks li.gone { border: 1px dashed var(--removed); color: var(--muted); text-decoration: line-through; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: 1rem 2rem;
  margin: .6rem 0 2rem; }
.samples h3 { margin: 0 0 .2rem; font-size: .875rem; font-weight: 400; color: var(--muted); overflow-wrap: anywhere; }
.samples p { margin: 0; white-space: pre-wrap; }
blockquote { margin: 1.2rem 0 .4rem; padding-left: 1rem; border-left: 2px solid var(--rule); white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre { background: var(--raised); padding: 1rem 1.1rem; overflow-x: auto; border-radius: 4px; font-size: .85rem;
  line-height: 1.5; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
p code { font-size: .9em; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--muted); font-size: .875rem; }
:focus-visible { outline: 2px solid var(--keep); outline-offset: 2px; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
@media (max-width: 32rem) {
  main { padding: 2rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .headline { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.2rem 1rem; }
  .headline .now { font-size: 1.35rem; }
  table { font-size: .84rem; }
  th, td { padding: .45rem .4rem; }
  .facts th { width: 7.5rem; }
}
@media print { details > * { display: block; } main { max-width: none; } }
"""

# "var(--ink)" in a chart stands for the colour of that name in the style sheet at the time of drawing
SCRIPT = """
(function () {
  "use strict";
  var charts = JSON.parse(document.getElementById("charts").textContent);
  function colour(value) {
    if (typeof value === "string") {
      var found = /^var\\((--[a-z]+)\\)$/.exec(value);
      return found ? getComputedStyle(document.documentElement).getPropertyValue(found[1]).trim() : value;
    }
    if (Array.isArray(value)) { return value.map(colour); }
    if (value && typeof value === "object") {
      var copy = {};
      Object.keys(value).forEach(function (key) { copy[key] = colour(value[key]); });
      return copy;
    }
    return value;
  }
  function draw() {
    Object.keys(charts).forEach(function (id) {
      var chart = colour(charts[id]);
      Plotly.react(id, chart.data, chart.layout, { displayModeBar: false, displaylogo: false, responsive: true });
    });
  }
  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
"""
