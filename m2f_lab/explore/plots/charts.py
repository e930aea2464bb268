"""Figures of numbers: curves, bars and tables.

Q queries, K classes, T segments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from m2f_lab.explore.plots.theme import HEAT, PALETTE, SMALL, TITLE, chart, chart_row, colors


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, title: str = "") -> Figure:
    """Lines over a common axis.

    Args:
        series: name → x values and y values.
        x, y: labels of the axes.
        title: says what to see.
    """
    figure, ax = chart(6.0, 3.2, title)
    for (name, (xs, ys)), color in zip(series.items(), colors(len(series)), strict=True):
        ax.plot(xs, ys, label=name, color=color, linewidth=1.6, marker="o" if len(xs) < 12 else None, markersize=4)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if len(series) > 1:
        ax.legend(fontsize=SMALL, frameon=False)
    return figure


def learning_curves(steps: Sequence[dict], evaluations: Sequence[dict] = (), title: str = "") -> Figure:
    """How a run went: the loss and its terms, mIoU, and the learning rate.

    Args:
        steps: rows of `Run.steps`, with "iteration", "loss", "learning_rate" and the terms "0.class", "0.mask", …;
            or with means over predictions, "class", "mask", "dice", in their place.
        evaluations: rows with "iteration" and "mIoU" in percent.
        title: over everything.
    """
    figure, axes = chart_row(4, 2.9, 2.5, title)
    iterations = [row["iteration"] for row in steps]
    axes[0].plot(iterations, [row["loss"] for row in steps], color=PALETTE[0], linewidth=1.4)
    axes[0].set_title("loss, weighted sum", fontsize=TITLE)
    for term, color in zip(("class", "mask", "dice"), PALETTE, strict=False):
        axes[1].plot(iterations, [mean_term(row, term) for row in steps], color=color, linewidth=1.2, label=term)
    axes[1].legend(fontsize=SMALL, frameon=False)
    axes[1].set_title("terms, mean of predictions", fontsize=TITLE)
    axes[2].plot(
        [row["iteration"] for row in evaluations], [row["mIoU"] for row in evaluations], color=PALETTE[2], marker="o",
        markersize=4, linewidth=1.4,
    )  # fmt: skip
    axes[2].set_title("mIoU in percent", fontsize=TITLE)
    axes[2].set_ylim(0, 100)
    axes[3].plot(iterations, [row.get("learning_rate", math.nan) for row in steps], color=PALETTE[4], linewidth=1.4)
    axes[3].set_title("learning rate", fontsize=TITLE)
    axes[3].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for ax in axes:
        ax.set_xlabel("iteration")
    return figure


def losses_per_prediction(losses: Mapping[str, float], title: str = "") -> Figure:
    """The terms of the loss for every prediction, from the learned queries (0) to the last decoder layer.

    Args:
        losses: what `Criterion` returns, as numbers: "l.class", "l.mask" and "l.dice" for prediction l; other entries
            are left out.
        title: says what to see.
    """
    terms = ("class", "mask", "dice")
    count = sum(name.endswith(f".{terms[0]}") for name in losses)
    figure, ax = chart(1.6 + 0.45 * count, 2.8, title)
    for i, (term, color) in enumerate(zip(terms, PALETTE, strict=False)):
        places = [prediction + 0.27 * (i - 1) for prediction in range(count)]
        ax.bar(places, [losses[f"{number}.{term}"] for number in range(count)], width=0.25, color=color, label=term)
    ax.set_xticks(range(count))
    ax.set_xlabel("prediction")
    ax.set_ylabel("loss, unweighted")
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
    figure, ax = chart(6.0, 0.8 + 0.24 * len(names), title)
    lengths = [0.0 if value is None else value for value in values]
    ax.barh(range(len(names)), lengths, color=PALETTE[0], height=0.7)
    reach = limit or max(lengths, default=1.0) or 1.0
    for i, value in enumerate(values):
        text = "–" if value is None else f"{value:.3g}"
        ax.text(lengths[i] + 0.01 * reach, i, text, va="center", fontsize=SMALL)
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.invert_yaxis()
    ax.set_xlim(0, reach * (1.0 if limit else 1.12))
    ax.set_xlabel(x)
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
    figure, axes = chart_row(len(tables), width, height, "")
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
    figure, ax = chart(side + 1.2, side, title)
    shown = ax.imshow(shares, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
    for axis in ("x", "y"):
        rotation = {"rotation": 60, "ha": "right"} if axis == "x" else {}
        ax.set(**{f"{axis}ticks": range(len(kept))})
        getattr(ax, f"set_{axis}ticklabels")([names[k] for k in kept], fontsize=SMALL, **rotation)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    ax.grid(visible=False)
    figure.colorbar(shown, ax=ax, shrink=0.7, label="share of the true class")
    return figure


def mean_term(row: dict, term: str) -> float:
    """A loss term averaged over predictions; NaN where the row does not hold it."""
    values = [value for name, value in row.items() if name == term or name.endswith(f".{term}")]
    return sum(values) / len(values) if values else math.nan
