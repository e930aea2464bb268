"""Pictures and words of sampling points: dots, notes below them, and maps of how far positions read.

N encoder layers, L levels, P points, h/w height/width of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m2f_lab.explore.parts.labels import percent
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.table import Caption, Table
from m2f_lab.explore.sampling.trace import SamplingPoints, SamplingTrace

# Name and colour of the dots of each level; the first colours of plots.PALETTE, which is slow to import.
LEVELS = (("stride 32", "#0072B2"), ("stride 16", "#D55E00"), ("stride 8", "#009E73"))
GROUPS = (*LEVELS, ("the position that asks", "#000000"))
ASKS = 0.02  # size of the dot of the position that asks: up to half a cell away from the place that was clicked

HEADER = (
    ("head", "Attention heads look independently of each other."),
    ("distance", "The mean distance of the head's points from the position, by weight, in pixels of the image."),
    *((name, f"How much of the head's weight lies on the level of {name}.") for name, _ in LEVELS),
    ("outside", "The share of the head's points that lie beyond the image, where there is only padding or nothing."),
)


def reach_maps(trace: SamplingTrace, layer: int, strides: Sequence[int]) -> np.ndarray:
    """Reach of the positions of some levels in a layer, from 1, as a share of the diagonal.

    Mean of the heads, then each of them, on the grid of the finest level. float32 [len(strides), 1 + heads, h, w]
    """
    diagonal = float(np.hypot(*trace.image_size))
    maps = []
    for stride in strides:
        distances = trace.distance_maps(layer, stride) / diagonal
        distances = np.concatenate([distances.mean(axis=0, keepdims=True), distances])
        factor = stride // min(strides)
        maps.append(distances.repeat(factor, axis=1).repeat(factor, axis=2))
    return np.minimum(np.stack(maps), 1)


def answer(view: MaskView, sampled: Sequence[Sequence[SamplingPoints]]) -> None:
    """Give a picture the points of a grid of places over the image; of one place, where that was clicked."""
    view.set_marks(np.stack([[_marks(each) for each in row] for row in sampled]), GROUPS)
    view.set_notes([_notes(each) for row in sampled for each in row], (len(sampled), len(sampled[0])))


def _marks(sampled: SamplingPoints) -> np.ndarray:
    """(x, y, weight) of all points, level by level, and of the position itself, as often. [N, heads, (L + 1) * P, 3]"""
    marks = np.concatenate([sampled.points, sampled.weights[..., None]], axis=-1)
    asks = np.broadcast_to([*sampled.location, ASKS], marks[:, :, :1].shape)
    marks = np.concatenate([marks, asks], axis=2)
    return marks.reshape(*marks.shape[:2], -1, 3)


def _notes(sampled: SamplingPoints) -> list[Caption]:
    """Numbers of each layer at that position."""
    row, column = sampled.cell
    notes = []
    for layer, (shares, distances, outside) in enumerate(
        zip(sampled.level_shares, sampled.distances, sampled.outside, strict=True), start=1
    ):
        text = (
            f"Encoder layer {layer} of {len(sampled.weights)}: row {row}, column {column} of stride {sampled.stride} "
            f"reads {distances.mean():.0f} pixels away on average; {percent(outside.mean())} of its points lie outside "
            "the image."
        )
        rows = tuple(
            (str(head + 1), f"{distances[head]:.0f}", *map(percent, (*shares[head], outside[head])))
            for head in range(len(distances))
        )
        bars = tuple(
            (name, round(float(share), 4), color)
            for (name, color), share in zip(LEVELS, shares.mean(axis=0), strict=True)
        )
        notes.append(Caption(text, bars=bars, table=Table(HEADER, rows)))
    return notes
