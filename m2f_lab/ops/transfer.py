"""Transfers between CPU and GPU that nobody waits for longer than necessary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def to_cpu(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to copy tensors to the CPU, in one piece of the type of the first.

    Returns:
        A function that waits for the copy, though not for what was queued on the GPU after it, and returns them.
    """
    packed = torch.cat([tensor.flatten().to(tensors[0].dtype) for tensor in tensors])
    sizes, shapes = [tensor.numel() for tensor in tensors], [tensor.shape for tensor in tensors]
    copy, arrived = packed.to("cpu", non_blocking=True), None  # pinned memory, if from a GPU
    if packed.device.type == "cuda":
        arrived = torch.cuda.Event()
        arrived.record()

    def wait() -> list[Tensor]:
        if arrived:
            arrived.synchronize()
        return [piece.view(shape) for piece, shape in zip(copy.split(sizes), shapes, strict=True)]

    return wait


def to_device(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Copy tensors of one type to a device in one piece, without waiting for it."""
    if device.type == "cpu":
        return tensors
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
    pieces = packed.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
