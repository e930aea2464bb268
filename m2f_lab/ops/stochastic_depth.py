"""Residual branches under stochastic depth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m2f_lab.ops.switch import is_plain


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], drop_rate: float) -> Tensor:
    """Add a residual branch, which each image loses with a probability; the others' is scaled up to make up for it.

    Images whose branch is dropped skip it. Plain: the branch is computed for all and multiplied by zero or 1 / kept.
    Both draw the same images, on the CPU, so that no GPU has to be waited for.

    Args:
        x: one row per image. [B, ...]
        branch: keeps the shape; treats images apart.
        drop_rate: probability; 0 outside training.

    Returns:
        [B, ...]

    Source: Deep Networks with Stochastic Depth (Huang et al. 2016).
    """
    if drop_rate == 0:
        return x + branch(x)
    kept = torch.empty(len(x)).bernoulli_(1 - drop_rate)
    if is_plain("add_branch"):
        scale = (kept / (1 - drop_rate)).to(x.device, x.dtype)
        return x + scale.view(-1, *[1] * (x.ndim - 1)) * branch(x)
    rows = kept.nonzero().flatten()
    if len(rows) == len(x):
        return torch.add(x, branch(x), alpha=1 / (1 - drop_rate))
    rows = rows.to(x.device, non_blocking=True)  # none at all is fine: every parameter gets a gradient, of zero
    return x.index_add(0, rows, branch(x.index_select(0, rows)).to(x.dtype), alpha=1 / (1 - drop_rate))
