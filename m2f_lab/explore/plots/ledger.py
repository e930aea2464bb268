"""The figure of a pixel's account.

Q queries, K classes, H/W height/width.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from m2f_lab.data import Classes
from m2f_lab.data.colors import overlay
from m2f_lab.explore.plots.theme import PALETTE, SMALL, TEXT, NotebookFigure, dress, show

OTHERS = "#c4c8cd"


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
