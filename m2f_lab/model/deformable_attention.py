"""Multi-scale deformable attention: every position looks at a few points of every level, and learns where they lie.

B batch, S positions of all levels together, L levels, P points per head and level, C channels, D = C / heads,
H/W height/width of a level.

Source: Deformable DETR (Zhu et al. 2021), section 4.1. No compiled operator is needed.
"""

import math

import torch
from torch import Tensor, nn

from m2f_lab.ops import Linear, SamplingPlan, checkpointed, deformable_sampling


class DeformableAttention(nn.Module):
    """Deformable self-attention over the positions of several feature levels."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = Linear(dim, num_heads * num_levels * num_points)
        self.value_projection = Linear(dim, dim)
        self.output_projection = Linear(dim, dim)
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
    ) -> tuple[Tensor, SamplingPlan]:
        """Attend.

        Args:
            features: what is looked at. [B, S, C]
            positions: their embeddings; features plus positions decide where to look. [S, C]
            reference_points: (x, y) in [0, 1] of every position. [S, 2]
            level_sizes: height and width of each level.

        Returns:
            The attended features [B, S, C], and the points whose weighted values they are.
        """
        values = self.value_projection(features).unflatten(2, (self.num_heads, -1))  # (B, S, heads, D)
        points = SamplingPlan(level_sizes, reference_points, *self.offsets_and_scores(features, positions))
        return self.output_projection(deformable_sampling(values, points).flatten(2)), points

    def offsets_and_scores(self, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets of the points, in pixels [B, S, heads, L, P, 2], and scores of their weights [B, S, heads, L, P].

        In the type of the parameters under autocast, too: in bfloat16 an offset of 10 pixels is wrong by up to 1/32.
        """
        with torch.autocast(features.device.type, enabled=False):
            offsets, scores = checkpointed(torch.add, features, positions, then=self._project)
        shape = (self.num_heads, self.num_levels, self.num_points)
        return offsets.unflatten(2, (*shape, 2)), scores.unflatten(2, shape)

    def _project(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        queries = queries.to(self.sampling_offsets.weight.dtype)
        return self.sampling_offsets(queries), self.attention_weights(queries)
