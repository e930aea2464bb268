"""Figures from arrays: every picture of the notebooks, and the static side of every tool.

Each function takes numpy arrays and returns a `matplotlib.figure.Figure`, which a notebook shows as the last value of
a cell and `figure.savefig("name.pdf")` writes as vectors. pyplot is not used: it keeps figures alive in the kernel and
is not safe in threads. Colours come from palettes that colour-blind readers can tell apart.

Q queries, K classes, T segments, S sampling points, H/W height/width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from m2f_lab.data import Classes
from m2f_lab.data.colors import colorize, overlay
from m2f_lab.structures import IGNORE

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008
HEAT = "magma"  # perceptually uniform, dark to bright
TITLE, TEXT, SMALL = 10, 9, 8  # points


class NotebookFigure(Figure):
    """A figure that a notebook shows; matplotlib's own does so only after pyplot was imported."""

    def _repr_png_(self) -> bytes:
        drawn, packed = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png")
        # 256 colours look the same at this size, and notebooks stay small enough for GitHub to show.
        Image.open(drawn).convert("RGB").quantize(256).save(packed, format="png", optimize=True)
        return packed.getvalue()


def images(panels: Mapping[str, np.ndarray], columns: int | None = None, width: float = 3.0) -> Figure:
    """Pictures side by side.

    Args:
        panels: title → picture, uint8 [H, W, 3], or a map [H, W], which is shown as heat.
        columns: pictures per row; all in one row if not given.
        width: of one picture, in inches.
    """
    height, breadth = next(iter(panels.values())).shape[:2]
    figure, axes = _grid(len(panels), columns or len(panels), width, width * height / breadth)
    for ax, (title, picture) in zip(axes, panels.items(), strict=True):
        _show(ax, picture, title)
    return figure


def segmentation(
    image: np.ndarray, label_maps: Mapping[str, np.ndarray], classes: Classes, opacity: float = 0.65, width: float = 3.6
) -> Figure:
    """An image, label maps over it, and the names of all classes that occur.

    Args:
        image: uint8 [H, W, 3]
        label_maps: title → classes 0…K-1, or 255 where nothing is known; those pixels are black. [H, W]
        classes: names and colours.
        opacity: 0 shows the image alone, 1 the colours alone.
        width: of one picture, in inches.
    """
    panels = {"image": image}
    for title, label_map in label_maps.items():
        painted = overlay(image, label_map, classes, opacity)
        painted[label_map == IGNORE] = 0
        panels[title] = painted
    figure = images(panels, width=width)
    present = np.unique(np.concatenate([np.unique(label_map) for label_map in label_maps.values()]))
    _class_legend(figure, [int(label) for label in present if label != IGNORE], classes)
    return figure


def comparison_rows(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: Classes, width: float = 2.8
) -> Figure:
    """One row per image: the image, the truth, the prediction.

    Args:
        rows: image uint8 [H, W, 3], true label map [H, W], predicted label map [H, W], of each image; images of
            different sizes may be mixed.
        classes: names and colours.
        width: of one picture, in inches.
    """
    heights = [image.shape[0] / image.shape[1] * width for image, _, _ in rows]
    figure, axes = _grid(3 * len(rows), 3, width, heights)
    for i, (image, truth, prediction) in enumerate(rows):
        titles = ("image", "truth", "prediction") if i == 0 else ("", "", "")
        pictures = (image, colorize(truth, classes), colorize(prediction, classes))
        for ax, picture, title in zip(axes[3 * i : 3 * i + 3], pictures, titles, strict=True):
            _show(ax, picture, title)
    present = np.unique(np.concatenate([np.unique(m) for _, *maps in rows for m in maps]))
    _class_legend(figure, [int(label) for label in present if label != IGNORE], classes)
    return figure


def masks(image: np.ndarray, maps: np.ndarray, captions: Sequence[str], columns: int = 6, width: float = 1.9) -> Figure:
    """Masks over their image, one picture each: bright where the mask is, dark elsewhere.

    Args:
        image: uint8 [H, W, 3]
        maps: mask probabilities in [0, 1], of any size. [N, h, w]
        captions: one per mask.
        columns: pictures per row.
        width: of one picture, in inches.
    """
    figure, axes = _grid(len(maps), min(columns, len(maps)), width, width * image.shape[0] / image.shape[1])
    for ax, probability, caption in zip(axes, maps, captions, strict=True):
        _show(ax, image, caption)
        _veil(ax, probability, image.shape[:2])
    return figure


def attention(
    image: np.ndarray,
    mask_before: np.ndarray,
    blocked: np.ndarray,
    weights: np.ndarray,
    mask_after: np.ndarray,
    title: str = "",
    width: float = 3.0,
) -> Figure:
    """One step of masked attention: the mask a query had, where it may look, where it looked, and its new mask.

    Args:
        image: uint8 [H, W, 3]
        mask_before, mask_after: mask probabilities in [0, 1]. [h, w]
        blocked: True where attention is forbidden. bool [h', w']
        weights: attention weights of one head, or their mean. [h', w']
        title: over everything.
        width: of one picture, in inches.
    """
    figure, axes = _grid(4, 4, width, width * image.shape[0] / image.shape[1], title=bool(title))
    titles = ("mask before the layer", "allowed cells", "attention weights", "mask after the layer")
    for ax, name in zip(axes, titles, strict=True):
        _show(ax, image, name)
    _veil(axes[0], mask_before, image.shape[:2])
    _veil(axes[1], (~blocked).astype(float), image.shape[:2], smooth=False)
    _heat(axes[2], weights, image.shape[:2])
    _veil(axes[3], mask_after, image.shape[:2])
    figure.suptitle(title, fontsize=TITLE + 1)
    return figure


def heat_over_image(image: np.ndarray, maps: Mapping[str, np.ndarray], width: float = 3.0) -> Figure:
    """Non-negative maps as heat over a darkened image; each is scaled to its own largest value.

    Args:
        image: uint8 [H, W, 3]
        maps: title → values of any size. [h, w]
        width: of one picture, in inches.
    """
    figure, axes = _grid(len(maps), len(maps), width, width * image.shape[0] / image.shape[1])
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        _show(ax, image, title)
        _heat(ax, values, image.shape[:2])
    return figure


def sampling_points(
    image: np.ndarray,
    location: np.ndarray,
    points: np.ndarray,
    weights: np.ndarray,
    title: str = "",
    width: float = 6.0,
) -> Figure:
    """Where deformable attention reads for one location: a dot per point, its size the weight, its colour the level.

    Args:
        image: uint8 [H, W, 3]
        location: (x, y) in [0, 1], the place that asks. [2]
        points: (x, y) in [0, 1]. [heads, L, P, 2]
        weights: they sum to 1 for each head; the legend says how much of them lies on each level. [heads, L, P]
        title: over the picture.
        width: of the picture, in inches.
    """
    height, breadth = image.shape[:2]
    figure, axes = _grid(1, 1, width, width * height / breadth)
    ax = axes[0]
    _show(ax, image, title, dim=0.6)
    for level, stride in enumerate((32, 16, 8)):
        here, size = points[:, level].reshape(-1, 2), weights[:, level].reshape(-1)
        ax.scatter(
            here[:, 0] * breadth, here[:, 1] * height, s=10 + 1500 * size, color=PALETTE[level], alpha=0.75,
            edgecolors="white", linewidths=0.6, label=f"stride {stride}: {size.sum() / len(points):.0%}",
        )  # fmt: skip
    ax.plot(*(location * (breadth, height)), marker="+", markersize=16, markeredgewidth=2.5, color="white")
    ax.set_xlim(0, breadth)
    ax.set_ylim(height, 0)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, fontsize=SMALL, frameon=False, markerscale=0.6)
    return figure


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, title: str = "") -> Figure:
    """Lines over a common axis.

    Args:
        series: name → x values and y values.
        x, y: labels of the axes.
        title: says what to see.
    """
    figure, ax = _axes(6.0, 3.2, title)
    for (name, (xs, ys)), color in zip(series.items(), _colors(len(series)), strict=True):
        ax.plot(xs, ys, label=name, color=color, linewidth=1.6, marker="o" if len(xs) < 12 else None, markersize=4)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if len(series) > 1:
        ax.legend(fontsize=SMALL, frameon=False)
    return figure


def learning_curves(steps: Sequence[dict], evaluations: Sequence[dict] = (), title: str = "") -> Figure:
    """How a run went: the loss and its terms, mIoU, and the learning rate.

    Args:
        steps: rows of `Run.steps`, with "iteration", "loss", "learning_rate" and the terms "0.class", "0.mask" and so on;
            or with means over predictions, "class", "mask", "dice", in their place.
        evaluations: rows with "iteration" and "mIoU" in percent.
        title: over everything.
    """
    figure, axes = _axes_row(4, 2.9, 2.5, title)
    iterations = [row["iteration"] for row in steps]
    axes[0].plot(iterations, [row["loss"] for row in steps], color=PALETTE[0], linewidth=1.4)
    axes[0].set_title("loss, weighted sum", fontsize=TITLE)
    for term, color in zip(("class", "mask", "dice"), PALETTE, strict=False):
        axes[1].plot(iterations, [_mean_term(row, term) for row in steps], color=color, linewidth=1.2, label=term)
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
    figure, ax = _axes(1.6 + 0.45 * count, 2.8, title)
    for i, (term, color) in enumerate(zip(terms, PALETTE, strict=False)):
        places = [prediction + 0.27 * (i - 1) for prediction in range(count)]
        ax.bar(places, [losses[f"{l}.{term}"] for l in range(count)], width=0.25, color=color, label=term)
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
    figure, ax = _axes(6.0, 0.8 + 0.24 * len(names), title)
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
    figure, axes = _axes_row(len(tables), width, height, "")
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
    figure, ax = _axes(side + 1.2, side, title)
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


# ----------------------------------------------------------------------------------------------------------------------


def _grid(
    count: int, columns: int, width: float, height: float | Sequence[float], title: bool = False
) -> tuple[Figure, list[Axes]]:
    """A grid of pictures without frames; `width` and `height` (of all, or row by row) in inches of one picture."""
    rows = math.ceil(count / columns)
    heights = [height] * rows if isinstance(height, int | float) else list(height)
    total = sum(heights) + 0.3 * rows + (0.3 if title else 0)
    figure = NotebookFigure(figsize=(columns * width, total), layout="constrained", dpi=90)
    axes = list(figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flat)
    for ax in axes:
        ax.set_axis_off()
    return figure, axes[:count]


def _axes(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure, (ax,) = _axes_row(1, width, height, "")
    ax.set_title(title, fontsize=TITLE)
    return figure, ax


def _axes_row(count: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes]]:
    figure = NotebookFigure(figsize=(count * width, height), layout="constrained", dpi=90)
    axes = list(figure.subplots(1, count, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(visible=True, alpha=0.25)
        ax.tick_params(labelsize=SMALL)
        ax.xaxis.label.set_size(TEXT)
        ax.yaxis.label.set_size(TEXT)
    if title:
        figure.suptitle(title, fontsize=TITLE + 1)
    return figure, axes


def _mean_term(row: dict, term: str) -> float:
    """A loss term averaged over predictions; NaN where the row does not hold it."""
    values = [value for name, value in row.items() if name == term or name.endswith(f".{term}")]
    return sum(values) / len(values) if values else math.nan


def _colors(count: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _show(ax: Axes, picture: np.ndarray, title: str, dim: float = 1.0) -> None:
    if picture.ndim == 2:
        ax.imshow(picture, cmap=HEAT, interpolation="nearest")
    else:
        ax.imshow((picture * dim).astype(np.uint8) if dim != 1.0 else picture, interpolation="nearest")
    ax.set_title(title, fontsize=TITLE)


def _veil(ax: Axes, probability: np.ndarray, size: tuple[int, int], smooth: bool = True) -> None:
    """Darken the picture where a mask is not."""
    veil = np.zeros((*probability.shape, 4), np.float32)
    veil[..., 3] = 0.85 * (1 - probability)
    ax.imshow(veil, extent=_extent(size), interpolation="bilinear" if smooth else "nearest")


def _heat(ax: Axes, values: np.ndarray, size: tuple[int, int]) -> None:
    top = float(values.max()) or 1.0
    ax.imshow(values / top, extent=_extent(size), cmap=HEAT, alpha=0.75, vmin=0, vmax=1, interpolation="nearest")


def _extent(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Lay a coarser map over a whole picture of this size: left, right, bottom, top in pixel centres."""
    height, width = size
    return -0.5, width - 0.5, height - 0.5, -0.5


def _class_legend(figure: Figure, labels: Sequence[int], classes: Classes) -> None:
    patches = [Patch(color=np.array(classes.colors[label]) / 255, label=classes.names[label]) for label in labels]
    columns = min(6, max(len(patches), 1))
    rows = math.ceil(len(patches) / columns)
    figure.set_figheight(figure.get_figheight() + 0.24 * rows)
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False)
