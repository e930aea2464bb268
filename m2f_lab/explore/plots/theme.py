"""Parts of all figures: colours, sizes of text, axes, legends, and a figure that notebooks show."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from m2f_lab.data import Classes

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008
HEAT = "magma"  # perceptually uniform, dark to bright
TITLE, TEXT, SMALL = 10, 9, 8  # points


class NotebookFigure(Figure):
    """A figure that a notebook shows; matplotlib's own does so only after pyplot was imported."""

    def _repr_png_(self) -> bytes:
        canvas, packed = FigureCanvasAgg(self), io.BytesIO()
        canvas.draw()
        # 256 colours look the same at this size, and notebooks stay small enough for GitHub to show.
        drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        drawn.quantize(256).save(packed, format="png", optimize=True)
        return packed.getvalue()


def picture_grid(
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


def chart(width: float, height: float, title: str, x: str, y: str = "") -> tuple[Figure, Axes]:
    """A figure of one chart; `width` and `height` in inches, `x` and `y` the labels of its axes."""
    figure, (ax,) = chart_grid(1, 1, width, height)
    ax.set_title(title, fontsize=TITLE)
    ax.set(xlabel=x, ylabel=y)
    return figure, ax


def chart_grid(rows: int, columns: int, width: float, height: float, title: str = "") -> tuple[Figure, list[Axes]]:
    """A figure of charts, row by row; `width` and `height` in inches of one of them."""
    figure = NotebookFigure(figsize=(columns * width, rows * height), layout="constrained", dpi=90)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        dress(ax)
    if title:
        figure.suptitle(title, fontsize=TITLE + 1)
    return figure, axes


def dress(ax: Axes) -> None:
    """The look of a chart: a pale grid, no frame above and right, small numbers."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, alpha=0.25)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=SMALL)
    ax.xaxis.label.set_size(TEXT)
    ax.yaxis.label.set_size(TEXT)


def show(ax: Axes, picture: np.ndarray, title: str) -> None:
    """A picture, uint8 [H, W, 3], or a map [H, W] as heat, and its title."""
    ax.imshow(picture, cmap=HEAT, interpolation="nearest")  # pictures have colours of their own
    ax.set_title(title, fontsize=TITLE)


def class_legend(
    figure: Figure, label_maps: Sequence[np.ndarray], classes: Classes, place: str = "outside lower center"
) -> None:
    """Name all classes of label maps under a figure, which grows by that much.

    Only a layout engine knows the places outside.
    """
    labels = np.unique(np.concatenate([np.unique(label_map) for label_map in label_maps]))
    labels = labels[labels != classes.ignore].tolist()
    patches = [Patch(color=np.array(classes.colors[label]) / 255, label=classes.names[label]) for label in labels]
    columns = min(6, max(len(patches), 1))
    rows = math.ceil(len(patches) / columns)
    figure.set_figheight(figure.get_figheight() + 0.24 * rows)
    figure.legend(handles=patches, loc=place, ncols=columns, fontsize=SMALL, frameon=False)
