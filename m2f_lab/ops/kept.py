"""Tensors that depend on sizes alone, made once per size."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def kept(count: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Keep the last `count` results of a function of hashable arguments; nobody may write into them.

    What was first made for inference serves training as well. Under `torch.compile`, which cannot trace a cache and
    makes constants of what depends on sizes, the function is called.
    """

    def keep(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        recall = functools.lru_cache(count)(torch.inference_mode(False)(make))

        @functools.wraps(make)
        def call(*arguments) -> Tensor:
            return make(*arguments) if torch.compiler.is_compiling() else recall(*arguments)

        call.forget = recall.cache_clear
        return call

    return keep
