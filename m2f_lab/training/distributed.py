"""Several processes, one per GPU, as `torchrun` starts them; a single process otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(hours=2)  # the other processes wait while the main one writes and reports


@dataclass(frozen=True)
class DistributedContext:
    """This process among those that train together.

    Attributes:
        rank: its number, 0…size - 1; the main process, number 0, writes files and calls callbacks.
        size: number of processes.
        device: the device of its model.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that gradients are averaged over all processes; a single process gets the model itself."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes, without waiting for a GPU."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


@contextmanager
def distributed_context() -> Iterator[DistributedContext]:
    """Join the processes that `torchrun` started, over NCCL on GPUs and gloo on CPUs, and leave them at the end."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield DistributedContext(0, 1, device)
        return
    joins = not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield DistributedContext(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if joins:
            dist.destroy_process_group()
