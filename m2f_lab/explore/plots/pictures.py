"""Figures of images, label maps, masks and attention; of a change to a label map, and of one pixel of it.

Q queries, K classes, H/W height/width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2f_lab.data import Classes
from m2f_lab.data.colors import colorize, overlay
from m2f_lab.explore.plots.theme import (
    HEAT,
    PALETTE,
    SMALL,
    TEXT,
    TITLE,
    NotebookFigure,
    class_legend,
    dress,
    picture_grid,
    show,
)  # fmt: skip

MAX_BARS = 10  # classes that a change is told of
OTHERS = "#c4c8cd"  # the bar of all queries without a colour of their own


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
        label_maps: title → classes 0…K-1, or `classes.ignore` where nothing is known; those pixels are black. [H, W]
        classes: names and colours.
        opacity: 0 shows the image alone, 1 the colours alone.
        width: of one picture, in inches.
    """
    panels = {"image": image}
    for title, label_map in label_maps.items():
        painted = overlay(image, label_map, classes, opacity)
        painted[label_map == classes.ignore] = 0
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


def label_change(
    image: np.ndarray, before: np.ndarray, after: np.ndarray, classes: Classes, title: str = "", width: float = 3.0
) -> Figure:
    """A label map before and after, the pixels that changed, and what every class gained or lost.

    Args:
        image: uint8 [H, W, 3]
        before, after: classes 0…K-1. integers [H, W]
        classes: names and colours.
        title: over everything.
        width: of one picture, in inches.
    """
    figure, axes = picture_grid(4, 4, width, max(width * image.shape[0] / image.shape[1], 1.6), title=bool(title))
    changed = before != after
    difference = (0.25 * image).astype(np.uint8)
    difference[changed] = colorize(after, classes)[changed]
    panels = {
        "before": overlay(image, before, classes, 0.65),
        "after": overlay(image, after, classes, 0.65),
        f"{100 * changed.mean():.1f} % of the pixels changed": difference,
    }
    for ax, (name, picture) in zip(axes, panels.items(), strict=False):
        show(ax, picture, name)

    count = len(classes)
    pixels = [np.bincount(labels.ravel(), minlength=count) for labels in (before, after)]
    gained = 100 * (pixels[1] - pixels[0]) / before.size
    shown = np.argsort(-np.abs(gained), kind="stable")[:MAX_BARS]
    shown = shown[(pixels[0] + pixels[1])[shown] > 0]
    ax = axes[3]
    ax.set_axis_on()
    dress(ax)
    ax.barh(range(len(shown)), gained[shown], color=[PALETTE[0] if g > 0 else PALETTE[1] for g in gained[shown]])
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(shown)), [classes.names[k] for k in shown], fontsize=SMALL)
    ax.invert_yaxis()
    reach = max(np.abs(gained).max(), 0.1)
    ax.set_xlim(-1.1 * reach, 1.1 * reach)
    ax.set_xlabel("gained or lost, in % of the image")
    figure.suptitle(title, fontsize=TITLE + 1)
    class_legend(figure, [before, after], classes)
    return figure


def pixel_ledger(
    image: np.ndarray,
    label_map: np.ndarray,
    classes: Classes,
    shares: np.ndarray,
    place: tuple[int, int],
    count: int = 6,
    width: float = 9.0,
) -> Figure:
    """A pixel on the map, and for its strongest classes what each query gives to the score.

    Args:
        image: uint8 [H, W, 3]
        label_map: classes 0…K-1. [H, W]
        classes: names and colours.
        shares: what each query gives to each class at the pixel. [Q, K]
        place: (x, y), the pixel.
        count: queries that have a colour of their own; all others share one.
        width: of the figure, in inches.
    """
    scores = shares.sum(axis=0)
    shown = np.argsort(-scores, kind="stable")[:4]
    first = np.argsort(-shares[:, shown].max(axis=1), kind="stable")[: min(count, len(PALETTE) - 1)]
    first = first[np.argsort(-shares[first, shown[0]], kind="stable")]
    height = max(2.4, 0.5 * width * image.shape[0] / image.shape[1] + 0.4)
    figure = NotebookFigure(figsize=(width, height), layout="constrained", dpi=90)
    figure.get_layout_engine().set(h_pad=0.1)
    picture, bars = figure.subplots(1, 2)

    title = f"pixel ({place[0]}, {place[1]}): {classes.names[shown[0]]}"
    show(picture, overlay(image, label_map, classes, 0.6), title)
    for size, color in ((7, "black"), (4, "white")):
        picture.plot(*place, marker="+", markersize=16, markeredgewidth=size / 2, color=color)
    picture.set_axis_off()

    dress(bars)
    left = np.zeros(len(shown))
    parts = [(f"query {query}", shares[query, shown], PALETTE[i]) for i, query in enumerate(first)]
    rest = scores[shown] - sum(values for _, values, _ in parts)
    if len(shares) > len(first):
        parts.append((f"{len(shares) - len(first)} others", rest, OTHERS))
    for name, values, color in parts:
        bars.barh(range(len(shown)), values, left=left, color=color, edgecolor="white", linewidth=0.5, label=name)
        left = left + values
    for row, score in enumerate(scores[shown]):
        bars.text(score + 0.01 * scores[shown[0]], row, f"{score:.3f}", va="center", fontsize=SMALL)
    bars.set_yticks(range(len(shown)), [classes.names[k] for k in shown], fontsize=TEXT)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.15 * max(float(scores[shown[0]]), 1e-6))
    bars.set_xlabel("score: the sum of p(class | query) · p(pixel | query)", fontsize=SMALL)
    bars.legend(fontsize=SMALL, frameon=False, loc="lower right")
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
