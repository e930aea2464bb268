"""Where masks are compared: at P points instead of all pixels.

B batch, T targets, M pairs of a prediction and a target, N maps, P points, H/W height/width.

Points are (x, y) in [0, 1] of the padded image, everywhere in this package: mask logits cover the padded image, and
ground truth, which may end earlier, is read as if it were padded with "no segment".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.structures import IGNORE, Target


def rows_at_once(row_length: int, device: torch.device) -> int:
    """How many rows of a large table to work on in one go.

    A CPU is fastest while the numbers stay in its cache, a GPU in few large steps; both save memory: 4 MiB and 128 MiB
    per table in float32.
    """
    return max(1, 2 ** (20 if device.type == "cpu" else 25) // row_length)


def random_points(num_sets: int, num_points: int, like: Tensor) -> Tensor:
    """Uniform points from torch's global generator, on the device and in the type of `like`. [num_sets, P, 2]"""
    return torch.rand(num_sets, num_points, 2, device=like.device, dtype=like.dtype)


def shared_points(
    num_points: int, oversample_ratio: float, importance_sample_ratio: float, like: Tensor
) -> tuple[Tensor, int, int]:
    """Draw what all masks of an image choose their points for the loss from: most where a mask is undecided.

    `oversample_ratio` times too many points are candidates. Each mask takes the share `importance_sample_ratio` of its
    points from them, those whose logits are nearest to 0, and then all points that follow the candidates.

    Returns:
        Candidates and the rest, [N + P - k, 2]; N, the number of candidates; k, how many of them a mask takes.

    Source: PointRend (Kirillov et al. 2020), section 3.1, "Training", which draws candidates for each mask anew;
    Mask2Former, section 3.3.
    """
    num_uncertain = int(num_points * importance_sample_ratio)
    num_candidates = int(num_points * oversample_ratio) if num_uncertain else 0
    points = random_points(1, num_candidates + num_points - num_uncertain, like)[0]
    return points, num_candidates, num_uncertain


@dataclass(frozen=True)
class PointReader:
    """Bilinear reading at P points as the sparse matrix it is: four pixels vote for each point.

    Where many maps are read at the same points, a pixel of all maps is one row in memory, a vote is one weighted row,
    and a point is a bag of four: `embedding_bag` reads 140 maps in a tenth of the time of `grid_sample`.

    Attributes:
        pixels: which rows vote; int32 [P, 4]
        weights: of the votes; zero where a pixel would lie outside the image. [P, 4]
        num_pixels: H * W
    """

    pixels: Tensor
    weights: Tensor
    num_pixels: int

    @classmethod
    def at(cls, points: Tensor, size: tuple[int, int]) -> PointReader:
        """Read maps of `size` at points (x, y) in [0, 1] of the image. [P, 2]"""
        height, width = size
        x, y = points[:, 0] * width - 0.5, points[:, 1] * height - 0.5  # pixel centres are at whole numbers
        left, top = x.floor(), y.floor()
        right_weight, lower_weight = x - left, y - top
        pixels, weights = [], []
        for row, row_weight in ((top, 1 - lower_weight), (top + 1, lower_weight)):
            for column, column_weight in ((left, 1 - right_weight), (left + 1, right_weight)):
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                pixels.append((row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).int())
                weights.append(row_weight * column_weight * inside)
        return cls(torch.stack(pixels, dim=1), torch.stack(weights, dim=1), height * width)

    def read(self, maps: Tensor) -> Tensor:
        """Bilinear samples, zero outside the image, as `sample_points`. [H*W, N] → [P, N]"""
        if maps.shape[1] == 0:  # embedding_bag fails on rows without numbers, if it has several threads
            return maps.new_empty(len(self.pixels), 0)
        return F.embedding_bag(self.pixels, maps, per_sample_weights=self.weights, mode="sum")

    def spread(self, values: Tensor) -> Tensor:
        """The transpose of `read`: give every pixel its share of the values. [P, N] → [H*W, N]

        The votes are sorted by pixel, so that a pixel, too, is one bag of rows, and nothing is added up in an order
        that chance decides.
        """
        if values.shape[1] == 0:  # as above
            return values.new_empty(self.num_pixels, 0)
        pixels, order = self.pixels.flatten().sort(stable=True)
        first = torch.searchsorted(pixels, torch.arange(self.num_pixels, dtype=pixels.dtype, device=pixels.device))
        weights = self.weights.flatten()[order]
        return F.embedding_bag(order // 4, values, first, per_sample_weights=weights, mode="sum")


def kth_smallest(rows: Tensor, k: int) -> Tensor:
    """The k-th smallest number of each row, k from 1. [M, P] → [M]

    On a CPU, what is clearly too large is sorted out first, by comparing with a number that a sample of the row
    suggests; if the sample has misled, the whole row is searched. Half the time of a selection among all.

    Source: Floyd and Rivest 1975, "Expected time bounds for selection".
    """
    if rows.device.type != "cpu":
        return rows.kthvalue(k, dim=1).values
    rows = rows.numpy()
    sample = rows[:, ::32]
    share, size = k / rows.shape[1], sample.shape[1]
    rank = min(int(size * share + 3 * (size * share * (1 - share)) ** 0.5) + 1, size - 1)  # three deviations too large
    limits = np.partition(sample, rank, axis=1)[:, rank]
    result = np.empty(len(rows), rows.dtype)
    for i, (row, limit) in enumerate(zip(rows, limits, strict=True)):
        near = row.compress(row <= limit)
        result[i] = np.partition(near if len(near) >= k else row, k - 1)[k - 1]
    return torch.from_numpy(result)


@dataclass(frozen=True)
class UncertainShare:
    """Which points are among the k least certain of each map, as weights.

    A threshold needs no indices, no gathering and no scattering of gradients, and where several points lie exactly at
    it, they share what is left, so that the weights of a map always add up to k.

    Attributes:
        threshold: the k-th smallest |logit|. [N]
        share: weight of the points that lie at the threshold; mostly there is one, and it is 1. [N]
    """

    threshold: Tensor
    share: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> UncertainShare:
        """The k of P candidates whose logits are nearest to 0. [P, N]"""
        chosen = []
        for part in logits.split(rows_at_once(len(logits), logits.device), dim=1):
            certainty = part.abs().T.contiguous()  # (n, P), a row for each map
            threshold = kth_smallest(certainty, k)
            below = torch.lt(certainty, threshold.unsqueeze(1), out=torch.empty_like(certainty)).sum(1)
            share = (k - below) / (certainty.le_(threshold.unsqueeze(1)).sum(1) - below)
            chosen.append(torch.stack([threshold, share]))
        return cls(*torch.cat(chosen, dim=1))

    def weights(self, logits: Tensor) -> Tensor:
        """1 below the threshold, `share` at it, 0 above. [P, N] → [P, N]"""
        # Comparing in place gives numbers at once, five times as fast as booleans that are converted.
        below = logits.abs()
        not_above = below.clone().le_(self.threshold)
        return torch.lerp(below.lt_(self.threshold), not_above, self.share)


@torch.no_grad()
def sample_segments(target: Target, segments: Tensor, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Read ground-truth masks at points; the same as `sample_points` on padded float masks, which are never built.

    A bilinear sample is a weighted vote of four pixels. An id map answers each vote with a comparison: does this
    pixel bear the number of the segment?

    Args:
        target: ground truth of one image, as an id map or as boolean masks; at most `padded_size` large
        segments: which segments to read, 0…T-1. [M]
        points: (x, y) in [0, 1] of the padded image; one set for each segment or one for all. [M or 1, P, 2]
        padded_size: height and width of the padded image in pixels

    Returns:
        Share of each segment at each point, in [0, 1]. [M, P]
    """
    height, width = target.size
    # Pixel centres are at whole numbers. Whatever lies beyond the ground truth is read from the border around it.
    x = (points[..., 0] * padded_size[1] - 0.5).clamp(-1, width)
    y = (points[..., 1] * padded_size[0] - 0.5).clamp(-1, height)
    left, top = x.floor(), y.floor()
    x, y = x - left, y - top  # (M or 1, P), weights of the right and of the lower pixels

    border = (1, 2, 1, 2)  # one pixel before, and two behind, where the upper left pixel may already be outside
    stride = width + 3
    first = (top.int() + 1) * stride + (left.int() + 1)
    if target.id_map is not None:
        pixels = F.pad(target.id_map, border, value=IGNORE)
        wanted = segments.to(pixels.dtype).unsqueeze(1)  # (M, 1)
    else:
        pixels = F.pad(target.masks, border)
        first = first + segments.unsqueeze(1) * (stride * (height + 3))
        wanted = True
    pixels = pixels.flatten()

    def vote(offset: int) -> Tensor:
        return pixels[offset:].index_select(0, first.flatten()).view_as(first) == wanted

    return (
        (1 - y) * (1 - x) * vote(0)
        + (1 - y) * x * vote(1)
        + y * (1 - x) * vote(stride)
        + y * x * vote(stride + 1)
    )  # fmt: skip
