"""An average of the weights over the last steps: a smoother model than any single step leaves behind."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a model's weights.

    After step n, average ← average + (1 - d) (weights - average), where d is the decay, or (1 + n) / (10 + n) as long
    as that is less: the first steps would otherwise stay in the average for 1 / (1 - decay) steps. Buffers are copied:
    statistics of batch norms are running averages already.

    Source: Acceleration of stochastic approximation by averaging (Polyak & Juditsky 1992); the rule for the first steps
    is TensorFlow's ExponentialMovingAverage.

    Attributes:
        model: a copy of the model with the averaged weights, without gradients.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._averaged, self._weights = list(self.model.parameters()), list(model.parameters())
        self._copied, self._buffers = list(self.model.buffers()), list(model.buffers())

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after so many steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._averaged, self._weights, 1 - decay)
        for copied, buffer in zip(self._copied, self._buffers, strict=True):
            copied.copy_(buffer)
