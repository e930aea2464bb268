"""Figures of training runs: one that is watched, and several laid over each other.

L predictions, H/W height/width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2f_lab.data import Classes
from m2f_lab.data.colors import colorize
from m2f_lab.explore.plots.charts import loss_terms, mean_term
from m2f_lab.explore.plots.theme import PALETTE, SMALL, TEXT, TITLE, NotebookFigure, class_legend, colors, dress

DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))  # of the terms, where colours stand for runs
WIDTH, CHARTS = 12.4, 4.9  # inches: of a figure of progress, and how high its charts are
LAYERS = "viridis_r"  # perceptually uniform, readable without colour vision; the last prediction is darkest


def training_progress(
    steps: Sequence[dict],
    evaluations: Sequence[dict] = (),
    title: str = "",
    images: Sequence[np.ndarray] = (),
    label_maps: Mapping[int, Sequence[np.ndarray]] | None = None,
    classes: Classes | None = None,
) -> Figure:
    """A run so far: the loss and its terms for every prediction, mIoU, learning rate, speed and memory.

    Args:
        steps: rows with "iteration", "loss", "learning_rate", "images_per_second", "memory_gib" and the terms
            of L predictions, "0.class", "0.mask", …, "1.class", …; a chart each. What a row lacks is left out.
        evaluations: rows with "iteration" and "mIoU" in percent.
        title: over everything.
        images: fixed images, shown in the first column of the strip below. N × uint8 [H, W, 3]
        label_maps: what was predicted for them: iteration → N × integers [H, W]; a column each.
        classes: names and colours of the label maps.
    """
    # Places are fixed: a layout engine would take half the time of drawing, and this figure is drawn often.
    figure = NotebookFigure(figsize=(WIDTH, CHARTS), dpi=90)
    if label_maps:
        present = np.unique(np.concatenate([np.unique(m) for maps in label_maps.values() for m in maps]))
        class_legend(figure, present.tolist(), classes, place="lower center")
        _strip(figure, images, label_maps, classes)
    height = figure.get_figheight()
    figure.suptitle(title, fontsize=TITLE + 1, y=1 - 0.08 / height)
    places = {"left": 0.036, "right": 0.99, "top": 1 - 0.68 / height, "bottom": 1 - (CHARTS - 0.5) / height}
    terms = loss_terms(steps)
    columns = max(4, 1 + len(terms))
    axes = figure.add_gridspec(2, columns, **places, wspace=0.2, hspace=0.38).subplots(squeeze=False)
    for ax in (*axes[0, 1 + len(terms) :], *axes[1, 4:]):
        ax.set_visible(False)
    iterations = [row["iteration"] for row in steps]
    _line(axes[0, 0], iterations, [row["loss"] for row in steps], "loss, weighted sum", PALETTE[0])
    for ax, (term, predictions) in zip(axes[0, 1:], terms.items(), strict=False):
        _lines_of_predictions(ax, steps, term, predictions)
    evaluated = [row for row in evaluations if row["mIoU"] is not None]
    places, figures = [row["iteration"] for row in evaluated], [row["mIoU"] for row in evaluated]
    _line(axes[1, 0], places, figures, "mIoU in percent", PALETTE[2], marker="o")
    axes[1, 0].set_ylim(0, _top(figures))
    for ax, (name, text), color in zip(
        axes[1, 1:4],
        (
            ("learning_rate", "learning rate"),
            ("images_per_second", "images per second"),
            ("memory_gib", "peak memory in GiB"),
        ),
        (PALETTE[4], PALETTE[5], PALETTE[3]),
        strict=True,
    ):
        _line(ax, iterations, [row.get(name, math.nan) for row in steps], text, color)
    axes[1, 1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for ax in axes[1, 2:4]:
        ax.set_ylim(bottom=0)
    end = max([1, *iterations, *places])
    for ax in axes.flat:
        dress(ax)
        ax.set_xlim(0, end * 1.02)
    for ax in axes[1]:
        ax.set_xlabel("iteration")
    return figure


def _lines_of_predictions(ax: Axes, steps: Sequence[dict], term: str, predictions: Sequence[int]) -> None:
    """One line per prediction, the first ones pale; the legend names the first and the last."""
    shades = colormaps[LAYERS](np.linspace(0.08, 0.95, max(len(predictions), 2)))
    iterations = [row["iteration"] for row in steps]
    for prediction, shade in zip(predictions, shades, strict=False):
        ends = prediction in (predictions[0], predictions[-1])
        values = [row.get(f"{prediction}.{term}", math.nan) for row in steps]
        label = f"prediction {prediction}" if ends else None
        ax.plot(iterations, values, color=shade, linewidth=1.4 if ends else 0.8, label=label)
    if predictions:
        ax.legend(fontsize=SMALL, frameon=False)
    ax.set_title(f"{term} term", fontsize=TITLE)


def _line(ax: Axes, x: Sequence[float], y: Sequence[float], title: str, color: str, marker: str = "") -> None:
    ax.plot(x, y, color=color, linewidth=1.4, marker=marker or ("o" if len(x) == 1 else None), markersize=4)
    ax.set_title(title, fontsize=TITLE)


def _top(percent: Sequence[float]) -> float:
    """End of an axis of percentages: above the largest, but at most a hundred."""
    return min(100.0, max(10.0, 1.15 * max(percent, default=100.0)))


def _strip(
    figure: Figure, images: Sequence[np.ndarray], label_maps: Mapping[int, Sequence[np.ndarray]], classes: Classes
) -> None:
    """Rows are images, columns iterations. The figure grows by the strip."""
    columns = [("image", images), *((f"after {n}", maps) for n, maps in label_maps.items())]
    width = WIDTH / max(8, len(columns))
    heights = [width * image.shape[0] / image.shape[1] for image in images]
    below, total = figure.get_figheight() - CHARTS + 0.05, sum(heights)  # below is the legend
    height = CHARTS + below + total + 0.2  # the titles
    figure.set_figheight(height)
    # One axes in inches: one for each picture would take much longer to draw.
    ax = figure.add_axes((0, below / height, 1, total / height))
    ax.set_axis_off()
    for column, (title, pictures) in enumerate(columns):
        left, top = column * width, 0.0
        ax.text(left + width / 2, -0.06, title, ha="center", va="bottom", fontsize=SMALL)
        for picture, tall in zip(pictures, heights, strict=True):
            shown = picture if column == 0 else colorize(picture, classes)
            extent = (left + 0.03, left + width - 0.03, top + tall - 0.06, top)
            ax.imshow(shown, extent=extent, interpolation="nearest", aspect="auto")
            top += tall
    ax.set(xlim=(0, WIDTH), ylim=(total, 0))


def compared_runs(runs: Mapping[str, tuple[Sequence[dict], Sequence[dict]]], title: str = "") -> Figure:
    """Runs laid over each other: loss, terms, mIoU and learning rate, over iterations above, over time below.

    Args:
        runs: name → rows of steps and of evaluations, with the keys of `training_progress`, and "seconds" of both.
        title: over everything.
    """
    figure = NotebookFigure(figsize=(13.0, 5.4), layout="constrained", dpi=90)
    if title:
        figure.suptitle(title, fontsize=TITLE + 1)
    axes = figure.subplots(2, 4, squeeze=False)
    longest = max((row["seconds"] for steps, _ in runs.values() for row in steps), default=0.0)
    unit, seconds = ("hours", 3600) if longest >= 7200 else ("minutes", 60) if longest >= 120 else ("seconds", 1)
    terms = loss_terms(step for steps, _ in runs.values() for step in steps)
    best = [row["mIoU"] for _, rows in runs.values() for row in rows if row["mIoU"] is not None]
    for (name, (steps, evaluations)), color in zip(runs.items(), colors(len(runs)), strict=True):
        for row, (key, scale) in enumerate((("iteration", 1), ("seconds", seconds))):
            x = [step[key] / scale for step in steps]
            style = {"color": color, "linewidth": 1.3, "marker": "o" if len(steps) == 1 else None, "markersize": 4}
            axes[row, 0].plot(x, [step["loss"] for step in steps], label=name if row == 0 else None, **style)
            for term, dashes in zip(terms, cycle(DASHES), strict=False):
                axes[row, 1].plot(x, [mean_term(step, term) for step in steps], linestyle=dashes, **style)
            evaluated = [entry for entry in evaluations if entry["mIoU"] is not None]
            places = [entry[key] / scale for entry in evaluated]
            axes[row, 2].plot(
                places, [entry["mIoU"] for entry in evaluated], color=color, linewidth=1.3, marker="o", markersize=4
            )
            axes[row, 3].plot(x, [step.get("learning_rate", math.nan) for step in steps], **style)
    titles = ("loss, weighted sum", "terms, mean of predictions", "mIoU in percent", "learning rate")
    for ax, text in zip(axes[0], titles, strict=True):
        ax.set_title(text, fontsize=TITLE)
    for row, label in enumerate(("iteration", f"{unit} of training")):
        axes[row, 2].set_ylim(0, _top(best))
        axes[row, 3].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for ax in axes[row]:
            dress(ax)
            ax.set_xlabel(label)
            ax.set_xlim(left=0)
    for term, dashes in zip(terms, cycle(DASHES), strict=False):
        axes[0, 1].plot([], [], color="#555555", linestyle=dashes, linewidth=1.3, label=term)
    axes[0, 1].legend(fontsize=SMALL, frameon=False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=TEXT, frameon=False)
    return figure
