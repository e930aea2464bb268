"""Images that are too large for one forward pass: overlapping tiles, whose class scores are averaged.

K classes, H/W height/width, h/w those of a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m2f_lab.inference.rows import Rows


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """First pixels of tiles of equal length that cover everything and overlap by at least the given share.

    Args:
        length: of the image, in pixels
        tile: length of a tile, in pixels
        overlap: share of a tile, in [0, 1)
    """
    if tile >= length:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    steps = -(-(length - tile) // step)
    return [round(i * (length - tile) / steps) for i in range(steps + 1)]


def tiled(scores_of: Callable[[Tensor], Rows], image: Tensor, tile: tuple[int, int], overlap: float) -> Rows:
    """Class scores of a large image, from those of its tiles.

    Near its edge a tile knows least of what surrounds a pixel, so its weight falls linearly towards its edges, over
    as many pixels as tiles overlap; all weights are positive, and are divided by their sum.

    A tile goes through the model when its first row is asked for and is forgotten after its last, so that reading from
    top to bottom keeps the two rows of tiles that overlap (or as many as one strip touches), however long the image.

    Args:
        scores_of: class scores of one tile [1, 3, h, w] → [K, h, w]
        image: [1, 3, H, W]
        tile: height and width of the tiles; smaller images are one tile
        overlap: share of a tile, in [0, 1), by which neighbours overlap at least

    Returns:
        Class scores. [K, H, W]
    """
    size = (image.shape[2], image.shape[3])
    height, width = (min(t, s) for t, s in zip(tile, size, strict=True))
    tops, lefts = (tile_starts(s, t, overlap) for s, t in zip(size, (height, width), strict=True))
    weight_y, weight_x = (_ramp(t, max(1, int(t * overlap)), image.device) for t in (height, width))
    running: dict[tuple[int, int], Rows] = {}

    def read(start: int, stop: int) -> Tensor:
        for top, left in list(running):
            if top + height <= start:
                del running[top, left]
        total, weights = None, torch.zeros(stop - start, size[1], device=image.device)
        for top in tops:
            first, last = max(start, top), min(stop, top + height)
            if first >= last:
                continue
            for left in lefts:
                if (top, left) not in running:
                    running[top, left] = scores_of(image[..., top : top + height, left : left + width])
                scores = running[top, left].read(first - top, last - top)  # (K, rows, w)
                weight = weight_y[first - top : last - top, None] * weight_x
                if total is None:
                    total = scores.new_zeros(len(scores), *weights.shape)
                here = (..., slice(first - start, last - start), slice(left, left + width))
                total[here] += scores * weight
                weights[here] += weight
        return total / weights

    return Rows(size, image.device, read)


def _ramp(length: int, ramp: int, device: torch.device) -> Tensor:
    """1 in the middle, falling linearly over `ramp` pixels to both ends, never to zero. [length]"""
    position = torch.arange(length, device=device) + 0.5
    return (torch.minimum(position, length - position) / ramp).clamp(max=1)
