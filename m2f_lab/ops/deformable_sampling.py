"""Deformable sampling: weighted sums of values at fractional locations of several levels.

B batch, S cells of all levels together, Q positions, L levels, P points per head and level, D channels of a head,
H/W height/width of a level.
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.ops.deformable_bags import sample_by_bags
from m2f_lab.ops.switch import is_plain


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """Points that positions look at, as linear maps give them: pixels of offset, and scores.

    Attributes:
        level_sizes: height and width of each level.
        centres: reference points, (x, y) in [0, 1]. [Q, 2]
        offsets: (x, y) in pixels of the level that is read. [B, Q, heads, L, P, 2]
        scores: logits of the weights. [B, Q, heads, L, P]
    """

    level_sizes: list[tuple[int, int]]
    centres: Tensor
    offsets: Tensor
    scores: Tensor

    @property
    def locations(self) -> Tensor:
        """(x, y) in [0, 1] of the image. [B, Q, heads, L, P, 2]"""
        # Sizes and centres are repeated: a CPU is slow at broadcasting pairs.
        pairs = [(w, h) for h, w in self.level_sizes for _ in range(self.offsets.shape[4])]
        if self.centres.device.type == "cpu":
            pixels = self.centres.new_tensor(pairs)
        else:  # a list would be copied to the device, and the host would wait for it
            pixels = torch.stack([self.centres.new_full((), side) for pair in pairs for side in pair])
        pixels = pixels.view(self.offsets.shape[3:])
        return self.centres[:, None, None, None].repeat(1, 1, *pixels.shape[:2], 1) + self.offsets / pixels

    @property
    def weights(self) -> Tensor:
        """Attention weights, which sum to 1 over L and P. [B, Q, heads, L, P]"""
        return self.scores.flatten(3).softmax(dim=3).view(self.scores.shape)


def deformable_sampling(values: Tensor, points: SamplingPlan) -> Tensor:
    """Sum values, read at fractional locations of every level, with weights.

    CPUs read bags of rows. CUDA devices run a Triton kernel, which finds locations and weights by itself; both add up
    in float32 at least. The kernel's gradient of the values has no fixed order of summation: where PyTorch is to use
    deterministic algorithms, CUDA devices read bags as well. Where the kernel cannot run, the plain version does the
    work: `sample_by_grid`. The log says which of them runs.

    Args:
        values: the levels flattened one behind the other. [B, S, heads, D]
        points: where to read, and how much each point counts; the areas of its levels add up to S.

    Returns:
        The weighted sum per position and head, in the type of the values. [B, Q, heads, D]

    Source: Deformable DETR (Zhu et al. 2021), equation 3.
    """
    device = values.device.type
    if is_plain("deformable_sampling"):
        return sample_by_grid(values, points.level_sizes, points.locations, points.weights)
    if device == "cpu" or (device == "cuda" and torch.are_deterministic_algorithms_enabled()):
        announce(logging.INFO, f"Deformable attention reads bags of rows on the device {device!r}.")
        return sample_by_bags(values, points.level_sizes, points.locations, points.weights)
    reason = why_no_kernel(device, values.dtype)
    if reason:
        announce(logging.WARNING, f"Deformable attention runs without its kernel, through grid_sample: {reason}.")
        return sample_by_grid(values, points.level_sizes, points.locations, points.weights)
    from m2f_lab.ops.deformable_kernel import sample_by_kernel  # here: it imports Triton, which is not everywhere

    announce(logging.INFO, "Deformable attention runs its Triton kernel.")
    return sample_by_kernel(values, points.level_sizes, points.centres, points.offsets, points.scores)


def sample_by_grid(values: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_sampling`, plain: equation 3 with `grid_sample`. Runs everywhere.

    Locations [B, Q, heads, L, P, 2] are (x, y) in [0, 1] of the image, outside of which values are zero; weights
    [B, Q, heads, L, P].
    """
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
