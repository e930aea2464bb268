"""Instances of images that are too large, or hold too many, for one forward pass.

N instances, H/W height/width.

Tiles overlap, and each shows whole what lies near its middle. So the image is divided into cores, one in each tile,
whose borders halve the overlaps, and an instance belongs to the tile in whose core its centre lies. What is larger than
an overlap may be cut. An instance whose centre two tiles place on either side of a border is found by both: of two
instances of a class that share more than half of the smaller's pixels, the one of the lower score is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from m2f_lab.inference.tiles import tile_starts
from m2f_lab.structures import PackedMasks, Prediction, Segment


@dataclass(frozen=True)
class Span:
    """A tile along one axis, and its core: the pixels for which it answers."""

    tile: slice
    core: slice

    @property
    def core_in_tile(self) -> slice:
        return slice(self.core.start - self.tile.start, self.core.stop - self.tile.start)


@dataclass(frozen=True)
class Found:
    """A segment of a tile."""

    segment: Segment
    mask: np.ndarray  # bool [h, w], within its box
    place: tuple[slice, slice]  # of the box in the image
    tile: tuple[slice, slice]
    has_centre_in_core: bool  # the mean of its pixels

    def within(self, area: Sequence[slice]) -> np.ndarray:
        """Its mask in an area of the image. bool [area's height, area's width]"""
        canvas = np.zeros([span.stop - span.start for span in area], bool)
        first = [max(a.start, b.start) for a, b in zip(area, self.place, strict=True)]
        stop = [max(f, min(a.stop, b.stop)) for f, a, b in zip(first, area, self.place, strict=True)]
        there, here = (
            tuple(slice(f - o.start, s - o.start) for f, s, o in zip(first, stop, origin, strict=True))
            for origin in (area, self.place)
        )
        canvas[there] = self.mask[here]
        return canvas


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
    all_rows, all_columns = (list(spans_of(length, t, overlap)) for length, t in zip(size, tile, strict=True))
    if len(all_rows) == len(all_columns) == 1:
        return predict_tile(image)
    found = []
    for rows in all_rows:
        for columns in all_columns:
            prediction = predict_tile(np.ascontiguousarray(image[rows.tile, columns.tile]))
            for segment, mask in zip(prediction.segments, prediction.masks, strict=True):
                instance = cut_out(segment, mask, rows, columns)
                if instance is not None and instance.has_centre_in_core:
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


def spans_of(length: int, tile: int, overlap: float) -> Iterator[Span]:
    """Tiles along an axis that cover it; see `tile_starts`."""
    starts = tile_starts(length, tile, overlap)
    borders = [(first + tile + second) // 2 for first, second in pairwise(starts)]
    for start, first, stop in zip(starts, [0, *borders], [*borders, length], strict=True):
        yield Span(slice(start, min(start + tile, length)), slice(first, stop))


def cut_out(segment: Segment, mask: np.ndarray, rows: Span, columns: Span) -> Found | None:
    """The segment within its box; None if no pixel is left of it. mask: bool [h, w] of the tile"""
    ys, xs = np.nonzero(mask)
    if not ys.size:
        return None
    top, left = rows.tile.start, columns.tile.start
    box = slice(int(ys.min()), int(ys.max()) + 1), slice(int(xs.min()), int(xs.max()) + 1)
    place = tuple(slice(start + span.start, start + span.stop) for start, span in zip((top, left), box, strict=True))
    middles = zip((top + ys.mean() + 0.5, left + xs.mean() + 0.5), (rows.core, columns.core), strict=True)
    is_inside = all(core.start <= middle < core.stop for middle, core in middles)
    part = mask[box].copy()  # the others of the tile are forgotten
    return Found(segment, part, place, (rows.tile, columns.tile), is_inside)


def _without_doubles(found: list[Found], size: tuple[int, int]) -> Iterator[Found]:
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
