"""The dashboard: one page with live values, whole in itself: no other file, no foreign host, no build step.

The page polls `api/metrics.json` and draws numbers and sparklines; everything it shows is set as text, never as markup. Its style and
script are allowed by their digests in the Content-Security-Policy and nothing else is, so that a label with markup in it stays text.
"""

import base64
import hashlib
from functools import cache
from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b1f24; --dim: #5b6470;
  --line: #d8dde3; --ink: #1f6feb; --bad: #c62828; --warn: #9a6700; --good: #1a7f37;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #0f1216; --card: #181c22; --text: #e6e9ee; --dim: #98a2ae;
    --line: #2b323b; --ink: #6cb0ff; --bad: #ff7b72; --warn: #e3b341; --good: #56d364;
  }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 1.2rem; background: var(--back); color: var(--text); font: 14px/1.45 system-ui, sans-serif; }
header { display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap; margin-bottom: 1rem; }
h1 { font-size: 1.2rem; margin: 0; }
h2 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
.dim { color: var(--dim); }
.ok { color: var(--good); } .degraded { color: var(--warn); } .failing, .lost { color: var(--bad); }
#cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .8rem; }
.card .name { color: var(--dim); font-size: .85rem; }
.card .now { font-size: 1.5rem; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: 2.4rem; margin-top: .3rem; }
svg path { fill: none; stroke: var(--ink); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line); }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { color: var(--dim); font-weight: 500; }
td.value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
input {
  font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .3rem;
  padding: .2rem .5rem; width: 18rem; max-width: 100%;
}
ul { margin: .3rem 0; padding-left: 1.2rem; }
"""

SCRIPT: Final = """
"use strict";
const PERIOD_MS = 1000, POINTS_MAX = 240, ROWS_MAX = 1000;
const byId = (id) => document.getElementById(id);
const sum = (rows) => rows.reduce((total, row) => total + (row.value ?? 0), 0);
const scaled = (value, units, step) => {
  let size = value, index = 0;
  while (Math.abs(size) >= step && index < units.length - 1) { size /= step; index += 1; }
  return (Number.isInteger(size) ? String(size) : size.toFixed(Math.abs(size) < 10 ? 2 : 1)) + units[index];
};
const bytes = (value) => scaled(value, [" B", " KiB", " MiB", " GiB", " TiB"], 1024);
const count = (value) => scaled(value, ["", " k", " M", " G"], 1000);
const percent = (value) => (value * 100).toFixed(1) + " %";
const perSecond = (value) => count(value) + "/s";
const milliseconds = (value) => (value * 1000).toFixed(1) + " ms";

// What the cards show: the families whose series are added up; a rate is the difference over time.
const CARDS = [
  { name: "CPU", from: ["isopod_process_cpu_seconds_total"], rate: true, show: percent },
  { name: "Memory", from: ["isopod_memory_current_usage_bytes"], show: bytes },
  { name: "Tasks", from: ["isopod_tasks"], show: count },
  { name: "Loop lag (worst)", from: ["isopod_reactor_lag_seconds_max"], show: milliseconds },
  { name: "Connections", from: ["isopod_http_connections", "isopod_rpc_connections"], show: count },
  { name: "Requests", from: ["isopod_http_responses_total", "isopod_rpc_calls_total"], rate: true, show: perSecond },
  { name: "Shards", from: ["isopod_smp_shards_up"], other: (state) => state.shards, show: count },
  { name: "Open descriptors", from: ["isopod_process_open_fds"], show: count },
  { name: "Network in", from: ["isopod_network_bytes_received_total"], rate: true, show: (value) => bytes(value) + "/s" },
  { name: "Network out", from: ["isopod_network_bytes_sent_total"], rate: true, show: (value) => bytes(value) + "/s" },
];

const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const svg = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);

for (const card of CARDS) {
  card.points = [];
  card.box = element("div", "card");
  card.now = element("div", "now", "-");
  const chart = svg("svg");
  chart.setAttribute("viewBox", "0 0 100 24");
  chart.setAttribute("preserveAspectRatio", "none");
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", card.name + " over time");
  card.line = svg("path");
  chart.append(card.line);
  card.box.append(element("div", "name", card.name), card.now, chart);
  byId("cards").append(card.box);
}

// One look at a card's families: [milliseconds, sum], or null if none of them is there.
const look = (card, state) => {
  if (state.totals) {
    const known = card.from.filter((name) => name in state.totals);
    return known.length ? [state.at_ms, known.reduce((total, name) => total + (state.totals[name] ?? 0), 0)] : null;
  }
  const rows = state.metrics.filter((family) => card.from.includes(family.name)).flatMap((family) => family.series);
  if (rows.length) return [state.at_ms, sum(rows)];
  return card.other && card.other(state) ? [state.at_ms, card.other(state)] : null;
};

const push = (card, state) => {
  const seen = look(card, state);
  if (!seen) return;
  let value = seen[1];
  if (card.rate) {
    const last = card.last;
    card.last = seen;
    if (!last || seen[0] <= last[0]) return;
    value = Math.max(0, seen[1] - last[1]) / ((seen[0] - last[0]) / 1000);
  }
  card.points.push(value);
  if (card.points.length > POINTS_MAX) card.points.shift();
};

const draw = (card) => {
  if (!card.points.length) return;
  card.now.textContent = card.show(card.points[card.points.length - 1]);
  const top = Math.max(...card.points) || 1, step = 100 / Math.max(1, card.points.length - 1);
  card.line.setAttribute("d", card.points.map((value, index) =>
    (index ? "L" : "M") + (index * step).toFixed(2) + " " + (23 - 22 * value / top).toFixed(2)).join(""));
};

const cells = new Map();
const text = (row) => row.value !== undefined ? (row.value === null ? "NaN" : String(row.value))
  : row.count + (row.count ? " (mean " + (row.sum / row.count).toPrecision(3) + ")" : "");
const showTable = (state) => {
  const wanted = byId("filter").value.trim().toLowerCase(), seen = new Set();
  let shown = 0;
  for (const family of state.metrics) for (const row of family.series) {
    const labels = Object.entries(row.labels).map(([name, value]) => name + "=" + value).join(", ");
    const key = family.name + "\\n" + labels;
    if (shown >= ROWS_MAX || !(family.name + " " + labels).toLowerCase().includes(wanted)) continue;
    shown += 1;
    seen.add(key);
    let cell = cells.get(key);
    if (!cell) {
      const line = element("tr");
      cell = element("td", "value");
      const name = element("td", "", family.name);
      name.title = family.help;
      line.append(name, element("td", "dim", labels), cell);
      line.dataset.metric = family.name;
      byId("rows").append(line);
      cells.set(key, cell);
    }
    const now = text(row);
    if (cell.textContent !== now) cell.textContent = now;
  }
  for (const [key, cell] of cells) if (!seen.has(key)) { cell.parentElement.remove(); cells.delete(key); }
};

const showHealth = (health) => {
  const status = byId("status");
  status.textContent = health.ready ? health.status : health.status + ", not ready";
  status.className = health.ready ? health.status : "failing";
  byId("reasons").replaceChildren(...health.reasons.map((reason) => element("li", "", reason)));
};

let first = true;
const get = async (query) => {
  const answer = await fetch("api/metrics.json" + query, { cache: "no-store" });
  if (!answer.ok) throw new Error("status " + answer.status);
  return answer.json();
};
const turn = async () => {
  try {
    if (first) {
      const names = [...new Set(CARDS.flatMap((card) => card.from))];
      for (const past of (await get("?history=1&name=" + names.join(","))).history) for (const card of CARDS) push(card, past);
      first = false;
    }
    const state = await get("");
    for (const card of CARDS) { push(card, state); draw(card); }
    showTable(state);
    showHealth(state.health);
    byId("when").textContent = new Date(state.at_ms).toLocaleTimeString();
    byId("when").className = "dim";
  } catch (error) {
    byId("when").textContent = "no answer: " + error.message;
    byId("when").className = "lost";
  }
  setTimeout(turn, PERIOD_MS);
};
byId("filter").addEventListener("input", () => { for (const cell of cells.values()) cell.parentElement.remove(); cells.clear(); });
turn();
"""

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>isopod</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>isopod</h1><span id="status" class="dim">...</span><span id="when" class="dim"></span></header>
<ul id="reasons"></ul>
<section id="cards" aria-label="Overview"></section>
<h2>All series</h2>
<p><input id="filter" type="search" placeholder="filter by name or label" aria-label="filter by name or label"></p>
<table><thead><tr><th>name</th><th>labels</th><th>value</th></tr></thead><tbody id="rows"></tbody></table>
<script>{script}</script>
</body>
</html>
"""


@cache
def page() -> bytes:
    """Return the page."""
    return _PAGE.replace("{style}", STYLE).replace("{script}", SCRIPT).encode()


@cache
def security_policy() -> str:
    """Return the Content-Security-Policy that allows this page its own style, script and requests, and nothing else."""
    return (
        f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
