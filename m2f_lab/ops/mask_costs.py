"""Costs of matching: every mask compared with every segment of an image.

L predictions, Q queries, C mask feature channels, T segments, P points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.ops.linear_map import linear
from m2f_lab.ops.switch import is_plain

POINTS_ON_CPU = 4096
"""Points in one piece on a CPU: bounds the table of all masks at all points."""


def mask_costs(embeddings: Tensor, features: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, averaged over points, and dice of every mask with every segment.

    The plain version is the equations, the fast one saves products and memory.

    Args:
        embeddings: mask embeddings of one image. [L, Q, C]
        features: its mask features at the points. [C, P]
        truth: its segments at the points. [T, P]

    Returns:
        Cross-entropy and dice. [L, Q, T], [L, Q, T]

    Source: Mask2Former (Cheng et al. 2022), section 3.3; MaskFormer (Cheng et al. 2021), section 3.3.
    """
    shape, embeddings = embeddings.shape[:2], embeddings.flatten(0, 1)  # (L*Q, C)
    if is_plain("mask_costs"):
        cross_entropy, dice = costs_of_logits(embeddings @ features, truth)  # (L*Q, T), (L*Q, T)
    else:
        cross_entropy, dice = _fast(embeddings, features, truth)
    return cross_entropy.unflatten(0, shape), dice.unflatten(0, shape)


def costs_of_logits(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The equations, for masks that are multiplied out. [M, P], [T, P] → [M, T], [M, T]"""
    inside, outside = F.softplus(-logits), F.softplus(logits)  # -log p, -log(1 - p)
    cross_entropy = (inside @ truth.T + outside @ (1 - truth).T) / logits.shape[1]
    probability = logits.sigmoid()
    dice = 1 - (2 * probability @ truth.T + 1) / (probability.sum(1, keepdim=True) + truth.sum(1) + 1)
    return cross_entropy, dice


def _fast(embeddings: Tensor, features: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Fewer products: softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t, and x t needs no x. [M, T], [M, T]"""
    num_segments, num_points = truth.shape
    # Row T sums over all points in the same product that gives the overlaps.
    segments = torch.cat([truth, truth.new_ones(1, num_points)])  # (T+1, P)
    empty = overlap = 0.0
    step = POINTS_ON_CPU if truth.device.type == "cpu" else num_points
    for pixels, here in zip(features.T.split(step), segments.split(step, dim=1), strict=True):
        logits = linear(pixels, embeddings)  # (p, M)
        empty = empty + F.softplus(logits).sum(0)  # cross-entropy with an empty segment
        overlap = overlap + here @ logits.sigmoid_()  # (T+1, M)
    overlap, cover = overlap.T.split([num_segments, 1], dim=1)  # (M, T), (M, 1)
    agreement = embeddings @ (features @ truth.T)  # (M, T)
    dice = 1 - (2 * overlap + 1) / (cover + truth.sum(1) + 1)
    return (empty.unsqueeze(1) - agreement) / num_points, dice
