"""Cost of sampling in deformable attention: ours against PyTorch's `grid_sample`, forward and with backward.

    python -m benchmarks.deformable_attention

One layer's sampling at 512 × 512, Swin-T's levels: 5376 positions, 8 heads, 3 levels, 4 points; 2 images on the CPU, 16
on CUDA. Softmax of the scores and locations of the points are part of both. The points lie as in a trained model:
within a few pixels of their position. The floor is what must move at least, every input and output once, at the copy
bandwidth measured here. Medians of seven, both in turn, equal first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.report import Table
from m2f_lab import ops
from m2f_lab.ops.deformable_sampling import SamplingPlan
from m2f_lab.structures import cell_centres

LEVEL_SIZES = [(16, 16), (32, 32), (64, 64)]
HEADS, DIM, POINTS = 8, 32, 4
REPEATS = 7
NOT_MEASURED = "not measured"
Sampling = Callable[[Tensor, SamplingPlan], Tensor]


def by_grid_sample(values: Tensor, points: SamplingPlan) -> Tensor:
    """The plain version."""
    with ops.plain("deformable_sampling"):
        return ops.deformable_sampling(values, points)


def inputs_of_a_layer(batch: int, level_sizes: list[tuple[int, int]], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Values, offsets and scores with gradients, centres, and a gradient of the output."""
    torch.manual_seed(0)
    centres = torch.cat([cell_centres(size, torch.device("cpu")) for size in level_sizes])
    offsets = 3 * torch.randn(batch, len(centres), HEADS, len(level_sizes), POINTS, 2)
    scores = torch.randn(offsets.shape[:-1])
    values, output_grad = torch.randn(2, batch, len(centres), HEADS, DIM).to(dtype)
    inputs = [x.to(device).requires_grad_() for x in (values, offsets, scores)]
    return [*inputs, centres.to(device), output_grad.to(device)]


def forward(sampling: Sampling, level_sizes: list, inputs: list[Tensor]) -> list[Tensor]:
    values, offsets, scores, centres, _ = inputs
    with torch.no_grad():
        return [sampling(values, SamplingPlan(level_sizes, centres, offsets, scores))]


def forward_and_backward(sampling: Sampling, level_sizes: list, inputs: list[Tensor]) -> list[Tensor]:
    values, offsets, scores, centres, output_grad = inputs
    output = sampling(values, SamplingPlan(level_sizes, centres, offsets, scores))
    return [output, *torch.autograd.grad(output, inputs[:3], output_grad.to(output.dtype))]


def seconds(function: Callable[[], object], device: str) -> float:
    """Time of one call, with what it started on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written."""
    source = torch.empty(2**26, device=device)  # 256 MB: more than caches hold
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(REPEATS)]
    return 2 * source.nbytes / statistics.median(times)


def assert_equal(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(ours, theirs, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        scale = b.float().std() + b.float().abs().mean()
        error = (a.float() - b.float()).square().mean().sqrt() / scale
        if error > tolerance:
            raise AssertionError(f"results differ by {error:.1e} of their size")


def compare(table: Table, device: str, batch: int, dtype: torch.dtype, level_sizes: list[tuple[int, int]]) -> None:
    """Two rows: forward, and forward with backward."""
    inputs = inputs_of_a_layer(batch, level_sizes, device, dtype)
    # In half precision grid_sample rounds where it reads, so that ours is held against grid_sample in float32.
    exact = [x.detach().float().requires_grad_() for x in inputs]
    bandwidth = copy_bandwidth(device)
    read = sum(x.nbytes for x in inputs[:4])
    # Backward reads the inputs and the output's gradient once more, and writes a gradient for every input.
    output = inputs[4].nbytes
    moved = {forward: read + output, forward_and_backward: 3 * read + 2 * output}
    for work, name in ((forward, "forward"), (forward_and_backward, "forward + backward")):
        assert_equal(
            work(ops.deformable_sampling, level_sizes, inputs), work(by_grid_sample, level_sizes, exact), dtype
        )
        times: dict[Sampling, list[float]] = {ops.deformable_sampling: [], by_grid_sample: []}
        for _ in range(REPEATS):
            for sampling, taken in times.items():
                taken.append(seconds(lambda s=sampling, w=work: w(s, level_sizes, inputs), device))
        ours, theirs = (1000 * statistics.median(taken) for taken in times.values())
        label = f"{device}, {batch} images, {str(dtype).removeprefix('torch.')}, {name}"
        floor = 1000 * moved[work] / bandwidth
        table.add(label, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}", f"{floor:.2f}", f"{floor / ours:.0%}")


def main() -> None:
    table = Table(
        "deformable_attention", ("sampling", "ours ms", "grid_sample ms", "ratio", "floor ms", "share of floor")
    )
    compare(table, "cpu", 2, torch.float32, LEVEL_SIZES)
    compare(table, "cpu", 2, torch.bfloat16, LEVEL_SIZES)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if torch.cuda.is_available():
            compare(table, "cuda", 16, dtype, LEVEL_SIZES)
        else:
            name = str(dtype).removeprefix("torch.")
            table.add(f"cuda, 16 images, {name}, forward + backward", *5 * [NOT_MEASURED])
    table.finish()


if __name__ == "__main__":
    main()
