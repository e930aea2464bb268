"""Deformable sampling on CUDA: equation 3 of Deformable DETR as a Triton kernel, and its gradient as another.

B batch, S cells of all levels, Q positions, L levels, P points per head and level, D channels of a head, H/W
height/width of a level.

A program computes one head of a block of positions. It reads each point's four cells where they lie, and adds them up
in registers in float32, whatever the type of the values: nothing of the samples' size is ever stored. Backward reads
the same cells again; the gradient of the values is added atomically, in float32 and in no fixed order, just as that of
`grid_sample` is on CUDA.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 16  # positions per program


@triton.jit
def point_of(locations, weights, index, present, height, width):
    """Position in cells of the level, its whole and its fractional part, and weight; 0 where it sees nothing."""
    x = tl.load(locations + 2 * index, mask=present, other=-1.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * index + 1, mask=present, other=-1.0).to(tl.float32) * height - 0.5
    weight = tl.load(weights + index, mask=present, other=0.0).to(tl.float32)
    near = present & (x >= -1) & (x < width) & (y >= -1) & (y < height)  # false where x or y is not a number
    x = tl.where(near, x, 0.0)
    y = tl.where(near, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return near, left.to(tl.int32), top.to(tl.int32), x - left, y - top, weight


@triton.jit
def block_of_program(S, Q, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Work of one program: its positions, channels and bags of points, and the start of its head's values."""
    head, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    q = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDE)[None, :]  # a power of two, as wide as DIM at least
    return q, channel, (image * Q + q) * HEADS + head, (image * S * HEADS + head) * DIM


@triton.jit
def level_of(levels, level):
    """Height, width and first cell."""
    return tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2)


@triton.jit
def corner_of(left, top, right_share, lower_share, near, height, width, CORNER: tl.constexpr):
    """One of the four cells around a point: its number in the level, whether it is there, its share along x and y."""
    column, row = left + CORNER % 2, top + CORNER // 2
    across = right_share if CORNER % 2 else 1 - right_share
    down = lower_share if CORNER // 2 else 1 - lower_share
    seen = near & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return row * width + column, seen, across, down


@triton.jit
def sum_points(
    values, levels, locations, weights, output,
    S, Q, HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """output[q] = sum over levels and points: weight * (bilinear mean of the values of four cells)."""
    q, channel, bag, first = block_of_program(S, Q, HEADS, DIM, BLOCK, WIDE)
    values += first
    total = tl.zeros((BLOCK, WIDE), dtype=tl.float32)
    for level in range(LEVELS):
        height, width, start = level_of(levels, level)
        for p in tl.static_range(POINTS):
            index = (bag * LEVELS + level) * POINTS + p
            near, left, top, right_share, lower_share, weight = point_of(
                locations, weights, index, q < Q, height, width
            )
            for corner in tl.static_range(4):
                number, seen, across, down = corner_of(left, top, right_share, lower_share, near, height, width, corner)
                cell = (start + number)[:, None] * (HEADS * DIM) + channel
                value = tl.load(values + cell, mask=seen[:, None] & (channel < DIM), other=0.0).to(tl.float32)
                total += (weight * down * across)[:, None] * value
    tl.store(output + bag[:, None] * DIM + channel, total, mask=(q < Q)[:, None] & (channel < DIM))


@triton.jit
def sum_points_backward(
    values, levels, locations, weights, output_grad, values_grad, locations_grad, weights_grad,
    S, Q, HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The three gradients, from the dot product of the output's gradient with the value of every corner."""
    q, channel, bag, first = block_of_program(S, Q, HEADS, DIM, BLOCK, WIDE)
    values += first
    values_grad += first
    present = (q < Q)[:, None] & (channel < DIM)
    grad = tl.load(output_grad + bag[:, None] * DIM + channel, mask=present, other=0.0).to(tl.float32)
    for level in range(LEVELS):
        height, width, start = level_of(levels, level)
        for p in tl.static_range(POINTS):
            index = (bag * LEVELS + level) * POINTS + p
            near, left, top, right_share, lower_share, weight = point_of(
                locations, weights, index, q < Q, height, width
            )
            x_grad = tl.zeros((BLOCK,), dtype=tl.float32)
            y_grad = tl.zeros((BLOCK,), dtype=tl.float32)
            weight_grad = tl.zeros((BLOCK,), dtype=tl.float32)
            for corner in tl.static_range(4):
                number, seen, across, down = corner_of(left, top, right_share, lower_share, near, height, width, corner)
                cell = (start + number)[:, None] * (HEADS * DIM) + channel
                visible = seen[:, None] & (channel < DIM)
                value = tl.load(values + cell, mask=visible, other=0.0).to(tl.float32)
                tl.atomic_add(values_grad + cell, (weight * down * across)[:, None] * grad, mask=visible, sem="relaxed")
                dot = tl.sum(value * grad, axis=1)
                weight_grad += down * across * dot
                x_grad += (down if corner % 2 else -down) * dot
                y_grad += (across if corner // 2 else -across) * dot
            tl.store(weights_grad + index, weight_grad, mask=q < Q)
            tl.store(locations_grad + 2 * index, x_grad * weight * width, mask=q < Q)
            tl.store(locations_grad + 2 * index + 1, y_grad * weight * height, mask=q < Q)


class KernelSampling(torch.autograd.Function):
    """Starts the kernels."""

    @staticmethod
    def forward(ctx, values: Tensor, locations: Tensor, weights: Tensor, level_sizes: list[tuple[int, int]]) -> Tensor:
        values, locations, weights = values.contiguous(), locations.contiguous(), weights.contiguous()
        levels = level_table(tuple(level_sizes), values.device)
        ctx.save_for_backward(values, levels, locations, weights)
        output = values.new_empty(*weights.shape[:3], values.shape[3])
        launch(sum_points, values, levels, locations, weights, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, levels, locations, weights = ctx.saved_tensors
        grads = torch.zeros_like(values, dtype=torch.float32), torch.empty_like(locations), torch.empty_like(weights)
        launch(sum_points_backward, values, levels, locations, weights, output_grad.contiguous(), *grads)
        return grads[0].to(values.dtype), grads[1], grads[2], None


def sample_by_kernel(values: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_sampling` on CUDA, for values in float32, bfloat16 and float16."""
    return KernelSampling.apply(values, locations, weights, level_sizes)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table that was first made for inference must serve training as well
def level_table(level_sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Height, width and first cell of each level, on the device: copied once per size, not once per call. [L, 3]"""
    starts = [sum(h * w for h, w in level_sizes[:i]) for i in range(len(level_sizes))]
    rows = [(*size, start) for size, start in zip(level_sizes, starts, strict=True)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def launch(
    kernel: triton.JITFunction, values: Tensor, levels: Tensor, locations: Tensor, weights: Tensor, *rest: Tensor
) -> None:
    """Run a kernel, one program per head, block of positions and image."""
    batch, queries, heads, num_levels, points = weights.shape
    dim = values.shape[3]
    if weights.numel() == 0:
        return
    with torch.cuda.device_of(values):
        kernel[heads, triton.cdiv(queries, BLOCK), batch](
            values, levels, locations, weights, *rest,
            values.shape[1], queries, heads, dim, num_levels, points, BLOCK, triton.next_power_of_2(dim),
        )  # fmt: skip
