"""Small parts that the boxes of the model share.

B batch, Q queries, S positions that are attended to, C channels, D = C / heads, H/W height/width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_lab.ops import Linear, checkpointed, copy_of, kept, linear


@kept(6)  # three levels of two sizes of image
def sine_positions(size: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """Fixed position embeddings: sines and cosines of y in the first half of the channels, of x in the second.

    Args:
        size: height and width of the feature map.
        dim: channels; divisible by 4.

    Returns:
        One embedding per position, in float32. [H * W, C]

    Source: DETR (Carion et al. 2020), appendix A.4; coordinates run over (0, 2π].
    """
    frequency = 10000 ** (torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))  # (C / 4)

    def along(length: int) -> Tensor:
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1e-6) * 2 * math.pi
        angle = position[:, None] / frequency  # (length, C / 4)
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)  # (length, C / 2), sine and cosine interleaved

    height, width = size
    y = along(height)[:, None].expand(height, width, dim // 2)
    x = along(width)[None, :].expand(height, width, dim // 2)
    return torch.cat([y, x], dim=2).flatten(0, 1)


class Perceptron(nn.Sequential):
    """Two-layer perceptron [..., C] → [..., C] whose hidden features are not kept for the backward pass."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(Linear(dim, hidden_dim), nn.ReLU(), Linear(hidden_dim, dim))
        for layer in (self[0], self[2]):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(lambda x: self[1](self[0](x)), x, then=self[2])


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) with the parameters of `torch.nn.MultiheadAttention`.

    It runs on `scaled_dot_product_attention`, and one boolean mask is broadcast over the heads: the published code
    copies that mask for each of them.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None, return_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: [B, Q, C]
            key: [B, S, C]
            value: [B, S, C]
            blocked: True where a query must not look; no row may be blocked everywhere. bool [B, Q, S]
            return_weights: also return the attention weights, which are otherwise never built.

        Returns:
            The attended values [B, Q, C] and the softmax weights per head [B, heads, Q, S] or None.
        """
        dim, weight, bias = query.shape[2], copy_of(self.in_proj_weight), copy_of(self.in_proj_bias)
        inputs, sizes = (query, key, value), (dim, dim, dim)
        if key is query:  # self-attention projects both at once
            inputs, sizes = (query, value), (2 * dim, dim)
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, Q or S, D)
            for x, own_weight, own_bias in zip(inputs, weight.split(sizes), bias.split(sizes), strict=True)
            for part in linear(x, own_weight, own_bias).split(dim, dim=2)
        )
        allowed = None if blocked is None else ~blocked.unsqueeze(1)  # (B, 1, Q, S)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not return_weights:
            return output, None
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[3])
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        return output, scores.softmax(dim=3)
