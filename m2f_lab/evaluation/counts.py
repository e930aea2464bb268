"""Counts of several processes."""

import torch
import torch.distributed
from torch import Tensor


def summed_over_processes(counts: Tensor, num_images: int) -> tuple[Tensor, int]:
    """Add up what all processes of `torch.distributed` counted; each of them gets the sum.

    Args:
        counts: int64 or float64, of any shape
        num_images: on how many images
    """
    packed = torch.cat([counts.flatten(), counts.new_tensor([num_images])])
    packed = packed.cuda() if torch.distributed.get_backend() == "nccl" else packed
    torch.distributed.all_reduce(packed)
    return packed[:-1].view_as(counts).cpu(), int(packed[-1])
