"""The criterion as published: prediction by prediction, image by image, on dense masks.

The peer of `m2f_lab.loss`: the same equations in the steps that the paper and its authors describe. Every prediction is
multiplied out, every matching and every loss draws its own points, ground truth is padded to one table of float masks.

B images, Q queries, K classes, T segments of an image, N matched pairs of a prediction, P points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m2f_lab.loss import Criterion, terms
from m2f_lab.structures import Output, sample_points

Pairs = list[tuple[Tensor, Tensor]]  # queries and segments of each image


def read(masks: Tensor, points: Tensor) -> Tensor:
    """Every mask at its own points. [N, H, W], [N, P, 2] → [N, P]"""
    return sample_points(masks.unsqueeze(1), points).squeeze(1)


def costs_of_logits(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of every mask with every segment. [M, P], [T, P] → [M, T], [M, T]"""
    inside, outside = F.softplus(-logits), F.softplus(logits)  # -log p, -log(1 - p)
    cross_entropy = (inside @ truth.T + outside @ (1 - truth).T) / logits.shape[1]
    probability = logits.sigmoid()
    dice = 1 - (2 * probability @ truth.T + 1) / (probability.sum(1, keepdim=True) + truth.sum(1) + 1)
    return cross_entropy, dice


@torch.no_grad()
def match(
    class_logits: Tensor, masks: Tensor, labels: list[Tensor], truths: list[Tensor], config: Criterion, points=None
) -> Pairs:
    """One prediction. Class logits [B, Q, K+1], masks [B, Q, H, W], labels B × [T], boolean masks B × [T, H, W]."""
    pairs = []
    for image in range(len(masks)):
        where = torch.rand(1, config.num_points, 2, device=masks.device) if points is None else points[image][None]
        truth = read(truths[image].to(masks.dtype), where.repeat(len(truths[image]), 1, 1))
        logits = read(masks[image], where.repeat(masks.shape[1], 1, 1))
        class_cost = -class_logits[image].softmax(-1)[:, labels[image]]
        mask_cost, dice_cost = costs_of_logits(logits, truth)
        weights = config.weights
        cost = weights["class"] * class_cost + weights["mask"] * mask_cost + weights["dice"] * dice_cost
        pairs.append(tuple(map(torch.as_tensor, linear_sum_assignment(cost.cpu()))))
    return pairs


@torch.no_grad()
def choose_points(masks: Tensor, config: Criterion) -> Tensor:
    """PointRend's points, for every mask by itself. [N, H, W] → [N, P, 2]"""
    num_candidates = int(config.num_points * config.oversample_ratio)
    num_uncertain = int(config.num_points * config.importance_sample_ratio)
    candidates = torch.rand(len(masks), num_candidates, 2, device=masks.device)
    uncertainty = -read(masks, candidates).abs()
    index = uncertainty.topk(num_uncertain, dim=1).indices
    index = index + num_candidates * torch.arange(len(masks), device=masks.device)[:, None]
    chosen = candidates.view(-1, 2)[index.view(-1)].view(len(masks), num_uncertain, 2)
    rest = torch.rand(len(masks), config.num_points - num_uncertain, 2, device=masks.device)
    return torch.cat([chosen, rest], dim=1)


def losses(
    class_logits: Tensor, masks: Tensor, labels: list[Tensor], truths: list[Tensor], pairs: Pairs, config: Criterion,
    points: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The weighted loss of one prediction; arguments as in `match`, and the points of every pair. [N, P, 2]"""
    device = masks.device
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)])
    query = torch.cat([query for query, _ in pairs])
    classes = torch.full(class_logits.shape[:2], config.num_classes, device=device)
    classes[image, query] = torch.cat([own[segment] for own, (_, segment) in zip(labels, pairs, strict=True)])
    weight = torch.ones(config.num_classes + 1, device=device)
    weight[-1] = config.no_object_weight
    class_loss = F.cross_entropy(class_logits.transpose(1, 2), classes, weight)

    padded = torch.zeros(len(truths), max(map(len, truths)), *truths[0].shape[1:], dtype=torch.bool, device=device)
    for table, truth in zip(padded, truths, strict=True):
        table[: len(truth)] = truth
    truth = padded.to(masks.dtype)[image, torch.cat([segment for _, segment in pairs])]  # (N, H, W)
    chosen = masks[image, query]
    if points is None:
        points = choose_points(chosen, config)
    with torch.no_grad():
        truth = read(truth, points)
    logits = read(chosen, points)
    num_masks = max(1, sum(map(len, truths)))
    mask_loss, dice_loss = (term(logits, truth).sum() / num_masks for term in (terms.mask, terms.dice))
    weights = config.weights
    return weights["class"] * class_loss + weights["mask"] * mask_loss + weights["dice"] * dice_loss


def total(output: Output, labels: list[Tensor], truths: list[Tensor], config: Criterion) -> Tensor:
    """The weighted loss of all predictions, whose masks are multiplied out, as the published model returns them."""
    result = 0.0
    for class_logits, masks in zip(output.class_logits, [masks.dense() for masks in output.masks], strict=True):
        pairs = match(class_logits, masks, labels, truths, config)
        result = result + losses(class_logits, masks, labels, truths, pairs, config)
    return result
