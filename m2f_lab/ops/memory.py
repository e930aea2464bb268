"""Less memory in training, for some more time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from m2f_lab.ops.linear_map import Linear, without_products
from m2f_lab.ops.switch import is_plain

T = TypeVar("T")


def checkpointed(function: Callable[..., T], *arguments, then: Linear | None = None) -> T:
    """Call a function without keeping its intermediate results: the backward pass computes them again.

    Plain: call the function. So it is on a GPU, whose memory is large and whose host has no time to launch everything
    twice, and under `torch.compile`, which chooses by itself what to keep.

    Args:
        function: of tensors; should be cheap and wide inside, as norms, activations and softmaxes are.
        arguments: of the function.
        then: a linear map of the function's result, whose input is not kept either. Its product is not run twice.
    """
    runs = 0

    def run(*arguments) -> T:
        nonlocal runs
        runs += 1
        result = function(*arguments)
        if then is None:
            return result
        with without_products() if runs > 1 else nullcontext():  # only what backward needs is looked at again
            return then(result)

    on_cpu = all(x.device.type == "cpu" for x in arguments if isinstance(x, torch.Tensor))
    if is_plain("checkpointed") or not (on_cpu and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return run(*arguments)
    # The second time runs in the context of the first, as backward may run outside `plain()` or in another thread.
    return checkpoint(copy_context().run, run, *arguments, use_reentrant=False)
