"""Panoptic segments of images that are too large, or show too much, for one forward pass.

H/W height/width.

Tiles overlap, and the image is divided into cores, one in each tile, whose borders halve the overlaps. Stuff is read
off core by core. Things may cross tiles: two of a class that cover mostly the same pixels of an overlap are one, also
over many tiles. What no other tile confirms counts if its centre lies in the core of its own tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np

from m2f_lab.inference.instance_tiles import Found, cut_out, spans_of
from m2f_lab.structures import Prediction, Segment


def tiled_panoptic(
    predict_tile: Callable[[np.ndarray], Prediction],
    image: np.ndarray,
    tile: tuple[int, int],
    overlap: float,
    overlap_threshold: float,
) -> Prediction:
    """Panoptic segments of an image, from those of its tiles. One tile gives what the whole image gives.

    Args:
        predict_tile: segments of a part of the image, at its own size. uint8 [h, w, 3] → Prediction
        image: uint8 [H, W, 3]
        tile: height and width of the tiles in pixels of the image; smaller images are one tile
        overlap: share of a tile, in [0, 1), by which neighbours overlap at least
        overlap_threshold: as within a tile, a thing must win at least this share of its own mask against surer ones

    Returns:
        A Prediction of the panoptic task; the queries of its segments are those of their tile, the surest if several.
    """
    size = image.shape[:2]
    all_rows, all_columns = (list(spans_of(length, t, overlap)) for length, t in zip(size, tile, strict=True))
    if len(all_rows) == len(all_columns) == 1:
        return predict_tile(image)
    things, stuff, surest = [], np.zeros(size, np.int32), {}  # stuff: 1 + class, 0 for none
    for rows in all_rows:
        for columns in all_columns:
            prediction = predict_tile(np.ascontiguousarray(image[rows.tile, columns.tile]))
            for segment in prediction.segments:
                mask = prediction.segments_map == segment.id
                if segment.is_thing:
                    things.append(cut_out(segment, mask, rows, columns))
                else:
                    stuff[rows.core, columns.core][mask[rows.core_in_tile, columns.core_in_tile]] = segment.label + 1
                    surest[segment.label] = max(surest.get(segment.label, segment), segment, key=lambda s: s.score)
    things = [group for group in _groups(things) if len(group) > 1 or group[0].has_centre_in_core]
    owner, kept = _compete(things, size, overlap_threshold)
    number_of = {label + 1: number for number, label in enumerate(sorted(surest), start=len(kept) + 1)}
    lookup = np.zeros(max(number_of, default=0) + 1, np.int32)
    lookup[list(number_of)] = list(number_of.values())
    segments_map = np.where(owner > 0, owner, lookup[stuff])
    kept += [surest[label] for label in sorted(surest)]
    areas = np.bincount(segments_map.ravel(), minlength=len(kept) + 1).tolist()
    segments = (replace(segment, id=n, area=areas[n]) for n, segment in enumerate(kept, start=1))
    return Prediction("panoptic", segments_map=segments_map, segments=tuple(s for s in segments if s.area))


def _groups(things: list[Found]) -> list[list[Found]]:
    """Parts of the same thing, the surest first."""
    group_of = list(range(len(things)))
    for i, j in combinations(range(len(things)), 2):
        if _agree(things[i], things[j]):
            old, new = group_of[j], group_of[i]
            group_of = [new if number == old else number for number in group_of]
    groups = {}
    for thing, number in zip(things, group_of, strict=True):
        groups.setdefault(number, []).append(thing)
    return [sorted(group, key=lambda thing: -thing.segment.score) for group in groups.values()]


def _agree(first: Found, second: Found) -> bool:
    """Whether two tiles see mostly the same pixels of the same class where they overlap."""
    if first.segment.label != second.segment.label or first.tile == second.tile:
        return False
    shared = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first.tile, second.tile, strict=True)]
    if any(span.start >= span.stop for span in shared):
        return False
    a, b = first.within(shared), second.within(shared)
    both = np.count_nonzero(a & b)
    return 2 * both > np.count_nonzero(a) + np.count_nonzero(b) - both


def _compete(
    things: list[list[Found]], size: tuple[int, int], overlap_threshold: float
) -> tuple[np.ndarray, list[Segment]]:
    """Every pixel goes to the surest thing that covers it; what loses too much of its mask goes.

    Returns:
        The thing of each pixel, numbered from 1, 0 for none. int32 [H, W]; and the segments, the surest first.
    """
    owner, own = np.zeros(size, np.int32), [0]
    things = sorted(things, key=lambda group: -group[0].segment.score)
    for number, group in enumerate(things, start=1):
        mask = np.zeros(size, bool)
        for part in group:
            mask[part.place] |= part.mask
        own.append(np.count_nonzero(mask))
        owner[mask & (owner == 0)] = number
    won = np.bincount(owner.ravel(), minlength=len(own))
    kept = [n for n in range(1, len(own)) if won[n] and won[n] / own[n] >= overlap_threshold]
    lookup = np.zeros(len(own), np.int32)
    lookup[kept] = np.arange(1, len(kept) + 1)
    return lookup[owner], [things[n - 1][0].segment for n in kept]
