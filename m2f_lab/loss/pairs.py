"""Mask and dice loss of all matched pairs of an image, at points that the pairs share.

B images, C mask feature channels, M matched pairs, T segments of an image, P points, H/W height/width of the mask
features.

PointRend draws candidates for every mask anew. Here all pairs of an image draw them together: each pair still keeps the
least certain of uniform candidates, so its loss has the same distribution, but masks, ground truth and gradients are
read, compared and spread for all pairs at once. The gradient is written out, so that nothing of the size of the masks
is kept between forward and backward, where it is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2f_lab.loss.points import PointReader, UncertainShare, rows_at_once
from m2f_lab.products import linear_product


@dataclass(frozen=True)
class SharedPoints:
    """Where the pairs of one image are compared.

    Attributes:
        reader: of the mask features, at the candidates first, then at the points that every pair takes
        read_truth: gives the share of each segment at each point [T, P], once forward and once backward: what is read
            again need not be kept
        num_candidates: how many of the points are candidates
        num_uncertain: how many of the candidates each pair takes
    """

    reader: PointReader
    read_truth: Callable[[], Tensor]
    num_candidates: int
    num_uncertain: int

    @property
    def num_points(self) -> int:
        """At how many points a pair is compared."""
        return self.num_uncertain + len(self.reader.pixels) - self.num_candidates

    def choose(self, logits: Tensor) -> UncertainShare:
        """Each pair's choice among the candidates. [P, M]"""
        if self.num_uncertain == 0:
            nothing = logits.new_zeros(logits.shape[1])
            return UncertainShare(nothing, nothing)
        return UncertainShare.of(logits[: self.num_candidates], self.num_uncertain)

    def tiles(
        self, logits: Tensor, segments: Tensor, choice: UncertainShare
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits, truth and weights of all pairs, a few points at a time: as many as stay in the cache.

        Args:
            logits: of the pairs at all points; what is yielded is a view of them. [P, M]
            segments: which segment a pair is about. [M]
        """
        rows = rows_at_once(max(logits.shape[1], 1), logits.device)
        parts = [self.num_candidates, len(logits) - self.num_candidates]
        for part, truths, is_candidate in zip(
            logits.split(parts), self.read_truth().T.split(parts), (True, False), strict=True
        ):
            for x, truth in zip(part.split(rows), truths.split(rows), strict=True):
                weights = choice.weights(x) if is_candidate else x.new_ones(1, 1)
                yield x, truth.contiguous().index_select(1, segments), weights


class PairLosses(torch.autograd.Function):
    """See `pair_losses`."""

    @staticmethod
    def forward(
        ctx, features: Tensor, embeddings: Tensor, segments: Tensor, counts: list[int], shared: Sequence[SharedPoints]
    ) -> tuple[Tensor, Tensor]:
        results = []
        for points, pixels, own, numbers in zip(
            shared, features.flatten(2), embeddings.split(counts), segments.split(counts), strict=True
        ):
            logits = points.reader.read(linear_product(pixels.T, own))  # (P, m)
            choice = points.choose(logits)
            cross_entropy = cover = size = overlap = 0.0
            for x, truth, weights in points.tiles(logits, numbers, choice):
                # -t log p - (1 - t) log(1 - p) = softplus(x) - x t
                cross_entropy = cross_entropy + F.softplus(x).addcmul_(x, truth, value=-1).mul_(weights).sum(0)
                probability = x.sigmoid_().mul_(weights)
                cover = cover + probability.sum(0)
                overlap = overlap + probability.mul_(truth).sum(0)
                size = size + truth.mul_(weights).sum(0)
            both = cover + size + 1
            dice = 1 - (2 * overlap + 1) / both
            mean = cross_entropy / points.num_points
            results.append(torch.stack([mean, dice, choice.threshold, choice.share, overlap, both]))
        mask, dice, *kept = torch.cat(results, dim=1)
        ctx.save_for_backward(features, embeddings, segments, *kept)
        ctx.counts, ctx.shared = counts, shared
        return mask, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mask: Tensor, grad_dice: Tensor) -> tuple[Tensor | None, ...]:
        features, embeddings, segments, threshold, share, overlap, both = ctx.saved_tensors
        # d dice / d p = (2 overlap + 1) / both² - t 2 / both: a constant and a slope of every pair
        constant, slope = grad_dice * (2 * overlap + 1) / both**2, -2 * grad_dice / both
        grad_features, grad_embeddings = torch.empty_like(features), torch.empty_like(embeddings)
        parts = (embeddings, grad_embeddings, segments, threshold, share, grad_mask, constant, slope)
        with torch.autocast(features.device.type, enabled=False):
            for points, pixels, grad_pixels, own, grad_own, numbers, limit, at_limit, grad, level, tilt in zip(
                ctx.shared,
                features.flatten(2),
                grad_features.flatten(2),
                *(part.split(ctx.counts) for part in parts),
                strict=True,
            ):
                logits = points.reader.read(linear_product(pixels.T, own))  # (P, m)
                for x, truth, weights in points.tiles(logits, numbers, UncertainShare(limit, at_limit)):
                    probability = x.sigmoid()
                    by_probability = torch.addcmul(level, truth, tilt)  # d dice / d p
                    torch.ops.aten.sigmoid_backward(by_probability, probability, grad_input=x)
                    x.add_(probability.sub_(truth).mul_(grad / points.num_points)).mul_(weights)
                grad_masks = points.reader.spread(logits)  # (H*W, m)
                torch.mm(grad_masks.T, pixels.T, out=grad_own)
                torch.mm(own.T, grad_masks.T, out=grad_pixels)
        return grad_features, grad_embeddings, None, None, None


def pair_losses(
    features: Tensor, embeddings: Tensor, segments: Tensor, counts: list[int], shared: Sequence[SharedPoints]
) -> tuple[Tensor, Tensor]:
    """Compare every matched mask with its segment.

    Args:
        features: mask features. [B, C, H, W]
        embeddings: mask embedding of each pair, image by image. [M, C]
        segments: segment of each pair. [M]
        counts: number of pairs of each image
        shared: where the pairs of each image are compared

    Returns:
        Binary cross-entropy, averaged over points, and dice of each pair; differentiable once. [M], [M]
    """
    return PairLosses.apply(features, embeddings, segments, counts, shared)
