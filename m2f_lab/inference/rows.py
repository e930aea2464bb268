"""Large maps, computed a few rows at a time.

N channels (queries or classes), H/W height/width.

At the size of the image, the masks of all queries and the scores of all classes are the largest arrays of inference,
a hundred times the image itself, and only ever reduced: summed over and compared at once. `Rows` is
such a map that has a size but no memory. It says how to compute any of its rows, and what is built on top (resized,
cropped, mapped) is again such a map. Bilinear resizing works on rows and columns separately, so the rows of a resized
map need a few rows of the original only, and the result is that of resizing everything, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from m2f_lab.ops import to_device
from m2f_lab.structures import resize

# Pixels in one strip, for a hundred or two channels. On a CPU a strip should stay in the cache between the few passes
# over it; on a GPU it should be long enough to keep the device busy, and a quarter of a gigabyte is no matter.
_STRIP_PIXELS = {"cpu": 2**14}
_STRIP_PIXELS_ELSEWHERE = 2**19
_SHORTEST_STRIP = 8  # neighbouring strips of a resized map read up to two rows in common


@dataclass(frozen=True)
class Rows:
    """A map [N, H, W] of which only the rows that are asked for are computed.

    Attributes:
        size: height and width in pixels
        device: where the rows are computed
        read: (start, stop) → those rows. [N, stop - start, W]
    """

    size: tuple[int, int]
    device: torch.device
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, maps: Tensor) -> Rows:
        """An array that is there already. [N, H, W]"""
        return cls((maps.shape[1], maps.shape[2]), maps.device, lambda start, stop: maps[:, start:stop])

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """Apply a function pixel by pixel; it may change the number of channels. [N, h, W] → [M, h, W]"""
        return replace(self, read=lambda start, stop: function(self.read(start, stop)))

    def cropped(self, size: tuple[int, int]) -> Rows:
        """The top left corner."""
        height, width = size
        if height > self.size[0] or width > self.size[1]:
            raise ValueError(f"Cannot crop a map of size {self.size} to the larger {tuple(size)}.")
        return replace(self, size=(height, width), read=lambda start, stop: self.read(start, stop)[..., :width])

    def mirrored(self) -> Rows:
        """Left and right exchanged."""
        return replace(self, read=lambda start, stop: self.read(start, stop).flip(-1))

    def resized(self, size: tuple[int, int]) -> Rows:
        """Bilinear with half-pixel centres and without antialiasing, as `structures.resize`."""
        height, width = size
        if self.size == (height, width):
            return self
        above, below, share_below = _row_neighbours(self.size[0], height)

        def read(start: int, stop: int) -> Tensor:
            first, last = int(above[start]), int(below[stop - 1])
            source = self.read(first, last + 1)  # (N, h, W)
            upper, lower = to_device([rows[start:stop] - first for rows in (above, below)], self.device)
            (share,) = to_device([share_below[start:stop, None].to(source.dtype)], self.device)
            strip = torch.lerp(source[:, upper], source[:, lower], share)
            return resize(strip[None], (stop - start, width))[0]

        return replace(self, size=(height, width), read=read)

    def strips(self, height: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Go through the map from top to bottom.

        Args:
            height: rows per strip; by default as many as suit the device

        Yields:
            The rows as a slice, and their values. [N, h, W]
        """
        if height is None:
            pixels = _STRIP_PIXELS.get(self.device.type, _STRIP_PIXELS_ELSEWHERE)
            height = max(_SHORTEST_STRIP, pixels // self.size[1])
        elif height < 1:
            raise ValueError(f"A strip has at least one row, got rows_per_strip = {height}.")
        for start in range(0, self.size[0], height):
            stop = min(start + height, self.size[0])
            yield slice(start, stop), self.read(start, stop)


def average(maps: list[Rows]) -> Rows:
    """The mean of maps of one size."""
    if len(maps) == 1:
        return maps[0]
    sizes = {m.size for m in maps}
    if len(sizes) != 1:
        raise ValueError(f"Only maps of one size can be averaged, got {sorted(sizes)}.")

    def read(start: int, stop: int) -> Tensor:
        total = maps[0].read(start, stop)
        for other in maps[1:]:
            total = total + other.read(start, stop)
        return total / len(maps)

    return replace(maps[0], read=read)


def _row_neighbours(height: int, new_height: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of the resized map, the two rows of the original that it lies between. 3 × [new_height]

    In float32, like PyTorch's own interpolation, so that both round to the same neighbours.
    """
    scale = torch.tensor(height, dtype=torch.float32) / new_height
    position = ((torch.arange(new_height) + 0.5) * scale - 0.5).clamp(min=0)
    above = position.long().clamp(max=height - 1)
    return above, (above + 1).clamp(max=height - 1), position - above
