"""Copies of all weights in 16 bits, made at once.

Autocast casts each weight by itself, and its gradient back: two launches on a GPU for each of some 350 weights and
biases, in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_copies: ContextVar[Mapping[nn.Parameter, Tensor]] = ContextVar("weight_copies", default=MappingProxyType({}))


@contextmanager
def autocast(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """`torch.autocast`, in which a model multiplies by weights that were cast all at once; nothing for float32."""
    if dtype == torch.float32:
        yield
        return
    with torch.autocast(device.type, dtype), weight_copies(model.parameters(), dtype):
        yield


@contextmanager
def weight_copies(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, linear maps under autocast multiply by copies of these weights.

    The numbers are autocast's: weights are rounded once, and gradients arrive in the parameters, in their own type.
    Copies do not follow a weight that changes; a block lasts for one forward pass in training, for many in evaluation.

    Args:
        parameters: those of a model; what is no float32 is left out
        dtype: autocast's
    """
    weights = [parameter for parameter in parameters if parameter.dtype == torch.float32]
    token = _copies.set(dict(zip(weights, _Cast.apply(dtype, *weights), strict=True)))
    try:
        yield
    finally:
        _copies.reset(token)


def copy_of(weight: Tensor) -> Tensor:
    """The copy of a weight to multiply by, if there is one and autocast wants it; else the weight itself."""
    if torch.compiler.is_compiling():  # the compiler casts in the same launch as it multiplies
        return weight
    copies = _copies.get()
    if copies and torch.is_autocast_enabled(weight.device.type):
        return copies.get(weight, weight)
    return weight


def for_products(x: Tensor) -> Tensor:
    """Cast what several products read to autocast's type, once instead of in each; unchanged without autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # most parameters of norms are used as they are
        return tuple(_cast(weights, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([gradient for gradient in gradients if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(cast) for gradient in gradients)


def _cast(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if cast:
        torch._foreach_copy_(cast, list(tensors))
    return cast
