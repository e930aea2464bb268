"""Small parts that the boxes of the model share; linear maps and a convolution by the fastest products at hand.

B batch, Q queries, S positions that are attended to, C channels, H/W height/width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from m2f_lab.products import linear_product, onednn_multiplies


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


def recomputed(function: Callable[..., Tensor], *arguments) -> Tensor:
    """Call a function whose intermediate results are not kept for the backward pass, but computed there again.

    That ends with the last thing that is needed: a product or convolution at the end of the function is not repeated.
    """
    return checkpoint(function, *arguments, use_reentrant=False) if torch.is_grad_enabled() else function(*arguments)


STRIP = 2**22  # numbers


def in_strips(function: Callable[[Tensor], Tensor], rows: Tensor, width: int) -> Tensor:
    """Apply a function of single rows to a strip of them at a time, if it widens them and they are on a CPU.

    What it computes in between is soon freed again. Tables as wide as that for the whole batch seldom find room among
    what is kept, and the process grows for them; strips of 16 MiB find room anywhere.

    Args:
        function: [n, C] → [n, D]; must not change its rows in place
        rows: [N, C]
        width: numbers per row at the function's widest.
    """
    most = max(STRIP // width, 1)
    if rows.device.type != "cpu" or len(rows) <= most:
        return function(rows)
    # Not `tensor_split`: there the gradient of each strip is a table for the whole batch, and all are added up.
    return torch.cat([function(strip) for strip in rows.split(most)])


def softmax_of_few(scores: Tensor) -> Tensor:
    """Softmax over a last axis of a dozen numbers, in float32 at least. [..., n] → [..., n]

    Where a processor's vectors hold more than that (16 with AVX-512), PyTorch's own takes one number after the other.
    """
    if scores.device.type != "cpu" or torch.compiler.is_compiling():
        return scores.softmax(dim=-1)
    return _SoftmaxOfFew.apply(scores.to(torch.promote_types(scores.dtype, torch.float32)))


class _SoftmaxOfFew(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor) -> Tensor:
        weights = (scores - scores.amax(-1, keepdim=True)).exp_()
        weights /= weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        of_scores = gradient * weights
        return of_scores.addcmul_(weights, of_scores.sum(-1, keepdim=True), value=-1)


class _Kept(torch.autograd.Function):
    """Keeps what the backward pass of a linear map or convolution needs, before that is computed: see `recomputed`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, keepers: list) -> Tensor:
        ctx.save_for_backward(x, weight)
        keepers.append(ctx)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _OneDnnLinear(torch.autograd.Function):
    """A linear map by oneDNN's matrix product; the gradient of the weight MKL computes as fast. [N, C] → [N, D]"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, keepers: list) -> Tensor:
        ctx.keepers = keepers
        return linear_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.keepers[0].saved_tensors
        of_x, (_, of_weight, of_bias, _) = ctx.keepers[0].needs_input_grad[0], ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            linear_product(gradient, weight.t()) if of_x else None,
            gradient.t() @ x if of_weight else None,
            gradient.sum(0) if of_bias else None,
            None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by the fastest matrix product at hand; equal to it but for rounding. [..., C] → [..., D]"""
    if not onednn_multiplies(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows, keepers = x.reshape(-1, x.shape[-1]), []
    if torch.is_grad_enabled():
        rows = _Kept.apply(rows, weight, keepers)
    return _OneDnnLinear.apply(rows, weight, bias, keepers).view(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """`nn.Linear` on `linear`; the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def speed_up_linears(model: nn.Module) -> None:
    """Let all linear maps of a model, whoever wrote them, run on `linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class _Convolution3x3(torch.autograd.Function):
    """A convolution whose weight gradient is nine matrix products. [B, C, H, W] → [B, D, H, W]

    Padded alike and laid row by row, input and gradient differ by a shift only, one for each place of the kernel. On a
    CPU with AVX2 and channels last, oneDNN's own kernel takes three times as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, keepers: list) -> Tensor:
        ctx.keepers = keepers
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.keepers[0].saved_tensors
        of_x = of_weight = None
        if ctx.keepers[0].needs_input_grad[0]:
            settings = [1, 1], [1, 1], [1, 1], False, [0, 0], 1  # stride, padding, dilation; nothing transposed
            of_x = torch.ops.aten.convolution_backward(gradient, x, weight, None, *settings, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            inputs = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, C)
            pitch, inputs = inputs.shape[2], inputs.flatten(0, 2)
            gradients = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, 2, 0, 2)).flatten(0, 2)
            shifts = [row * pitch + column for row in range(3) for column in range(3)]
            products = [gradients[: len(inputs) - shift].t() @ inputs[shift:] for shift in shifts]
            of_weight = torch.stack(products, dim=2).unflatten(2, (3, 3))
        return of_x, of_weight, None


class Convolution3x3(nn.Conv2d):
    """A padded 3 × 3 convolution without bias; `nn.Conv2d`, but trained faster in float32 on CPUs."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, D, H, W]"""
        on_cpu = x.device.type == "cpu" and torch.is_grad_enabled()
        if not on_cpu or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x)
        keepers = []
        return _Convolution3x3.apply(_Kept.apply(x, self.weight, keepers), self.weight, keepers)


def feedforward(dim: int, hidden_dim: int) -> nn.Sequential:
    """The two-layer perceptron of a transformer layer."""
    layers = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
    for layer in (layers[0], layers[2]):
        nn.init.xavier_uniform_(layer.weight)
    return layers


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
        self.out_proj = nn.Linear(dim, dim)
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
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, Q or S, C / heads)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
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
