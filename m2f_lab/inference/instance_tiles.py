"""Instances of images that are too large, or hold too many, for one forward pass.

N instances, H/W height/width.

Tiles overlap, and each shows whole what lies near its middle. So the image is divided into cores, one in each tile,
whose borders halve the overlaps, and an instance belongs to the tile in whose core its centre lies. What is larger than
an overlap may be cut. An instance whose centre two tiles place on either side of a border is found by both: of two
instances of a class that share more than half of the smaller's pixels, the one of the lower score is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from m2f_lab.inference.tiles import tile_starts
from m2f_lab.structures import PackedMasks, Prediction, Segment


@dataclass(frozen=True)
class _Found:
    """An instance of a tile."""

    segment: Segment
    mask: np.ndarray  # bool [h, w], within its box
    top: int
    left: int
    tile: tuple[int, int]  # its first row and column

    @property
    def place(self) -> tuple[slice, slice]:
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def tiled_instances(
    predict_tile: Callable[[np.ndarray], Prediction],
    image: np.ndarray,
    tile: tuple[int, int],
    overlap: float,
    top_k: int,
) -> Prediction:
    """Instances of an image, from those of its tiles. One tile gives what the whole image gives.

    Args:
        predict_tile: instances of a part of the image, at its own size. uint8 [h, w, 3] → Prediction
        image: uint8 [H, W, 3]
        tile: height and width of the tiles in pixels of the image; smaller images are one tile
        overlap: share of a tile, in [0, 1), by which neighbours overlap at least
        top_k: instances to keep, those of the highest score

    Returns:
        A Prediction of the instance task; the queries of its segments are those of their tile.
    """
    size = image.shape[:2]
    spans = [list(_spans(length, t, overlap)) for length, t in zip(size, tile, strict=True)]
    if len(spans[0]) == len(spans[1]) == 1:
        return predict_tile(image)
    found = []
    for rows, core_rows in spans[0]:
        for columns, core_columns in spans[1]:
            prediction = predict_tile(np.ascontiguousarray(image[rows, columns]))
            for segment, mask in zip(prediction.segments, prediction.masks, strict=True):
                instance = _cut_out(segment, mask, (rows.start, columns.start))
                if instance is not None and _has_centre(instance, core_rows, core_columns):
                    found.append(instance)
    found.sort(key=lambda instance: -instance.segment.score)
    kept = list(_without_doubles(found, size))[:top_k]
    masks = PackedMasks.empty(len(kept), size)
    for number, instance in enumerate(kept):
        mask = np.zeros(size, bool)
        mask[instance.place] = instance.mask
        masks[number] = mask
    segments = tuple(replace(instance.segment, id=number) for number, instance in enumerate(kept, start=1))
    return Prediction("instance", masks=masks, segments=segments)


def _spans(length: int, tile: int, overlap: float) -> Iterator[tuple[slice, tuple[float, float]]]:
    """Tiles along an axis, and the core of each, from and to which pixel."""
    starts = tile_starts(length, tile, overlap)
    borders = [(first + tile + second) / 2 for first, second in pairwise(starts)]
    cores = zip([-np.inf, *borders], [*borders, np.inf], strict=True)
    for start, core in zip(starts, cores, strict=True):
        yield slice(start, min(start + tile, length)), core


def _cut_out(segment: Segment, mask: np.ndarray, tile: tuple[int, int]) -> _Found | None:
    """The instance within its box; None if no pixel is left of it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()  # the others of the tile are forgotten
    return _Found(segment, part, tile[0] + int(rows[0]), tile[1] + int(columns[0]), tile)


def _has_centre(instance: _Found, rows: tuple[float, float], columns: tuple[float, float]) -> bool:
    """Whether the mean of the instance's pixels lies in a core."""
    y, x = np.nonzero(instance.mask)
    return (
        rows[0] <= instance.top + y.mean() + 0.5 < rows[1] and columns[0] <= instance.left + x.mean() + 0.5 < columns[1]
    )


def _without_doubles(found: list[_Found], size: tuple[int, int]) -> Iterator[_Found]:
    """Those, best first, that are not mostly the same as a better one of the same class from another tile."""
    owners = {}  # class → the best instance at each pixel, counted from 1. int32 [H, W]
    areas = [int(instance.mask.sum()) for instance in found]
    for number, instance in enumerate(found):
        owner = owners.setdefault(instance.segment.label, np.zeros(size, np.int32))
        here = owner[instance.place]
        others, shared = np.unique(here[instance.mask & (here > 0)], return_counts=True)
        is_double = any(
            found[other - 1].tile != instance.tile and 2 * pixels > min(areas[number], areas[other - 1])
            for other, pixels in zip(others.tolist(), shared.tolist(), strict=True)
        )
        if not is_double:
            here[instance.mask & (here == 0)] = number + 1
            yield instance
