"""Deformable sampling: weighted sums of values at fractional locations of several levels.

B batch, S cells of all levels together, Q positions, L levels, P points per head and level, D channels of a head,
H/W height/width of a level.
"""

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.ops.deformable_bags import sample_by_bags
from m2f_lab.ops.switch import is_plain


def deformable_sampling(
    values: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum values, read at fractional locations of every level, with weights.

    CPUs read bags of rows, CUDA devices run a Triton kernel; both add up in float32 at least. Where the kernel cannot
    run, the plain version does the work: `sample_by_grid`. The log says which of them runs.

    Args:
        values: the levels flattened one behind the other. [B, S, heads, D]
        level_sizes: height and width of each level; their areas add up to S.
        locations: (x, y) in [0, 1] of the image; outside it values are zero. [B, Q, heads, L, P, 2]
        weights: attention weights. [B, Q, heads, L, P]

    Returns:
        The weighted sum per position and head, in the type of the values. [B, Q, heads, D]

    Source: Deformable DETR (Zhu et al. 2021), equation 3.
    """
    if is_plain("deformable_sampling"):
        return sample_by_grid(values, level_sizes, locations, weights)
    if values.device.type == "cpu":
        announce(logging.INFO, "Deformable attention on the CPU reads bags of rows.")
        return sample_by_bags(values, level_sizes, locations, weights)
    reason = why_no_kernel(values.device.type, values.dtype)
    if reason:
        announce(logging.WARNING, f"Deformable attention runs without its kernel, through grid_sample: {reason}.")
        return sample_by_grid(values, level_sizes, locations, weights)
    from m2f_lab.ops.deformable_kernel import sample_by_kernel  # here: it imports Triton, which is not everywhere

    announce(logging.INFO, "Deformable attention runs its Triton kernel.")
    return sample_by_kernel(values, level_sizes, locations, weights)


def sample_by_grid(values: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_sampling`, plain: equation 3 with `grid_sample`. Runs everywhere."""
    batch, _, heads, dim = values.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, L, P, 2)
    shares = weights.transpose(1, 2).flatten(0, 1)  # (B * heads, Q, L, P)
    total = values.new_zeros(batch * heads, dim, queries)
    for level, (value, (height, width)) in enumerate(
        zip(values.split([h * w for h, w in level_sizes], dim=1), level_sizes, strict=True)
    ):
        maps = value.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        sampled = F.grid_sample(
            maps, grids[:, :, level].to(maps.dtype), mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (B * heads, D, Q, P)
        total = total + (sampled * shares[:, None, :, level]).sum(dim=3)
    return total.to(values.dtype).reshape(batch, heads, dim, queries).permute(0, 3, 1, 2)


def why_no_kernel(device: str, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernel cannot run on a device and type; None if it can."""
    if device != "cuda":
        return f"there is none for the device {device!r}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, not in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return 'triton is missing (pip install "m2f_lab[triton]")'
    return None


@functools.cache
def announce(level: int, message: str) -> None:
    """Log a message once per process."""
    logging.getLogger("m2f_lab").log(level, message)
