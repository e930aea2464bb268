"""Deformable sampling on CUDA: equations 2 and 3 of Deformable DETR as a Triton kernel, their gradients as another.

B batch, S cells of all levels, Q positions, L levels, P points per head and level, D channels of a head, H/W
height/width of a level. A row is one position and head; a sample is one point of any level.

A program computes all heads of a few positions, one after the other as they lie in memory. Offsets and scores are read
as the linear maps wrote them: softmax, locations and the bilinear mean happen in registers, in float32 whatever the
types of the inputs, and nothing of the samples' size is ever stored. A few lanes share a row. Tensors of rows have the
shape [ROWS, LANES]: each lane computes what all channels of the row need, and reads a vector of its own channels,
[PARTS, ROWS, LANES, VECTOR].

Backward reads the same cells again. The gradient of the values is added atomically, in float32 and in no fixed order,
just as that of `grid_sample` is on CUDA. It lies between margins that are wide enough for every corner of every point:
a corner outside of its level adds zeros to some other cell, which needs no branch.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = tl.constexpr(1.4426950408889634)


def tuned(shapes: list[tuple[int, int]], **options: list[str]) -> Callable:
    """Choose the channels of a lane and the warps of a program by timing them once for each kind of model.

    Triton's interpreter takes the first.
    """
    configs = [triton.Config({"CHANNELS": c, "THREADS": 32 * warps}, num_warps=warps) for c, warps in shapes]

    def decorate(kernel: Callable) -> triton.runtime.Autotuner:
        chosen = configs if isinstance(kernel, triton.JITFunction) else configs[:1]
        return triton.autotune(chosen, key=["HEADS", "DIM", "LEVELS", "POINTS"], **options)(kernel)

    return decorate


@triton.jit
def rows_of_program(Q, HEADS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Position and head of each row, its number among those of all images, and whether it is one. [ROWS, LANES]"""
    row = tl.broadcast_to((tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], (ROWS, LANES))
    present = row < Q * HEADS
    row = tl.where(present, row, 0)  # computes what the first does, and writes nothing
    return row // HEADS, row % HEADS, (tl.program_id(1).to(tl.int64) * Q) * HEADS + row, present


@triton.jit
def channels_of_lanes(PARTS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, SPREAD: tl.constexpr):
    """Channels of a lane: VECTOR neighbours, PARTS times; spread, every LANES-th. [PARTS, 1, LANES, VECTOR]"""
    part = tl.arange(0, PARTS)[:, None, None, None]
    lane = tl.arange(0, LANES)[None, None, :, None]
    if SPREAD:
        return (part * LANES) | lane  # "or" hides from Triton that lanes are neighbours, which it would give one lane
    else:
        return (part * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, None, :]


@triton.jit
def softmax_of_rows(scores, SAMPLES: tl.constexpr, LANES: tl.constexpr, PADDED: tl.constexpr):
    """Numbers and exponentials of a lane's samples [ROWS, LANES, n]; highest score, one over the sum [ROWS, 1]."""
    EACH: tl.constexpr = 1 if PADDED < LANES else PADDED // LANES
    number = tl.arange(0, LANES)[None, :, None] * EACH + tl.arange(0, EACH)[None, None, :]
    score = tl.load(scores[:, :, None] + number, mask=number < SAMPLES, other=float("-inf")).to(tl.float32) * LOG2_E
    highest = tl.max(tl.max(score, axis=2), axis=1)[:, None]
    power = tl.exp2(score - highest[:, :, None])
    return number, power, highest, 1 / tl.sum(tl.sum(power, axis=2), axis=1)[:, None]


@triton.jit
def level_of(levels, level):
    """Height, width and first cell."""
    return tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2)


@triton.jit
def along(pixel, size):
    """Along one side: cell before a point, share of the next, whether there is either, whether the point sees any.

    A point that sees nothing lies where both have no share; so does one that is not a number.
    """
    near = tl.where(pixel >= -1, tl.minimum(pixel, size.to(tl.float32)), -1.0)
    whole = tl.floor(near)
    cell = whole.to(tl.int32)
    return cell, near - whole, (cell >= 0) & (cell < size), cell + 1 < size, near == pixel


@triton.jit
def read(values, seen, channel, DIM: tl.constexpr):
    """Channels of a corner, zeros where there is none."""
    mask = seen[None, :, :, None]
    if channel.numel > DIM:
        mask = mask & (channel < DIM)
    return tl.load(values, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def add(gradient, share, grad, channel, DIM: tl.constexpr):
    """Add to the gradient of a corner."""
    mask = None if channel.numel == DIM else channel < DIM
    tl.atomic_add(gradient, share[None, :, :, None] * grad, mask=mask, sem="relaxed")


@triton.jit
def share_out(
    gradient, pitch, CELL: tl.constexpr, weight, grad, channel, DIM: tl.constexpr,
    right_share, lower_share, has_left, has_right, has_top, has_bottom,
):  # fmt: skip
    """Add to the gradients of the four corners of a point, by their shares."""
    lower = weight * lower_share
    upper = tl.where(has_top, weight - lower, 0.0)
    lower = tl.where(has_bottom, lower, 0.0)
    before = tl.where(has_left, 1 - right_share, 0.0)
    after = tl.where(has_right, right_share, 0.0)
    add(gradient, upper * before, grad, channel, DIM)
    add(gradient + CELL, upper * after, grad, channel, DIM)
    add(gradient + pitch, lower * before, grad, channel, DIM)
    add(gradient + pitch + CELL, lower * after, grad, channel, DIM)


@triton.jit
def load_gradient(output_grad, present, channel, DIM: tl.constexpr):
    """Channels of the output's gradient, zeros where there is no row."""
    mask = present[None, :, :, None] & (channel < DIM)
    return tl.load(output_grad[None, :, :, None] + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def dot(values, seen, grad, channel, DIM: tl.constexpr):
    """Product of a corner with the output's gradient, over the channels of a lane. [ROWS, LANES]"""
    return tl.sum(tl.sum(grad * read(values, seen, channel, DIM), axis=3), axis=0)


@triton.jit
def blend(a, b, share):
    """From a to b, by the share of b."""
    return a + share * (b - a)


@triton.jit
def look(
    values, pitch, CELL: tl.constexpr, grad, channel, DIM: tl.constexpr,
    right_share, lower_share, has_left, has_right, has_top, has_bottom,
):  # fmt: skip
    """A lane's part of the product of a bilinear mean with the output's gradient, and its slopes along x and y."""
    upper_left = dot(values, has_left & has_top, grad, channel, DIM)
    upper_right = dot(values + CELL, has_right & has_top, grad, channel, DIM)
    lower_left = dot(values + pitch, has_left & has_bottom, grad, channel, DIM)
    lower_right = dot(values + pitch + CELL, has_right & has_bottom, grad, channel, DIM)
    above = blend(upper_left, upper_right, right_share)
    y_slope = blend(lower_left, lower_right, right_share) - above
    x_slope = blend(upper_right - upper_left, lower_right - lower_left, lower_share)
    return above + lower_share * y_slope, x_slope, y_slope


@tuned([(8, 4), (16, 4), (8, 2), (16, 2)])
@triton.jit
def sum_points(
    values, levels, centres, offsets, scores, output,
    S, Q, HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    WIDE: tl.constexpr, PADDED: tl.constexpr, VECTOR: tl.constexpr, CHANNELS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """output[row] = sum over samples: softmax of the scores * (bilinear mean of the values of four cells)."""
    LANES: tl.constexpr = 1 if WIDE < CHANNELS else WIDE // CHANNELS
    ROWS: tl.constexpr = THREADS // LANES
    PARTS: tl.constexpr = WIDE // (LANES * VECTOR)
    SAMPLES: tl.constexpr = LEVELS * POINTS
    CELL: tl.constexpr = HEADS * DIM
    query, head, row, present = rows_of_program(Q, HEADS, ROWS, LANES)
    channel = channels_of_lanes(PARTS, LANES, VECTOR, False)
    values += (tl.program_id(1).to(tl.int64) * S * CELL + head * DIM)[None, :, :, None] + channel
    offsets += row * (2 * SAMPLES)
    scores += row * SAMPLES
    centre_x, centre_y = tl.load(centres + 2 * query), tl.load(centres + 2 * query + 1)
    _number, _power, highest, scale = softmax_of_rows(scores, SAMPLES, LANES, PADDED)
    total = tl.zeros((PARTS, ROWS, LANES, VECTOR), dtype=tl.float32)
    for level in range(LEVELS):
        height, width, start = level_of(levels, level)
        x_origin, y_origin = centre_x * width - 0.5, centre_y * height - 0.5
        for p in tl.static_range(POINTS):
            x = x_origin + tl.load(offsets + 2 * p).to(tl.float32)
            y = y_origin + tl.load(offsets + 2 * p + 1).to(tl.float32)
            weight = tl.exp2(tl.load(scores + p).to(tl.float32) * LOG2_E - highest)
            left, right_share, has_left, has_right, _ = along(x, width)
            top, lower_share, has_top, has_bottom, _ = along(y, height)
            corner = values + ((start + top * width + left).to(tl.int64) * CELL)[None, :, :, None]
            below = corner + width * CELL
            lower = weight * lower_share
            upper = weight - lower
            upper_right, lower_right = upper * right_share, lower * right_share
            total += (upper - upper_right)[None, :, :, None] * read(corner, has_left & has_top, channel, DIM)
            total += upper_right[None, :, :, None] * read(corner + CELL, has_right & has_top, channel, DIM)
            total += (lower - lower_right)[None, :, :, None] * read(below, has_left & has_bottom, channel, DIM)
            total += lower_right[None, :, :, None] * read(below + CELL, has_right & has_bottom, channel, DIM)
        offsets += 2 * POINTS
        scores += POINTS
    written = present[None, :, :, None] & (channel < DIM)
    tl.store(output + (row * DIM)[None, :, :, None] + channel, total * scale[None, :, :, None], mask=written)


@tuned([(8, 4), (8, 2), (8, 8)], reset_to_zero=["values_grad"])
@triton.jit
def sum_points_backward(
    values, levels, centres, offsets, scores, output_grad, values_grad, offsets_grad, scores_grad,
    S, Q, HEADS: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    WIDE: tl.constexpr, PADDED: tl.constexpr, MARGIN, SPREAD: tl.constexpr,
    CHANNELS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The three gradients, from the dot product of the output's gradient with the value of every corner.

    Devices that add four neighbours at once get a vector of them from each lane. Others add one number per lane, in
    rows whose lanes are neighbours: SPREAD.
    """
    EACH: tl.constexpr = CHANNELS // 2 if SPREAD else CHANNELS
    LANES: tl.constexpr = 1 if WIDE < EACH else WIDE // EACH
    ROWS: tl.constexpr = THREADS // LANES
    PARTS: tl.constexpr = WIDE // (LANES * 4)
    SAMPLES: tl.constexpr = LEVELS * POINTS
    CELL: tl.constexpr = HEADS * DIM
    query, head, row, present = rows_of_program(Q, HEADS, ROWS, LANES)
    channel = channels_of_lanes(PARTS, LANES, 4, False)
    added = channels_of_lanes(PARTS * 4 if SPREAD else PARTS, LANES, 1 if SPREAD else 4, SPREAD)
    first = (tl.program_id(1).to(tl.int64) * S * CELL + head * DIM)[None, :, :, None]
    values += first + channel
    values_grad += first + added + MARGIN * CELL
    output_grad += row * DIM
    grad = load_gradient(output_grad, present, channel, DIM)
    added_grad = load_gradient(output_grad, present, added, DIM)
    offsets, offsets_grad = offsets + row * (2 * SAMPLES), offsets_grad + row * (2 * SAMPLES)
    scores, scores_grad = scores + row * SAMPLES, scores_grad + row * SAMPLES
    centre_x, centre_y = tl.load(centres + 2 * query), tl.load(centres + 2 * query + 1)
    number, power, highest, scale = softmax_of_rows(scores, SAMPLES, LANES, PADDED)
    writes = present & (tl.arange(0, LANES)[None, :] == 0)
    weight_grads = power * 0.0  # rather than zeros: this way it lies in registers as the scores do
    for level in range(LEVELS):
        height, width, start = level_of(levels, level)
        x_origin, y_origin = centre_x * width - 0.5, centre_y * height - 0.5
        for p in tl.static_range(POINTS):
            x = x_origin + tl.load(offsets + 2 * p).to(tl.float32)
            y = y_origin + tl.load(offsets + 2 * p + 1).to(tl.float32)
            weight = tl.exp2(tl.load(scores + p).to(tl.float32) * LOG2_E - highest) * scale
            left, right_share, has_left, has_right, near_x = along(x, width)
            top, lower_share, has_top, has_bottom, near_y = along(y, height)
            corner = ((start + top * width + left).to(tl.int64) * CELL)[None, :, :, None]
            value, x_slope, y_slope = look(
                values + corner, width * CELL, CELL, grad, channel, DIM,
                right_share, lower_share, has_left, has_right, has_top, has_bottom,
            )  # fmt: skip
            share_out(
                values_grad + corner, width * CELL, CELL, weight, added_grad, added, DIM,
                right_share, lower_share, has_left, has_right, has_top, has_bottom,
            )  # fmt: skip
            # Three sums over the lanes, each of what is needed of all four dot products.
            x_grad = tl.sum(tl.where(near_x, x_slope, 0.0), axis=1)[:, None] * weight
            y_grad = tl.sum(tl.where(near_y, y_slope, 0.0), axis=1)[:, None] * weight
            weight_grad = tl.sum(value, axis=1)[:, None, None]
            tl.store(offsets_grad + 2 * p, x_grad, mask=writes)
            tl.store(offsets_grad + 2 * p + 1, y_grad, mask=writes)
            weight_grads = tl.where(number == level * POINTS + p, weight_grad, weight_grads)
        offsets += 2 * POINTS
        offsets_grad += 2 * POINTS
        scores += POINTS
    weights = power * scale[:, :, None]
    shared = tl.sum(tl.sum(weights * weight_grads, axis=2), axis=1)[:, None, None]
    written = present[:, :, None] & (number < SAMPLES)
    tl.store(scores_grad[:, :, None] + number, weights * (weight_grads - shared), mask=written)


class KernelSampling(torch.autograd.Function):
    """Starts the kernels."""

    @staticmethod
    def forward(
        ctx, values: Tensor, centres: Tensor, offsets: Tensor, scores: Tensor, level_sizes: list[tuple[int, int]]
    ) -> Tensor:
        inputs = [x.contiguous() for x in (values, centres.float(), offsets, scores)]
        levels = level_table(tuple(level_sizes), values.device)
        ctx.save_for_backward(*inputs, levels)
        ctx.margin = max(width for _, width in level_sizes) + 1
        output = values.new_empty(*scores.shape[:3], values.shape[3])
        launch(sum_points, *inputs, levels, output, VECTOR=16 // values.element_size())
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        values, centres, offsets, scores, levels = ctx.saved_tensors
        cells = values.flatten(0, 1)
        values_grad = cells.new_zeros(len(cells) + 3 * ctx.margin, *cells.shape[1:], dtype=torch.float32)
        grads = values_grad, torch.empty_like(offsets), torch.empty_like(scores)
        launch(
            sum_points_backward, values, centres, offsets, scores, levels, output_grad.contiguous(), *grads,
            MARGIN=ctx.margin, SPREAD=not adds_vectors(values.device),
        )  # fmt: skip
        values_grad = values_grad[ctx.margin : ctx.margin + len(cells)].view(values.shape)
        return values_grad.to(values.dtype), None, grads[1], grads[2], None


def sample_by_kernel(
    values: Tensor, level_sizes: list[tuple[int, int]], centres: Tensor, offsets: Tensor, scores: Tensor
) -> Tensor:
    """`deformable_sampling` on CUDA, for values in float32, bfloat16 and float16."""
    return KernelSampling.apply(values, centres, offsets, scores, level_sizes)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table that was first made for inference must serve training as well
def level_table(level_sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Height, width and first cell of each level, on the device: copied once per size, not once per call. [L, 3]"""
    starts = [sum(h * w for h, w in level_sizes[:i]) for i in range(len(level_sizes))]
    rows = [(*size, start) for size, start in zip(level_sizes, starts, strict=True)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@functools.cache
def adds_vectors(device: torch.device) -> bool:
    """True where one instruction adds four float32 atomically: compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel: triton.runtime.Autotuner, values: Tensor, centres: Tensor, offsets: Tensor, scores: Tensor, levels: Tensor,
    *rest: Tensor, **options: int,
) -> None:  # fmt: skip
    """Run a kernel on all rows of all images."""
    batch, queries, heads, num_levels, points = scores.shape
    if scores.numel() == 0:
        return
    dim = values.shape[3]
    wide = max(8, triton.next_power_of_2(dim))

    def grid(config: dict) -> tuple[int, int]:
        return triton.cdiv(queries * heads, rows_of(config, wide)), batch

    with torch.cuda.device_of(values):
        kernel[grid](
            values, levels, centres, offsets, scores, *rest, values.shape[1], queries,
            HEADS=heads, DIM=dim, LEVELS=num_levels, POINTS=points, WIDE=wide,
            PADDED=triton.next_power_of_2(num_levels * points), **options,
        )  # fmt: skip


def rows_of(config: dict[str, int], wide: int) -> int:
    """Rows of a program, as the kernels compute them from their configuration."""
    channels = config["CHANNELS"] // 2 if config.get("SPREAD") else config["CHANNELS"]
    return config["THREADS"] // max(1, wide // channels)
