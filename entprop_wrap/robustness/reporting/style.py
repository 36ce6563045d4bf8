"""The style sheet of a report: light and dark, wide and narrow, screen and paper."""

__all__ = ["STYLE"]

#: Colours of series come in a fixed order, which neighbours in it are told apart in by people who see few colours.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --ink: #161613; --soft: #55544f; --faint: #8a8983; --rule: #e3e2dd;
  --heat-low: #f3f6fb; --heat-high: #12498f; --in-cell: #000000; --on-cell: #ffffff;
  --mid: #f3f2ef; --less: #86200f; --more: #12498f;
  --c0: #2a78d6; --c1: #d9591f; --c2: #14936a; --c3: #a87400;
  --c4: #c94a86; --c5: #3f7d00; --c6: #5a46b8; --c7: #c93a39;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #121211; --card: #1b1b19; --ink: #f3f2ee; --soft: #b9b8b0; --faint: #85847d; --rule: #34332f;
    --heat-low: #20242b; --heat-high: #a9cdf7; --in-cell: #ffffff; --on-cell: #000000;
    --mid: #272623; --less: #f8b5a9; --more: #a9cdf7;
    --c0: #4a94ea; --c1: #ec7a45; --c2: #2db787; --c3: #d09a1c;
    --c4: #e277ab; --c5: #6fb52a; --c6: #9d90f0; --c7: #ee7271;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 4px; }
header p { margin: 0; color: var(--soft); }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px 24px 24px;
  margin-top: 20px;
}
section > p, .note { color: var(--soft); margin: 0 0 14px; max-width: 78ch; }
.note { font-size: 0.86rem; margin: 6px 0 0; }
.lead { color: var(--soft); margin: 24px 0 -8px; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; margin-top: 20px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 20px 16px; }
.charts + .scroll, .scroll + .scroll { margin-top: 20px; } .maps > .scroll { margin-top: 0; }
.number { display: block; font-size: 2.3rem; line-height: 1.2; font-weight: 640; letter-spacing: -0.02em; }
.number small { font-size: 0.5em; font-weight: 400; color: var(--soft); }
.meaning { color: var(--soft); font-size: 0.9rem; } .meaning b { color: var(--ink); }
.scroll + figure { margin-top: 22px; } .zero { stroke: var(--faint); }
.scroll { overflow-x: auto; position: relative; }
.scroll:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 0.86rem; padding: 0 0 6px; }
th { font-weight: 500; text-align: left; } thead th { color: var(--soft); vertical-align: bottom; }
table.plain { width: 100%; } table.short { width: auto; min-width: min(100%, 420px); }
table.plain th, table.plain td { padding: 8px 12px 8px 0; border-bottom: 1px solid var(--rule); }
table.plain td, table.plain thead th + th { text-align: right; padding: 8px 0 8px 12px; }
table.plain td { white-space: nowrap; }
table.plain thead th { line-height: 1.25; font-size: 0.84rem; }
.quiet caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
table.plain tbody th { min-width: 7.5em; }
tbody th { position: sticky; left: 0; background: var(--card); overflow-wrap: anywhere; }
.spread { color: var(--soft); font-size: 0.86em; font-weight: 400; }
.minor { color: var(--soft); padding-left: 1em; }
b .spread { font-weight: 400; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px 32px; }
table.map { width: 100%; font-size: 0.82rem; }
table.map caption { color: var(--ink); font-weight: 600; font-size: 0.92rem; }
table.map th, table.map td { padding: 4px 6px; }
table.map tbody th { white-space: nowrap; padding: 4px 10px 4px 0; }
table.map thead th:first-child { padding-left: 0; }
table.map td, table.map thead th + th { text-align: center; }
table.map td { border: 1px solid var(--card); border-width: 1px; }
table.map .mean, table.map .total td { font-weight: 640; } table.map .total th { font-weight: 640; }
.heat {
  background: color-mix(in oklab, var(--heat-high) calc(var(--v) * 100%), var(--heat-low));
  border-radius: 3px;
}
.change { border-radius: 3px; } .heat, .change { color: var(--in-cell); }
.s2 { color: var(--on-cell); }
@media screen and (prefers-color-scheme: dark) { .s1 { color: var(--on-cell); } }
.change.more { background: color-mix(in oklab, var(--more) calc(var(--v) * 100%), var(--mid)); }
.change.less { background: color-mix(in oklab, var(--less) calc(var(--v) * 100%), var(--mid)); }
.legends { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0 0 18px; }
.legend { display: inline-flex; align-items: center; gap: 8px; color: var(--soft); font-size: 0.84rem; }
.ramp { width: 140px; height: 10px; border-radius: 5px; }
.heat-ramp { background: linear-gradient(in oklab 90deg, var(--heat-low), var(--heat-high)); }
.change-ramp { background: linear-gradient(in oklab 90deg, var(--less), var(--mid), var(--more)); }
.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px 40px;
}
figure { margin: 0; max-width: 600px; min-width: 0; }
figcaption { font-weight: 600; font-size: 0.92rem; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12.5px system-ui, "Segoe UI", Roboto, sans-serif; }
svg .name { fill: var(--ink); } .middle { text-anchor: middle; } .end { text-anchor: end; }
.tick { font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); } .axis { stroke: var(--faint); }
.stroke { stroke: var(--s); stroke-width: 2; fill: none; stroke-linejoin: round; stroke-linecap: round; }
.d1 { stroke-dasharray: 7 5; } .d2 { stroke-dasharray: 2 5; }
.mark { fill: var(--s); stroke: var(--card); stroke-width: 1.5; }
.area { fill: var(--s); opacity: 0.18; }
.c0 { --s: var(--c0); } .c1 { --s: var(--c1); } .c2 { --s: var(--c2); } .c3 { --s: var(--c3); }
.c4 { --s: var(--c4); } .c5 { --s: var(--c5); } .c6 { --s: var(--c6); } .c7 { --s: var(--c7); }
.keys { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 0.86rem; color: var(--soft); }
.keys > span { display: inline-flex; align-items: center; gap: 7px; }
.key { width: 26px; height: 16px; flex: none; }
details { margin-top: 6px; font-size: 0.9rem; }
summary { color: var(--soft); cursor: pointer; width: max-content; }
table.pictures { font-size: 0.84rem; }
table.pictures tbody th { padding: 0 10px 4px 0; width: 6.6em; overflow-wrap: break-word; }
table.pictures td { padding: 0 8px 8px 0; } table.pictures thead th { padding: 0 0 6px; }
img { display: block; border-radius: 4px; }
img.small, img.photo { width: 96px; height: auto; }
img.small { image-rendering: pixelated; }
ul { margin: 8px 0 0; padding-left: 20px; max-width: 84ch; } li { margin: 4px 0; }
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 14px 0 0; font-size: 0.9rem;
}
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 0.92em ui-monospace, "Cascadia Mono", Menlo, monospace; white-space: pre-wrap; }
@media (max-width: 640px) {
  main { padding: 24px 12px 40px; } section { padding: 16px 14px 18px; } h1 { font-size: 1.5rem; }
  .tiles { gap: 8px; }
  .tile { padding: 10px 12px; }
  .number { font-size: 1.5rem; } .meaning { font-size: 0.78rem; }
  .number small { font-size: 0.6em; }
  table.map { font-size: 0.74rem; } table.map th, table.map td { padding: 3px 2px; }
  table.map tbody th { padding-right: 6px; white-space: normal; overflow-wrap: normal; }
  svg text { font-size: 16.5px; } img.small, img.photo { width: 16vw; }
  table.pictures tbody th { padding-right: 6px; font-size: 0.76rem; width: 5em; }
  table.pictures thead th { font-size: 0.76rem; }
  table.pictures td { padding-right: 4px; }
}
@media print {
  :root { color-scheme: light; }
  body { background: none; font-size: 10.5pt; } main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section { border: 0; padding: 14px 0 0; }
  figure, tr, .tile { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; } details { display: none; } tbody th { position: static; }
  table.map, table.pictures { break-inside: avoid; } section > p { break-after: avoid; }
  img.small, img.photo { width: 80px; }
}
""".strip()
