"""Figures of what a change did to a result."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from m2f_lab.data import Classes
from m2f_lab.data.colors import colorize, overlay
from m2f_lab.explore.plots.theme import PALETTE, SMALL, TITLE, class_legend, dress, picture_grid, show

MAX_BARS = 10


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
