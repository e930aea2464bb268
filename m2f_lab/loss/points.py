"""Where masks are compared: at P points instead of all pixels.

B batch, T targets, M pairs of a prediction and a target, N maps, P points, H/W height/width.

Points are (x, y) in [0, 1] of the padded image, everywhere in this package: mask logits cover the padded image, and
ground truth, which may end earlier, is read as if it were padded with "no segment".
"""

from __future__ import annotations

from collections.abc import Sequence
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
    parts = points.split([num_candidates, len(points) - num_candidates])
    return torch.cat([top_to_bottom(part) for part in parts]), num_candidates, num_uncertain


def top_to_bottom(points: Tensor) -> Tensor:
    """Points in another order, in which neighbours read the same pixels: five times as fast. [P, 2] → [P, 2]"""
    return points[(points[:, 1] * 256).short().argsort(stable=True)]


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

        def along(positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
            """The two pixels around each position on one axis, and their weights. [P] → [2, P], [2, P]"""
            positions = positions * length - 0.5  # pixel centres are at whole numbers
            first = positions.floor()
            behind = positions - first
            pixels = torch.stack([first, first + 1])
            inside = (pixels >= 0) & (pixels < length)
            return pixels.clamp_(0, length - 1).int(), torch.stack([1 - behind, behind]) * inside

        columns, column_weights = along(points[:, 0], width)
        rows, row_weights = along(points[:, 1], height)
        pixels = (rows * width).unsqueeze(1) + columns  # (2, 2, P)
        weights = row_weights.unsqueeze(1) * column_weights
        return cls(*(votes.flatten(0, 1).T.contiguous() for votes in (pixels, weights)), height * width)

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
        weights = self.weights.flatten().index_select(0, order)
        return F.embedding_bag(order >> 2, values, first, per_sample_weights=weights, mode="sum")


def kth_nearest_to_zero(table: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th smallest absolute value of each column, k from 1; how many are smaller, and how many equal.

    On a CPU, a sample of the rows suggests where it lies, counting what is below corrects the suggestion, and only the
    one or two hundredths of the numbers that lie around it are looked at one by one. Where the sample has misled, the
    whole column is searched. A third of the time of a selection among all, and no second table is made.

    Args:
        table: float32 or float64 [P, N]
        k: 1…P

    Returns:
        Each [N]; the two counts as numbers of any type.

    Source: Floyd and Rivest 1975, "Expected time bounds for selection".
    """
    if table.device.type != "cpu" or table.numel() == 0:
        table = table.abs()
        kth = table.kthvalue(k, dim=0).values
        return kth, (table < kth).sum(0), (table == kth).sum(0)
    tiles = table.split(rows_at_once(table.shape[1], table.device))
    guess, below_guess, low, high = _around_kth(table, tiles, k)
    values, columns = [], []
    for tile in tiles:
        magnitude = tile.abs()
        near = torch.clamp(magnitude, low, high).eq_(magnitude).bool()  # a third of the time of two comparisons
        near = torch.from_numpy(np.flatnonzero(near))
        values.append(magnitude.flatten().index_select(0, near))
        columns.append(near % table.shape[1])
    columns, by_column = torch.cat(columns).int().sort(stable=True)
    ends = columns.bincount(minlength=table.shape[1]).cumsum(0)[:-1]
    values = np.split(torch.cat(values)[by_column].numpy(), ends)
    results = []
    for column, (some, split, below) in enumerate(zip(values, guess.numpy(), below_guess.tolist(), strict=True)):
        smaller = int(below) - np.count_nonzero(some < split)  # than all of these
        if not smaller < k <= smaller + len(some):
            some, smaller = table[:, column].abs().numpy(), 0
        kth = np.partition(some, k - smaller - 1)[k - smaller - 1]
        results.append((kth, smaller + np.count_nonzero(some < kth), np.count_nonzero(some == kth)))
    # Each of the three in one piece: what is compared with numbers that lie apart takes ten times as long.
    return tuple(torch.from_numpy(np.array(results, values[0].dtype).T.copy()))


def _around_kth(table: Tensor, tiles: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A guess at each column's k-th smallest absolute value, and between which two numbers it very likely lies.

    Returns:
        The guess; how many are smaller; two numbers, between which the guess lies, too. Each [N]. The two are NaN where
        infinities are near: then nothing lies between them, and the whole column is searched.
    """
    sample = np.sort(table[::32].abs().T.contiguous())  # (N, P / 32)
    size, share = sample.shape[1], k / len(table)
    deviations = 3 * (size * share * (1 - share)) ** 0.5 + 1
    ranks = [min(max(int(size * share + d), 0), size - 1) for d in (-deviations, 0, deviations)]
    low, guess, high = torch.from_numpy(sample[:, ranks].T.copy())
    step = (high - low) * (size / (len(table) * max(ranks[2] - ranks[0], 1)))  # from one number to the next
    # Comparing in place gives numbers at once, five times as fast as booleans that are converted.
    below = sum(tile.abs().lt_(guess).sum(0) for tile in tiles)
    missing = k - below
    centre = guess + missing * step
    margin = (0.4 * missing.abs() + 4 * missing.abs().sqrt() + 16) * step  # four deviations of what we know by now
    return guess, below, torch.minimum(guess, centre - margin), torch.maximum(guess, centre + margin)


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
        threshold, below, equal = kth_nearest_to_zero(logits, k)
        return cls(threshold, (k - below) / equal)

    def weights(self, logits: Tensor) -> Tensor:
        """1 below the threshold, `share` at it, 0 above. [P, N] → [P, N]"""
        certainty = logits.abs()
        if not self.tied:
            return certainty.le_(self.threshold)
        not_above = certainty.clone().le_(self.threshold)
        return torch.lerp(certainty.lt_(self.threshold), not_above, self.share)

    @property
    def tied(self) -> bool:
        """Whether points share a place; taken for granted where asking would mean to wait for the device."""
        return self.share.device.type != "cpu" or bool((self.share != 1).any())


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
    x, y, first, stride = _votes(target, points, padded_size)  # (M or 1, P)
    if target.id_map is not None:
        pixels = F.pad(target.id_map, BORDER, value=IGNORE).flatten()
        wanted = segments.to(pixels.dtype).unsqueeze(1)  # (M, 1)
    else:
        pixels = F.pad(target.masks, BORDER).flatten()
        first = first + segments.unsqueeze(1) * (stride * (target.size[0] + 3))
        wanted = True

    def vote(offset: int) -> Tensor:
        return pixels[offset:].index_select(0, first.flatten()).view_as(first) == wanted

    return (
        (1 - y) * (1 - x) * vote(0)
        + (1 - y) * x * vote(1)
        + y * (1 - x) * vote(stride)
        + y * x * vote(stride + 1)
    )  # fmt: skip


@torch.no_grad()
def sample_all_segments(target: Target, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Read all segments at the same points: `sample_segments` for all of 0…T-1, whose arguments it takes.

    Where there is an id map, each pixel knows which segment its vote is for, so that nobody asks all the others.

    Args:
        points: [P, 2]

    Returns:
        [T, P]
    """
    count = target.num_segments
    if target.id_map is None:
        return sample_segments(target, torch.arange(count, device=points.device), points.unsqueeze(0), padded_size)
    x, y, first, stride = _votes(target, points, padded_size)  # (P)
    pixels = F.pad(target.id_map, BORDER, value=IGNORE).flatten()
    shares = points.new_zeros(count + 1, len(points))  # the last row is for pixels without a segment
    column = torch.arange(len(points), device=points.device)
    for offset, weight in (
        (0, (1 - y) * (1 - x)), (1, (1 - y) * x), (stride, y * (1 - x)), (stride + 1, y * x)
    ):  # fmt: skip
        row = pixels[offset:].index_select(0, first).long().clamp_(max=count)
        shares.view(-1).scatter_add_(0, row * len(points) + column, weight)  # one vote for each point at a time
    return shares[:count]


BORDER = (1, 2, 1, 2)  # one pixel before, and two behind, where the upper left pixel may already be outside


def _votes(target: Target, points: Tensor, padded_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Which pixels of the ground truth with its `BORDER` vote at points [..., P, 2], and with which weights.

    Returns:
        Weights of the right and of the lower pixels [..., P]; index of the upper left pixel [..., P]; length of a row.
    """
    height, width = target.size
    # Pixel centres are at whole numbers. Whatever lies beyond the ground truth is read from the border around it.
    x = (points[..., 0] * padded_size[1] - 0.5).clamp(-1, width)
    y = (points[..., 1] * padded_size[0] - 0.5).clamp(-1, height)
    left, top = x.floor(), y.floor()
    stride = width + sum(BORDER[:2])
    return x - left, y - top, (top.int() + 1) * stride + (left.int() + 1), stride
