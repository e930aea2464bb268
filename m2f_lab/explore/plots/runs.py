"""Figures of training runs: one that is done, one that is watched, and several laid over each other.

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
from m2f_lab.explore.plots.charts import loss_terms
from m2f_lab.explore.plots.theme import PALETTE, SMALL, TEXT, TITLE, NotebookFigure, chart_grid, class_legend, dress
from m2f_lab.training.run import leading_figure, leading_metric

DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))  # of the terms, where colours stand for runs
WIDTH, CHARTS = 12.4, 4.9  # inches: of a figure of progress, and how high its charts are
LAYERS = "viridis_r"  # perceptually uniform, readable without colour vision; the last prediction is darkest


def learning_curves(steps: Sequence[dict], evaluations: Sequence[dict] = (), title: str = "") -> Figure:
    """Course of a run: the loss and its terms, mIoU, and the learning rate.

    Args:
        steps: rows of `Run.steps`, with "iteration", "loss", "learning_rate" and the terms "0.class", "0.mask", …; or
            with means over predictions, "class", "mask", "dice", in their place.
        evaluations: rows with "iteration" and "mIoU", "PQ" or "AP" in percent.
        title: over everything.
    """
    figure, axes = chart_grid(1, 4, 2.9, 2.5, title)
    terms = loss_terms(steps)
    looks = {term: {"color": color, "label": term} for term, color in zip(terms, cycle(PALETTE), strict=False)}
    _course(axes, (steps, evaluations), looks, (PALETTE[0], PALETTE[2], PALETTE[4]))
    axes[1].legend(fontsize=SMALL, frameon=False)
    axes[2].set_ylim(0, 100)
    for ax in axes:
        ax.set_xlabel("iteration")
    return figure


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
        evaluations: rows with "iteration" and "mIoU", "PQ" or "AP" in percent.
        title: over everything.
        images: fixed images, shown in the first column of the strip below. N × uint8 [H, W, 3]
        label_maps: what was predicted for them: iteration → N × integers [H, W]; a column each.
        classes: names and colours of the label maps.
    """
    # Places are fixed: a layout engine would take half the time of drawing, and this figure is drawn often.
    figure = NotebookFigure(figsize=(WIDTH, CHARTS), dpi=90)
    if label_maps:
        class_legend(figure, [m for maps in label_maps.values() for m in maps], classes, place="lower center")
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
    _course(axes[:, :2].ravel(), (steps, evaluations), {}, (PALETTE[0], PALETTE[2], PALETTE[4]))
    for ax, (term, predictions) in zip(axes[0, 1:], terms.items(), strict=False):
        _lines_of_predictions(ax, steps, term, predictions)
    axes[1, 0].set_ylim(0, _top(evaluations))
    for ax, name, text, color in (
        (axes[1, 2], "images_per_second", "images per second", PALETTE[5]),
        (axes[1, 3], "memory_gib", "peak memory in GiB", PALETTE[3]),
    ):
        _line(ax, iterations, [row.get(name, math.nan) for row in steps], text, color)
        ax.set_ylim(bottom=0)
    end = max([1, *iterations, *(row["iteration"] for row in _measured(evaluations))])
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


def _top(evaluations: Sequence[dict]) -> float:
    """End of an axis of percent: above the largest figure, but at most a hundred."""
    return min(100.0, max(10.0, 1.15 * max(map(leading_figure, _measured(evaluations)), default=100.0)))


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
    figure, axes = chart_grid(2, 4, 3.25, 2.7, title)
    longest = max((row["seconds"] for steps, _ in runs.values() for row in steps), default=0.0)
    unit, seconds = ("hours", 3600) if longest >= 7200 else ("minutes", 60) if longest >= 120 else ("seconds", 1)
    terms = dict(zip(loss_terms(step for steps, _ in runs.values() for step in steps), cycle(DASHES), strict=False))
    for run, color in zip(runs.values(), cycle(PALETTE), strict=False):
        looks = {term: {"color": color, "linestyle": dashes} for term, dashes in terms.items()}
        _course(axes[:4], run, looks, (color,) * 3)
        _course(axes[4:], run, looks, (color,) * 3, seconds)
    for number, ax in enumerate(axes):
        ax.set_xlim(left=0)
        ax.set_xlabel("iteration" if number < 4 else f"{unit} of training")
    for ax in axes[2::4]:
        ax.set_ylim(0, max((_top(evaluations) for _, evaluations in runs.values()), default=100.0))
    for term, dashes in terms.items():
        axes[1].plot([], [], color="#555555", linestyle=dashes, linewidth=1.3, label=term)
    axes[1].legend(fontsize=SMALL, frameon=False)
    figure.legend(axes[0].lines, list(runs), fontsize=TEXT, frameon=False, loc="outside lower center", ncols=4)
    return figure


def _course(
    axes: Sequence[Axes], run: tuple, looks: Mapping[str, dict], shades: Sequence[str], unit: float = 0
) -> None:
    """Loss, terms, mIoU and learning rate of a run, over iterations, or over time in units of so many seconds.

    `looks` are those of the terms, `shades` the colours of the other three.
    """
    steps, evaluated = run[0], _measured(run[1])
    at, after = ([row["seconds"] / unit if unit else row["iteration"] for row in rows] for rows in (steps, evaluated))
    _line(axes[0], at, [row["loss"] for row in steps], "loss, weighted sum", shades[0])
    for term, look in looks.items():
        _line(axes[1], at, [mean_term(row, term) for row in steps], "terms, mean of predictions", **look)
    metric = leading_metric((evaluated or [{}])[0])
    _line(axes[2], after, list(map(leading_figure, evaluated)), f"{metric} in percent", shades[1], marker="o")
    _line(axes[3], at, [row.get("learning_rate", math.nan) for row in steps], "learning rate", shades[2])
    axes[3].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _measured(evaluations: Sequence[dict]) -> list[dict]:
    return [row for row in evaluations if leading_figure(row) is not None]


def _line(ax: Axes, x: Sequence[float], y: Sequence[float], title: str, color: str, **style) -> None:
    style = {"marker": "o" if len(x) == 1 else None, "linewidth": 1.4, "markersize": 4} | style
    ax.plot(x, y, color=color, **style)
    ax.set_title(title, fontsize=TITLE)


def mean_term(row: dict, term: str) -> float:
    """A loss term averaged over predictions; NaN where the row does not hold it."""
    values = [value for name, value in row.items() if name == term or name.endswith(f".{term}")]
    return sum(values) / len(values) if values else math.nan
