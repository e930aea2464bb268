"""The terms of the training loss, one function each.

M matched pairs of a query and a segment, N queries, K classes, P points, L predictions.

A term compares the mask logits of M pairs with the truth at P points and returns one number per pair. A term marked
with `sees_output` gets the whole output instead. `Criterion` takes a dictionary of them and one of weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def mask(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy of each pair, averaged over points. [M, P], [M, P] → [M]"""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)


def dice(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice loss of each pair, smoothed by 1. [M, P], [M, P] → [M]

    Source: V-Net (Milletari et al. 2016), equation in section 3.
    """
    probability = logits.sigmoid()
    overlap = (probability * truth).sum(1)
    return 1 - (2 * overlap + 1) / (probability.sum(1) + truth.sum(1) + 1)


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of each query; class K is "no object". [N, K+1], [N] → [N]"""
    return F.cross_entropy(logits, classes, reduction="none")


def sees_output(term: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark a term that is called as `term(output, targets, matching)`.

    It returns the sum over the segments of each prediction, [L]; the criterion divides by the number of segments.
    """
    term.sees_output = True
    return term
