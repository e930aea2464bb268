"""Costs of matching: every mask compared with every segment of an image.

M masks, C mask feature channels, T segments, P points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.ops.at_once import points_at_once
from m2f_lab.ops.linear_map import products


def mask_costs(embeddings: Tensor, features: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, averaged over points, and dice of every mask with every segment.

    Masks are multiplied out at some points at a time, which bounds the memory. With x a logit and t a share,
    -t log p - (1 - t) log(1 - p) = softplus(x) - x t, and the sum of x t over points needs no x.

    Args:
        embeddings: mask embeddings. [..., M, C]
        features: mask features at the points. [..., P, C]
        truth: segments at the points. [..., T, P]

    Returns:
        Cross-entropy and dice. [..., M, T], [..., M, T]

    Source: Mask2Former (Cheng et al. 2022), section 3.3; MaskFormer (Cheng et al. 2021), section 3.3.
    """
    num_segments, num_points = truth.shape[-2:]
    # Row T sums over all points in the same product that gives the overlaps.
    rows = torch.cat([truth, truth.new_ones(*truth.shape[:-2], 1, num_points)], dim=-2)  # (..., T+1, P)
    empty = overlap = 0.0
    step = points_at_once(embeddings[..., 0].numel(), features.device)
    for pixels, here in zip(features.split(step, dim=-2), rows.split(step, dim=-1), strict=True):
        logits = products(pixels, embeddings)  # (..., p, M)
        empty = empty + F.softplus(logits).sum(-2)  # cross-entropy with an empty segment
        overlap = overlap + here @ logits.sigmoid_()  # (..., T+1, M)
    overlap, cover = overlap.mT.split([num_segments, 1], dim=-1)  # (..., M, T), (..., M, 1)
    agreement = embeddings @ (truth @ features).mT  # (..., M, T)
    dice = 1 - (2 * overlap + 1) / (cover + truth.sum(-1).unsqueeze(-2) + 1)
    return (empty.unsqueeze(-1) - agreement) / num_points, dice
