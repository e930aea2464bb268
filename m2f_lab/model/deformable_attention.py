"""Multi-scale deformable attention: every position looks at a few points of every level, and learns where they lie.

B batch, S positions of all levels together, L levels, P points per head and level, C channels, D = C / heads,
H/W height/width of a level.

Source: Deformable DETR (Zhu et al. 2021), section 4.1. No compiled operator is needed.
"""

import functools
import importlib.util
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_lab.model.deformable_bags import sample_by_bags
from m2f_lab.model.layers import linear, recomputed, softmax_of_few


def deformable_sampling(
    values: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum values, read at fractional locations of every level, with weights.

    CPUs read bags of rows, CUDA devices run a kernel of ours; both add up in float32 at least. Where the kernel cannot
    run, PyTorch's `grid_sample` does the work. The log says which of them it is.

    Args:
        values: the levels flattened one behind the other. [B, S, heads, D]
        level_sizes: height and width of each level; their areas add up to S.
        locations: (x, y) in [0, 1] of the image; outside it values are zero. [B, Q, heads, L, P, 2]
        weights: attention weights. [B, Q, heads, L, P]

    Returns:
        The weighted sum per position and head, in the type of the values. [B, Q, heads, D]

    Source: Deformable DETR, equation 3.
    """
    if values.device.type == "cpu":
        announce(logging.INFO, "Deformable attention on the CPU reads bags of rows.")
        return sample_by_bags(values, level_sizes, locations, weights)
    obstacle = obstacle_to_kernel(values.device.type, values.dtype)
    if obstacle:
        announce(logging.WARNING, f"Deformable attention runs without its kernel, through grid_sample: {obstacle}.")
        return sample_by_grid(values, level_sizes, locations, weights)
    from m2f_lab.model.deformable_kernel import sample_by_kernel  # here: it imports Triton, which is not everywhere

    announce(logging.INFO, "Deformable attention runs its Triton kernel.")
    return sample_by_kernel(values, level_sizes, locations, weights)


@functools.cache
def announce(level: int, message: str) -> None:
    """Log a message once per process."""
    logging.getLogger("m2f_lab").log(level, message)


def obstacle_to_kernel(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run there, if it cannot."""
    if device != "cuda":
        return f"there is none for the device {device!r}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, not in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return 'triton is missing (pip install "m2f_lab[triton]")'
    return None


def sample_by_grid(values: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_sampling` as it is usually written without a kernel; runs everywhere, and is what others equal."""
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


class DeformableAttention(nn.Module):
    """Deformable self-attention over the positions of several feature levels."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_projection = nn.Linear(dim, dim)
        self.output_projection = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At first head h looks into direction h of a star, point p at p + 1 pixels, all with equal weight."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=1)  # (heads, 2)
        direction = direction / direction.abs().amax(dim=1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        star = direction[:, None, None, :] * distance[None, None, :, None]  # (heads, 1, P, 2)
        star = star.expand(self.num_heads, self.num_levels, self.num_points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(star.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_projection, self.output_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, features: Tensor, positions: Tensor, reference_points: Tensor, level_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            features: what is looked at. [B, S, C]
            positions: their embeddings; features plus positions decide where to look. [S, C]
            reference_points: (x, y) in [0, 1] of every position. [S, 2]
            level_sizes: height and width of each level.

        Returns:
            The attended features [B, S, C], the sampling locations [B, S, heads, L, P, 2], (x, y) in [0, 1], and
            their weights [B, S, heads, L, P], which sum to 1 over L and P.
        """
        values = self.value_projection(features).unflatten(2, (self.num_heads, -1))  # (B, S, heads, D)
        offsets, scores = self.aim(features, positions)
        # Offsets are in pixels of the level they point into. What is the same for all points is written out for each of
        # them: a CPU then runs along L * P * 2 numbers at a time, not along 2, which is nine times as fast.
        pixels = reference_points.new_tensor([(width, height) for height, width in level_sizes])  # (L, 2)
        pixels = pixels[:, None].repeat(1, self.num_points, 1)  # (L, P, 2)
        centres = reference_points[:, None, None, None].repeat(1, 1, *pixels.shape[:2], 1)  # (S, 1, L, P, 2)
        locations = torch.addcdiv(centres, offsets, pixels)
        weights = softmax_of_few(scores).unflatten(3, (self.num_levels, self.num_points))  # (B, S, heads, L, P)
        attended = deformable_sampling(values, level_sizes, locations, weights)
        return self.output_projection(attended.flatten(2)), locations, weights

    def aim(self, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where to look: offsets [B, S, heads, L, P, 2] in pixels, and how much: scores [B, S, heads, L * P].

        Both are linear maps of the same sum: one product instead of two, and the sum need not be kept.
        """
        maps = self.sampling_offsets, self.attention_weights
        weight, bias = torch.cat([each.weight for each in maps]), torch.cat([each.bias for each in maps])
        both = recomputed(lambda: linear(features + positions, weight, bias))
        offsets, scores = both.split([each.out_features for each in maps], dim=2)
        offsets = offsets.unflatten(2, (self.num_heads, self.num_levels, self.num_points, 2))
        return offsets, scores.unflatten(2, (self.num_heads, -1))
