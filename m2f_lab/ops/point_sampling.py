"""Bilinear sampling of many maps at the same points: of predicted masks, and of ground truth.

B images, N maps of an image, T segments of an image, P points, H/W height/width of the maps.
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
    """Bilinear sampling of each image at P points of its own, zero outside the maps, as the sparse matrix that it is.

    A pixel of all maps is one row in memory, each of the four neighbours of a point is one weighted row, and a point is
    a bag of four. The plain version is `grid_sample`, which takes ten times as long for 140 maps on a CPU, and on a GPU
    adds up gradients in no fixed order.

    Attributes:
        points: (x, y) in [0, 1] of `area`. [B, P, 2]
        size: height and width of the maps
        area: height and width that the points span, in pixels of the maps, which are its upper left corner; the maps'
            own size if it is left out
    """

    points: Tensor
    size: tuple[int, int]
    area: tuple[int, int] | None = None

    @cached_property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """Pixels around each point, row by row, and their weights: zero for one outside. int32 [B, P, 4], [B, P, 4]"""

        def along(positions: Tensor, length: int, span: int) -> tuple[Tensor, Tensor]:
            """The two pixels around each position on one axis, and their weights. [B, P] → [2, B, P], [2, B, P]"""
            positions = positions * span - 0.5  # pixel centres are at whole numbers
            first = positions.floor()
            behind = positions - first
            pixels = torch.stack([first, first + 1])
            inside = (pixels >= 0) & (pixels < length)
            return pixels.clamp_(0, length - 1).int(), torch.stack([1 - behind, behind]) * inside

        (height, width), (rows_spanned, columns_spanned) = self.size, self.area or self.size
        columns, column_weights = along(self.points[..., 0], width, columns_spanned)
        rows, row_weights = along(self.points[..., 1], height, rows_spanned)
        pixels = (rows * width).unsqueeze(1) + columns  # (2, 2, B, P)
        weights = row_weights.unsqueeze(1) * column_weights
        return tuple(table.flatten(0, 1).movedim(0, -1).contiguous() for table in (pixels, weights))

    @cached_property
    def bags(self) -> tuple[Tensor, Tensor]:
        """The neighbours as rows of the pixels of all images, and their weights. int32 [B*P, 4], [B*P, 4]"""
        pixels, weights = self.neighbours
        if len(pixels) > 1:
            image = torch.arange(len(pixels), dtype=pixels.dtype, device=pixels.device)
            pixels = pixels + image[:, None, None] * (self.size[0] * self.size[1])
        return pixels.flatten(0, 1), weights.flatten(0, 1)

    def gather(self, maps: Tensor) -> Tensor:
        """Sample maps, without a gradient unless plain. [B, H*W, N] → [B, P, N]"""
        num_images, _, num_maps = maps.shape
        if num_maps == 0:  # embedding_bag fails on empty rows if it has several threads
            return maps.new_empty(num_images, self.points.shape[1], 0)
        if is_plain("sample_points"):
            grid = 2 * self.points.to(maps.dtype).unsqueeze(1) - 1  # (B, 1, P, 2)
            return F.grid_sample(maps.mT.unflatten(2, self.size), grid, align_corners=False)[:, :, 0].mT
        pixels, weights = self.bags
        rows = maps.contiguous().flatten(0, 1)
        sampled = F.embedding_bag(pixels, rows, per_sample_weights=weights.to(maps.dtype), mode="sum")
        return sampled.unflatten(0, (num_images, -1))

    def scatter_add(self, values: Tensor) -> Tensor:
        """The transpose of `gather`. [B, P, N] → [B, H*W, N]

        Neighbours are sorted by pixel, so that a pixel is one bag of rows and the order of the sum is fixed.
        """
        num_images, _, num_maps = values.shape
        shape = (num_images, self.size[0] * self.size[1], num_maps)
        if num_maps == 0:  # as in `gather`
            return values.new_empty(shape)
        if is_plain("sample_points"):
            with torch.enable_grad():
                maps = values.new_zeros(shape, requires_grad=True)
                return torch.autograd.grad(self.gather(maps), maps, values)[0]
        pixels, weights = self.bags
        pixels, order = pixels.flatten().sort(stable=True)
        first = torch.searchsorted(pixels, torch.arange(shape[0] * shape[1], dtype=pixels.dtype, device=pixels.device))
        weights = weights.flatten().index_select(0, order).to(values.dtype)
        points = order >> 2  # four neighbours per point
        rows = values.contiguous().flatten(0, 1)
        return F.embedding_bag(points, rows, first, per_sample_weights=weights, mode="sum").view(shape)


def sample_points(maps: Tensor, sampler: PointSampler) -> Tensor:
    """Sample maps at points, differentiably; plain by `grid_sample`, see `PointSampler`. [B, H*W, N] → [B, P, N]"""
    return sampler.gather(maps) if is_plain("sample_points") else _Sample.apply(maps, sampler)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, maps: Tensor, sampler: PointSampler) -> Tensor:
        ctx.sampler = sampler
        return sampler.gather(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.sampler.scatter_add(gradient), None


def sample_segments(maps: Tensor, num_segments: int, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Sample ground-truth masks at points, zero outside, as if they were padded to the image.

    No mask is made of an id map: each of the four pixels around a point votes for the segment that it belongs to.

    Args:
        maps: the segment 0…T-1 of each pixel, or any other number for none [B, H, W]; or boolean masks [B, T, H, W]
        num_segments: T
        points: (x, y) in [0, 1] of the padded image. [B, P, 2]
        padded_size: height and width of the padded image in pixels; the maps are its upper left corner

    Returns:
        Share of each segment at each point, in [0, 1]. [B, T, P]
    """
    pixels, weights = PointSampler(points, tuple(maps.shape[-2:]), padded_size).neighbours  # (B, P, 4)
    segments = torch.arange(num_segments, device=maps.device)[:, None]  # (T, 1)
    shares = points.new_zeros(len(points), num_segments, points.shape[1])
    for pixel, weight in zip(pixels.long().unbind(2), weights.unsqueeze(1).unbind(3), strict=True):  # (B, P), (B, 1, P)
        if maps.ndim == 3:
            votes = maps.flatten(1).gather(1, pixel).unsqueeze(1) == segments  # (B, T, P)
        else:
            votes = maps.flatten(2).gather(2, pixel.unsqueeze(1).expand(shares.shape))
        shares.addcmul_(votes, weight)
    return shares
