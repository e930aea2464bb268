"""Linear maps in float32 on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m2f_lab.ops.switch import is_plain
from m2f_lab.ops.weight_copies import copy_of

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_without_products: ContextVar[bool] = ContextVar("without_products", default=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, by oneDNN for float32 on a CPU.

    PyTorch asks MKL, which on an AMD CPU with AVX-512 reaches half of oneDNN's rate. Plain: `F.linear`, which also runs
    for other types and devices, under autocast and `torch.compile`, and where PyTorch lacks the operator.

    Args:
        x: [..., C]
        weight: [D, C]
        bias: [D] or None

    Returns:
        [..., D]
    """
    if is_plain("linear") or not can_use_onednn(x, weight):
        return F.linear(x, copy_of(weight), None if bias is None else copy_of(bias))
    return OneDnnLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def products(x: Tensor, y: Tensor) -> Tensor:
    """Dot products of all rows of `x` with all rows of `y`. [..., N, C], [..., M, C] → [..., N, M]"""
    if x.shape[:-2].numel() == 1:  # one image, as always on a CPU
        return linear(x, y.flatten(0, -2))
    return x @ y.mT


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] → [..., D]"""
        return linear(x, self.weight, self.bias)


def replace_linears(module: nn.Module) -> None:
    """Replace each `nn.Linear` inside a module of another library by a `Linear` of the same parameters."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            replacement = Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
            replacement.weight, replacement.bias = child.weight, child.bias
            setattr(module, name, replacement)
        else:
            replace_linears(child)


def can_use_onednn(x: Tensor, weight: Tensor) -> bool:
    """True for float32 on a CPU whose PyTorch has the operator, outside autocast and `torch.compile`."""
    fits = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and min(x.numel(), weight.numel()) > 0
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return HAS_ONEDNN and fits and not torch.is_autocast_enabled("cpu") and not is_traced


@contextmanager
def without_products() -> Iterator[None]:
    """Leave results undefined inside the block: linear maps only save their inputs for the backward pass."""
    token = _without_products.set(True)
    try:
        yield
    finally:
        _without_products.reset(token)


class OneDnnLinear(torch.autograd.Function):
    """Forward and the gradient of the input by oneDNN; that of the weight is as fast by MKL. [N, C] → [N, D]"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _without_products.get():
            return x.new_empty(len(x), len(weight))
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "") if of_x else None,
            gradient.t() @ x if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )
