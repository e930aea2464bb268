"""Swin blocks with the parameters of timm's and the numbers of the official ones.

B images, H/W height/width, C channels, W windows, N tokens of a window, D = C / heads.

timm pads a feature map to whole windows *after* the cyclic shift of shifted windows; the official code, and with it
every published checkpoint, pads before. The two agree only where nothing needs padding: at 512 × 512 features differ by
O(1). `SwinBlock` restores the official order; weights load unchanged.

Source: Swin Transformer (Liu et al. 2021), section 3.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from m2f_lab.ops import add_branch, checkpointed, cut_windows, merge_windows, shift_mask, window_attention


class SwinBlock(nn.Module):
    """Attention within windows and a perceptron, both residual; made of the parts of a timm block, under its names."""

    def __init__(self, block: SwinTransformerBlock) -> None:
        super().__init__()
        self.window, self.shift = tuple(block.window_size), tuple(block.shift_size)
        self.norm1, self.attn, self.drop_path1 = block.norm1, block.attn, block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H, W, C]"""
        x = add_branch(x, self.attend, drop_rate(self.drop_path1))
        return add_branch(x, self.transform, drop_rate(self.drop_path2))

    def attend(self, x: Tensor) -> Tensor:
        """Normalisation, and attention of the (shifted) windows to themselves. [B, H, W, C] → [B, H, W, C]"""
        height, width = x.shape[1:3]
        padded = height + -height % self.window[0], width + -width % self.window[1]
        query, key, value = self.project_windows(x).unbind(3)  # (B, W, N, heads, D) each
        bias = self.position_bias()
        if any(self.shift):
            bias = bias + shift_mask(padded, self.window, self.shift, x.device)  # (W, heads, N, N)
        dropout = self.attn.attn_drop.p if self.training else 0.0
        attended = checkpointed(window_attention, query, key, value, bias, dropout).flatten(3)
        tokens = merge_windows(attended, self.window, padded)
        if any(self.shift):
            tokens = tokens.roll(self.shift, (1, 2))
        if padded != (height, width):
            tokens = tokens[:, :height, :width]
        return self.attn.proj_drop(self.attn.proj(tokens))

    def project_windows(self, x: Tensor) -> Tensor:
        """Normalise, pad bottom and right, shift, cut; then query, key and value. → [B, W, N, 3, heads, D]"""
        height, width = x.shape[1:3]
        x = F.pad(self.norm1(x), (0, 0, 0, -width % self.window[1], 0, -height % self.window[0]))
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        return self.attn.qkv(cut_windows(x, self.window)).unflatten(3, (3, self.attn.num_heads, -1))

    def position_bias(self) -> Tensor:
        """Learned score of every pair of tokens, by their relative position. [heads, N, N]"""
        return self.attn.relative_position_bias_table[self.attn.relative_position_index].permute(2, 0, 1)

    def transform(self, x: Tensor) -> Tensor:
        """Normalisation and perceptron. [B, H, W, C] → [B, H, W, C]"""
        return self.mlp.drop2(checkpointed(self.hidden_features, x, then=self.mlp.fc2))

    def hidden_features(self, x: Tensor) -> Tensor:
        return self.mlp.norm(self.mlp.drop1(self.mlp.act(self.mlp.fc1(self.norm2(x)))))


def replace_blocks(network: SwinTransformer) -> None:
    """Replace all blocks of a timm network by `SwinBlock`s of the same parameters."""
    for stage in network.layers:
        for i, block in enumerate(stage.blocks):
            stage.blocks[i] = SwinBlock(block)


def drop_rate(drop_path: nn.Module) -> float:
    """Probability with which an image loses a branch now; timm has an `nn.Identity` where it is zero."""
    return 0.0 if isinstance(drop_path, nn.Identity) or not drop_path.training else drop_path.drop_prob
