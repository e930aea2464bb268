"""Parts of report.html: tables, bars and curves as text, which a browser shows without a server or a network.

K classes.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

import numpy as np

PAIRS = 15
"""Confused pairs that the page shows."""

LEADING = {"mIoU": "IoU"}
"""Figures of a class under another name than those of the data set."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .15rem .7rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} tr:nth-child(even) {{ background: #f6f6f6; }}
.bar {{ background: #dde6f0; width: 16rem; }} .bar div {{ background: #3b6fb6; height: .9rem; }}
.short {{ width: 8rem; }} .error div {{ background: #b6563b; }}
.curves {{ display: flex; flex-wrap: wrap; gap: .8rem; }}
.curves figure {{ margin: 0; width: 10.5rem; font-size: 13px; }}
.curves svg {{ background: #f6f6f6; width: 100%; }} .curves figcaption {{ line-height: 1.3; }}
polyline {{ fill: none; stroke: #3b6fb6; stroke-width: 1.5; }} .strict {{ stroke: #b6563b; }}
figure {{ margin: 1.2rem 0; }} figure img {{ max-width: 100%; }} code {{ background: #f2f2f2; padding: .1rem .3rem; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document."""
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def classes_by_figure(classes: Sequence[dict], metric: str) -> str:
    """Bars of the classes, the worst first."""
    leading = LEADING.get(metric, metric)
    columns = [name for name in classes[0] if name != "name"]
    order = sorted(classes, key=lambda row: (row[leading] is None, row[leading] or 0.0))
    rows = [(row["name"], bar(row[leading]), *(_cell(row[name]) for name in columns)) for row in order]
    return f"<h2>Classes by {leading}</h2>" + table(("class", "", *columns), rows)


def confusions(pairs: Sequence[dict]) -> str:
    """Pairs of classes that most pixels are mistaken between."""
    rows = [(row["is"], row["was called"], f"{row['pixels']:,}", f"{row['share']:.1f} %") for row in pairs]
    return "<h2>Confused classes</h2>" + table(("is", "was called", "pixels", "of the class"), rows)


def precision_and_recall(unit: str, rows: Sequence[dict]) -> str:
    """Two bars for each class, the lowest recall first; a class that never occurs is left out.

    Args:
        unit: of which precision and recall are shares: "pixels" or "segments"
        rows: "name", "precision" and "recall" of each class
    """
    shown = [row for row in rows if not row["precision"] is row["recall"] is None]
    shown.sort(key=lambda row: (row["recall"] is None, row["recall"] or 0.0))
    cells = [
        (
            row["name"],
            *(part for name in ("recall", "precision") for part in (bar(row[name], "short"), _cell(row[name]))),
        )
        for row in shown
    ]
    said = "found" if unit == "segments" else "called by their class"
    return (
        f"<h2>Precision and recall of {unit}</h2><p>Recall: the share of a class's true {unit} that were {said}. "
        f"Precision: the share of the {unit} predicted as the class that are right.</p>"
        + table(("class", "", "recall", "", "precision"), cells)
    )


def curves(rows: Sequence[dict]) -> str:
    """Precision over recall of each class, the smallest area under the curve first."""
    shown = [row for row in rows if row["precision50"] is not None]
    shown.sort(key=lambda row: np.mean(row["precision50"]))
    return (
        "<h2>Precision over recall</h2><p>Of each class with an overlap of 50 % asked for (blue) and of 75 % (red); "
        "the dot is the score that balances both best at 50 %. Both axes go from 0 to 1.</p>"
        f'<div class="curves">{"".join(map(_curve, shown))}</div>'
    )


def _curve(row: dict) -> str:
    width, height = 160, 100
    steps = np.linspace(0, width, len(row["precision50"]))
    lines = []
    for key, kind in (("precision75", "strict"), ("precision50", "")):
        heights = height * (1 - np.array(row[key]))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(steps, heights, strict=True))
        lines.append(f'<polyline class="{kind}" points="{points}"/>')
    best, text = row["best"], "no instance was found"
    if best is not None:
        x, y = width * best["recall"], height * (1 - best["precision"])
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#222"/>')
        shares = ", ".join(f"{name} {100 * best[name]:.0f} %" for name in ("precision", "recall"))
        text = f"score ≥ {best['score']:.2f}: {shares}"
    return (
        f'<figure><svg viewBox="-4 -4 {width + 8} {height + 8}" role="img" '
        f'aria-label="precision over recall of {html.escape(row["name"])}">{"".join(lines)}</svg>'
        f"<figcaption><b>{html.escape(row['name'])}</b><br>{text}</figcaption></figure>"
    )


def sizes(title: str, note: str, rows: Sequence[dict]) -> str:
    """A table of figures by size, whose first column is "size"."""
    columns = list(rows[0])
    cells = [tuple(row[name] if name == "size" else _cell(row[name]) for name in columns) for row in rows]
    return f"<h2>{title} by size</h2><p>Small: up to 32² pixels; large: more than 96². {note}</p>" + table(
        columns, cells
    )


def distances(rows: Sequence[dict]) -> str:
    """Error by the distance to the nearest true outline, and the share of all errors that lie there."""
    total = sum(row["pixels"] for row in rows)
    wrong = [row["pixels"] * (row["error"] or 0.0) for row in rows]
    cells = []
    for row, part in zip(rows, wrong, strict=True):
        start, end = row["from"], row["to"]
        band = f"more than {start - 1}" if end is None else str(end) if start == end else f"{start}–{end}"
        shares = (100 * row["pixels"] / total if total else None, 100 * part / sum(wrong) if sum(wrong) else None)
        cells.append((band, bar(row["error"], "error"), _cell(row["error"]), *map(_cell, shares)))
    return (
        "<h2>Errors by distance to the nearest true outline</h2><p>A pixel on the outline has the distance 1. Many "
        "errors near outlines come with coarse masks or careless labels; errors far inside are whole objects called "
        "something else.</p>" + table(("pixels away", "", "wrong %", "% of all pixels", "% of all errors"), cells)
    )


_BROWSER = """<h2>All images</h2>
<p>Worst first by <select id="by"></select>. <span id="count"></span></p><table id="images"></table>
<script type="application/json" id="rows">{rows}</script>
<script>
const rows = JSON.parse(document.getElementById("rows").textContent), metric = {metric};
const pair = (c) => c["is"] + " called " + c["was called"];
const orders = [[metric, "%", 1, (row) => row[metric]], ["error near outlines", "%", -1, (row) => row.boundary_error]];
for (const name of new Set(rows.flatMap((row) => Object.keys(row.classes))))
  orders.push(["class " + name, "%", 1, (row) => row.classes[name]]);
for (const name of new Set(rows.flatMap((row) => row.confused.map(pair))))
  orders.push([name, "pixels", -1, (row) => row.confused.find((c) => pair(c) === name)?.pixels]);
const by = document.getElementById("by");
orders.forEach(([name], number) => by.add(new Option(name, number)));
by.onchange = () => {{
  const [, unit, sign, value] = orders[by.value];
  const known = rows.filter((row) => value(row) != null).sort((a, b) => sign * (value(a) - value(b)));
  document.getElementById("count").textContent = known.length + " of " + rows.length + " images; the first {most}:";
  document.getElementById("images").replaceChildren(...known.slice(0, {most}).map((row) => {{
    const line = document.createElement("tr"), figure = value(row).toFixed(unit === "%" ? 2 : 0) + " " + unit;
    for (const text of [row.name, figure, "QueryExplorer(model, dataset[" + row.number + "].image)"])
      line.insertCell().append(text);
    return line;
  }}));
}};
by.onchange();
</script>"""


def images(rows: Sequence[dict], metric: str, most: int = 50) -> str:
    """A list of images to be sorted in the browser: by figure, error near outlines, class or confused pair.

    Args:
        rows: "number", "name", the metric, "boundary_error", "classes" and "confused" of each image
        metric: the figure that the data set is measured by
        most: lines that are shown at once
    """
    safe = json.dumps(rows, separators=(",", ":")).replace("<", "\\u003c")  # a name may hold the end of a script
    return _BROWSER.format(rows=safe, metric=json.dumps(metric), most=most)


class Markup(str):
    """Text that is HTML already."""


def bar(percent: float | None, kind: str = "") -> Markup:
    """A bar as long as a percentage."""
    return Markup(f'<div class="bar {kind}"><div style="width: {percent or 0.0:.1f}%"></div></div>')


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        texts = (cell if isinstance(cell, Markup) else html.escape(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cell(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else percent(value)
