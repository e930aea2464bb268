"""Mask losses of matched pairs at the points where each pair is least certain.

B images, C mask feature channels, M matched pairs, m pairs that share points, T segments of an image, N candidate
points, k of which a pair keeps, R points that every pair takes, P = k + R, H/W height/width of the mask features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2f_lab.ops.linear_map import linear
from m2f_lab.ops.memory import checkpointed
from m2f_lab.ops.point_sampling import PointSampler, sample_points
from m2f_lab.ops.selection import select_uncertain


@dataclass(frozen=True)
class PairGroup:
    """Matched pairs of one image that choose from the same points.

    Attributes:
        image: index in the batch
        points: N candidates, then the R points that every pair takes, (x, y) in [0, 1]. [N + R, 2]
        truth: share of each segment at each point. [T, N + R]
        num_candidates: N
        num_uncertain: k, the candidates that each pair keeps
        segments: the segment of each pair; None until they are known. [m]
    """

    image: int
    points: Tensor
    truth: Tensor
    num_candidates: int = 0
    num_uncertain: int = 0
    segments: Tensor | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """Indices of each pair's points: the least certain candidates, then all that follow. [m, N + R] → [m, P]"""
        rest = torch.arange(self.num_candidates, logits.shape[1], device=logits.device).expand(len(logits), -1)
        if not self.num_uncertain:
            return rest
        return torch.cat([select_uncertain(logits[:, : self.num_candidates], self.num_uncertain), rest], dim=1)

    def truth_at(self, index: Tensor) -> Tensor:
        """Share of each pair's segment at its points. [m, P] → [m, P]"""
        return self.truth[self.segments].gather(1, index)


def at_chosen_points(features: Tensor, embeddings: Tensor, group: PairGroup) -> tuple[Tensor, Tensor]:
    """Mask logits and truth of the pairs of a group, differentiable to the logits.

    Args:
        features: mask features of the group's image. [C, H, W]
        embeddings: mask embedding of each pair. [m, C]

    Returns:
        Logits and truth at the points that each pair chooses. [m, P], [m, P]
    """
    sampler = PointSampler(group.points, tuple(features.shape[1:]))
    logits = sample_points(features.flatten(1).T @ embeddings.T, sampler).T.contiguous()  # (m, N + R)
    index = group.choose(logits.detach())
    return logits.gather(1, index), group.truth_at(index)


def compare_pairs(
    terms: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    features: Tensor,
    embeddings: Tensor,
    groups: Sequence[PairGroup],
) -> dict[str, Tensor]:
    """Call terms on the mask logits and the truth of each pair, at the points that the pair chooses.

    Logits are computed again in the backward pass, so that one group of them at a time is kept.

    Args:
        terms: (logits [m, P], truth [m, P]) → [m]
        features: mask features. [B, C, H, W]
        embeddings: mask embedding of each pair, group by group. [M, C]
        groups: the pairs

    Returns:
        {name: [M]}
    """

    def of_group(features: Tensor, embeddings: Tensor, group: PairGroup) -> Tensor:
        logits, truth = at_chosen_points(features, embeddings, group)  # (m, P), (m, P)
        losses = {name: term(logits, truth) for name, term in terms.items()}
        for name, values in losses.items():
            check_shape(name, values, len(logits), "one per pair; mark a term that needs the output with sees_output")
        return torch.stack(list(losses.values()))  # (terms, m)

    nothing = embeddings[:0].sum(1) + 0 * features.sum()  # distributed training waits for every gradient
    losses, images = [nothing.expand(len(terms), 0)], features.unbind()
    for group, own in zip(groups, _split(embeddings, groups), strict=True):
        losses.append(checkpointed(of_group, images[group.image], own, group))
    return dict(zip(terms, torch.cat(losses, dim=1), strict=True))


def check_shape(name: str, values: Tensor, count: int, meaning: str) -> None:
    """Raise a ValueError if a term's losses are not [count]."""
    if values.shape != (count,):
        raise ValueError(
            f"Loss term {name!r} returned a tensor of shape {tuple(values.shape)}, not ({count},): {meaning}."
        )


def mask_and_dice(features: Tensor, embeddings: Tensor, groups: Sequence[PairGroup]) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice of every pair, as `loss.terms` define them, at its chosen points.

    The plain version is `compare_pairs` with those terms. Here the gradient is written out, and
    logits are computed again in the backward pass: of the size of the masks, only indices are kept between the two.

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
        losses, chosen = [features.new_empty(2, 0)], []
        samplers = [PointSampler(group.points, tuple(features.shape[2:])) for group in groups]
        for group, sampler, own in zip(groups, samplers, _split(embeddings, groups), strict=True):
            pixels = features[group.image].flatten(1).T  # (H*W, C)
            logits = sampler.gather(linear(pixels, own)).T.contiguous()  # (m, N + R)
            index = group.choose(logits)
            x, truth = logits.gather(1, index), group.truth_at(index)
            # -t log p - (1 - t) log(1 - p) = softplus(x) - x t
            cross_entropy = F.softplus(x).addcmul_(x, truth, value=-1).mean(1)
            probability = x.sigmoid_()
            overlap, both = _overlap_and_both(probability, truth)
            losses.append(torch.stack([cross_entropy, 1 - (2 * overlap + 1) / both]))
            chosen.append(index.int())
        ctx.save_for_backward(features, embeddings, *chosen)
        ctx.groups, ctx.samplers = groups, samplers
        mask, dice = torch.cat(losses, dim=1)
        return mask, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mask: Tensor, grad_dice: Tensor) -> tuple[Tensor, Tensor, None]:
        features, embeddings, *chosen = ctx.saved_tensors
        grad_features = features.new_zeros(len(features), features[0, 0].numel(), features.shape[1])  # (B, H*W, C)
        grad_embeddings = torch.empty_like(embeddings)
        parts = [_split(part, ctx.groups) for part in (embeddings, grad_embeddings, grad_mask, grad_dice)]
        with torch.autocast(features.device.type, enabled=False):
            for group, sampler, index, own, grad_own, by_mask, by_dice in zip(
                ctx.groups, ctx.samplers, chosen, *parts, strict=True
            ):
                pixels = features[group.image].flatten(1).T  # (H*W, C)
                logits = sampler.gather(linear(pixels, own)).T.contiguous()  # (m, N + R)
                index = index.long()
                truth = group.truth_at(index)
                p = logits.gather(1, index).sigmoid_()
                overlap, both = _overlap_and_both(p, truth)
                # d mask / d x = (p - t) / P; d dice / d p = (2 overlap + 1) / both² - t 2 / both; d p / d x = p (1 - p)
                constant, slope = by_dice * (2 * overlap + 1) / both**2, -2 * by_dice / both
                gradient = torch.addcmul(constant[:, None], truth, slope[:, None]).mul_(p * (1 - p))
                gradient.addcmul_(p.sub_(truth), by_mask[:, None], value=1 / max(index.shape[1], 1))
                logits.zero_().scatter_(1, index, gradient)
                grad_masks = sampler.scatter_add(logits.T.contiguous())  # (H*W, m)
                torch.mm(grad_masks.T, pixels, out=grad_own)
                grad_features[group.image].addmm_(grad_masks, own)
        return grad_features.transpose(1, 2).unflatten(2, features.shape[2:]), grad_embeddings, None


def _split(pairs: Tensor, groups: Sequence[PairGroup]) -> tuple[Tensor, ...]:
    """Rows of each group. [M, …] → [m, …] per group"""
    return pairs.split([len(group.segments) for group in groups])


def _overlap_and_both(probability: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of dice without its smoothing: p · t, and Σ p + Σ t + 1. [m, P] → [m], [m]"""
    return (probability * truth).sum(1), probability.sum(1) + truth.sum(1) + 1
