"""Swin blocks: the parameters and numbers of the official ones, in less time and memory than timm's.

B images, S tokens of an image (H × W), W windows, N tokens of a window, C channels, D = C / heads.

timm pads a feature map to whole windows *after* the cyclic shift of shifted windows; the official code, and with it
every published checkpoint, pads before. The two agree only where nothing needs padding: at 512 × 512 features differ by
O(1). `PaddedFirst` restores the official order; weights load unchanged. What makes it fast, without changing a number:

- Query, key and value are computed before the windows are cut, so that padding is computed once and not at every
  place: at 512 × 512 that is a quarter of the tokens of an average block.
- Padding, shift, cut and the split into heads are one gather. Every token appears once: its gradient is a gather, too.
- An image whose branch stochastic depth drops goes without: nothing is computed only to be multiplied by zero.
- GELU, the attention weights and both norms are computed a second time in the backward pass instead of being kept: they
  are wide and cheap. So are the hidden features of the first stage, where a product has few channels to sum over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m2f_lab.model.layers import in_strips, recomputed

FEW_CHANNELS = 128  # of the first stage of Swin-T, -S and -B


class PaddedFirst(SwinTransformerBlock):
    """A Swin block that pads to whole windows before the cyclic shift, as the official code does."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H, W, C]"""
        x = add_branch(x, self._attend, self.drop_path1)
        return add_branch(x, self._perceptron, self.drop_path2)

    def _attend(self, x: Tensor) -> Tensor:
        """Normalisation and attention within shifted windows. [B, H, W, C] → [B, H, W, C]"""
        batch, height, width, _ = x.shape
        heads = self.attn.num_heads
        windows = cut_windows((batch, height, width), self.window_size, self.shift_size, heads, x.device)
        rows = recomputed(self._to_rows, x.flatten(0, 2))  # (B * S + 1, 3 * C)
        rows = IntoWindows.apply(rows.unflatten(1, (3 * heads, -1)).flatten(0, 1), windows)
        query, key, value = rows.view(3, batch, -1, heads, windows.num_tokens, rows.shape[1])
        dropout = self.attn.attn_drop.p if self.training else 0.0
        bias = self.attn._get_rel_pos_bias()[0]
        attended = recomputed(attend_within, query, key, value, bias, windows.mask, dropout)
        tokens = OutOfWindows.apply(attended.flatten(0, 3), windows).view(batch, height, width, -1)
        return self.attn.proj_drop(self.attn.proj(tokens))

    def _to_rows(self, tokens: Tensor) -> Tensor:
        """Query, key and value of all tokens [B * S, C], and of one more that is all the padding."""
        return self.attn.qkv(F.pad(self.norm1(tokens), (0, 0, 0, 1)))

    def _perceptron(self, x: Tensor) -> Tensor:
        rows = in_strips(self._perceptron_of_rows, x.flatten(0, 2), self.mlp.fc1.out_features)
        return rows.view_as(x)

    def _perceptron_of_rows(self, rows: Tensor) -> Tensor:
        if rows.shape[1] <= FEW_CHANNELS:
            return recomputed(lambda: self._after_hidden(self._to_hidden(rows)))
        return recomputed(self._after_hidden, recomputed(self._to_hidden, rows))

    def _to_hidden(self, rows: Tensor) -> Tensor:
        return self.mlp.fc1(self.norm2(rows))

    def _after_hidden(self, hidden: Tensor) -> Tensor:
        return self.mlp.drop2(self.mlp.fc2(self.mlp.norm(self.mlp.drop1(self.mlp.act(hidden)))))


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], drop_path: nn.Module) -> Tensor:
    """A residual branch under stochastic depth, computed for those images only that keep it. [B, ...] → [B, ...]

    Which ones is drawn on the CPU, so that no GPU needs to be asked.

    Source: Deep Networks with Stochastic Depth (Huang et al. 2016).
    """
    rate = getattr(drop_path, "drop_prob", 0.0) if drop_path.training else 0.0
    if rate == 0:
        return x + branch(x)
    kept = torch.empty(len(x)).bernoulli_(1 - rate).nonzero().flatten()
    if len(kept) == len(x):
        return torch.add(x, branch(x), alpha=1 / (1 - rate))
    if len(kept) == 0:
        return x
    kept = kept.to(x.device, non_blocking=True)
    return x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=1 / (1 - rate))


def attend_within(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Attention of every window to itself. [B, W, heads, N, D], thrice → [B, W, heads, N, D]

    Args:
        bias: by relative position. [heads, N, N]
        mask: added where the shift brought together what is no neighbour. [W, 1, N, N] or None
        dropout: share of the attention weights that are dropped
    """
    batch, windows, heads, tokens, dim = query.shape
    bias = bias.to(query.dtype)
    added = bias if mask is None else bias + mask.to(query.dtype)  # ([W,] heads, N, N)
    if query.device.type == "cpu" and added.requires_grad:
        # The CPU's fused kernel has no gradient for what is added to the scores; its stand-in is slower than this.
        query, key, value = (x.flatten(0, 2) for x in (query, key, value))
        scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=1 / math.sqrt(dim))
        # A new shape, but no view to autograd: for an addition in place to a view, it would copy the gradient.
        scores = torch.ops.aten._unsafe_view(scores, (batch, windows, heads, tokens, tokens)).add_(added)
        weights = F.dropout(scores.softmax(4, dtype=value.dtype), dropout)
        return (weights.flatten(0, 2) @ value).view(batch, windows, heads, tokens, dim)
    first = (batch, windows * heads) if mask is not None else (batch * windows, heads)  # what `added` broadcasts over
    query, key, value = (x.reshape(*first, tokens, dim) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=added.flatten(0, -3)[None], dropout_p=dropout
    )
    return attended.view(batch, windows, heads, tokens, dim)


class Windows(NamedTuple):
    """Where everything goes when a batch of feature maps is cut into windows.

    All but the mask count rows: of an image's tokens in the order [B, S, heads], or for query, key and value
    [B, S, 3, heads]; and of windows in the order [B, W, heads, N], or [3, B, W, heads, N]. One token more, behind all
    others, is the padding.

    Attributes:
        num_tokens: N
        into: the token row of every window row of query, key and value. [3 * B * W * heads * N]
        into_back: the window row of every token row of query, key and value, but of the padding. [B * S * 3 * heads]
        out: the window row of every token row. [B * S * heads]
        out_back: the token row of every window row; any for padding. [B * W * heads * N]
        padding: the window rows that are padding, P for each head. [heads, P]
        mask: 0 between neighbours, -100 between tokens that only the shift brought together. [W, 1, N, N], or None
    """

    num_tokens: int
    into: Tensor
    into_back: Tensor
    out: Tensor
    out_back: Tensor
    padding: Tensor
    mask: Tensor | None


@functools.lru_cache(maxsize=16)  # four stages, shifted or not, of two sizes of image
def cut_windows(
    shape: tuple[int, int, int], window: tuple[int, int], shift: tuple[int, int], heads: int, device: torch.device
) -> Windows:
    """Pad maps bottom and right to whole windows, shift them cyclically, and cut them.

    Args:
        shape: images, height and width. The other sizes are height and width, too.
    """
    with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training, too
        batch, height, width = shape
        num_tokens, total = window[0] * window[1], batch * height * width
        padded = F.pad(torch.arange(total).view(shape), (0, -width % window[1], 0, -height % window[0]), value=total)

        def cut(maps: Tensor) -> Tensor:
            """[B, h, w] → [B, W, N]"""
            maps = maps.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
            return maps.reshape(len(maps), -1, num_tokens)

        token = cut(padded.roll((-shift[0], -shift[1]), (1, 2)))[:, :, None]  # (B, W, 1, N)
        head = torch.arange(heads)[:, None]
        part = torch.arange(3).view(3, 1, 1, 1, 1)
        into = ((token * 3 + part) * heads + head).flatten()
        into_back = torch.empty((total + 1) * 3 * heads, dtype=torch.long)
        into_back[into] = torch.arange(len(into))
        into_back = into_back[: total * 3 * heads]
        is_padding = (token == total).expand(-1, -1, heads, -1)
        padding = torch.arange(is_padding.numel()).view_as(is_padding).transpose(0, 2)[is_padding.transpose(0, 2)]
        indices = {
            "into": into,
            "into_back": into_back,
            "out": into_back.view(total, 3, heads)[:, 0].flatten(),
            "out_back": (token.clamp(max=total - 1) * heads + head).flatten(),
            "padding": padding.view(heads, -1),
        }
        mask = None
        if any(shift):
            rows, columns = (_sides(*sizes) for sizes in zip(padded.shape[1:], window, shift, strict=True))
            side = cut(3 * rows[None, :, None] + columns)[0]  # (W, N)
            mask = torch.where(side[:, None, :, None] == side[:, None, None, :], 0.0, -100.0).to(device)
        return Windows(num_tokens, **{name: i.to(device, torch.int32) for name, i in indices.items()}, mask=mask)


def _sides(length: int, window: int, shift: int) -> Tensor:
    """Along one axis of a shifted map: 0 before the last window, and in it 1 before and 2 after the seam. [length]"""
    place = torch.arange(length)
    return (place >= length - window).long() + (place >= length - shift)


class IntoWindows(torch.autograd.Function):
    """Query, key and value rows of tokens, [(B * S + 1) * 3 * heads, D], into windows: [3 * B * W * heads * N, D]."""

    @staticmethod
    def forward(ctx, rows: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        return rows.index_select(0, windows.into)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        windows = ctx.windows
        real = len(windows.into_back)
        rows = gradient.new_empty(real + 3 * len(windows.padding), gradient.shape[1])
        torch.index_select(gradient, 0, windows.into_back, out=rows[:real])
        of_padding = gradient.unflatten(0, (3, -1))[:, windows.padding.long()]  # (3, heads, P, D)
        rows[real:] = of_padding.sum(2).flatten(0, 1)
        return rows, None


class OutOfWindows(torch.autograd.Function):
    """Rows of windows, [B * W * heads * N, D], back into the order of tokens, without padding: [B * S * heads, D]."""

    @staticmethod
    def forward(ctx, rows: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        return rows.index_select(0, windows.out)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        windows = ctx.windows
        rows = gradient.index_select(0, windows.out_back)
        return rows.index_fill_(0, windows.padding.flatten().long(), 0), None
