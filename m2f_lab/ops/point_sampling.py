"""Bilinear sampling of many maps at the same points: of predicted masks, and of ground truth.

N maps, T segments of an image, P points, H/W height/width of the maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2f_lab.ops.switch import is_plain


@dataclass(frozen=True)
class PointSampler:
    """Bilinear sampling at P points, zero outside the maps, as the sparse matrix that it is.

    A pixel of all maps is one row in memory, each of the four neighbours of a point is one weighted row, and a point is
    a bag of four.

    Attributes:
        points: (x, y) in [0, 1] of the area that the maps cover. [P, 2]
        size: height and width of the maps
    """

    points: Tensor
    size: tuple[int, int]

    @cached_property
    def _neighbours(self) -> tuple[Tensor, Tensor]:
        """Pixels around each point, and their weights: zero for a pixel outside the maps. int32 [P, 4], [P, 4]"""
        height, width = self.size

        def along(positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
            """The two pixels around each position on one axis, and their weights. [P] → [2, P], [2, P]"""
            positions = positions * length - 0.5  # pixel centres are at whole numbers
            first = positions.floor()
            behind = positions - first
            pixels = torch.stack([first, first + 1])
            inside = (pixels >= 0) & (pixels < length)
            return pixels.clamp_(0, length - 1).int(), torch.stack([1 - behind, behind]) * inside

        columns, column_weights = along(self.points[:, 0], width)
        rows, row_weights = along(self.points[:, 1], height)
        pixels = (rows * width).unsqueeze(1) + columns  # (2, 2, P)
        weights = row_weights.unsqueeze(1) * column_weights
        return pixels.flatten(0, 1).T.contiguous(), weights.flatten(0, 1).T.contiguous()

    def gather(self, maps: Tensor) -> Tensor:
        """Sample maps, without a gradient. [H*W, N] → [P, N]"""
        pixels, weights = self._neighbours
        if maps.shape[1] == 0:  # embedding_bag fails on empty rows if it has several threads
            return maps.new_empty(len(pixels), 0)
        return F.embedding_bag(pixels, maps.contiguous(), per_sample_weights=weights.to(maps.dtype), mode="sum")

    def scatter_add(self, values: Tensor) -> Tensor:
        """The transpose of `gather`. [P, N] → [H*W, N]

        Neighbours are sorted by pixel, so that a pixel is one bag of rows and the order of the sum is fixed.
        """
        num_pixels = self.size[0] * self.size[1]
        if values.shape[1] == 0:  # as in `gather`
            return values.new_empty(num_pixels, 0)
        pixels, weights = self._neighbours
        pixels, order = pixels.flatten().sort(stable=True)
        first = torch.searchsorted(pixels, torch.arange(num_pixels, dtype=pixels.dtype, device=pixels.device))
        weights = weights.flatten().index_select(0, order).to(values.dtype)
        points = order >> 2  # four neighbours per point
        return F.embedding_bag(points, values, first, per_sample_weights=weights, mode="sum")


def sample_points(maps: Tensor, sampler: PointSampler) -> Tensor:
    """Sample maps at points, differentiably. [H*W, N] → [P, N]

    The plain version is `grid_sample`. The fast one samples 140 maps in a tenth of its time, and its gradient adds up
    in a fixed order, on a GPU too.
    """
    if not is_plain("sample_points") or maps.shape[1] == 0:
        return _Sample.apply(maps, sampler)
    grid = 2 * sampler.points.to(maps.dtype)[None, None] - 1  # (1, 1, P, 2)
    maps = maps.T.unflatten(1, sampler.size).unsqueeze(0)  # (1, N, H, W)
    return F.grid_sample(maps, grid, align_corners=False)[0, :, 0].T


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, maps: Tensor, sampler: PointSampler) -> Tensor:
        ctx.sampler = sampler
        return sampler.gather(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.sampler.scatter_add(gradient), None


BORDER = (1, 2, 1, 2)  # one pixel before and two behind: the upper left neighbour may already be outside


def sample_segments(maps: Tensor, num_segments: int, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Sample ground-truth masks at points, zero outside, as if they were padded to the image.

    The plain version builds float masks. The fast one lets each of four pixels vote for its own segment.

    Args:
        maps: the segment 0…T-1 of each pixel, or any larger number for none [H, W]; or boolean masks [T, H, W]
        num_segments: T
        points: (x, y) in [0, 1] of the padded image. [P, 2]
        padded_size: height and width of the padded image in pixels; the maps are its upper left corner

    Returns:
        Share of each segment at each point, in [0, 1]. [T, P]
    """
    height, width = maps.shape[-2:]
    if is_plain("sample_segments"):
        masks = maps if maps.ndim == 3 else maps == torch.arange(num_segments, device=maps.device)[:, None, None]
        masks = F.pad(masks.to(points.dtype), (0, padded_size[1] - width, 0, padded_size[0] - height))
        return sample_points(masks.flatten(1).T, PointSampler(points, padded_size)).T
    stride = width + sum(BORDER[:2])
    # Pixel centres are at whole numbers. Positions beyond the ground truth are read from the border around it.
    x = (points[:, 0] * padded_size[1] - 0.5).clamp(-1, width)
    y = (points[:, 1] * padded_size[0] - 0.5).clamp(-1, height)
    left, top = x.floor(), y.floor()
    x, y, first = x - left, y - top, (top.int() + 1) * stride + (left.int() + 1)
    votes = ((0, (1 - y) * (1 - x)), (1, (1 - y) * x), (stride, y * (1 - x)), (stride + 1, y * x))
    if maps.ndim == 3:
        pixels = F.pad(maps, BORDER).flatten(1)  # (T, …)
        return sum(weight * pixels[:, offset:].index_select(1, first) for offset, weight in votes)
    none = min(num_segments, torch.iinfo(maps.dtype).max)  # any number but a segment's
    pixels = F.pad(maps, BORDER, value=none).flatten()
    shares = points.new_zeros(num_segments + 1, len(points))  # the last row is for pixels without a segment
    column = torch.arange(len(points), device=points.device)
    for offset, weight in votes:
        row = pixels[offset:].index_select(0, first).long().clamp_(max=num_segments)
        shares.view(-1).scatter_add_(0, row * len(points) + column, weight)  # one vote per point at a time
    return shares[:num_segments]
