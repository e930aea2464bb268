"""Windows of feature maps, attention within them, and the mask of shifted windows, which is made once per size.

B images, H/W height/width, C channels, W windows, N tokens of a window, D = C / heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.ops.kept import kept
from m2f_lab.ops.switch import is_plain


def cut_windows(maps: Tensor, window: tuple[int, int]) -> Tensor:
    """[B, H, W, C] → [B, W, N, C]"""
    maps = maps.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # (B, rows, h, columns, w, C)
    return maps.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge_windows(windows: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Undo `cut_windows`. [B, W, N, C] → [B, *size, C]"""
    rows, columns = size[0] // window[0], size[1] // window[1]
    maps = windows.unflatten(2, window).unflatten(1, (rows, columns))  # (B, rows, columns, h, w, C)
    return maps.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def window_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D + bias) v, in every window and head.

    On a GPU it is `scaled_dot_product_attention`, one launch, of which no table of scores is kept. On a CPU, and with
    everything plain, it is the equation.

    Args:
        query: [B, W, N, heads, D]
        key: [B, W, N, heads, D]
        value: [B, W, N, heads, D]
        bias: added to the scores. [heads, N, N] or [W, heads, N, N]
        dropout: share of the attention weights that are dropped.

    Returns:
        [B, W, N, heads, D]

    Source: Swin Transformer (Liu et al. 2021), equation 4.
    """
    query, key, value = (x.transpose(2, 3) for x in (query, key, value))  # (B, W, heads, N, D)
    attend = by_equation if query.device.type == "cpu" or is_plain() else by_fused_attention
    return attend(query, key, value, bias, dropout).transpose(2, 3)


def by_equation(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """[B, W, heads, N, D]"""
    scores = query / math.sqrt(query.shape[4]) @ key.transpose(3, 4) + bias
    weights = F.dropout(scores.softmax(dim=4), dropout).to(value.dtype)
    return weights @ value


def by_fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """[B, W, heads, N, D]"""
    bias = bias.to(query.dtype).expand(*query.shape[:3], -1, -1).flatten(0, 1)  # (B*W, heads, N, N)
    windows = (x.flatten(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(*windows, bias, dropout).unflatten(0, value.shape[:2])


@kept(16)  # four stages of two sizes of image, on two devices
def shift_mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """Mask of shifted windows: 0 between neighbours, -100 where only the shift brought two tokens together.

    Args:
        size: height and width of the padded feature map.

    Returns:
        [W, 1, N, N]
    """
    rows, columns = (_bands(*sizes) for sizes in zip(size, window, shift, strict=True))
    bands = cut_windows((3 * rows[:, None] + columns)[None, :, :, None], window)[0, :, :, 0]  # (W, N)
    return torch.where(bands[:, None, :, None] == bands[:, None, None, :], 0.0, -100.0).to(device)


def _bands(length: int, window: int, shift: int) -> Tensor:
    """Along one axis of a shifted map: 0 before the last window, and in it 1 before and 2 after the seam. [length]"""
    place = torch.arange(length)
    return (place >= length - window).long() + (place >= length - shift)
