"""Figures of deformable attention: a dot for every sampling point.

L levels, P points, H/W height/width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2f_lab.explore.parts.labels import percent
from m2f_lab.explore.plots.theme import PALETTE, SMALL, TITLE, picture_grid

Sampled = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The place that asks, (x, y) in 0…1 of the image [2]; the points it reads [heads, L, P, 2]; their weights, which add
up to 1 for each head [heads, L, P]."""


def sampling_points(
    image: np.ndarray,
    location: np.ndarray,
    points: np.ndarray,
    weights: np.ndarray,
    title: str = "",
    width: float = 6.0,
) -> Figure:
    """Sampling points of deformable attention for one location: a dot each, its size the weight, its colour the level.

    Args:
        image: uint8 [H, W, 3]
        location: (x, y) in [0, 1], the place that asks. [2]
        points: (x, y) in [0, 1]; those beyond the image are left out. [heads, L, P, 2]
        weights: they sum to 1 for each head; the legend says how much of them lies on each level. [heads, L, P]
        title: over the picture.
        width: of the picture, in inches.
    """
    return sampling_panels(image, {title: (location, points, weights)}, width=width)


def sampling_panels(
    image: np.ndarray, panels: Mapping[str, Sampled], columns: int | None = None, width: float = 3.6
) -> Figure:
    """The same for several layers or models, side by side.

    Args:
        image: uint8 [H, W, 3]
        panels: title → location, points and weights, as `sampling_points` takes them.
        columns: pictures per row; all in one row if not given.
        width: of one picture, in inches.
    """
    height, breadth = image.shape[:2]
    figure, axes = picture_grid(len(panels), columns or len(panels), width, width * height / breadth + 0.25)
    for ax, (title, sampled) in zip(axes, panels.items(), strict=True):
        ax.imshow((image * 0.6).astype(np.uint8), extent=(0, breadth, height, 0), interpolation="nearest")
        ax.set_title(title, fontsize=TITLE)
        _dots(ax, sampled, np.array([breadth, height]), width / 6.0)
    return figure


def _dots(ax: Axes, sampled: Sampled, size: np.ndarray, scale: float) -> None:
    location, points, weights = sampled
    for level, stride in enumerate((32, 16, 8)):
        x, y = (points[:, level].reshape(-1, 2) * size).T
        area = weights[:, level].reshape(-1)
        ax.scatter(
            x, y, s=scale**2 * (10 + 1500 * area), color=PALETTE[level], alpha=0.75, edgecolors="white",
            linewidths=0.6 * scale, label=f"stride {stride}: {percent(area.sum() / len(points))}",
        )  # fmt: skip
    ax.plot(*(location * size), marker="+", markersize=16 * scale, markeredgewidth=2.5 * scale, color="white")
    ax.set(xlim=(0, size[0]), ylim=(size[1], 0))
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, fontsize=SMALL, frameon=False,
        markerscale=0.6, handlelength=1, handletextpad=0.2, columnspacing=0.8,
    )  # fmt: skip
