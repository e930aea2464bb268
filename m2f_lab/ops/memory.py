"""Less memory in training, for some more time."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from m2f_lab.ops.switch import is_plain

T = TypeVar("T")


def checkpointed(function: Callable[..., T], *arguments) -> T:
    """Call a function without keeping its intermediate results: the backward pass computes them again.

    Recomputation stops at the last tensor that backward needs: a matrix product or convolution at the end of the
    function is not run twice. Plain: call the function; so does `torch.compile`, which chooses by itself what to keep.

    Args:
        function: of tensors; should be cheap and wide inside, as norms, activations and softmaxes are.
        arguments: of the function.
    """
    if is_plain("checkpointed") or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*arguments)
    # The second time runs in the context of the first, as backward may run outside `plain()` or in another thread.
    return checkpoint(copy_context().run, function, *arguments, use_reentrant=False)
