"""Residual branches under stochastic depth.

B images; the dots are any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2f_lab.ops.kept import kept
from m2f_lab.ops.switch import is_plain


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], drop_rate: float) -> Tensor:
    """Add a residual branch, which each image loses with a probability; the others' is scaled up to make up for it.

    Plain: the branch is computed for all images and multiplied by zero or 1 / (1 - drop_rate). So it is on GPUs, where
    sizes that depend on a draw would stop the host and keep CUDA graphs away; scaling and adding are one launch there.
    On a CPU, dropped images skip the branch. On every device all of them draw the same images, without a transfer.

    Args:
        x: one row per image. [B, ...]
        branch: keeps the shape; treats images apart. Each of its parameters gets a gradient, whatever is drawn.
        drop_rate: probability; 0 outside training.

    Returns:
        [B, ...]

    Source: Deep Networks with Stochastic Depth (Huang et al. 2016).
    """
    if drop_rate == 0:
        return x + branch(x)
    scale = draw_scale(len(x), drop_rate, x.device)
    if is_plain("add_branch"):
        return x + per_image(scale, x).to(x.dtype) * branch(x)
    if x.device.type == "cpu":
        return add_to_kept(x, branch, scale, drop_rate)
    return AddScaled.apply(x, branch(x), per_image(scale, x))


def draw_scale(num_images: int, drop_rate: float, device: torch.device) -> Tensor:
    """0 for images that lose the branch, 1 / (1 - drop_rate) for the others; one launch on a GPU. [B]"""
    return F.dropout(_ones(num_images, device), drop_rate)


@kept(16)
def _ones(num_images: int, device: torch.device) -> Tensor:
    return torch.ones(num_images, device=device)


def per_image(scale: Tensor, x: Tensor) -> Tensor:
    """[B] → [B, 1, ...], with as many dimensions as x."""
    return scale.view(-1, *[1] * (x.ndim - 1))


def add_to_kept(x: Tensor, branch: Callable[[Tensor], Tensor], scale: Tensor, drop_rate: float) -> Tensor:
    """`add_branch` where dropped images skip the branch; the number of rows it sees depends on the draw."""
    rows = scale.nonzero().flatten()
    if len(rows) == len(x):
        return torch.add(x, branch(x), alpha=1 / (1 - drop_rate))
    # No rows at all is fine: every parameter gets a gradient, of zero.
    return x.index_add(0, rows, branch(x.index_select(0, rows)).to(x.dtype), alpha=1 / (1 - drop_rate))


class AddScaled(torch.autograd.Function):
    """x + scale * y in one launch each way, whatever the types; keeps `scale` alone for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = y.dtype
        # Given where to write, it casts on the way; autocast would cast y in a launch of its own.
        result = torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
        return torch.addcmul(x, scale, y, out=result)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient, torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=ctx.dtype)), None
