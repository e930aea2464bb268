"""Mask losses of matched pairs at the points where each pair is least certain.

B images, b images that are worked on together, C mask feature channels, M matched pairs, n pairs of a group, m pairs of
an image, T segments of an image, N candidate points, k of which a pair keeps, R points that every pair takes; P is
k + R. Mask features are H high and W wide.

Images that are worked on together are padded to as many pairs as the one with the most has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2f_lab.ops.linear_map import products
from m2f_lab.ops.memory import checkpointed
from m2f_lab.ops.point_sampling import PointSampler, sample_points
from m2f_lab.ops.selection import select_uncertain
from m2f_lab.ops.transfer import to_device


@dataclass(frozen=True)
class PairGroup:
    """Matched pairs of some images; those of an image choose from the same points.

    Attributes:
        images: which of the batch. b of them
        points: N candidates, then the R points that every pair takes, (x, y) in [0, 1]. [b, N + R, 2]
        truth: share of each segment at each point. [b, T, N + R]
        num_candidates: N
        num_uncertain: k, the candidates that each pair keeps
        segments: the segment of each pair, any where an image has fewer than m; None until they are known. [b, m]
        real: the entries of `segments`, flattened, that are pairs; None if all are. [n]
    """

    images: slice
    points: Tensor
    truth: Tensor
    num_candidates: int = 0
    num_uncertain: int = 0
    segments: Tensor | None = None
    real: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """n"""
        return self.segments.numel() if self.real is None else len(self.real)

    def sampler(self, features: Tensor) -> PointSampler:
        """Sampler of mask features [B, C, H, W] at the points."""
        return PointSampler(self.points, tuple(features.shape[2:]))

    def pad(self, of_pairs: Tensor) -> Tensor:
        """Arrange by image, with zeros where there is no pair. [n, …] → [b, m, …]"""
        if self.real is not None:
            padded = of_pairs.new_zeros(self.segments.numel(), *of_pairs.shape[1:])
            of_pairs = padded.index_copy(0, self.real, of_pairs)
        return of_pairs.unflatten(0, self.segments.shape)

    def unpad(self, by_image: Tensor) -> Tensor:
        """Undo `pad`. [b, m, …] → [n, …]"""
        by_image = by_image.flatten(0, 1)
        return by_image if self.real is None else by_image.index_select(0, self.real)

    def choose(self, logits: Tensor) -> Tensor:
        """Indices of each pair's points: the least certain candidates, then all that follow. [b, m, N+R] → [b, m, P]"""
        rest = torch.arange(self.num_candidates, logits.shape[2], device=logits.device).expand(*logits.shape[:2], -1)
        if not self.num_uncertain:
            return rest
        return torch.cat([select_uncertain(logits[..., : self.num_candidates], self.num_uncertain), rest], dim=2)

    def truth_at(self, index: Tensor) -> Tensor:
        """Share of each pair's segment at its points. [b, m, P] → [b, m, P]"""
        row = self.segments.unsqueeze(2) * self.truth.shape[2]  # of the pair's segment in the flattened table
        return self.truth.flatten(1).gather(1, (row + index).flatten(1)).view(index.shape)


def with_pairs(drawn: Sequence[PairGroup], place: Tensor, segment: Tensor) -> list[PairGroup]:
    """Arrange pairs by the row of the points that were drawn for them.

    Args:
        drawn: groups without pairs; a group of b images has b rows
        place: row of each pair among those of all groups, ascending. [m]
        segment: of each pair. [m]
    """
    counts = torch.bincount(place, minlength=sum(len(group.points) for group in drawn))
    groups, first = [], 0
    for group, number in zip(drawn, counts.split([len(group.points) for group in drawn]), strict=True):
        if total := int(number.sum()):
            real = torch.arange(int(number.max())) < number[:, None]  # (b, m)
            padded = torch.zeros_like(real, dtype=torch.long)
            padded[real] = segment[first : first + total]
            padded, flat = to_device([padded, real.flatten().nonzero().squeeze(1)], group.points.device)
            groups.append(replace(group, segments=padded, real=None if real.all() else flat))
            first += total
    return groups


def at_chosen_points(features: Tensor, embeddings: Tensor, group: PairGroup) -> tuple[Tensor, Tensor]:
    """Mask logits and truth of the pairs of a group, differentiable to the logits.

    Args:
        features: mask features. [B, C, H, W]
        embeddings: mask embedding of each pair of the group. [n, C]

    Returns:
        Logits and truth at the points that each pair chooses. [n, P], [n, P]
    """
    pixels = features[group.images].flatten(2).mT  # (b, H*W, C)
    masks = pixels @ group.pad(embeddings).mT  # (b, H*W, m)
    logits = sample_points(masks, group.sampler(features)).mT.contiguous()  # (b, m, N + R)
    index = group.choose(logits.detach())
    return group.unpad(logits.gather(2, index)), group.unpad(group.truth_at(index))


def compare_pairs(
    terms: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    features: Tensor,
    embeddings: Tensor,
    groups: Sequence[PairGroup],
) -> dict[str, Tensor]:
    """Call terms on the mask logits and the truth of each pair, at the points that the pair chooses.

    Logits are computed again in the backward pass, so that one group of them at a time is kept.

    Args:
        terms: (logits [n, P], truth [n, P]) → [n]
        features: mask features. [B, C, H, W]
        embeddings: mask embedding of each pair, group by group. [M, C]
        groups: the pairs

    Returns:
        {name: [M]}
    """

    def of_group(features: Tensor, embeddings: Tensor, group: PairGroup) -> Tensor:
        logits, truth = at_chosen_points(features, embeddings, group)  # (n, P), (n, P)
        losses = {name: term(logits, truth) for name, term in terms.items()}
        for name, values in losses.items():
            check_shape(name, values, len(logits), "one per pair; mark a term that needs the output with sees_output")
        return torch.stack(list(losses.values()))  # (terms, n)

    nothing = embeddings[:0].sum(1) + 0 * features.sum()  # distributed training waits for every gradient
    losses = [nothing.expand(len(terms), 0)]
    for group, own in zip(groups, _split(embeddings, groups), strict=True):
        losses.append(checkpointed(of_group, features, own, group))
    return dict(zip(terms, torch.cat(losses, dim=1), strict=True))


def check_shape(name: str, values: Tensor, count: int, meaning: str) -> None:
    """Raise a ValueError if a term's losses are not [count]."""
    if values.shape != (count,):
        raise ValueError(
            f"Loss term {name!r} returned a tensor of shape {tuple(values.shape)}, not ({count},): {meaning}."
        )


def mask_and_dice(features: Tensor, embeddings: Tensor, groups: Sequence[PairGroup]) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice of every pair, as `loss.terms` define them, at its chosen points.

    The plain version is `compare_pairs` with those terms. Here the gradient is written out, and of the size of the
    masks, only the points that a pair chose and its probabilities there are kept for it.

    Args:
        features: mask features. [B, C, H, W]
        embeddings: mask embedding of each pair, group by group. [M, C]
        groups: the pairs

    Returns:
        Cross-entropy, averaged over points, and dice; differentiable once. [M], [M]
    """
    return _MaskAndDice.apply(features, embeddings, groups)


class _MaskAndDice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, embeddings: Tensor, groups: Sequence[PairGroup]) -> tuple[Tensor, Tensor]:
        losses, kept = [features.new_empty(2, 0)], []
        ctx.groups, ctx.samplers = groups, [group.sampler(features) for group in groups]
        for group, sampler, own in zip(groups, ctx.samplers, _split(embeddings, groups), strict=True):
            pixels = features[group.images].flatten(2).mT  # (b, H*W, C)
            logits = sampler.gather(products(pixels, group.pad(own))).mT.contiguous()  # (b, m, N + R)
            index = group.choose(logits)
            x, truth = logits.gather(2, index), group.truth_at(index)
            # -t log p - (1 - t) log(1 - p) = softplus(x) - x t
            cross_entropy = F.softplus(x).addcmul_(x, truth, value=-1).mean(2, keepdim=True)
            probability = x.sigmoid_()
            overlap, both = _overlap_and_both(probability, truth)
            dice = 1 - (2 * overlap + 1) / both
            losses.append(torch.stack([group.unpad(term.squeeze(2)) for term in (cross_entropy, dice)]))
            kept += [index.int(), probability]
        ctx.save_for_backward(features, embeddings, *kept)
        mask, dice = torch.cat(losses, dim=1)
        return mask, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mask: Tensor, grad_dice: Tensor) -> tuple[Tensor, Tensor, None]:
        features, embeddings, *kept = ctx.saved_tensors
        grad_features = features.new_zeros(len(features), features[0, 0].numel(), features.shape[1])  # (B, H*W, C)
        grad_embeddings = [embeddings[:0]]
        parts = [_split(part, ctx.groups) for part in (embeddings, grad_mask, grad_dice)]
        with torch.autocast(features.device.type, enabled=False):
            for group, sampler, index, p, own, by_mask, by_dice in zip(
                ctx.groups, ctx.samplers, kept[::2], kept[1::2], *parts, strict=True
            ):
                own, by_mask, by_dice = group.pad(own), group.pad(by_mask).unsqueeze(2), group.pad(by_dice).unsqueeze(2)
                pixels, index = features[group.images].flatten(2).mT, index.long()  # (b, H*W, C), (b, m, P)
                truth = group.truth_at(index)
                overlap, both = _overlap_and_both(p, truth)
                # d mask / d x = (p - t) / P; d dice / d p = (2 overlap + 1) / both² - t 2 / both; d p / d x = p (1 - p)
                gradient = torch.addcmul(by_dice * (2 * overlap + 1) / both**2, truth, -2 * by_dice / both)
                gradient.mul_(p * (1 - p)).addcmul_(p - truth, by_mask, value=1 / max(index.shape[2], 1))
                at_points = p.new_zeros(*index.shape[:2], sampler.points.shape[1])
                grad_masks = sampler.scatter_add(at_points.scatter_(2, index, gradient).mT)  # (b, H*W, m)
                grad_embeddings.append(group.unpad(grad_masks.mT @ pixels))
                grad_features[group.images].baddbmm_(grad_masks, own)
        return grad_features.mT.unflatten(2, features.shape[2:]), torch.cat(grad_embeddings), None


def _split(of_pairs: Tensor, groups: Sequence[PairGroup]) -> tuple[Tensor, ...]:
    """Rows of each group. [M, …] → [n, …] per group"""
    return of_pairs.split([group.num_pairs for group in groups])


def _overlap_and_both(probability: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of dice without its smoothing: p · t, and Σ p + Σ t + 1. [b, m, P] → [b, m, 1] each"""
    both = probability.sum(2, keepdim=True) + truth.sum(2, keepdim=True) + 1
    return (probability * truth).sum(2, keepdim=True), both
