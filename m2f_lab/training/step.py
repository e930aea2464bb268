"""One optimiser step: forward, match, backward, clip, update; in parts and over several processes where asked for.

B images, Q queries.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from m2f_lab.data import Batch
from m2f_lab.loss import Criterion
from m2f_lab.recipes import Recipe
from m2f_lab.structures import Target
from m2f_lab.training.distributed import DistributedContext
from m2f_lab.training.optimizer import clipped_step, set_learning_rate


@dataclass(frozen=True)
class Learner:
    """What a step needs.

    Attributes:
        model: the model, wrapped by `DistributedContext.wrap_ddp` where there are several processes.
        precision: of the forward and backward pass; the losses are computed in float32 in any case.
    """

    recipe: Recipe
    model: nn.Module
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: torch.dtype
    world: DistributedContext

    def step(self, batch: Batch, iteration: int) -> dict[str, float | None]:
        """Take one optimiser step.

        Args:
            batch: this process's images of the batch.
            iteration: steps taken before.

        Returns:
            "loss", every term of the criterion, "learning_rate", and "gradient_norm" before clipping (None where
            float16 overflowed, and the step was skipped).

        Raises:
            FloatingPointError: a loss or the gradient is not finite.
        """
        recipe, config, device = self.recipe, self.recipe.optimization, self.world.device
        seed_everything(recipe.seed, iteration, self.world.rank)
        learning_rate = set_learning_rate(self.optimizer, iteration, config)
        self.optimizer.zero_grad(set_to_none=True)
        parts = split(batch, config.accumulation_steps)
        shares = gradient_shares(
            [part.targets for part in parts],
            self.recipe.model.num_queries,
            self.recipe.loss.no_object_weight,
            self.world,
        )
        terms: dict[str, Tensor | float] = {}
        try:
            for i, (part, share) in enumerate(zip(parts, shares, strict=True)):
                with nullcontext() if i == len(parts) - 1 or self.world.size == 1 else self.model.no_sync():
                    losses = self._losses(part.to(device, non_blocking=True), share)
                    self.scaler.scale(losses["loss"]).backward()
                for name, value in losses.items():
                    terms[name] = terms.get(name, 0.0) + value.detach()
            values = self.world.sum(torch.stack(list(terms.values())).tolist())  # one transfer for all terms
            norm = clipped_step(self.optimizer, self.scaler, self.model, config.clip_norm)
        except FloatingPointError as error:
            names = ", ".join(f"{i} = {name}" for i, name in enumerate(part.names))
            raise FloatingPointError(f"Iteration {iteration}, images {names}. {error}") from error
        means = {name: value / self.world.size for name, value in zip(terms, values, strict=True)}
        return means | {"learning_rate": learning_rate, "gradient_norm": norm if math.isfinite(norm) else None}

    def _losses(self, part: Batch, share: Share) -> dict[str, Tensor]:
        """All terms of one part, weighted so that they add up to those of the whole batch; "loss" is their total."""
        with torch.autocast(self.world.device.type, self.precision, enabled=self.precision != torch.float32):
            output = self.model(part.images)
        losses = self.criterion(output, part.targets)
        total = losses.pop("total")
        class_total = self.criterion.class_weight * sum(v for name, v in losses.items() if name.endswith(".class"))
        weighted = {n: v * (share.classes if n.endswith(".class") else share.masks) for n, v in losses.items()}
        return {"loss": share.masks * total + (share.classes - share.masks) * class_total} | weighted


@dataclass(frozen=True)
class Share:
    """What a part's loss terms count: its share of the divisor that the whole batch would have."""

    classes: float
    masks: float


def gradient_shares(
    parts: Sequence[Sequence[Target]], num_queries: int, no_object_weight: float, world: DistributedContext
) -> list[Share]:
    """Weights that make parts and processes add up to the gradient of the whole batch.

    The criterion divides each part's mask terms by the number of its segments, and the class terms by the sum of its
    class weights. Plain averages over parts would let an image in a part with few segments count for more.

    What no weighting can undo: every part draws its own random points, and batch norms see one part at a time.

    Args:
        parts: the targets of each part on this process.
        num_queries: Q
        no_object_weight: of queries without a segment.
        world: the processes over whose gradients the average is taken.

    Returns:
        One share per part; both numbers are 1 where there is one part and one process.
    """
    segments = [sum(target.num_segments for target in part) for part in parts]
    matched = [sum(min(target.num_segments, num_queries) for target in part) for part in parts]
    weights = [m + no_object_weight * (num_queries * len(part) - m) for m, part in zip(matched, parts, strict=True)]
    *all_segments, all_weight = world.sum([*segments, sum(weights)])
    divisors = [max(n / world.size, 1.0) for n in all_segments]  # as the criterion divides
    return [
        Share(classes=world.size * weight / all_weight, masks=world.size * divisor / max(sum(all_segments), 1.0))
        for weight, divisor in zip(weights, divisors, strict=True)
    ]


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """Cut a batch into equal parts, in order."""
    size = len(batch.names) // num_parts
    slices = [slice(i * size, (i + 1) * size) for i in range(num_parts)]
    return [Batch(batch.images[s], batch.targets[s], batch.names[s]) for s in slices]


def seed_everything(*numbers: int) -> None:
    """Seed the generators of torch (CUDA included), numpy and python from a few non-negative numbers."""
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence(numbers).generate_state(3, np.uint64)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed) % 2**32)
    random.seed(int(python_seed))


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in: what the recipe says, or for "auto" bfloat16 on GPUs that have it, else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32
