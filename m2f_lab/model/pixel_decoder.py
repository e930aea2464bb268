"""The pixel decoder: turns the backbone's pyramid into three levels to attend to and one map of mask features.

B batch, C channels, S positions of strides 32, 16 and 8 together, H/W height/width.

Source: Mask2Former (Cheng et al. 2022), sections 3.2.2 and 4.1; Deformable DETR (Zhu et al. 2021).
"""

import torch
from torch import Tensor, nn

from m2f_lab.model.deformable_attention import DeformableAttention
from m2f_lab.model.layers import Perceptron, sine_positions
from m2f_lab.ops import checkpointed
from m2f_lab.recipes import ModelConfig
from m2f_lab.structures import cell_centres, resize

NUM_LEVELS = 3  # strides 32, 16 and 8, in this order everywhere
NUM_GROUPS = 32


class EncoderLayer(nn.Module):
    """Deformable self-attention over all three levels, then a perceptron; each added and normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.attention = DeformableAttention(dim, config.num_heads, NUM_LEVELS, config.num_sampling_points)
        self.attention_norm = nn.LayerNorm(dim)
        self.feedforward = Perceptron(dim, config.encoder_feedforward_dim)
        self.feedforward_norm = nn.LayerNorm(dim)

    def forward(
        self, features: Tensor, positions: Tensor, reference_points: Tensor, level_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """Features [B, S, C] in and out; the other arguments are those of `DeformableAttention`."""
        attended, _ = self.attention(features, positions, reference_points, level_sizes)
        features = self.attention_norm(features + attended)
        return self.feedforward_norm(features + self.feedforward(features))


class PixelDecoder(nn.Module):
    """Deformable encoder over strides 32, 16, 8, and one feature-pyramid step up to stride 4.

    Args:
        in_channels: channels of the backbone's features at strides 4, 8, 16, 32.
        config: the architecture.
    """

    def __init__(self, in_channels: list[int], config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(NUM_GROUPS, dim))
            for channels in reversed(in_channels[1:])
        )
        self.level_embedding = nn.Parameter(torch.empty(NUM_LEVELS, dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.lateral = nn.Sequential(nn.Conv2d(in_channels[0], dim, 1, bias=False), nn.GroupNorm(NUM_GROUPS, dim))
        self.output = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(NUM_GROUPS, dim), nn.ReLU()
        )
        self.mask_projection = nn.Conv2d(dim, config.mask_dim, 1)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        nn.init.normal_(self.level_embedding)
        for projection in self.input_projections:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for convolution in (self.lateral[0], self.output[0], self.mask_projection):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_projection.bias)

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode.

        Args:
            pyramid: the backbone's features at strides 4, 8, 16, 32. [B, C_i, H / stride, W / stride]

        Returns:
            Mask features [B, mask_dim, H/4, W/4], and the levels at strides 32, 16, 8 [B, C, H / stride, W / stride].
        """
        stride4, *coarse = pyramid
        inputs = [project(x) for project, x in zip(self.input_projections, reversed(coarse), strict=True)]
        sizes = [(x.shape[2], x.shape[3]) for x in inputs]
        features = torch.cat([x.flatten(2).transpose(1, 2) for x in inputs], dim=1)  # (B, S, C)
        positions = torch.cat([
            sine_positions(size, features.shape[2], features.device).to(embedding.dtype) + embedding
            for size, embedding in zip(sizes, self.level_embedding, strict=True)
        ])  # (S, C)  # fmt: skip
        reference_points = torch.cat([cell_centres(size, features.device) for size in sizes])  # (S, 2)

        for layer in self.layers:
            features = layer(features, positions, reference_points, sizes)

        levels = [
            level.transpose(1, 2).unflatten(2, size)
            for level, size in zip(features.split([h * w for h, w in sizes], dim=1), sizes, strict=True)
        ]
        return checkpointed(self._project, checkpointed(self._merge, stride4, levels[-1])), levels

    def _merge(self, stride4: Tensor, level: Tensor) -> Tensor:
        """Feature-pyramid step up to stride 4, and its convolution. → [B, C, H/4, W/4]"""
        return self.output[0](self.lateral(stride4) + resize(level, (stride4.shape[2], stride4.shape[3])))

    def _project(self, merged: Tensor) -> Tensor:
        """Mask features of what that convolution returns. → [B, mask_dim, H/4, W/4]"""
        return self.mask_projection(self.output[1:](merged))
