"""Pictures and words of a counterfactual: label maps with names, their difference, and the cells that layers hide.

Q queries, K classes, N decoder layers, h/w height/width of a grid.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from m2f_lab.data import Classes
from m2f_lab.data.colors import in_bytes
from m2f_lab.explore.counterfactuals.edits import Edit, Mute, describe, target
from m2f_lab.explore.counterfactuals.label_change import LabelChange, compare_label_maps
from m2f_lab.explore.parts.drawing import label_table
from m2f_lab.explore.parts.labels import OPENED
from m2f_lab.explore.parts.reading import hidden_cells, nearest, opened_rows
from m2f_lab.explore.parts.table import Caption, Table
from m2f_lab.structures import Output

LONGEST_EDGE = 640  # label maps are sent at most this large, in cells: the nearest pixel of each

UNCHANGED = ("unchanged", (74, 80, 94, 215))  # fog, in which changes stand out
OTHER = ("another change", (0, 0, 0, 220))

BEFORE, NOW, DIFFERENCE = range(3)
STATES = (("before", BEFORE), ("now", NOW), ("difference", DIFFERENCE))


class NamedMaps(NamedTuple):
    """Label maps for a MaskView.

    Attributes:
        maps: before, now, difference. uint8 [3, h, w]
        names: of each value: the classes, "unchanged", and "old → new" for every kind of change.
        table: colour and opacity of each value; a change has the colour of the new class. uint8 [256, 4]
    """

    maps: np.ndarray
    names: list[str]
    table: np.ndarray


def named_maps(change: LabelChange, classes: Classes, longest_edge: int = LONGEST_EDGE) -> NamedMaps:
    """Both label maps and the difference between them, with a name for every kind of change.

    A byte tells 256 values apart. Where there are more kinds of change than fit, the rarest share one value.
    """
    (before, after), shown = in_bytes(np.stack([change.before, change.after]), classes)
    if shown is not classes:
        change, classes = compare_label_maps(before, after, len(shown)), shown
    names, table = [*classes.names, UNCHANGED[0]], label_table(classes)
    first, last = len(names), 255
    table[first - 1] = UNCHANGED[1]
    value_of = np.full((len(classes), len(classes)), first - 1, np.uint8)
    for value, (old, new, _) in enumerate(change.flows(), start=first):
        value_of[old, new] = min(value, last)
        if value > last:
            names[last], table[last] = OTHER
        else:
            names.append(f"{classes.names[old]} → {classes.names[new]}")
            table[value] = (*classes.colors[new], 235)
    scale = max(1.0, max(change.before.shape) / longest_edge)
    size = tuple(max(1, round(edge / scale)) for edge in change.before.shape)
    before, now = (nearest(label_map, size) for label_map in (change.before, change.after))
    return NamedMaps(np.stack([before, now, value_of[before, now]]).astype(np.uint8), names, table)


def change_caption(change: LabelChange, classes: Classes) -> Caption:
    """Number of changed pixels, and the gain or loss of every class, the largest first."""
    total = change.before.size
    before, now = change.pixels_before, change.pixels_after
    columns = {
        ("class", ""): classes.names,
        ("before", "Share of the image without any edit."): [f"{100 * pixels / total:.1f} %" for pixels in before],
        ("now", "Share of the image with the edits."): [f"{100 * pixels / total:.1f} %" for pixels in now],
        ("change", "In hundredths of the image."): [_signed(100 * pixels / total) for pixels in now - before],
    }
    if change.iou_before is not None:
        about = "Overlap with the truth: pixels in both, divided by pixels in either, in percent."
        columns["IoU before", about] = map(_percent, change.iou_before)
        columns["IoU now", "The same with the edits. –: the truth holds no such class."] = map(
            _percent, change.iou_after
        )
    rows = list(zip(*columns.values(), strict=True))
    order = np.argsort(-np.abs(now - before), kind="stable").tolist()
    return Caption(
        text=f"{change.num_changed} of {total} pixels changed ({100 * change.share_changed:.1f} %)",
        table=Table(tuple(columns), tuple(rows[k] for k in order if before[k] + now[k])),
    )


def _signed(value: float) -> str:
    """12.34 → "+12.3"; too little to show → "0.0" """
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def hidden_stacks(output: Output, order: np.ndarray) -> list[np.ndarray]:
    """Cells that every layer hides from every query, in the given order, as 255. N × uint8 [Q, h, w]"""
    layers = range(1, output.num_predictions)
    return [hidden_cells(output, layer)[order] * np.uint8(255) for layer in layers]


def hidden_captions(output: Output, order: np.ndarray, edits: Sequence[Edit]) -> list[list[Caption]]:
    """Number of cells that every layer hides, and whether the fallback or a person changed that. N × Q"""
    by_hand = {target(edit) for edit in edits}
    muted_from = {edit.query: edit.from_layer for edit in edits if isinstance(edit, Mute) and edit.from_layer}
    layers = range(1, output.num_predictions)
    blocked, opened = ([read(output, layer) for layer in layers] for read in (hidden_cells, opened_rows))

    def caption(layer: int, query: int) -> Caption:
        if muted_from.get(query, output.num_predictions) <= layer:
            return Caption(f"Layer {layer}, query {query}: muted, it sees nothing")
        hidden = blocked[layer - 1][query]
        touched = {("attention", layer, query), ("attention", layer, None)} & by_hand
        text = f"Layer {layer}, query {query}: {hidden.sum()} of {hidden.size} cells hidden"
        return Caption(text + ", by hand" * bool(touched), OPENED if opened[layer - 1][query] else "")

    return [[caption(layer, query) for query in order.tolist()] for layer in layers]


def edits_as_text(edits: Sequence[Edit], names: Sequence[str], most: int = 3) -> str:
    """Edits in one line."""
    told = [describe(edit, names) for edit in edits[:most]]
    if len(edits) > most:
        told.append(f"and {len(edits) - most} more")
    return "; ".join(told) or "nothing changed"


def edits_as_html(edits: Sequence[Edit], names: Sequence[str]) -> str:
    """Edits as a list."""
    if not edits:
        return "<i>Nothing is changed: this is the model's own result.</i>"
    return "<ol>" + "".join(f"<li>{html.escape(describe(edit, names))}</li>" for edit in edits) + "</ol>"
