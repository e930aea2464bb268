"""Figures of images, label maps, masks and attention.

Q queries, H/W height/width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2f_lab.data import Classes
from m2f_lab.data.colors import colorize, overlay
from m2f_lab.explore.plots.theme import HEAT, TITLE, class_legend, picture_grid, show
from m2f_lab.structures import IGNORE


def images(panels: Mapping[str, np.ndarray], columns: int | None = None, width: float = 3.0) -> Figure:
    """Pictures side by side.

    Args:
        panels: title → picture, uint8 [H, W, 3], or a map [H, W], which is shown as heat.
        columns: pictures per row; all in one row if not given.
        width: of one picture, in inches.
    """
    height, breadth = next(iter(panels.values())).shape[:2]
    figure, axes = picture_grid(len(panels), columns or len(panels), width, width * height / breadth)
    for ax, (title, picture) in zip(axes, panels.items(), strict=True):
        show(ax, picture, title)
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
    class_legend(figure, list(label_maps.values()), classes)
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
    figure, axes = picture_grid(3 * len(rows), 3, width, heights)
    for i, (image, truth, prediction) in enumerate(rows):
        titles = ("image", "truth", "prediction") if i == 0 else ("", "", "")
        pictures = (image, colorize(truth, classes), colorize(prediction, classes))
        for ax, picture, title in zip(axes[3 * i : 3 * i + 3], pictures, titles, strict=True):
            show(ax, picture, title)
    class_legend(figure, [label_map for _, *label_maps in rows for label_map in label_maps], classes)
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
    figure, axes = picture_grid(len(maps), min(columns, len(maps)), width, width * image.shape[0] / image.shape[1])
    for ax, probability, caption in zip(axes, maps, captions, strict=True):
        show(ax, image, caption)
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
    figure, axes = picture_grid(4, 4, width, width * image.shape[0] / image.shape[1], title=bool(title))
    titles = ("mask before the layer", "allowed cells", "attention weights", "mask after the layer")
    for ax, name in zip(axes, titles, strict=True):
        show(ax, image, name)
    _veil(axes[0], mask_before, image.shape[:2])
    _veil(axes[1], (~blocked).astype(float), image.shape[:2], smooth=False)
    _heat(axes[2], weights, image.shape[:2])
    _veil(axes[3], mask_after, image.shape[:2])
    figure.suptitle(title, fontsize=TITLE + 1)
    return figure


def heat_over_image(
    image: np.ndarray, maps: Mapping[str, np.ndarray], columns: int | None = None, width: float = 3.0
) -> Figure:
    """Non-negative maps as heat over a darkened image; each is scaled to its own largest value.

    Args:
        image: uint8 [H, W, 3]
        maps: title → values of any size. [h, w]
        columns: pictures per row; all in one row if not given.
        width: of one picture, in inches.
    """
    height = width * image.shape[0] / image.shape[1]
    lines = max(title.count("\n") for title in maps)
    figure, axes = picture_grid(len(maps), columns or len(maps), width, height + 0.17 * lines)
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        show(ax, image, title)
        _heat(ax, values, image.shape[:2])
    return figure


def _veil(ax: Axes, probability: np.ndarray, size: tuple[int, int], smooth: bool = True) -> None:
    """Darken the picture where a mask is not."""
    veil = np.zeros((*probability.shape, 4), np.float32)
    veil[..., 3] = 0.85 * (1 - probability)
    _lay_over(ax, veil, size, interpolation="bilinear" if smooth else "nearest")


def _heat(ax: Axes, values: np.ndarray, size: tuple[int, int]) -> None:
    top = float(values.max()) or 1.0
    _lay_over(ax, values / top, size, cmap=HEAT, alpha=0.75, vmin=0, vmax=1, interpolation="nearest")


def _lay_over(ax: Axes, values: np.ndarray, size: tuple[int, int], **look) -> None:
    """Draw a coarser map over a whole picture, [H, W]; its edges are those of the outer pixels."""
    height, width = size
    ax.imshow(values, extent=(-0.5, width - 0.5, height - 0.5, -0.5), **look)
