"""Several processes, one per GPU, as `torchrun` starts them; a single process otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)  # the others wait while the main one writes and reports; a lost one is noticed


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

    def from_main(self, function: Callable[[], T]) -> T:
        """Call a function in the main process alone; all return what it returned, or raise what it raised.

        Args:
            function: returns something small, which is pickled on its way to the other processes.
        """
        if self.size == 1:
            return function()
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def broadcast(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give all processes the main one's tensors; those of the others are ignored. They arrive on `device`."""
        if self.size == 1:
            return tensors
        kinds = self.from_main(lambda: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        received = {}
        for name, (shape, dtype) in kinds.items():
            own = tensors[name].to(self.device) if self.is_main else torch.empty(shape, dtype=dtype, device=self.device)
            received[name] = own.contiguous()
            dist.broadcast(received[name], src=0)
        return received

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that gradients are averaged over all processes; a single process gets the model itself.

        On GPUs, batch norms measure the whole batch, over all processes; PyTorch cannot do that on CPUs, where each
        process measures its own images.
        """
        if self.size == 1:
            return model
        if self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            # Gradients lie where they are sent from, instead of being copied there. The graph is not declared static:
            # the model may be anyone's, and change as it trains.
            gradient_as_bucket_view=True,
        )

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes, without waiting for a GPU."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


def is_main_process() -> bool:
    """True in the process that writes files; `torchrun` numbers processes."""
    return int(os.environ.get("RANK", 0)) == 0


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
