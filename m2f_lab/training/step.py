"""One optimiser step: forward, match, backward, clip, update; in parts and over several processes where asked for.

B images, Q queries.
"""

from __future__ import annotations

import inspect
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from m2f_lab import ops
from m2f_lab.data import Batch
from m2f_lab.loss import Criterion, Divisors
from m2f_lab.recipes import Recipe
from m2f_lab.structures import Output
from m2f_lab.training.distributed import DistributedContext
from m2f_lab.training.optimizer import clip_gradient, set_learning_rate, update_weights


@dataclass(frozen=True)
class TrainStep:
    """State and collaborators of an optimiser step.

    A model may take part in its own training: its forward gets the targets if it has a parameter `targets`, and its
    `anneal`, if it has one, is called before every step with the share of the training that is done, in [0, 1).

    Attributes:
        model: wrapped by DistributedDataParallel if there are several processes
        precision: of the forward and backward pass; losses are computed in float32 in any case
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
            batch: this process's images of the batch
            iteration: steps taken before

        Returns:
            "loss", every term of the criterion, "learning_rate", and "gradient_norm" before clipping (None where
            float16 overflowed, and the step was skipped).

        Raises:
            FloatingPointError: a loss or the gradient is not finite.
        """
        config, device = self.recipe.optimization, self.world.device
        seed_everything(self.recipe.seed, iteration, self.world.rank)
        self._anneal(iteration / config.max_iterations)
        learning_rate = set_learning_rate(self.optimizer, iteration, config)
        self.optimizer.zero_grad(set_to_none=True)
        parts = split(batch, config.accumulation_steps)
        divisors, sums = None, 0.0
        try:
            for i, part in enumerate(parts):
                is_last = i == len(parts) - 1 or self.world.size == 1
                with nullcontext() if is_last else self.model.no_sync(), tensor_cores(self.precision, device):
                    part = part.to(device, non_blocking=True)
                    output = self._forward(part)
                    if divisors is None and (len(parts) > 1 or self.world.size > 1):
                        divisors = whole_batch_divisors(batch, output, self.criterion, self.world)
                    losses = self.criterion(output, part.targets, divisors)
                    self.scaler.scale(losses["total"]).backward()
                sums = sums + torch.stack(list(losses.values())).detach().double()
            norm = clip_gradient(self.optimizer, self.scaler, self.model, config.clip_norm)
            *values, norm = torch.cat([self.world.sum(sums), norm[None]]).tolist()  # one transfer for all numbers
            update_weights(self.optimizer, self.scaler, norm)
        except FloatingPointError as error:
            names = ", ".join(f"{i} = {name}" for i, name in enumerate(part.names))
            raise FloatingPointError(f"Iteration {iteration}, images {names}. {error}") from error
        row = {name: value / self.world.size for name, value in zip(losses, values, strict=True)}
        row = {"loss": row.pop("total")} | row
        return row | {"learning_rate": learning_rate, "gradient_norm": norm if math.isfinite(norm) else None}

    def _forward(self, part: Batch) -> Output:
        targets = {"targets": part.targets} if self._takes_targets else {}
        with ops.autocast(self.model, self.precision, self.world.device):
            output = self._run(part.images, **targets)
        if not isinstance(output, Output):
            raise ValueError(
                f"{self.recipe.builder} built a model whose forward returns a {type(output).__name__}; it must return "
                "a m2f_lab.structures.Output."
            )
        return output

    @cached_property
    def _run(self) -> Callable[..., Output]:
        """The model, or a compiled one that shares its weights. Training alone calls it: its crops have one size."""
        if not self.recipe.optimization.compile:
            return self.model
        if self.world.device.type == "cpu":
            logging.getLogger("m2f_lab").info("optimization.compile is left out on a CPU, where it makes steps slower.")
            return self.model
        return torch.compile(self.model)

    @cached_property
    def _own_model(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @cached_property
    def _takes_targets(self) -> bool:
        return "targets" in inspect.signature(self._own_model.forward).parameters

    @cached_property
    def _anneal(self) -> Callable[[float], None]:
        return getattr(self._own_model, "anneal", lambda progress: None)


def whole_batch_divisors(batch: Batch, output: Output, criterion: Criterion, world: DistributedContext) -> Divisors:
    """Divisors that make parts and processes add up to the gradient of the whole batch.

    Plain averages over parts would let an image in a part with few segments count for more. What no divisor can undo:
    every part draws its own random points, and batch norms see one part at a time.

    Args:
        batch: all parts of this process
        output: of any of the parts; its number of queries counts
        criterion: weighs the queries
        world: the processes over whose gradients the average is taken
    """
    weight = criterion.weight_of_queries(batch.targets, output.class_logits[0].shape[1])
    segments = sum(target.num_segments for target in batch.targets)
    (own,) = ops.to_device([torch.tensor([weight, segments], dtype=torch.float64)], world.device)
    queries, segments = world.sum(own) / world.size
    return Divisors(queries, segments.clamp(min=1))


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


@contextmanager
def tensor_cores(precision: torch.dtype, device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in TF32 inside the block, if that loses nothing that was there.

    Under autocast, the factors of the loss's products come from 16-bit numbers; TF32 keeps ten bits of a number's
    fraction, as many as float16 has and more than bfloat16.

    Args:
        precision: of the forward pass; in float32, products stay in it
        device: on which is trained; a CPU stays as it is
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and precision != torch.float32:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type to compute in: the recipe's, or for "auto" bfloat16 on GPUs that have it, else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32
