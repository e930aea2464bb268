"""Figures of numbers: curves, bars and tables.

Q queries, K classes, T segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from m2f_lab.explore.plots.theme import HEAT, PALETTE, SMALL, TITLE, chart, chart_grid


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, title: str = "") -> Figure:
    """Lines over a common axis.

    Args:
        series: name → x values and y values.
        x, y: labels of the axes.
        title: says what to see.
    """
    figure, ax = chart(6.0, 3.2, title, x, y)
    for (name, (xs, ys)), color in zip(series.items(), cycle(PALETTE), strict=False):
        ax.plot(xs, ys, label=name, color=color, linewidth=1.6, marker="o" if len(xs) < 12 else None, markersize=4)
    if len(series) > 1:
        ax.legend(fontsize=SMALL, frameon=False)
    return figure


def losses_per_prediction(losses: Mapping[str, float], title: str = "") -> Figure:
    """The terms of the loss for every prediction, from the learned queries (0) to the last decoder layer.

    Args:
        losses: of a `Criterion`, as numbers: "l.class", "l.mask" and so on for prediction l; sums are left out.
        title: says what to see.
    """
    terms = loss_terms([losses])
    count = 1 + max((number for numbers in terms.values() for number in numbers), default=0)
    figure, ax = chart(1.6 + 0.15 * count * len(terms), 2.8, title, "prediction", "loss, unweighted")
    pitch = 0.81 / len(terms)
    for i, ((term, numbers), color) in enumerate(zip(terms.items(), cycle(PALETTE), strict=False)):
        places = [number + pitch * (i - (len(terms) - 1) / 2) for number in numbers]
        heights = [losses[f"{number}.{term}"] for number in numbers]
        ax.bar(places, heights, width=0.93 * pitch, color=color, label=term)
    ax.set_xticks(range(count))
    figure.legend(loc="outside right upper", fontsize=SMALL, frameon=False)
    return figure


def bars(
    names: Sequence[str], values: Sequence[float | None], x: str, title: str = "", limit: float | None = None
) -> Figure:
    """Horizontal bars with their numbers; "–" where a value is None.

    Args:
        names: one per bar, drawn from top to bottom.
        values: one per bar.
        x: label of the axis.
        title: says what to see.
        limit: right end of the axis.
    """
    figure, ax = chart(6.0, 0.8 + 0.24 * len(names), title, x)
    lengths = [0.0 if value is None else value for value in values]
    ax.barh(range(len(names)), lengths, color=PALETTE[0], height=0.7)
    reach = limit or max(lengths, default=1.0) or 1.0
    for i, (length, value) in enumerate(zip(lengths, values, strict=True)):
        ax.text(length + 0.01 * reach, i, "–" if value is None else f"{value:.3g}", va="center", fontsize=SMALL)
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.invert_yaxis()
    ax.set_xlim(0, reach * (1.0 if limit else 1.12))
    return figure


def dumbbells(
    names: Sequence[str],
    pairs: Sequence[tuple[float, float]],
    ends: tuple[str, str],
    x: str,
    title: str = "",
    limit: float | None = None,
) -> Figure:
    """One line per name, from its first value to its second.

    Args:
        names: drawn from top to bottom.
        pairs: two numbers each.
        ends: what the first and the second number are.
        x: label of the axis.
        title: says what to see.
        limit: right end of the axis.
    """
    figure, ax = chart(7.2, 1.0 + 0.36 * len(names), title, x)
    for row, (first, second) in enumerate(pairs):
        ax.plot([first, second], [row, row], color="0.75", linewidth=3, zorder=1, solid_capstyle="round")
    for end, color, marker, name in zip(zip(*pairs, strict=True), (PALETTE[0], PALETTE[1]), "os", ends, strict=True):
        ax.scatter(end, range(len(names)), s=48, color=color, marker=marker, label=name, zorder=2)
    reach = limit or max(max(pair) for pair in pairs) or 1.0
    for row, (_, second) in enumerate(pairs):
        ax.annotate(
            f"{second:.3g}", (second, row), (0, 6), textcoords="offset points", ha="center", fontsize=SMALL, zorder=3
        )
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.set_ylim(len(names) - 0.5, -0.7)
    ax.set_xlim(-0.02 * reach, 1.02 * reach)
    figure.legend(loc="outside upper right", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def matrices(
    tables: Mapping[str, np.ndarray],
    rows: str,
    columns: Sequence[str],
    marked: tuple[Sequence[int], Sequence[int]] = ((), ()),
    width: float = 2.6,
    height: float = 4.0,
) -> Figure:
    """Tables of numbers as colours, side by side, for example the terms of a cost matrix.

    Args:
        tables: title → numbers. [Q, T]
        rows: what a row is.
        columns: what each column is. T × str
        marked: row and column numbers of cells to frame, for example the matched pairs.
        width, height: of one table, in inches.
    """
    figure, axes = chart_grid(1, len(tables), width, height)
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        shown = ax.imshow(table, aspect="auto", cmap=HEAT, interpolation="nearest")
        ax.scatter(marked[1], marked[0], s=55, facecolors="none", edgecolors="cyan", linewidths=1.6)
        ax.set_title(title, fontsize=TITLE)
        ax.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=SMALL)
        ax.grid(visible=False)
        figure.colorbar(shown, ax=ax, shrink=0.7).ax.tick_params(labelsize=SMALL)
    axes[0].set_ylabel(rows)
    return figure


def confusion(matrix: np.ndarray, names: Sequence[str], title: str = "") -> Figure:
    """Of the pixels of a true class (row), the share that each class was predicted for (column).

    Args:
        matrix: pixel counts, rows are the truth. Classes without a pixel in either are left out. [K, K]
        names: K × str
        title: says what to see.
    """
    matrix = np.asarray(matrix, dtype=float)
    kept = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    shares = matrix[np.ix_(kept, kept)] / np.maximum(matrix[kept].sum(1, keepdims=True), 1)
    side = 1.6 + 0.32 * len(kept)
    figure, ax = chart(side + 1.2, side, title, "predicted", "true")
    shown = ax.imshow(shares, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks(range(len(kept)), [names[k] for k in kept], fontsize=SMALL, rotation=60, ha="right")
    ax.set_yticks(range(len(kept)), [names[k] for k in kept], fontsize=SMALL)
    ax.grid(visible=False)
    figure.colorbar(shown, ax=ax, shrink=0.7, label="share of the true class")
    return figure


def loss_terms(rows: Iterable[Mapping[str, float]]) -> dict[str, list[int]]:
    """Terms of the loss that rows hold, in their order, each with the predictions that have it.

    "2.mask" is the term "mask" of prediction 2. Where no name has such a number, the paper's three terms.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    found: dict[str, list[int]] = {}
    for number, _, term in (name.partition(".") for name in names):
        if number.isdigit():
            found.setdefault(term, []).append(int(number))
    return {term: sorted(numbers) for term, numbers in found.items()} or {"class": [], "mask": [], "dice": []}
